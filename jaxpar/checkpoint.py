"""Checkpoints: asynchronous, complete or not there, and restored onto any mesh.

A checkpoint is a directory `WORKDIR/checkpoints/STEP` that Orbax renames into place when its last
byte is written:

    state/      one zarr array a leaf, by dotted name (`model.layers.attention.query`), any mesh
    data/       JSON: the position in the data
    corpus/     JSON: marks of the files of the data, by which they are known again elsewhere
    tokenizer/  the file of the tokenizer, where it is one
    config/     JSON: the resolved config of the run
    metrics/    JSON: the evaluation, where the best checkpoints are kept

Finding and judging checkpoints needs no jax, so that a wrong request fails before jax starts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpar.config import Config, ConfigError, configure
from jaxpar.data.corpus import marks
from jaxpar.data.tokenizer import FILES, tokenizer_file
from jaxpar.validation import resolve

if TYPE_CHECKING:
    import jax
    import orbax.checkpoint as ocp

# Written by Orbax as a checkpoint completes; a copy or a deletion that was cut short lacks some of
# them.
_PARTS = ("_CHECKPOINT_METADATA", "state/_METADATA", "data/metadata", "config/metadata")


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a run has come: updates done, and samples and tokens seen of its data. `tokens` is
    None where an older checkpoint does not tell."""

    step: int
    samples: int
    tokens: int | None


# Before jax starts.


