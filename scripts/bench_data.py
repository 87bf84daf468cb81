"""Times reading token shards on one core: windows of a random order, with their masks, as the
training loop gets them; and how long the steps of a run wait for them, with a model so small that
it takes 100,000 tokens/s of two cores.

  python scripts/bench_data.py [--tokens=50000000]

Makes eight shards of random ids (a document every 200 tokens) in a temporary folder, which the file
cache then holds: this is the cost of the code, not of the disk.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arguments import ROOT, parser

if __name__ == "__main__":  # before jax is imported, which takes seconds
    flags = parser(__doc__)
    flags.add_argument("--tokens", type=int, default=50_000_000, help="tokens of the corpus")
    flags.add_argument(
        "--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="sequence lengths"
    )
    OPTIONS = flags.parse_args()

import numpy as np

from jaxpar.config import DataConfig
from jaxpar.data.batches import batches
from jaxpar.data.corpus import open_corpus

SHARDS, ROWS, SECONDS = 8, 128, 2.0


def main(options: argparse.Namespace) -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, options.tokens, vocabulary=50_256)
        rates = {length: rate(folder, length) for length in options.lengths}
        os.sched_setaffinity(0, cores)
        waits = run(f"{folder}/bytes", options.tokens // 10)
    print(
        json.dumps(
            dict(
                date=datetime.date.today().isoformat(),
                machine=f"one core ({platform.machine()})",
                python=platform.python_version(),
                numpy=np.__version__,
                rows=ROWS,
                tokens_per_second=rates,
                run_on_cores=len(cores),
                run=waits,
            )
        )
    )


def write_shards(folder: str, tokens: int, vocabulary: int) -> None:
    """Random ids below `vocabulary`, which itself ends a document."""
    random, each = np.random.default_rng(0), tokens // SHARDS
    for n in range(SHARDS):
        ids = random.integers(0, vocabulary, each).astype(np.uint16)
        ids[::200] = vocabulary
        ids.tofile(Path(folder) / f"train_{n}.bin")


def rate(folder: str, length: int) -> float:
    """Tokens a second, the median of seven runs of `SECONDS`/7 each."""
    config = DataConfig(source=folder, sequence_length=length, validation_fraction=0.0)
    windows = open_corpus(config, vocab_size=50_257, seed=0).train
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


def run(folder: str, tokens: int) -> list[dict[str, float]]:
    """Tokens a second of a run on shards, and the share of its time that steps waited for data; of
    10 steps each."""
    Path(folder).mkdir()
    write_shards(folder, tokens, vocabulary=256)
    model = dict(dim=32, layers=1, heads=2, kv_heads=2, ffn_dim=64)
    train = dict(batch_size=64, steps=60, eval_every=0)
    fields = dict(model=model, train=train, checkpoint=dict(every=0), log=dict(every=10))
    flags = [
        f"--config.{group}.{name}={value}"
        for group, values in fields.items()
        for name, value in values.items()
    ]
    flags += [f"--config.data.source={folder}", f"--workdir={folder}/run"]
    command = [sys.executable, "-m", "jaxpar.train", "--config=configs/tiny.py", *flags]
    subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    rows = map(json.loads, (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
    return [
        dict(
            tokens_per_second=row["tokens_per_second"],
            waited=row["data_wait_seconds"] / row["step_seconds"],
        )
        for row in rows
        if row.get("step_seconds")
    ]


if __name__ == "__main__":
    main(OPTIONS)
