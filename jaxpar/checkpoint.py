"""Checkpoints: asynchronous, complete or not there, and restored onto any mesh.

A checkpoint is a directory `WORKDIR/checkpoints/STEP` that Orbax renames into place when its last
byte is written:

    state/    one zarr array a leaf, by dotted name (`model.layers.attention.query`, `optimizer.mu.head`), any mesh
    data/     JSON: the position in the data
    corpus/   JSON: marks of the files of the corpus, by which it is known again where they have moved
    config/   JSON: the resolved config of the run
    metrics/  JSON: the evaluation, where the best checkpoints are kept

Finding and judging checkpoints needs no jax, so that a wrong request fails before jax starts.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpar.config import Config, ConfigError, configure, field_paths, value_of
from jaxpar.data.sources import content_mark
from jaxpar.validation import resolve

if TYPE_CHECKING:
    import jax
    import orbax.checkpoint as ocp

# Written by Orbax as a checkpoint completes; a copy or a deletion that was cut short lacks some of
# them.
_PARTS = ("_CHECKPOINT_METADATA", "state/_METADATA", "data/metadata", "config/metadata")

_MUST_MATCH = ("optimizer.name", "data.tokenizer", "precision.params")

_ORDER_OF_DATA = (
    *("data.source", "data.text_field", "data.sequence_length", "data.packing"),
    *("data.validation_fraction", "data.validation_source", "train.seed"),
)
"""What decides which windows the position in the data has passed."""

_FILES_OF_DATA = ("data.source", "data.validation_source")
"""Those of them that may change with the place of the same files."""


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
      ConfigError: `checkpoint.restore=none` in a workdir with checkpoints, a path without any, or
        one whose newest checkpoint is incomplete.
    """
    own, restore = Path(workdir) / "checkpoints", config.checkpoint.restore
    if restore == "none" and _steps(own):
        raise ConfigError(
            f"{own} holds checkpoints of steps {_listed(_steps(own))} and checkpoint.restore=none; "
            "use another "
            "--workdir, or --config.checkpoint.restore=auto to continue from the newest"
        )
    if _steps(own):
        return _newest(own)
    return None if restore in ("auto", "none") else locate(restore)


def locate(path: str | Path) -> Path:
    """The checkpoint that a path means: a workdir, its `checkpoints`, or one `STEP` in it.

    Raises:
      ConfigError: the path holds no complete checkpoint.
    """
    path = Path(path)
    if _is_complete(path):
        return path
    return _newest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)


def saved_config(workdir: str | Path) -> dict[str, Any] | None:
    """The resolved config in the newest complete checkpoint of a workdir; None where there is
    none."""
    directory = Path(workdir) / "checkpoints"
    steps = complete_steps(directory)
    return _read_json(directory / str(steps[-1]), "config") if steps else None


def load_config(directory: Path) -> Config:
    """The config that is stored in one checkpoint; a field younger than the checkpoint has its
    default."""
    return resolve(configure(**_read_json(directory, "config")))


def check_resume(workdir: str | Path, config: Config) -> None:
    """Refuses a start from a checkpoint of another model, and to continue a run with other data.

    Raises:
      ConfigError: fields of the model, or the optimizer's name, the tokenizer or the precision of
        the parameters differ, or in a run that goes on what decides the order of its data (each is
        listed with both values); or `find_checkpoint` refuses.
    """
    found = find_checkpoint(workdir, config)
    if found is None:
        return
    of_model = [path for path in field_paths() if path.startswith("model.")]
    if differences := _differences(found, config, [*of_model, *_MUST_MATCH]):
        raise ConfigError(
            f"{found} belongs to another run:\n  "
            + "\n  ".join(differences)
            + "\nuse another --workdir, or the same fields"
        )
    if _steps(Path(workdir) / "checkpoints") and (differences := other_data(found, config)):
        raise ConfigError(
            f"{found} is in the middle of other data:\n  "
            + "\n  ".join(differences)
            + "\nuse the same fields, or begin this data from its start with these weights, in another --workdir with "
            f"--config.checkpoint.restore={workdir}"
        )


def other_data(directory: Path, config: Config) -> list[str]:
    """The fields by which the data of a checkpoint differs from that of `config`, with both values;
    [] where its position in the data means the same windows: a corpus may have moved."""
    return _differences(directory, config, _ORDER_OF_DATA)


def _differences(directory: Path, config: Config, paths: Iterable[str]) -> list[str]:
    saved = _read_json(directory, "config")
    differences = []
    for path in paths:
        value: Any = saved
        for name in path.split("."):
            value = value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        if (
            value is not _ABSENT
            and value != value_of(config, path)
            and not _moved(directory, config, path)
        ):
            differences.append(f"{path}: checkpoint {value}, config {value_of(config, path)}")
    return differences


