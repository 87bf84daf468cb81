"""Train a Llama.

  python -m jaxpar.train --config=configs/tiny.py --workdir=runs/tiny [--config.train.steps=50]
  [--mesh.fsdp=4]

Writes config.json, metrics.jsonl and checkpoints/ under the workdir, and continues from the newest
checkpoint there. On SIGTERM or Ctrl-C it saves a checkpoint and stops.
"""

import contextlib
import functools
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpar import cli, program, xla
from jaxpar.checkpoint import Checkpointer, check_resume, find_checkpoint, other_data, restore_run
from jaxpar.compile import (
    abstract_state,
    check_attention,
    check_host_memory,
    check_offload,
    compile_train_step,
)
from jaxpar.config import Config, ConfigError, MeshConfig
from jaxpar.data.batches import batch_indices, training_batches, validation_batches
from jaxpar.data.corpus import Corpus, open_corpus
from jaxpar.estimate import counts, memory
from jaxpar.estimate.ranking import Pins
from jaxpar.estimate.remedy import out_of_memory
from jaxpar.metrics import Metrics, write_config
from jaxpar.parallel.timetable import describe as describe_timetable
from jaxpar.parallel.timetable import timetable
from jaxpar.sharding import axes_across_hosts
from jaxpar.step import TrainState, init_state, make_eval_step


