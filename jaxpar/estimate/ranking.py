"""Every way to run a config on so many devices, the fastest that fits first: what `plan` and
`remedy` choose from.

A way is a mesh, a number of microbatches, a remat policy, a way to gather weights, and a pipeline
schedule. Memory and time are predicted by arithmetic (`memory`, `timing`), and what the rules of
the config refuse is left out.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping

from jaxpar.config import AXES, REMAT, Config, ConfigError, MemoryConfig, MeshConfig, ParallelConfig
from jaxpar.estimate.counts import step_flops
from jaxpar.estimate.hardware import Hardware
from jaxpar.estimate.memory import RESERVE, Peak, peak_memory
from jaxpar.estimate.timing import StepTime, step_time
from jaxpar.validation import validate_mesh


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a config, and what it is predicted to cost."""

    config: Config
    mesh: MeshConfig
    peak: Peak
    time: StepTime
    fits: bool

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

    def flags(self) -> str:
        """The command line that asks for it."""
        config = self.config
        flags = [
            f"--mesh.{axis}={size}"
            for axis, size in zip(AXES, self.mesh.shape, strict=True)
            if size > 1
        ]
        flags += [
            f"--config.train.microbatches={config.train.microbatches}",
            f"--config.memory.remat={config.memory.remat}",
        ]
        flags += (
            [f"--config.parallel.gather={config.parallel.gather}"] if self.mesh.fsdp > 1 else []
        )
        if self.mesh.data > 1:
            flags.append(
                f"--config.parallel.optimizer_sharding={config.parallel.optimizer_sharding}"
            )
        if self.mesh.pipeline > 1:
            flags += [
                f"--config.parallel.schedule={config.parallel.schedule}",
                f"--config.parallel.chunks={self.chunks}",
            ]
        return " ".join(flags)


def rank(
    config: Config, hardware: Hardware, devices: int, fixed: Mapping[str, int | None] | None = None
) -> list[Candidate]:
    """Every candidate, those that fit first, the fastest first (see `ALIKE`); of those that do not,
    the smallest first.

    Args:
      config: the run; its global batch is kept, its microbatches, remat, gather and ZeRO-1 are
        chosen.
      hardware: what it shall run on.
      devices: how many.
      fixed: sizes of axes that are not to be chosen.

    Raises:
      ConfigError: no mesh of so many devices is legal for this config; with the reason of the last
        one refused.
    """
    found, refusal = [], None
    for mesh in meshes(devices, fixed or {}):
        try:
            validate_mesh(config, dataclasses.replace(mesh, pipeline=1), training=False)
        except ConfigError as error:
            refusal = error
            continue
        for choice in choices(config, mesh):
            try:
                validate_mesh(choice, mesh)
            except ConfigError as error:
                refusal = error
                continue
            found.append(_first_that_fits(choice, mesh, hardware))
    if not found:
        raise ConfigError(
            f"no mesh of {devices} devices is legal for this config. The last one tried: {refusal}"
        )
    return sorted(found, key=_order)


ALIKE = 0.003
"""Times that differ by less count as equal; then the smaller peak comes first."""


def _order(candidate: Candidate) -> tuple:
    if candidate.fits:
        return False, round(math.log(candidate.seconds) / ALIKE), candidate.peak.total
    return True, candidate.peak.total


