"""What a run tells: `config.json`, `metrics.jsonl`, TensorBoard, and the lines or the bar on the
terminal.

The training loop dispatches step n and then reads the metrics of step n-1, so the device never
waits for the host:

    with Metrics(workdir, config, mesh, start_step=step) as metrics:
        for batch in metrics.watch(batches):
            state, values = train_step(state, batch)
            step += 1
            finished = metrics.step(step, values)           # waits for step - 1
            if evaluate_or_save_now:
                with metrics.untimed():                     # waits for step, stops the clock
                    metrics.evaluation(step, evaluate(state))
                    checkpointer.save(step, state, position=...)
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import jax
import numpy as np

from jaxpar import __version__
from jaxpar.config import AXES, Config, ConfigError, MeshConfig
from jaxpar.estimate import counts, hardware

if TYPE_CHECKING:
    from rich.progress import Progress
    from tensorboardX import SummaryWriter

Row = dict[str, float | int | None]
T = TypeVar("T")


def write_config(workdir: str | Path, config: Config, mesh: MeshConfig) -> None:
    """Writes `config.json`: the config's groups, `mesh`, `versions` and `devices`. Only process 0
    writes."""
    if jax.process_index():
        return
    devices = jax.devices()
    content = dataclasses.asdict(config) | {
        "mesh": dict(zip(AXES, mesh.shape, strict=True)),
        "versions": _versions(),
        "devices": {
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
    }
    Path(workdir).mkdir(parents=True, exist_ok=True)
    _replace(Path(workdir) / "config.json", json.dumps(content, indent=2) + "\n")


def _versions() -> dict[str, str]:
    packages = {
        "jax": "jax",
        "jaxlib": "jaxlib",
        "flax": "flax",
        "optax": "optax",
        "orbax": "orbax-checkpoint",
    }
    versions = {name: importlib.metadata.version(package) for name, package in packages.items()}
    return {"jaxpar": __version__, **versions, "python": platform.python_version()}


class Metrics:
    """Writes the rows of a run. Process 0 writes; the others only keep step.

    Throughput is measured between the ends of steps, over all steps since the last row. The first
    step of a run, which compiles, and everything inside `untimed` are left out.

    Args:
      workdir: receives `metrics.jsonl` and, with `log.tensorboard`, `tensorboard/`.
      config: the resolved config.
      mesh: all devices of the run; their number and kind give MFU.
      start_step: steps done before. Rows of later steps are dropped: they belong to an attempt that
        was lost.
      start_samples: sequences of this data seen before; not all need have come in batches of this
        size.
      start_tokens: tokens of this data seen before.
      windows: of the training data, which make an epoch; 0 where that is not known.
      began: when the run was started, on the clock of `time.perf_counter`; by default now.

    Raises:
      ConfigError: `log.tensorboard` without tensorboardX.
    """

    def __init__(
        self,
        workdir: str | Path,
        config: Config,
        mesh: MeshConfig,
        *,
        start_step: int = 0,
        start_samples: int = 0,
        start_tokens: int = 0,
        windows: int = 0,
        began: float | None = None,
    ):
        self._config = config
        self.tokens = start_tokens
        """Seen of this data, without padding, those of the step that is pending included."""
        self._batch_tokens = config.train.batch_size * config.data.sequence_length
        self._start_step, self._start_samples, self._windows = start_step, start_samples, windows
        self._token_flops = counts.step_flops(config).per_step / self._batch_tokens
        peak = hardware.peak_flops(jax.devices()[0].device_kind, config.precision.compute)
        self._peak = None if peak is None else peak * mesh.devices
        self._pending: tuple[int, Mapping[str, Any], int] | None = None
        self._clock = _Clock()
        self._file: TextIO | None = None
        self._tensorboard: SummaryWriter | None = None
        self._reporter: Reporter | None = None
        if jax.process_index():
            return
        self._file = _open_rows(Path(workdir) / "metrics.jsonl", start_step)
        if config.log.tensorboard:
            self._tensorboard = _tensorboard(Path(workdir) / "tensorboard", start_step)
        self._reporter = Reporter(
            config.train.steps, start_step=start_step, progress=config.log.progress, began=began
        )

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time it takes to get each is `data_wait_seconds`."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._clock.wait(time.perf_counter() - start)
            yield batch

    def step(
        self, step: int, values: Mapping[str, Any], tokens: int | None = None
    ) -> dict[str, Any] | None:
        """Takes the metrics of a step that was dispatched and reads those of the one before.

        Args:
          step: counted from 1.
          values: on device or not; every scalar becomes a field of the row, arrays and mappings do
            not. `loss`, `grad_norm`, `learning_rate` and `skipped` (updates skipped so far, not
            finite) are expected.
          tokens: of its batch, without padding; by default there is none.

        Returns:
          The values of the step before, on the host; None where nothing was pending.
        """
        finished = self.flush()
        for value in jax.tree.leaves(values):
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        tokens = self._batch_tokens if tokens is None else tokens
        self._pending = (step, values, tokens)
        self.tokens += tokens
        return finished

    def flush(self) -> dict[str, Any] | None:
        """Waits for the step that is pending and returns its values."""
        if self._pending is None:
            return None
        (step, values, tokens), self._pending = self._pending, None
        finished = jax.tree.map(np.asarray, jax.device_get(dict(values)))
        self._clock.tick(tokens)
        due = step % self._config.log.every == 0 or step == self._config.train.steps
        row = self._row(step, finished) if due else None
        if row is not None:
            self._write(step, row)
        if self._reporter:
            self._reporter.step(step, row)
        return finished

    def _row(self, step: int, values: Mapping[str, Any]) -> Row:
        seconds, waited, rate = self._clock.lap()
        samples = self._start_samples + (step - self._start_step) * self._config.train.batch_size
        return {
            **{
                name: value.item()
                for name, value in values.items()
                if isinstance(value, np.ndarray) and value.ndim == 0
            },
            "epoch": samples / self._windows if self._windows else None,
            "tokens": self.tokens,
            "tokens_per_second": rate,
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            "mfu": self._token_flops * rate / self._peak if rate and self._peak else None,
            "peak_bytes": _peak_bytes(),
        }

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Waits for the step that is pending and stops the clock: for evaluation and
        checkpoints."""
        self.flush()
        timing = self._clock.stop()
        try:
            yield
        finally:
            if timing:  # else the first step, which compiles, is still to come
                self._clock.start()

    def evaluation(self, step: int, loss: float | jax.Array) -> None:
        """Writes `eval_loss` (nats a token) and its perplexity."""
        loss = float(loss)
        perplexity = math.exp(loss) if loss < 700 else math.inf  # float64 overflows at 709
        self._write(step, {"eval_loss": loss, "eval_perplexity": perplexity})
        if self._reporter:
            self._reporter.line(
                f"step {step}/{self._config.train.steps}  eval_loss {loss:.4f}  ppl "
                f"{perplexity:,.2f}"
            )

    def checkpoint(self, step: int, path: Path) -> None:
        """Says that a checkpoint is saved, or on its way to the disk."""
        writing = "  (written in the background)" if self._config.checkpoint.async_ else ""
        self.line(f"step {step}/{self._config.train.steps}  checkpoint {path}{writing}")

    def line(self, text: str) -> None:
        """Prints a line, above the bar where there is one. Only process 0 prints."""
        if self._reporter:
            self._reporter.line(text)

    def close(self) -> None:
        """Writes what is pending and closes the files."""
        try:
            self.flush()
        finally:
            for part in (self._reporter, self._tensorboard, self._file):
                if part:
                    part.close()

    def _write(self, step: int, row: Row) -> None:
        if not self._file:
            return
        # JSON has no NaN and no infinity.
        row = {
            name: value if value is None or math.isfinite(value) else None
            for name, value in row.items()
        }
        row = {"step": step, "time": time.time(), **row}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard:
            for name, value in row.items():
                if value is not None and name not in ("step", "time"):
                    group = "eval" if name.startswith("eval_") else "train"
                    self._tensorboard.add_scalar(
                        f"{group}/{name.removeprefix('eval_')}", value, step
                    )
            self._tensorboard.flush()