def complete_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in a `checkpoints` directory, ascending; [] where there is
    none."""
    return [step for step in _steps(directory) if _is_complete(directory / str(step))]


def find_checkpoint(workdir: str | Path, config: Config) -> Path | None:
    """The checkpoint a run starts from: the workdir's newest, else the newest of the run
    `checkpoint.restore` names.

    Returns:
      Its directory, or None for a fresh start.

    Raises:
      ConfigError: `checkpoint.restore=none` in a workdir with checkpoints, or a path from which
        those did not begin; a path without any, or one whose newest checkpoint is incomplete.
    """
    own, restore = Path(workdir) / "checkpoints", config.checkpoint.restore
    steps = _steps(own)
    if restore == "none" and steps:
        raise ConfigError(
            f"{own} holds checkpoints of steps {_listed(steps)} and checkpoint.restore=none; "
            "use another --workdir, or --config.checkpoint.restore=auto to continue from the newest"
        )
    if not steps:
        return None if restore in ("auto", "none") else locate(restore)
    newest = _newest(own)
    if restore != "auto" and not _begun_from(newest, restore):
        raise ConfigError(
            f"{own} holds checkpoints of steps {_listed(steps)}, which did not begin from "
            f"checkpoint.restore={restore}; use another --workdir to begin from it, or "
            f"--config.checkpoint.restore=auto to continue from step {steps[-1]}"
        )
    return newest


def _begun_from(newest: Path, restore: str) -> bool:
    """Whether the run of a checkpoint began from `restore`, so that a restart continues it, or
    `restore` is that very checkpoint."""
    before = load_config(newest).checkpoint.restore
    if Path(before).resolve() == Path(restore).resolve():
        return True
    return locate(restore).resolve() == newest.resolve()


def locate(path: str | Path) -> Path:
    """The checkpoint that a path means: a workdir, its `checkpoints`, or one `STEP` in it.

    Raises:
      ConfigError: the path holds no complete checkpoint.
    """
    path = Path(path)
    if _is_complete(path):
        return path
    return _newest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)


def of_workdir(checkpoint: Path, workdir: str | Path) -> bool:
    """Whether `find_checkpoint` found a checkpoint in the workdir itself, whose run goes on."""
    return checkpoint.parent == Path(workdir) / "checkpoints"


def run_of(checkpoint: Path) -> Path:
    """The workdir of the run of a checkpoint, or the checkpoint where it lies alone."""
    folder = checkpoint.parent
    return folder.parent if folder.name == "checkpoints" else checkpoint


def load_config(directory: Path) -> Config:
    """The config that is stored in one checkpoint; a field younger than the checkpoint has its
    default."""
    try:
        return resolve(configure(**_read_json(directory, "config")))
    except ConfigError as error:
        raise ConfigError(f"{directory / 'config'}: {error}") from error


def load_position(directory: Path) -> Position:
    """How far the run of a checkpoint had come."""
    saved = _read_json(directory, "data")
    step = saved["step"] if "step" in saved else int(directory.name)
    return Position(step, saved["samples"], saved.get("tokens"))


def load_marks(directory: Path) -> dict[str, str | None]:
    """The `corpus.marks` that are stored in one checkpoint; {} in an older one."""
    return _read_json(directory, "corpus") if (directory / "corpus").is_dir() else {}


def carried_tokenizer(directory: Path) -> Path | None:
    """The file of the tokenizer in one checkpoint; None for one that goes by its name, and in an
    older checkpoint."""
    files = (directory / "tokenizer" / name for name in FILES)
    return next((file for file in files if file.is_file()), None)


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal())


def _is_complete(directory: Path) -> bool:
    return all((directory / part).is_file() for part in _PARTS)


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def _newest(directory: Path) -> Path:
    steps, complete = _steps(directory), complete_steps(directory)
    if not steps:
        raise ConfigError(f"{directory} holds no checkpoints")
    newest = directory / str(steps[-1])
    if not _is_complete(newest):
        rest = f"delete it to use {complete[-1]}" if complete else "use another path"
        raise ConfigError(f"{newest} is incomplete; complete steps: {_listed(complete)}; {rest}")
    return newest


def _read_json(directory: Path, item: str) -> dict[str, Any]:
    path = directory / item / "metadata"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(directory, error, f"{path}: ") from error


def _first_line(reason: object) -> str:
    """TensorStore explains a damaged array on 30 lines, of which the first says it."""
    return (str(reason).strip() or repr(reason)).splitlines()[0]


_NOT_DAMAGED = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
"""Kinds of errors of TensorStore, which raises one exception for all."""


def _unreadable(directory: Path, error: Exception, where: str = "") -> ConfigError:
    """What to raise for an error of reading. Only files that are damaged or lost call for deleting
    the checkpoint."""
    lost = isinstance(error, FileNotFoundError | NotADirectoryError)
    if (isinstance(error, OSError) and not lost) or any(k in str(error) for k in _NOT_DAMAGED):
        return ConfigError(f"{directory} can't be read: {where}{_first_line(error)}")
    steps = _listed(complete_steps(directory.parent))
    return ConfigError(
        f"cannot restore {directory}: {where}{_first_line(error)}; complete steps: {steps}; delete "
        "this one to use the one before"
    )


# Saving and restoring.


class Checkpointer:
    """Saves the checkpoints of one run.

    Keeps the `checkpoint.keep` newest and the `checkpoint.keep_best` of lowest evaluation loss.
    Every process calls every method.

    Args:
      tokenizer: where that of the run lies, if not where the config says.
    """

    def __init__(self, workdir: str | Path, config: Config, tokenizer: str = ""):
        import orbax.checkpoint as ocp

        _quiet_orbax()
        self.directory, self._config = Path(workdir).absolute() / "checkpoints", config
        data = config.data
        if tokenizer:
            data = dataclasses.replace(data, tokenizer=tokenizer)
        self._marks = marks(data)
        self._tokenizer = None if data.source == "synthetic" else tokenizer_file(data.tokenizer)
        self._content = self._tokenizer.read_bytes() if self._tokenizer else b""
        settings, keep = config.checkpoint, ocp.checkpoint_managers
        policies: list[Any] = [keep.LatestN(settings.keep)]
        if settings.keep_best:
            policies.append(
                keep.BestN(
                    get_metric_fn=_eval_loss,
                    reverse=True,  # BestN keeps the end of the order
                    n=settings.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": _state_handler(),
                "data": ocp.JsonCheckpointHandler(),
                "corpus": ocp.JsonCheckpointHandler(),
                "tokenizer": _file_handler()[0](),
                "config": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep.AnyPreservationPolicy(policies),
                best_fn=_eval_loss
                if settings.keep_best
                else None,  # without it metrics are not written
                best_mode="min",
                enable_async_checkpointing=settings.async_,
                cleanup_tmp_directories=True,
            ),
        )

    def save(
        self,
        step: int,
        state: Any,
        *,
        position: Position,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves a checkpoint; a step that is saved already stays as it is.

        Returns once the arrays are copied off the devices (`state` may then be donated), or when
        all is written where `checkpoint.async_` is false. An error of a save in the background is
        raised by the next call.

        Args:
          step: its name: optimizer steps done.
          state: any pytree of `jax.Array`.
          metrics: `{"eval_loss": ...}` of this step; a checkpoint without one is never among the
            best.
        """
        import orbax.checkpoint as ocp

        from jaxpar.tree import named_leaves

        if step in self._manager.all_steps():
            return
        items = {
            "state": ocp.args.PyTreeSave(named_leaves(state)),
            "data": ocp.args.JsonSave(dataclasses.asdict(position)),
            "corpus": ocp.args.JsonSave(self._marks),
            "config": ocp.args.JsonSave(dataclasses.asdict(self._config)),
        }
        if self._tokenizer:
            name = "tokenizer" + self._tokenizer.suffix
            items["tokenizer"] = _file_handler()[1](name, self._content)
        self._manager.save(
            step,
            args=ocp.args.Composite(**items),
            metrics=None if metrics is None else dict(metrics),
            force=True,
        )

    def wait(self) -> None:
        """Waits for the save in the background, and raises its error."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the threads."""
        self._manager.close()


