"""Times reading token shards on one core: windows of a random order, with their masks, as the training loop gets them.

  python scripts/bench_data.py [--tokens=50000000] [--folder=DIR]

Makes eight shards of random ids (a document every 200 tokens) in a temporary folder, which the file cache then holds:
this is the cost of the code, not of the disk.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxpar.config import DataConfig
from jaxpar.data import batches, open_data

SHARDS, ROWS, SECONDS = 8, 128, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000, help="tokens of the corpus")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="sequence lengths")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        random, each = np.random.default_rng(0), options.tokens // SHARDS
        for n in range(SHARDS):
            ids = random.integers(0, 50_256, each).astype(np.uint16)
            ids[::200] = 50_256
            ids.tofile(Path(folder) / f"train_{n}.bin")
        rates = {length: rate(folder, length) for length in options.lengths}
    print(
        json.dumps(
            dict(
                date=datetime.date.today().isoformat(),
                machine=f"one core ({platform.machine()})",
                python=platform.python_version(),
                numpy=np.__version__,
                rows=ROWS,
                tokens_per_second=rates,
            )
        )
    )


def rate(folder: str, length: int) -> float:
    """Tokens a second, the median of seven runs of `SECONDS`/7 each."""
    config = DataConfig(source=folder, sequence_length=length, validation_fraction=0.0)
    windows = open_data(config, vocab_size=50_257, seed=0).train
    batch = iter(batches(windows, seed=0, batch_size=ROWS, prefetch=0))
    for _ in range(20):
        next(batch)
    rates = []
    for _ in range(7):
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < SECONDS / 7:
            next(batch)
            count += 1
        rates.append(count * ROWS * length / (time.perf_counter() - begin))
    return statistics.median(rates)


if __name__ == "__main__":
    main()
