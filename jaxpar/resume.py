"""Where a run begins: at nothing, where it stopped, or at another run; and what may differ then.

A field that differs from the checkpoint's is

    refused   where its parameters do not fit: the model, the optimizer
    refused   unless `checkpoint.allow_changes`, where numbers would mean something else: how
              parameters are read, and in a run that goes on its data and the shape of its curve
    told      where it decides what is learned
    passed    where it only decides how that is computed, saved or shown

Everything here happens before jax starts.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxpar.checkpoint import (
    carried_tokenizer,
    find_checkpoint,
    load_config,
    load_marks,
    load_position,
    of_workdir,
    run_of,
)
from jaxpar.config import Config, ConfigError, field_paths, value_of
from jaxpar.data.corpus import marks

_REINTERPRETED = (
    *("model.rope_theta", "model.norm_eps", "data.tokenizer", "precision.params"),
    *(path for path in field_paths() if path.startswith("model.rope_scaling.")),
)
"""Parameters saved under other values fit, and mean something else."""

_ORDER_OF_DATA = (
    *("data.source", "data.text_field", "data.shard_dtype", "data.sequence_length"),
    *("data.packing", "data.validation_fraction", "data.validation_source", "train.seed"),
)
"""What decides which windows the position in the data has passed."""

_HOW = ("memory.", "parallel.", "attention.", "loss.", "compile.", "checkpoint.", "log.")
_HOW_FIELDS = (
    *("data.prefetch", "model.init_std", "train.microbatches", "train.eval_every"),
    "train.max_nonfinite_steps",
)
"""How a run is computed, saved and shown: not what it learns."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins.

    `step`: updates done. `samples`, `tokens`: of this data, seen. `tokenizer`: where it lies.
    `run`: the one that is continued or begun from, whose config was `before`. `message`: what to
    tell.
    """

    tokenizer: str
    checkpoint: Path | None = None
    step: int = 0
    samples: int = 0
    tokens: int = 0
    before: Config | None = None
    run: Path | None = None
    message: str = ""


@dataclasses.dataclass(frozen=True)
class _Change:
    """A field that differs, or what it stands for; `note` says what the values do not."""

    path: str
    before: Any
    now: Any
    note: str = ""

    def told(self) -> str:
        values = "" if self.before == self.now else f" {self.before} -> {self.now}"
        return f"{self.path}{values}{self.note}"

    def refused(self) -> str:
        return f"{self.path}: checkpoint {self.before}, config {self.now}{self.note}"


def plan_start(workdir: Path, config: Config) -> Start:
    """Where a run in `workdir` begins.

    Raises:
      ConfigError: what differs is refused, the batch size does not divide the position in the data,
        or `find_checkpoint` refuses.
    """
    checkpoint = find_checkpoint(workdir, config)
    if checkpoint is None:
        return Start(tokenizer=config.data.tokenizer)
    before, position = load_config(checkpoint), load_position(checkpoint)
    tokenizer, gone = config.data.tokenizer, ""
    copy = carried_tokenizer(checkpoint)
    if copy and tokenizer == before.data.tokenizer and not Path(tokenizer).expanduser().exists():
        tokenizer, gone = str(copy), f"; {tokenizer} is gone, its copy in the checkpoint is used"
    current = marks(dataclasses.replace(config.data, tokenizer=tokenizer))
    changes, moved = _changes(before, config, load_marks(checkpoint), current)
    own, step = of_workdir(checkpoint, workdir), position.step
    if copy and "data.tokenizer" in changes:
        own_copy = f" (the checkpoint's own is {copy})"
        changes["data.tokenizer"] = dataclasses.replace(changes["data.tokenizer"], note=own_copy)
    _refuse(checkpoint, workdir, config, changes, _broken(before, config, step) if own else set())
    other_data = [path for path in changes if path in _ORDER_OF_DATA]
    samples = 0 if other_data else position.samples
    check_batch_size(samples, config.train.batch_size)
    told = [*(change.told() for change in changes.values()), *moved]
    return Start(
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        step=step,
        samples=samples,
        tokens=0 if other_data else position.tokens or samples * config.data.sequence_length,
        before=before,
        run=run_of(checkpoint),
        message=f"{'continuing' if own else 'starting'} from step {step} of {run_of(checkpoint)}"
        + (f"; changed since: {', '.join(told)}" if told else "")
        + ("; the data is other than it was, so it begins at its start" if other_data else "")
        + gone,
    )


def check_batch_size(samples: int, batch_size: int) -> None:
    """Refuses a batch size that does not divide the `samples` that a run has seen."""
    if samples % batch_size:
        legal = [size for size in range(1, 4 * batch_size) if samples % size == 0]
        near = sorted(sorted(legal, key=lambda size: abs(size - batch_size))[:4])
        raise ConfigError(
            f"train.batch_size={batch_size} does not divide the {samples} samples that the "
            f"checkpoint has seen; use one of {', '.join(map(str, near))}"
        )


def _changes(
    before: Config, now: Config, saved: dict[str, str | None], current: dict[str, str | None]
) -> tuple[dict[str, _Change], list[str]]:
    """The fields that differ and matter, by name; and what is said of files that only moved.
    `saved`, `current`: the marks of both."""
    changes, moved = {}, []
    for path in field_paths():
        values, mark = (value_of(before, path), value_of(now, path)), saved.get(path)
        if path.startswith(_HOW) or path in _HOW_FIELDS:
            continue
        if mark is None or current.get(path) is None:  # goes by its name, or an older checkpoint
            if values[0] != values[1]:
                changes[path] = _Change(path, *values)
        elif mark == current[path]:
            if values[0] != values[1] and path != "data.shard_dtype":
                moved.append(f"{path} {values[0]} -> {values[1]} (the same content)")
        elif path == "data.shard_dtype":
            note = f" (ids were read as {mark}, and would be as {current[path]})"
            changes[path] = _Change(path, *values, note)
        else:
            same = " (rewritten since: its content is another)" if values[0] == values[1] else ""
            changes[path] = _Change(path, *values, same)
    return changes, moved


def _broken(before: Config, now: Config, step: int) -> set[str]:
    """Fields that would give a run that goes on another curve than that of its first steps, if they
    have changed: its batch, and what of its learning rates is behind it or under way.

    A longer `train.steps` is the way to train on, and is told; the rate rises again then, if it was
    falling. What only scales the rates is told too.
    """
    o, length = now.optimizer, min(before.train.steps, now.train.steps)
    falling = {
        "constant": False,
        "wsd": step > length * (1 - max(before.optimizer.decay_fraction, o.decay_fraction)),
    }.get(o.schedule, True)
    warming = step < max(before.optimizer.warmup_steps, o.warmup_steps)
    broken = {"train.batch_size", "optimizer.schedule"}
    if warming or o.schedule in ("cosine", "linear"):
        broken.add("optimizer.warmup_steps")
    if falling and o.schedule == "wsd":
        broken.add("optimizer.decay_fraction")
    if now.train.steps < step or (falling and now.train.steps < before.train.steps):
        broken.add("train.steps")
    return broken


def _refuse(
    found: Path, workdir: Path, config: Config, changes: dict[str, _Change], broken: set[str]
) -> None:
    """Raises ConfigError for what of the changes is refused. `broken`: what breaks the curve; empty
    where a new run begins."""

    def listed(refused: Callable[[str], bool]) -> str:
        lines = [change.refused() for path, change in changes.items() if refused(path)]
        return "".join(f"\n  {line}" for line in lines)

    def fits(path: str) -> bool:
        return path in _REINTERPRETED or not path.startswith(("model.", "optimizer.name"))

    if not all(map(fits, changes)):
        fixed = listed(lambda path: path in _REINTERPRETED or not fits(path))
        raise ConfigError(
            f"{found} belongs to another run:{fixed}\nuse another --workdir, or the same fields"
        )
    if config.checkpoint.allow_changes:
        return
    allow = "or go on all the same with --config.checkpoint.allow_changes=true"
    if meant := listed(lambda path: path in _REINTERPRETED):
        raise ConfigError(
            f"the parameters of {found} would mean something else:{meant}\n"
            f"use the same fields, or {allow}"
        )
    if broken and (other := listed(lambda path: path in broken or path in _ORDER_OF_DATA)):
        raise ConfigError(
            f"{found} is in the middle of another curve:{other}\nuse the same fields, or begin a "
            f"new run with these weights, in another --workdir with "
            f"--config.checkpoint.restore={workdir}; {allow}"
        )