def restore_state(directory: Path, abstract_state: Any, *, partial: bool = False) -> Any:
    """Restores the state of one checkpoint onto the current mesh, whatever mesh saved it.

    Args:
      abstract_state: the pytree to fill, of `jax.ShapeDtypeStruct` with shardings; those of
        `jax.eval_shape` under a mesh do.
      partial: it may leave out leaves of the checkpoint; only those asked for are read.

    Returns:
      The state, in the dtypes and shardings asked for.

    Raises:
      ConfigError: the checkpoint is damaged or can't be read, or it holds other leaves. A lack of
        memory is raised as it comes: the checkpoint has no part in it.
    """
    import jax
    import orbax.checkpoint as ocp
    from etils import epath

    from jaxpar.tree import named_leaves

    wanted = {name: _on_devices(leaf) for name, leaf in named_leaves(abstract_state).items()}
    path = epath.Path(directory.absolute() / "state")
    handler = _state_handler()
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            saved = {name: tuple(leaf.shape) for name, leaf in handler.metadata(path).tree.items()}
            if partial:
                saved = {name: shape for name, shape in saved.items() if name in wanted}
            _check_leaves(directory, saved, wanted)
            arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
            restored = checkpointer.restore(
                path, args=ocp.args.PyTreeRestore(wanted, arguments, partial_restore=partial)
            )
        except (ConfigError, MemoryError, RuntimeError):  # RuntimeError: jax, not the files
            raise
        except Exception as error:  # Orbax wraps what TensorStore says of a lost file in it
            raise _unreadable(directory, error) from error
    return jax.tree.unflatten(
        jax.tree.structure(abstract_state), [restored[name] for name in wanted]
    )


def _check_leaves(
    directory: Path, saved: dict[str, tuple[int, ...]], wanted: dict[str, jax.ShapeDtypeStruct]
) -> None:
    differences = [f"{name}: only in the checkpoint" for name in saved if name not in wanted]
    differences += [f"{name}: not in the checkpoint" for name in wanted if name not in saved]
    differences += [
        f"{name}: checkpoint {saved[name]}, wanted {leaf.shape}"
        for name, leaf in wanted.items()
        if name in saved and saved[name] != leaf.shape
    ]
    if differences:
        more = [f"and {len(differences) - 8} more"] if len(differences) > 8 else []
        raise ConfigError(
            f"{directory} holds another state:\n  " + "\n  ".join(differences[:8] + more)
        )


def _on_devices(leaf: Any) -> jax.ShapeDtypeStruct:
    """A leaf with a sharding over real devices: `jax.eval_shape` gives abstract ones, or none."""
    import jax
    from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding

    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        sharding = NamedSharding(
            jax.sharding.get_mesh(), sharding.spec, memory_kind=sharding.memory_kind
        )
    elif sharding is None:
        mesh = jax.sharding.get_mesh()
        sharding = (
            SingleDeviceSharding(jax.devices()[0]) if mesh.empty else NamedSharding(mesh, jax.P())
        )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    """Plain zarr: measured on 384 MiB, it saves 5 times and restores 12 times as fast as compressed
    OCDBT."""
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)


@functools.cache
def _file_handler() -> tuple[type, type]:
    """How Orbax saves a file as it is: the class of its handler, and that of its arguments (name,
    content)."""
    import jax
    import orbax.checkpoint as ocp

    class FileHandler(ocp.CheckpointHandler):
        def save(self, directory: Any, args: Any) -> None:
            if jax.process_index() == 0:
                (directory / args.name).write_bytes(args.content)

        def restore(self, directory: Any, args: Any) -> Any:
            raise NotImplementedError("read the file")

    @ocp.args.register_with_handler(FileHandler, for_save=True, for_restore=True)
    @dataclasses.dataclass
    class FileSave(ocp.args.CheckpointArgs):
        name: str
        content: bytes = dataclasses.field(repr=False)

    return FileHandler, FileSave


def _eval_loss(metrics: Mapping[str, float]) -> float:
    loss = metrics["eval_loss"]
    return loss if math.isfinite(loss) else math.inf


def _quiet_orbax() -> None:
    """Drops a warning that every save without OCDBT would print."""
    logger = logging.getLogger("absl")
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "Skipping merge of OCDBT" not in str(record.msg)