class NonFinite(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


class StopSignal:
    """Notes SIGTERM and the first Ctrl-C, so that the loop can save and stop; a second Ctrl-C
    interrupts at once."""

    number: int | None = None

    def __enter__(self) -> "StopSignal":
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Watchdog:
    """Counts skipped updates in a row.

    Args:
      limit: how many in a row raise `NonFinite`.
      skipped: how many the run has skipped before.
      windows: the window indices of the batch of a step, for the report.
    """

    def __init__(self, limit: int, skipped: int, windows: Callable[[int], list[int]]):
        self._limit, self._skipped, self._windows, self._in_a_row = limit, skipped, windows, 0

    def check(self, step: int, metrics: Mapping[str, Any] | None) -> None:
        """Takes the metrics of a finished step, on the host; None where there is none."""
        if metrics is None:
            return
        skipped = int(metrics["skipped"])
        searching = (
            metrics.get("loss_scale", 1) > 1
        )  # an overflow only says that the loss scale was too large
        self._in_a_row = self._in_a_row + 1 if skipped > self._skipped and not searching else 0
        self._skipped = skipped
        if self._in_a_row >= self._limit:
            raise NonFinite(_non_finite_report(step, self._in_a_row, metrics, self._windows(step)))


def _non_finite_report(
    step: int, in_a_row: int, metrics: Mapping[str, Any], batch: list[int]
) -> str:
    by_layer = {
        name if norms.ndim == 0 else f"{name}[{layer}]": float(norm)
        for name, norms in metrics["gradient_norms"].items()
        for layer, norm in enumerate(np.atleast_1d(norms))
    }
    largest = sorted(
        by_layer.items(), key=lambda item: -math.inf if math.isnan(item[1]) else -item[1]
    )[:8]
    bad = sum(not math.isfinite(norm) for norm in by_layer.values())
    return "\n".join(
        [
            f"step {step}: loss {float(metrics['loss'])}, gradient norm "
            f"{float(metrics['grad_norm'])}; the "
            f"last {in_a_row} updates were not finite and were skipped (train.max_nonfinite_steps)",
            f"windows of the training data in its batch: {', '.join(map(str, batch))}",
            f"largest gradients ({bad} of {len(by_layer)} not finite):",
            *(f"  {name}: {norm:.4g}" for name, norm in largest),
            "try a lower optimizer.learning_rate, a longer optimizer.warmup_steps, or "
            "precision.compute=float32",
        ]
    )


def describe(config: Config, mesh: Mesh, corpus: Corpus, kernel: str) -> str:
    """What is about to run, for the head of the log; `kernel` is what computes attention."""
    sizes = MeshConfig(*mesh.devices.shape)
    device = mesh.devices.flat[0]
    state = memory.state_bytes(config, sizes)
    processes = f"{jax.process_count()} process{'es' * (jax.process_count() > 1)}"
    lines = [
        f"devices   {mesh.size} x {device.device_kind}, {processes}; mesh {sizes}",
        f"model     {counts.parameter_count(config.model):,} parameters; a device holds "
        f"{_mebibytes(state['parameters'])} of parameters, {_mebibytes(state['optimizer'])} of "
        "optimizer state" + " in host memory" * config.memory.offload_optimizer,
        f"batch     {counts.describe_batch(config, sizes)}",
        f"data      {corpus}",
        f"attention {kernel}",
    ]
    if sizes.pipeline > 1:
        parallel = config.parallel
        table = timetable(
            parallel.schedule, sizes.pipeline, config.train.microbatches, parallel.chunks
        )
        lines.insert(3, f"pipeline  {parallel.schedule}, {describe_timetable(table)}")
    if corpus.unigram_entropy is not None:
        lines.append(
            f"baseline  unigram entropy {corpus.unigram_entropy:.4f} nats a token: a loss that "
            "knows no context"
        )
    if "tensor" in (crossing := axes_across_hosts(mesh.devices)):
        lines.append(
            f"warning   mesh.tensor={sizes.tensor} spans hosts of {jax.local_device_count()} "
            "devices, so its traffic "
            f"takes the slow links (as that of {', '.join(crossing)} does)"
        )
    return "\n".join(lines)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def evaluate(
    config: Config, mesh: Mesh, eval_step: Any, model: Any, corpus: Corpus, stop: StopSignal
) -> float | None:
    """Mean cross-entropy of the validation split in nats a token; None if a signal came in
    between."""
    assert corpus.validation is not None
    sums = []
    for batch in validation_batches(config, mesh, corpus.validation):
        sums.append(eval_step(model, batch))
        if stop.number and jax.process_count() == 1:
            return None
    losses, tokens = zip(*jax.device_get(sums), strict=True)
    return float(np.sum(losses, dtype=np.float64) / max(np.sum(tokens), 1))


def start_state(config: Config, found: Path | None) -> tuple[TrainState, int]:
    """The state to begin with, from a checkpoint or fresh, and the number of samples of this data
    it has seen."""
    if found is None:
        options = xla.options(config.compile, jax.sharding.get_mesh().devices.flat, once=True)
        return jax.jit(lambda: init_state(config), compiler_options=options)(), 0
    state, position = restore_run(found, abstract_state(config, jax.sharding.get_mesh()))
    state = program.to_stages(state, config)
    if differences := other_data(found, config):  # of another run: `check_resume` has seen to that
        if jax.process_index() == 0:
            print(
                f"{found} has seen other data, so this one begins at its start "
                f"({'; '.join(differences)})",
                flush=True,
            )
        return state, 0
    return state, int(position["samples"])


def first_batch(samples: int, batch_size: int) -> int:
    """Number of the batch that begins at sample `samples`.

    Raises:
      ConfigError: the batch size changed to one that does not divide the position.
    """
    if samples % batch_size:
        legal = [size for size in range(1, 4 * batch_size) if samples % size == 0]
        near = sorted(sorted(legal, key=lambda size: abs(size - batch_size))[:4])
        raise ConfigError(
            f"train.batch_size={batch_size} does not divide the {samples} samples that the "
            "checkpoint has seen; use "
            f"one of {', '.join(map(str, near))}"
        )
    return samples // batch_size


def train(config: Config, mesh: Mesh, corpus: Corpus, workdir: Path) -> int:
    """Runs the training loop on the current mesh and returns the exit code.

    Dispatches step n, then reads the metrics of step n-1, so the device never waits for the host.
    """
    clock = time.perf_counter()
    train_step = compile_train_step(config, mesh)
    if config.memory.offload:
        check_offload(train_step, config, MeshConfig(*mesh.devices.shape))
    eval_step = jax.jit(
        make_eval_step(config), compiler_options=xla.options(config.compile, mesh.devices.flat)
    )
    state, samples = start_state(config, find_checkpoint(workdir, config))
    batch_size, start, steps = config.train.batch_size, int(state.step), config.train.steps
    offset = first_batch(samples, batch_size) - start  # not 0 only where the batch size has changed
    checkpointer = Checkpointer(workdir, config)  # writes; nothing above does
    write_config(workdir, config, MeshConfig(*mesh.devices.shape))
    training = training_batches(
        config, mesh, corpus.train, start=start + offset, stop=max(steps, start) + offset
    )
    windows = functools.partial(
        batch_indices, corpus.train, seed=config.train.seed, batch_size=batch_size
    )
    watchdog = Watchdog(
        config.train.max_nonfinite_steps,
        int(state.skipped),
        lambda step: windows(step=step - 1 + offset),
    )
    best, eval_loss = math.inf, None
    with (
        StopSignal() as stop,
        contextlib.closing(checkpointer),
        Metrics(
            workdir,
            config,
            MeshConfig(*mesh.devices.shape),
            start_step=start,
            start_samples=samples,
        ) as metrics,
    ):
        for step, batch in enumerate(metrics.watch(training), start=start + 1):
            state, values = train_step(state, batch)
            watchdog.check(step - 1, metrics.step(step, values))
            if step == start + 1:
                watchdog.check(step, metrics.flush())
                metrics.line(
                    f"first step after {time.perf_counter() - clock:.1f} s, compilation included"
                )
            signal_number = _agree(stop, step, config)
            evaluating = corpus.validation is not None and (
                step == steps or _due(step, config.train.eval_every)
            )
            saving = step == steps or _due(step, config.checkpoint.every) or bool(signal_number)
            if not (evaluating or saving):
                continue
            watchdog.check(step, metrics.flush())
            with metrics.untimed():
                scores = None
                if evaluating and not signal_number:
                    eval_loss = evaluate(config, mesh, eval_step, state.model, corpus, stop)
                    if eval_loss is None:
                        signal_number, saving = stop.number, True
                    else:
                        metrics.evaluation(step, eval_loss)
                        scores = {"eval_loss": eval_loss}
                        saving |= config.checkpoint.keep_best > 0 and eval_loss < best
                        best = min(best, eval_loss)
                if saving:
                    state = program.to_network(
                        state, config
                    )  # what a checkpoint knows; no copy is made
                    checkpointer.save(
                        step, state, data={"samples": (step + offset) * batch_size}, metrics=scores
                    )
                    state = program.to_stages(state, config)
            if signal_number:
                checkpointer.wait()
                metrics.line(
                    f"stopped by signal {signal_number} after step {step}, saved; the same command "
                    "continues"
                )
                return 128 + signal_number
    _summarise(corpus, start, steps, eval_loss, workdir)
    return 0


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _agree(stop: StopSignal, step: int, config: Config) -> int | None:
    """The signal to stop for, agreed among processes: they must leave the loop at the same step."""
    if jax.process_count() == 1:
        return stop.number
    if not _due(step, config.log.every):
        return None
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(stop.number or 0)))) or None


