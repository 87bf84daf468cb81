"""What to change when a step does not fit: the category to blame, and changes in order of what they
cost in time."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxpar.config import AXES, REMAT, Config, ConfigError, MeshConfig, value_of
from jaxpar.estimate.hardware import Hardware, of_kind
from jaxpar.estimate.memory import PART_NAMES, RESERVE, human, peak_memory
from jaxpar.estimate.ranking import (
    ANY,
    SEARCHED,
    Pins,
    best_of_each_mesh,
    divisors,
    flag,
    rank,
)
from jaxpar.estimate.timing import step_time
from jaxpar.validation import validate_mesh


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of a run, as flags, with predicted bytes of a device and seconds of a step."""

    flags: str
    config: Config
    mesh: MeshConfig
    predicted: int
    seconds: float


def changes(
    config: Config,
    mesh: MeshConfig,
    hardware: Hardware,
    *,
    room: int,
    scale: float = 1.0,
    pins: Pins = ANY,
) -> list[Change]:
    """Changes that should make a step fit, the cheapest in predicted time first.

    Args:
      config: the run that does not fit.
      mesh: its mesh; others of as many devices are among the changes.
      hardware: for the times.
      room: bytes that a device has for the program.
      scale: compiled peak over predicted peak of the run as it is, where it is known.
      pins: what the command line names. It is kept, unless nothing that keeps it fits.
    """
    by_flags: dict[str, Change] = {}
    for flags, changed, sizes in _candidates(config, mesh, hardware, pins):
        try:
            validate_mesh(changed, sizes)
        except ConfigError:
            continue
        peak = int(scale * peak_memory(changed, sizes).total)
        if peak <= room:
            by_flags.setdefault(
                flags,
                Change(flags, changed, sizes, peak, step_time(changed, sizes, hardware).total),
            )
    if not by_flags and pins != ANY:
        return changes(config, mesh, hardware, room=room, scale=scale)
    return sorted(by_flags.values(), key=lambda change: change.seconds)


def _candidates(
    config: Config, mesh: MeshConfig, hardware: Hardware, pins: Pins
) -> Iterator[tuple[str, Config, MeshConfig]]:
    """One field changed, or two, or the mesh."""

    def options(path: str, *tried: Any) -> tuple[Any, ...]:
        now = value_of(config, path)
        return (now,) if path in pins.fields else tuple(dict.fromkeys((now, *tried)))

    policies = list(REMAT)
    now = policies.index(config.memory.remat) if config.memory.remat in policies else 0
    sequences = config.train.batch_size // mesh.batch_shards
    more = [n for n in divisors(sequences) if n > config.train.microbatches]
    for remat, count, zero, gather in itertools.product(
        options("memory.remat", *policies[now:]),
        options("train.microbatches", *more),
        options("parallel.optimizer_sharding", "data" if mesh.data > 1 else "none"),
        options("parallel.gather", "per_layer"),
    ):
        parallel = dataclasses.replace(config.parallel, optimizer_sharding=zero, gather=gather)
        changed = dataclasses.replace(
            config,
            memory=dataclasses.replace(config.memory, remat=remat),
            train=dataclasses.replace(config.train, microbatches=count),
            parallel=parallel,
        )
        if changed != config and len(differing := _flags(changed, config)) <= 2:
            yield " ".join(differing), changed, mesh
    for candidate in best_of_each_mesh(rank(config, hardware, mesh.devices, pins))[:8]:
        if candidate.mesh != mesh:
            axes = zip(AXES, candidate.mesh.shape, mesh.shape, strict=True)
            sizes = [f"--mesh.{axis}={size}" for axis, size, before in axes if size != before]
            flags = " ".join([*sizes, *_flags(candidate.config, config)])
            yield flags, candidate.config, candidate.mesh


def _flags(config: Config, before: Config) -> list[str]:
    """The flags of what was chosen anew."""
    changed = (path for path in SEARCHED if value_of(config, path) != value_of(before, path))
    return [flag(config, path) for path in changed]


def blame(parts: Mapping[str, int], most: int = 3) -> str:
    """The largest parts of memory, in words: `optimizer state 28.4 GiB, gradients 14.2 GiB`."""
    largest = sorted(parts.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{PART_NAMES[name]} {human(size)}" for name, size in largest if size)


def out_of_memory(
    config: Config, mesh: MeshConfig, device: Any, arguments: Sequence[str], pins: Pins = ANY
) -> str:
    """What `train` answers when a device runs out of memory: what fills it and what would help,
    both predicted, and the command that compiles the step and tells exactly.

    Args:
      config: the run.
      mesh: its mesh.
      device: one of its devices, as jax has it.
      arguments: of the command line that failed.
      pins: what they name.
    """
    gpu = of_kind(device.device_kind)
    room = (device.memory_stats() or {}).get("bytes_limit") or gpu.memory_bytes - RESERVE
    peak = peak_memory(config, mesh)
    # Where the arithmetic says that it fits, it is too low by at least this.
    scale = max(1.0, room / peak.total)
    fitting = changes(config, mesh, gpu, room=room, scale=scale, pins=pins)
    kept = [arg for arg in arguments if arg.startswith(("--config", "--mesh", "--cpu_devices"))]
    lines = [
        f"a device ran out of memory. By arithmetic, a step needs {human(peak.total)} of "
        f"{human(room)}, most of it for {blame(vars(peak))}",
        *(["what should fit, the fastest first:"] if fitting else []),
        *(f"  {change.flags}  ({human(change.predicted)})" for change in fitting[:3]),
        f"every buffer by name: python -m jaxpar.explain {' '.join(kept)}",
    ]
    return "\n".join(lines)
