"""Every way to run a config on so many devices, the fastest that fits first: what `plan` and
`remedy` choose from.

A way is a mesh and the fields of `SEARCHED`. Memory and time are predicted by arithmetic (`memory`,
`timing`), what the rules of the config refuse is left out, and what is pinned is kept.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxpar.config import (
    AXES,
    REMAT,
    Config,
    ConfigError,
    MemoryConfig,
    MeshConfig,
    ParallelConfig,
    TrainConfig,
    field_paths,
    value_of,
)
from jaxpar.estimate.counts import step_flops
from jaxpar.estimate.hardware import Hardware
from jaxpar.estimate.memory import RESERVE, Peak, peak_memory
from jaxpar.estimate.timing import StepTime, overlap_room, step_time
from jaxpar.validation import validate_mesh

SEARCHED = (
    *("train.microbatches", "memory.remat", "parallel.gather", "parallel.optimizer_sharding"),
    *("parallel.schedule", "parallel.chunks"),
)
"""The fields that are chosen with the mesh, unless they are pinned."""


@dataclasses.dataclass(frozen=True)
class Pins:
    """What is not to be chosen, because the command line names it.

    Attributes:
      axes: sizes of axes; None and -1 stand for any.
      fields: dotted config fields; their values are those of the config.
    """

    axes: Mapping[str, int | None] = dataclasses.field(default_factory=dict)
    fields: frozenset[str] = frozenset()

    @property
    def sizes(self) -> dict[str, int]:
        """The axes that have a size, in the order of `AXES`."""
        given = ((axis, self.axes.get(axis)) for axis in AXES)
        return {axis: size for axis, size in given if size and size > 0}

    def flags(self, config: Config) -> list[str]:
        """As on the command line."""
        sizes = [f"--mesh.{axis}={size}" for axis, size in self.sizes.items()]
        return [*sizes, *(flag(config, path) for path in field_paths() if path in self.fields)]


ANY = Pins()
"""Nothing is pinned."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a config, and what it is predicted to cost, or compiled to.

    Attributes:
      config: with the choices in it.
      mesh: sizes of the axes.
      hardware: what it runs on.
      peak: bytes of a device.
      fits: the device has so many bytes, besides `RESERVE`.
      overlaps: the peak leaves the compiler room to run collectives beside the computation.
      synchronous: which collectives are waited for; see `step_time`.
    """

    config: Config
    mesh: MeshConfig
    hardware: Hardware
    peak: Peak
    fits: bool
    overlaps: bool
    synchronous: float | Mapping[str, float]

    @functools.cached_property
    def time(self) -> StepTime:
        """Of a step. Made when asked for: of thousands, those that do not fit need none."""
        return step_time(self.config, self.mesh, self.hardware, synchronous=self.synchronous)

    @property
    def chunks(self) -> int:
        """Parts of the model that each pipeline stage holds."""
        return self.config.parallel.chunks if self.mesh.pipeline > 1 else 1

    @property
    def seconds(self) -> float:
        return self.time.total

    def mfu(self, hardware: Hardware) -> float:
        """Model FLOPs (causal attention once) a second, of the dense peak of all devices."""
        peak = hardware.peak(self.config.precision.compute)
        return step_flops(self.config).per_step / (self.seconds * self.mesh.devices * peak)

    def flags(self, pins: Pins = ANY) -> list[str]:
        """The flags that ask for it: what is pinned, whether it changes anything or not, and of
        the rest what the mesh and the choices need."""
        sizes = dict(zip(AXES, self.mesh.shape, strict=True))
        asked = pins.fields | {"train.microbatches", "memory.remat"}
        if self.mesh.fsdp > 1:
            asked |= {"parallel.gather"}
        if self.mesh.data > 1:
            asked |= {"parallel.optimizer_sharding"}
        if self.mesh.pipeline > 1:
            asked |= {"parallel.schedule", "parallel.chunks"}
        chosen = [path for path in SEARCHED if path in asked]
        others = [path for path in field_paths() if path in asked and path not in chosen]
        return [
            *(f"--mesh.{axis}={n}" for axis, n in sizes.items() if n > 1 or axis in pins.sizes),
            *(flag(self.config, path) for path in [*chosen, *others]),
        ]


def flag(config: Config, path: str) -> str:
    """A field as on the command line, `--config.memory.remat=full`; not quoted for a shell."""
    value = value_of(config, path)
    return f"--config.{path}={str(value).lower() if isinstance(value, bool) else value}"


def rank(config: Config, hardware: Hardware, devices: int, pins: Pins = ANY) -> list[Candidate]:
    """Every candidate, those that fit first, the fastest first (see `ALIKE`); of those that do not,
    the smallest first.

    Args:
      config: the run; its global batch is kept, the fields of `SEARCHED` are chosen.
      hardware: what it shall run on.
      devices: how many.
      pins: what is not to be chosen.

    Raises:
      ConfigError: no mesh of so many devices is legal for this config, and why; or the hardware
        does not tell the peak of the dtype that it computes in.
    """
    hardware.peak(config.precision.compute)
    candidates = []
    for mesh in meshes(devices, pins):
        try:
            candidates += [
                _best_remat(choice, mesh, hardware, pins) for choice in legal(config, mesh, pins)
            ]
        except ConfigError:
            continue
    if not candidates:
        raise ConfigError(_nothing_legal(config, devices, pins))
    return sorted(candidates, key=order)


ALIKE = 0.003
"""Times that differ by less count as equal; then the smaller peak comes first."""


def order(candidate: Candidate) -> tuple:
    """The key that sorts candidates, the best first."""
    if candidate.fits:
        return False, round(math.log(candidate.seconds) / ALIKE), candidate.peak.total
    return True, candidate.peak.total


def meshes(devices: int, pins: Pins = ANY) -> Iterator[MeshConfig]:
    """Every factorisation of the devices into the axes; `expert` stays 1, for there are no experts
    yet."""
    pinned = pins.sizes

    def sizes(axes: tuple[str, ...], left: int) -> Iterator[tuple[int, ...]]:
        if not axes:
            if left == 1:
                yield ()
            return
        given = pinned.get(axes[0])
        options = [given] if given else [1] if axes[0] == "expert" else divisors(left)
        for size in options:
            if left % size == 0:
                for rest in sizes(axes[1:], left // size):
                    yield (size, *rest)

    for shape in sizes(AXES, devices):
        yield MeshConfig(*shape)


@functools.cache
def divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def legal(config: Config, mesh: MeshConfig, pins: Pins = ANY) -> Iterator[Config]:
    """The choices for a mesh that the rules accept, all but remat, which no rule is about.

    Raises:
      ConfigError: there is none; with the rule that refuses the first.
    """
    # What no choice can mend is refused at once: plans ask for thousands of meshes.
    bare = config
    if "parallel.optimizer_sharding" not in pins.fields:
        parallel = dataclasses.replace(config.parallel, optimizer_sharding="none")
        bare = dataclasses.replace(config, parallel=parallel)
    validate_mesh(bare, dataclasses.replace(mesh, pipeline=1), training=False)
    refusal, none = None, True
    for choice in choices(config, mesh, pins):
        try:
            validate_mesh(choice, mesh)
        except ConfigError as error:
            refusal = refusal or error
            continue
        none = False
        yield choice
    if none:
        batch, shards = config.train.batch_size, mesh.batch_shards
        raise refusal or ConfigError(
            f"train.batch_size={batch} is not divisible by data x fsdp x expert = {shards}"
        )


def choices(config: Config, mesh: MeshConfig, pins: Pins = ANY) -> Iterator[Config]:
    """The config with each number of microbatches, way to gather, ZeRO-1, and pipeline chunks.

    Of the schedules only 1f1b: at the same bubble, gpipe holds the inputs of all microbatches and
    the gradients of all losses. More than half of a pipeline's time idle is not tried, unless it is
    pinned.
    """
    staged, sequences = mesh.pipeline > 1, config.train.batch_size // mesh.batch_shards

    def options(path: str, *tried: Any) -> tuple[Any, ...]:
        return (value_of(config, path),) if path in pins.fields or not tried else tried

    counts = () if config.train.batch_size % mesh.batch_shards else divisors(sequences)
    counts = [n for n in counts if n >= min(mesh.pipeline, sequences)]
    if not counts and "train.microbatches" not in pins.fields:
        return
    layers = config.model.layers // mesh.pipeline
    chunked = (n for n in (1, 2, 4) if layers % n == 0) if staged else ()
    every = itertools.product(
        options("train.microbatches", *counts),
        options("parallel.gather", *(("per_layer", "per_step") if mesh.fsdp > 1 else ())),
        options("parallel.optimizer_sharding", *(("none", "data") if mesh.data > 1 else ())),
        options("parallel.schedule", *(("1f1b",) if staged else ())),
        options("parallel.chunks", *chunked),
    )
    for microbatches, *fields in every:
        train = _train(config.train, microbatches)
        yield dataclasses.replace(config, train=train, parallel=_parallel(config.parallel, *fields))


@functools.cache
def _train(before: TrainConfig, microbatches: int) -> TrainConfig:
    return dataclasses.replace(before, microbatches=microbatches)


@functools.cache
def _parallel(
    before: ParallelConfig, gather: str, zero: str, schedule: str, chunks: int
) -> ParallelConfig:
    return dataclasses.replace(
        before, gather=gather, optimizer_sharding=zero, schedule=schedule, chunks=chunks
    )


def _best_remat(config: Config, mesh: MeshConfig, hardware: Hardware, pins: Pins) -> Candidate:
    """With the remat policy of the fastest step that fits; else with the one that holds least.

    It is the first that fits, or the first that also leaves room for overlap: between them, steps
    compute more and wait all the same.
    """
    pinned = "memory.remat" in pins.fields
    policies = [config.memory] if pinned else _policies(config.memory)
    best: Candidate | None = None
    for memory in policies:
        choice = dataclasses.replace(config, memory=memory)
        peak = peak_memory(choice, mesh)
        fits, overlaps = _room(peak, hardware)
        if overlaps or (fits and best is None) or (best is None and memory is policies[-1]):
            candidate = weigh(choice, mesh, hardware, peak)
            best = candidate if best is None else min(best, candidate, key=order)
        if overlaps:
            break
    assert best is not None
    return best


@functools.cache
def _policies(before: MemoryConfig) -> list[MemoryConfig]:
    """With every remat policy, the one that recomputes least first."""
    return [dataclasses.replace(before, remat=remat) for remat in REMAT]


def weigh(
    config: Config,
    mesh: MeshConfig,
    hardware: Hardware,
    peak: Peak,
    synchronous: Mapping[str, float] | None = None,
) -> Candidate:
    """A candidate of a peak, predicted or compiled.

    Where the compiler has too little room, all collectives count as waited for; `synchronous` (see
    `step_time`) says better which are, where it is known.
    """
    fits, overlaps = _room(peak, hardware)
    waits = float(not overlaps) if synchronous is None else synchronous
    return Candidate(config, mesh, hardware, peak, fits, overlaps, waits)


def _room(peak: Peak, hardware: Hardware) -> tuple[bool, bool]:
    """Whether a peak fits, and whether it leaves the compiler room for overlap."""
    held = peak.params + peak.optimizer + peak.batch
    fits = peak.total <= hardware.memory_bytes - RESERVE
    return fits, fits and peak.total <= overlap_room(hardware.memory_bytes, held)


def best_of_each_mesh(ranked: Iterable[Candidate]) -> list[Candidate]:
    """The first of every mesh, in order."""
    first: dict[MeshConfig, Candidate] = {}
    for candidate in ranked:
        first.setdefault(candidate.mesh, candidate)
    return list(first.values())


def illegal(config: Config, devices: int, pins: Pins = ANY) -> dict[str, list[MeshConfig]]:
    """Meshes that the rules of the config refuse, by the rule that does, the one that refuses most
    first. Of rules that differ in numbers alone, the words of the first."""
    rules: dict[str, tuple[str, list[MeshConfig]]] = {}
    for mesh in meshes(devices, pins):
        try:
            next(legal(config, mesh, pins))
        except ConfigError as error:
            rule = re.sub(r"\d+", "", str(error).split(";")[0])
            rules.setdefault(rule, (str(error), []))[1].append(mesh)
    return dict(sorted(rules.values(), key=lambda rule: -len(rule[1])))


def _nothing_legal(config: Config, devices: int, pins: Pins) -> str:
    """Why no mesh of so many devices is legal, in one message."""
    product = math.prod(pins.sizes.values())
    free = [axis for axis in AXES if axis not in (*pins.sizes, "expert")]
    if devices % product or (not free and devices != product):
        sizes = " x ".join(f"{axis}={size}" for axis, size in pins.sizes.items())
        below = devices // product * product
        near = [n for n in (below, below + product) if n] if free else [product]
        return (
            f"mesh {sizes} = {product} does not {'divide' if free else 'use'} {devices} devices; "
            f"use --devices={' or '.join(map(str, near))}, or leave an axis out"
        )
    kept = f" with {' '.join(named)}" if (named := _kept(config, pins)) else ""
    rules = list(illegal(config, devices, pins))
    near = [n for n in range(1, 2 * devices) if n != devices and _any_legal(config, n, pins)]
    near = sorted(sorted(near, key=lambda n: abs(n - devices))[:2])
    remedy = f". Legal: --devices={' or '.join(map(str, near))}" if near else ""
    return (
        f"no mesh of {devices} devices is legal for this config{kept}: {'; and '.join(rules[:2])}"
        f"{remedy}"
    )


def _kept(config: Config, pins: Pins) -> list[str]:
    """The flags that narrow the choice."""
    return dataclasses.replace(pins, fields=pins.fields & {*SEARCHED}).flags(config)


def _any_legal(config: Config, devices: int, pins: Pins) -> bool:
    for mesh in meshes(devices, pins):
        try:
            next(legal(config, mesh, pins))
        except ConfigError:
            continue
        return True
    return False


def fewest_that_fit(
    config: Config, hardware: Hardware, devices: int, pins: Pins = ANY, most: int = 4096
) -> Candidate | None:
    """The best on twice as many devices, or four times, and so on: the first of these that fits."""
    while (devices := 2 * devices) <= most:
        try:
            best = rank(config, hardware, devices, pins)[0]
        except ConfigError:
            continue
        if best.fits:
            return best
    return None