@contextlib.contextmanager
def announced(what: str, *, progress: bool = True) -> Iterator[None]:
    """Says what takes its time, and in the end how long it took; on a terminal the seconds run
    unless `progress` is False. Only process 0 prints."""
    if jax.process_index():
        yield
        return
    begin, now = time.perf_counter(), time.strftime("%H:%M:%S")
    if progress and sys.stdout.isatty():
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, transient=True) as bar:
            bar.add_task(f"{what} ...", total=None)
            yield
    else:
        print(f"{now}  {what} ...", flush=True)
        yield
    now = time.strftime("%H:%M:%S")
    print(f"{now}  {what} took {time.perf_counter() - begin:.1f} s", flush=True)


class _Clock:
    """Seconds and steps since the last row. It runs from the end of the first step on."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._seconds, self._waited, self._steps, self._tokens = 0.0, 0.0, 0, 0

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> bool:
        """Whether it was running."""
        since, self._since = self._since, None
        return since is not None

    def wait(self, seconds: float) -> None:
        """The host has waited for data."""
        if self._since is not None:
            self._waited += seconds

    def tick(self, tokens: int) -> None:
        """A step over so many tokens has ended."""
        now = time.perf_counter()
        if self._since is not None:
            self._seconds += now - self._since
            self._steps += 1
            self._tokens += tokens
        self._since = now

    def lap(self) -> tuple[float | None, float | None, float | None]:
        """Mean seconds of a step and of the wait for its data, and tokens a second; None where no
        step was timed. Starts over."""
        steps, seconds, waited, tokens = self._steps, self._seconds, self._waited, self._tokens
        self._seconds, self._waited, self._steps, self._tokens = 0.0, 0.0, 0, 0
        if not steps or not seconds:
            return (None, None, None)
        return seconds / steps, waited / steps, tokens / seconds


class Reporter:
    """Tells a person how the run goes: a bar on a terminal, else a line for every row.

    Args:
      total: steps of the run.
      start_step: steps done before.
      progress: False gives lines on a terminal too.
      began: when the run was started, on the clock of `time.perf_counter`; by default now.
    """

    def __init__(
        self,
        total: int,
        *,
        start_step: int = 0,
        progress: bool = True,
        began: float | None = None,
    ):
        self._total, self._status = total, ""
        self._began = time.perf_counter() if began is None else began
        self._bar: Progress | None = None
        if progress and sys.stdout.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task(
                "training", total=total, completed=start_step, status="compiling"
            )
            self._bar.start()

    def step(self, step: int, row: Row | None) -> None:
        """A step has ended; `row` if it was one to write."""
        if row is not None:
            names = _SHORT if self._bar else _DESCRIPTIONS
            parts = _described(row, names)
            parts.append(f"elapsed {_duration(time.perf_counter() - self._began)}")
            if (seconds := row["step_seconds"]) is not None:
                parts.append(f"eta {_duration(seconds * (self._total - step))}")
            self._status = "  ".join(parts)
        if self._bar:
            self._bar.update(self._task, completed=step, status=self._status)
        elif row is not None:
            self.line(f"step {step}/{self._total}  {self._status}")

    def line(self, text: str) -> None:
        """Prints a line after the time of day, above the bar where there is one."""
        text = f"{time.strftime('%H:%M:%S')}  {text}"
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leaves the last state of the bar on the screen."""
        if self._bar:
            self._bar.stop()


