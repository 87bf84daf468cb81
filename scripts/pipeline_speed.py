"""Times the schedules of a pipeline side by side on simulated devices: `1f1b` against `gpipe` with
the same remat.

  python scripts/pipeline_speed.py [--stages=4] [--microbatches=8] [--repeats=7]
  [--remat=full]

Steps of the two take turns, so that what else the machine does hits both alike; medians are printed
as JSON. Simulated devices share the machine's cores: this compares the work that the schedules do
and not how well stages overlap.
"""

import argparse
import json
import statistics
import time

from arguments import parser

if __name__ == "__main__":  # before jax is imported, which takes seconds
    flags = parser(__doc__)
    for name, default in (("stages", 4), ("microbatches", 8), ("repeats", 7)):
        flags.add_argument(f"--{name}", type=int, default=default)
    flags.add_argument("--remat", default="full")
    OPTIONS = flags.parse_args()

import jax

from jaxpar import xla
from jaxpar.config import MeshConfig, configure
from jaxpar.data.batches import load_batch, place
from jaxpar.data.corpus import open_corpus
from jaxpar.parallel.timetable import describe, timetable
from jaxpar.sharding import make_mesh
from jaxpar.step import init_state, make_train_step
from jaxpar.validation import resolve, validate_mesh


def make_run(options: argparse.Namespace, schedule: str):
    """A function that takes one training step, compiled and warm, and waits for it."""
    config = resolve(
        configure(
            model=dict(vocab_size=4096, dim=256, layers=8, heads=8, kv_heads=4, ffn_dim=704),
            data=dict(source="synthetic", sequence_length=128),
            train=dict(batch_size=2 * options.microbatches, microbatches=options.microbatches),
            precision=dict(compute="float32"),
            memory=dict(remat=options.remat),
            parallel=dict(schedule=schedule),
        )
    )
    sizes = MeshConfig(pipeline=options.stages)
    validate_mesh(config, sizes)
    mesh = make_mesh(sizes, jax.devices())
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(config))()
        step = jax.jit(make_train_step(config), donate_argnums=0)
        corpus = open_corpus(config.data, vocab_size=config.model.vocab_size, seed=0)
        placed = place(load_batch(config, corpus.train), config, mesh)

    def run() -> tuple[float, float]:
        nonlocal state
        with jax.set_mesh(mesh):
            begin = time.perf_counter()
            state, metrics = step(state, placed)
            loss = float(metrics["loss"])
        return time.perf_counter() - begin, loss

    run()
    return run


def main(options: argparse.Namespace) -> None:
    xla.simulate_devices(options.stages)
    runs = {schedule: make_run(options, schedule) for schedule in ("1f1b", "gpipe")}
    seconds: dict[str, list[float]] = {schedule: [] for schedule in runs}
    for _ in range(options.repeats):
        for schedule, run in runs.items():
            seconds[schedule].append(run()[0])
    losses = {schedule: run()[1] for schedule, run in runs.items()}
    medians = {schedule: statistics.median(found) for schedule, found in seconds.items()}
    print(describe(timetable("1f1b", options.stages, options.microbatches)))
    print(
        json.dumps(
            dict(
                vars(options),
                median_seconds=medians,
                ratio=medians["1f1b"] / medians["gpipe"],
                loss=losses,
            )
        )
    )


if __name__ == "__main__":
    main(OPTIONS)