def _summarise(
    corpus: Corpus, start: int, steps: int, eval_loss: float | None, workdir: Path
) -> None:
    if jax.process_index():
        return
    if start >= steps:
        print(f"{workdir} is at step {start} already; raise train.steps={steps} to continue")
        return
    if eval_loss is not None:
        print(
            f"final validation loss {eval_loss:.4f} nats a token, perplexity "
            f"{math.exp(min(eval_loss, 700)):,.2f}"
        )
        if corpus.unigram_entropy is not None:
            print(
                f"unigram entropy       {corpus.unigram_entropy:.4f} nats a token, of the training "
                "text"
            )
    print(f"checkpoint, metrics.jsonl and config.json are in {workdir}")


def main(argv: list[str] | None = None) -> int:
    request = cli.parse(argv, __doc__ or "")
    config, workdir = request.config, request.workdir
    cli.check_writable(workdir)
    check_resume(workdir, config)
    corpus = open_corpus(config.data, vocab_size=config.model.vocab_size, seed=config.train.seed)
    mesh = cli.start(request, config)
    check_host_memory(config, mesh)
    kernel = check_attention(config, mesh)
    if jax.process_index() == 0:
        print(describe(config, mesh, corpus, kernel), flush=True)
    try:
        with jax.set_mesh(mesh):
            return train(config, mesh, corpus, workdir)
    except NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        arguments = cli.joined(sys.argv[1:] if argv is None else argv)
        sizes, pins = MeshConfig(*mesh.devices.shape), Pins(request.mesh, request.named)
        answer = out_of_memory(config, sizes, mesh.local_devices[0], arguments, pins)
        print(f"error: {answer}\n{str(error).splitlines()[0]}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    cli.run(main)
