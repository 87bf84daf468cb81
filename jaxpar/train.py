"""Train a Llama.

  python -m jaxpar.train --config=configs/tiny.py --workdir=runs/tiny [--config.train.steps=50]
  [--mesh.fsdp=4]

Writes config.json, metrics.jsonl and checkpoints/ under the workdir, and continues from the newest
checkpoint there. On SIGTERM or Ctrl-C it saves a checkpoint and stops.
"""

import contextlib
import dataclasses
import functools
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpar import cli, program, xla
from jaxpar.checkpoint import Checkpointer, Position, load_config, restore_state
from jaxpar.compile import (
    abstract_state,
    check_attention,
    check_host_memory,
    check_offload,
    compile_train_step,
)
from jaxpar.config import Config, MeshConfig
from jaxpar.data.batches import (
    batch_indices,
    batch_tokens,
    training_batches,
    validation_batches,
)
from jaxpar.data.corpus import Corpus, open_corpus
from jaxpar.estimate import counts, memory
from jaxpar.estimate.ranking import Pins
from jaxpar.estimate.remedy import out_of_memory
from jaxpar.metrics import Metrics, announced, write_config
from jaxpar.optimizer import schedule
from jaxpar.parallel.timetable import describe as describe_timetable
from jaxpar.parallel.timetable import timetable
from jaxpar.resume import Start, plan_start
from jaxpar.sharding import axes_across_hosts
from jaxpar.step import TrainState, init_state, make_eval_step
from jaxpar.watchdog import NonFinite, Watchdog


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


def describe(config: Config, mesh: Mesh, corpus: Corpus, kernel: str) -> str:
    """What is about to run, for the head of the log; `kernel` is what computes attention."""
    sizes = MeshConfig(*mesh.devices.shape)
    device = mesh.devices.flat[0]
    state = memory.state_bytes(config, sizes)
    processes = f"{jax.process_count()} process{'es' * (jax.process_count() > 1)}"
    padding = ""
    if not config.data.packing:
        padding = f"; {corpus.train.padding:.0%} of them are padding (data.packing=false)"
    lines = [
        f"devices   {mesh.size} x {device.device_kind}, {processes}; mesh {sizes}",
        f"model     {counts.parameter_count(config.model):,} parameters; a device holds "
        f"{_mebibytes(state['parameters'])} of parameters, {_mebibytes(state['optimizer'])} of "
        "optimizer state" + " in host memory" * config.memory.offload_optimizer,
        f"batch     {counts.describe_batch(config, sizes)}{padding}",
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


def describe_start(start: Start, config: Config) -> list[str]:
    """What a run continues or begins from, and what has changed since."""
    if start.before is None:
        return []
    steps = config.train.steps
    if start.step >= steps:
        return [
            f"{start.run} is at step {start.step} already; raise train.steps={steps} to continue"
        ]
    before, now = (
        float(np.asarray(schedule(c.optimizer, c.train.steps)(start.step)))
        for c in (start.before, config)
    )
    if math.isclose(before, now, rel_tol=1e-6):
        return [start.message]
    rates = f"learning rate of the next step {now:.3g} (without these changes {before:.3g})"
    return [start.message, rates]


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


def start_state(config: Config, found: Path | None) -> TrainState:
    """The state to begin with on the current mesh: fresh, or that of a checkpoint."""
    mesh = jax.sharding.get_mesh()
    if found is None:
        options = xla.options(config.compile, mesh.devices.flat, once=True)
        return jax.jit(lambda: init_state(config), compiler_options=options)()
    state = program.to_stages(restore_state(found, abstract_state(config, mesh)), config)
    scale = config.precision.loss_scale
    if bool(scale) == bool(load_config(found).precision.loss_scale):
        return state
    # The checkpoint has searched for none: the search begins, or there is nothing to scale.
    fresh, since = (
        jax.device_put(value, state.loss_scale.sharding)
        for value in (np.float32(scale or 1), np.int32(0))
    )
    return dataclasses.replace(state, loss_scale=fresh, since_scaled=since)


def train(config: Config, mesh: Mesh, corpus: Corpus, workdir: Path, start: Start) -> int:
    """Runs the training loop on the current mesh and returns the exit code.

    Dispatches step n, then reads the metrics of step n-1, so the device never waits for the host.
    """
    clock, sizes = time.perf_counter(), MeshConfig(*mesh.devices.shape)
    with announced("compiling the training step", progress=config.log.progress):
        train_step = compile_train_step(config, mesh)
    if config.memory.offload:
        check_offload(train_step, config, sizes)
    eval_step = jax.jit(
        make_eval_step(config), compiler_options=xla.options(config.compile, mesh.devices.flat)
    )
    state = start_state(config, start.checkpoint)
    checkpointer = Checkpointer(workdir, config, start.tokenizer)  # writes; nothing above does
    write_config(workdir, config, sizes)
    steps, batch_size = config.train.steps, config.train.batch_size
    # Of batches, counted from the begin of the data; not 0 where that or their size has changed.
    offset = start.samples // batch_size - start.step
    training = training_batches(
        config, mesh, corpus.train, start=start.step + offset, stop=steps + offset
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
            sizes,
            start_step=start.step,
            start_samples=start.samples,
            start_tokens=start.tokens,
            windows=len(corpus.train),
            began=clock,
        ) as metrics,
    ):
        for step, batch in enumerate(metrics.watch(training), start=start.step + 1):
            state, values = train_step(state, batch)
            tokens = batch_tokens(config, corpus.train, step - 1 + offset)
            watchdog.check(step - 1, metrics.step(step, values, tokens))
            if step == start.step + 1:
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
                    position = Position(step, (step + offset) * batch_size, metrics.tokens)
                    # What a checkpoint knows is the network; no copy is made.
                    state = program.to_network(state, config)
                    checkpointer.save(step, state, position=position, metrics=scores)
                    metrics.checkpoint(step, workdir / "checkpoints" / str(step))
                    state = program.to_stages(state, config)
            if signal_number:
                checkpointer.wait()
                metrics.line(
                    f"stopped by signal {signal_number} after step {step}, saved; the same command "
                    "continues"
                )
                return 128 + signal_number
    _summarise(corpus, eval_loss, workdir)
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


def _summarise(corpus: Corpus, eval_loss: float | None, workdir: Path) -> None:
    if jax.process_index():
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
    start = plan_start(workdir, config)
    data = dataclasses.replace(config.data, tokenizer=start.tokenizer)
    corpus = open_corpus(data, vocab_size=config.model.vocab_size, seed=config.train.seed)
    mesh = cli.start(request, config)
    check_host_memory(config, mesh)
    kernel = check_attention(config, mesh)
    if jax.process_index() == 0:
        lines = [describe(config, mesh, corpus, kernel), *describe_start(start, config)]
        print(*lines, sep="\n", flush=True)
    if start.step >= config.train.steps:
        return 0
    try:
        with jax.set_mesh(mesh):
            return train(config, mesh, corpus, workdir, start)
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