def meshes(devices: int, fixed: Mapping[str, int | None]) -> Iterator[MeshConfig]:
    """Every factorisation of the devices into the axes; `expert` stays 1, for there are no experts
    yet."""

    def sizes(axes: tuple[str, ...], left: int) -> Iterator[tuple[int, ...]]:
        if not axes:
            if left == 1:
                yield ()
            return
        given = fixed.get(axes[0])
        options = [given] if given and given > 0 else [1] if axes[0] == "expert" else divisors(left)
        for size in options:
            if left % size == 0:
                for rest in sizes(axes[1:], left // size):
                    yield (size, *rest)

    for found in sizes(AXES, devices):
        yield MeshConfig(*found)


@functools.cache
def divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def choices(config: Config, mesh: MeshConfig) -> Iterator[Config]:
    """The config with each number of microbatches, way to gather, ZeRO-1, and pipeline chunks.

    Of the schedules only 1f1b: at the same bubble, gpipe holds the inputs of all microbatches and
    more gradients.
    """
    sequences, rest = divmod(config.train.batch_size, mesh.batch_shards)
    if rest:
        return
    gathers = ("per_layer", "per_step") if mesh.fsdp > 1 else (config.parallel.gather,)
    zeros = ("none", "data") if mesh.data > 1 else (config.parallel.optimizer_sharding,)
    layers = config.model.layers // mesh.pipeline
    chunked = [n for n in (1, 2, 4) if layers % n == 0] if mesh.pipeline > 1 else [1]
    for microbatches in divisors(sequences):
        if microbatches < min(
            mesh.pipeline, sequences
        ):  # stages would be idle for half of the time
            continue
        train = dataclasses.replace(config.train, microbatches=microbatches)
        for gather, zero, chunks in itertools.product(gathers, zeros, chunked):
            if chunks > 1 and microbatches % mesh.pipeline:
                continue
            parallel = _parallel(config.parallel, gather, zero, chunks, mesh.pipeline > 1)
            yield dataclasses.replace(config, train=train, parallel=parallel)


@functools.cache
def _parallel(
    before: ParallelConfig, gather: str, zero: str, chunks: int, pipelined: bool
) -> ParallelConfig:
    schedule = "1f1b" if pipelined else before.schedule
    return dataclasses.replace(
        before, gather=gather, optimizer_sharding=zero, chunks=chunks, schedule=schedule
    )


@functools.cache
def _policies(before: MemoryConfig) -> list[MemoryConfig]:
    """With every remat policy, from the one that keeps all to the one that keeps least."""
    return [dataclasses.replace(before, remat=remat) for remat in REMAT]


def _first_that_fits(config: Config, mesh: MeshConfig, hardware: Hardware) -> Candidate:
    """With the remat policy that recomputes least of those that fit; else with the one that holds
    least."""
    room = hardware.memory_bytes - RESERVE
    for memory in _policies(config.memory):
        choice = dataclasses.replace(config, memory=memory)
        peak = peak_memory(choice, mesh)
        if peak.total <= room:
            break
    time = step_time(choice, mesh, hardware)
    return Candidate(choice, mesh, peak, time, peak.total <= room)


def best_of_each_mesh(ranked: Iterable[Candidate]) -> list[Candidate]:
    """The first of every mesh, in order."""
    first: dict[MeshConfig, Candidate] = {}
    for candidate in ranked:
        first.setdefault(candidate.mesh, candidate)
    return list(first.values())


def illegal(
    config: Config, devices: int, fixed: Mapping[str, int | None]
) -> dict[str, list[MeshConfig]]:
    """Meshes that the rules of the config refuse, by the rule that does, the one that refuses most
    first. Of rules that differ in numbers alone, the words of the first."""
    found: dict[str, tuple[str, list[MeshConfig]]] = {}
    for mesh in meshes(devices, fixed):
        choice = next(choices(config, mesh), None)
        try:
            if choice is None:
                batch, shards = config.train.batch_size, mesh.batch_shards
                raise ConfigError(
                    f"train.batch_size={batch} is not divisible by data x fsdp x expert = {shards}"
                )
            validate_mesh(choice, mesh)
        except ConfigError as error:
            found.setdefault(re.sub(r"\d+", "", str(error).split(";")[0]), (str(error), []))[
                1
            ].append(mesh)
    return dict(sorted(found.values(), key=lambda rule: -len(rule[1])))


def fewest_that_fit(
    config: Config, hardware: Hardware, devices: int, most: int = 4096
) -> Candidate | None:
    """The best on twice as many devices, or four times, and so on: the first of these that fits."""
    while (devices := 2 * devices) <= most:
        try:
            best = rank(config, hardware, devices)[0]
        except ConfigError:
            continue
        if best.fits:
            return best
    return None