_DESCRIPTIONS = {
    "loss": "loss {:.4f}",
    "grad_norm": "grad_norm {:.2f}",
    "learning_rate": "lr {:.1e}",
    "epoch": "epoch {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "mfu {:.1%}",
    "skipped": "skipped {}",
}
_SHORT = ("loss", "epoch", "tokens_per_second", "mfu", "skipped")


def _described(row: Row, names: Iterable[str]) -> list[str]:
    """A row for people, without what is unknown or did not happen."""
    known = [
        name for name in names if row.get(name) is not None and (row[name] or name != "skipped")
    ]
    return [_DESCRIPTIONS[name].format(row[name]) for name in known]


def _duration(seconds: float) -> str:
    """`1:23`, `2:01:23`, `3 d 2:01:23`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{days} d {clock}" if days else clock


def _bar() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        MofNCompleteColumn(),
        BarColumn(20),
        TextColumn("{task.fields[status]}"),
        refresh_per_second=4,
    )


def _open_rows(path: Path, start_step: int) -> TextIO:
    """Opens `metrics.jsonl` to append, without the rows after `start_step` and without a line cut
    short by a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        lines = path.read_text().splitlines()
        _replace(path, "".join(f"{line}\n" for line in lines if _row_step(line) <= start_step))
    return path.open("a")


def _row_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _tensorboard(directory: Path, start_step: int) -> SummaryWriter:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "log.tensorboard=True needs tensorboardX; pip install tensorboardX, or leave it False"
        ) from error
    return SummaryWriter(str(directory), purge_step=start_step + 1 if start_step else None)


def _peak_bytes() -> int | None:
    """The most memory that any device of this process has used, in bytes; None where it isn't
    counted, as on CPUs."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if stat and "peak_bytes_in_use" in stat]
    return max(peaks, default=None)