def _moved(directory: Path, config: Config, path: str) -> bool:
    """Whether a field names the files of a checkpoint's corpus in another place."""
    if (
        path not in _FILES_OF_DATA or not (directory / "corpus").is_dir()
    ):  # older checkpoints have none
        return False
    mark = _read_json(directory, "corpus").get(path)
    return mark is not None and mark == content_mark(value_of(config, path), path)


_ABSENT = object()  # a field that is younger than the checkpoint


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
        raise _corrupt(directory, f"{path}: {error}") from error


def _corrupt(directory: Path, reason: object) -> ConfigError:
    # TensorStore explains a damaged array on 30 lines, of which the first says it
    why = (str(reason).strip() or repr(reason)).splitlines()[0]
    steps = _listed(complete_steps(directory.parent))
    return ConfigError(
        f"cannot restore {directory}: {why}; complete steps: {steps}; delete this one to use the "
        "one before"
    )


# Saving and restoring.


class Checkpointer:
    """Saves the checkpoints of one run and restores them.

    Keeps the `checkpoint.keep` newest and the `checkpoint.keep_best` of lowest evaluation loss.
    Every process calls every method.
    """

    def __init__(self, workdir: str | Path, config: Config):
        import orbax.checkpoint as ocp

        _quiet_orbax()
        self._workdir, self._config = Path(workdir).absolute(), config
        self._directory = self._workdir / "checkpoints"
        self._marks = {path: content_mark(value_of(config, path), path) for path in _FILES_OF_DATA}
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
            self._directory,
            item_handlers={
                "state": _state_handler(),
                "data": ocp.JsonCheckpointHandler(),
                "corpus": ocp.JsonCheckpointHandler(),
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
        data: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves a checkpoint; a step that is saved already stays as it is.

        Returns once the arrays are copied off the devices (`state` may then be donated), or when
        all is written where `checkpoint.async_` is false. An error of a save in the background is
        raised by the next call.

        Args:
          step: optimizer steps done.
          state: any pytree of `jax.Array`.
          data: position in the data, as JSON.
          metrics: `{"eval_loss": ...}` of this step; a checkpoint without one is never among the
            best.
        """
        import orbax.checkpoint as ocp

        from jaxpar.tree import named_leaves

        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(named_leaves(state)),
            data=ocp.args.JsonSave(dict(data)),
            corpus=ocp.args.JsonSave(self._marks),
            config=ocp.args.JsonSave(dataclasses.asdict(self._config)),
        )
        self._manager.save(
            step, args=items, metrics=None if metrics is None else dict(metrics), force=True
        )

    def latest_step(self) -> int | None:
        """The newest complete step of this run, or None."""
        self.wait()
        steps = complete_steps(self._directory)
        return steps[-1] if steps else None

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Restores a checkpoint onto the current mesh, whatever mesh saved it.

        Args:
          abstract_state: the pytree to fill, of `jax.ShapeDtypeStruct` with shardings; those of
            `jax.eval_shape` under a mesh do.
          step: of this run; None is the checkpoint of `find_checkpoint`.

        Returns:
          The state, in the dtypes and shardings asked for, and the position in the data.

        Raises:
          ConfigError: there is no such checkpoint, it is incomplete or damaged, or it holds other
            leaves.
        """
        self.wait()
        found = (
            find_checkpoint(self._workdir, self._config)
            if step is None
            else self._directory / str(step)
        )
        if found is None or not _is_complete(found):
            steps = _listed(complete_steps(self._directory))
            raise ConfigError(
                f"{found or self._directory} holds no complete checkpoint; complete steps: {steps}"
            )
        return restore_run(found, abstract_state)

    def wait(self) -> None:
        """Waits for the save in the background, and raises its error."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the threads."""
        self._manager.close()


def restore_run(directory: Path, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """The state and the position in the data of one checkpoint directory; as in
    `Checkpointer.restore`."""
    return restore_state(directory, abstract_state), _read_json(directory, "data")


def restore_state(directory: Path, abstract_state: Any, *, partial: bool = False) -> Any:
    """The state of one checkpoint directory; arguments, result and errors as in
    `Checkpointer.restore`.

    With `partial`, `abstract_state` may leave out leaves of the checkpoint; only those asked for
    are read.
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
        except ConfigError:
            raise
        except (
            Exception
        ) as error:  # tensorstore and Orbax raise many kinds for files that are damaged
            raise _corrupt(directory, error) from error
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
