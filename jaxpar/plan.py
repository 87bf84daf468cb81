"""Rank meshes for a config without a device: which fit, how fast they will be, and why.

  python -m jaxpar.plan --config=configs/llama3_70b.py --hardware=h100 --devices=64 [--verify_top=3] [--json=FILE]

Tries every mesh with every number of microbatches, remat policy, way to gather weights, and pipeline schedule, predicts
memory and time of each by arithmetic, and ranks by tokens/s. Sizes given as --mesh.AXIS=N are kept.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxpar import cli
from jaxpar.apart import CompileFailed, Target, check_gpu_compiler, compile_report
from jaxpar.config import AXES, REMAT, Config, ConfigError, MeshConfig
from jaxpar.counts import step_flops
from jaxpar.hardware import NAMES, Hardware, find
from jaxpar.memory import RESERVE, Peak, peak_memory
from jaxpar.page import plan_page
from jaxpar.timing import StepTime, bubble_fraction, members_near, step_time
from jaxpar.traffic import by_axes, transfers
from jaxpar.validation import validate_mesh


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a config, and what it is predicted to cost."""

    config: Config
    mesh: MeshConfig
    chunks: int
    peak: Peak
    time: StepTime
    fits: bool

    @property
    def seconds(self) -> float:
        return self.time.total

    def mfu(self, hardware: Hardware) -> float:
        """Model FLOPs (causal attention once) a second, of the dense peak of all devices."""
        peak = hardware.peaks.get(self.config.precision.compute, hardware.peaks["float32"])
        return step_flops(self.config).per_step / (self.seconds * self.mesh.devices * peak)

    def flags(self) -> str:
        """The command line that asks for it."""
        config = self.config
        flags = [f"--mesh.{axis}={size}" for axis, size in zip(AXES, self.mesh.shape, strict=True) if size > 1]
        flags += [
            f"--config.train.microbatches={config.train.microbatches}",
            f"--config.memory.remat={config.memory.remat}",
        ]
        flags += [f"--config.parallel.gather={config.parallel.gather}"] if self.mesh.fsdp > 1 else []
        if self.mesh.data > 1:
            flags.append(f"--config.parallel.optimizer_sharding={config.parallel.optimizer_sharding}")
        if self.mesh.pipeline > 1:
            flags += [
                f"--config.parallel.schedule={config.parallel.schedule}",
                f"--config.parallel.chunks={self.chunks}",
            ]
        return " ".join(flags)


def rank(
    config: Config, hardware: Hardware, devices: int, fixed: Mapping[str, int | None] | None = None
) -> list[Candidate]:
    """Every candidate, those that fit first, the fastest first (see `ALIKE`); of those that do not, the smallest first.

    Args:
      config: the run; its global batch is kept, its microbatches, remat, gather and ZeRO-1 are chosen.
      hardware: what it shall run on.
      devices: how many.
      fixed: sizes of axes that are not to be chosen.

    Raises:
      ConfigError: no mesh of so many devices is legal for this config; with the reason of the last one refused.
    """
    found, refusal = [], None
    for mesh in meshes(devices, fixed or {}):
        try:
            validate_mesh(config, dataclasses.replace(mesh, pipeline=1), training=False)
        except ConfigError as error:
            refusal = error
            continue
        for choice, chunks in choices(config, mesh):
            try:
                validate_mesh(choice, mesh)
            except ConfigError as error:
                refusal = error
                continue
            found.append(_first_that_fits(choice, mesh, chunks, hardware))
    if not found:
        raise ConfigError(f"no mesh of {devices} devices is legal for this config. The last one tried: {refusal}")
    return sorted(found, key=_order)


ALIKE = 0.003
"""Times that differ by less count as equal; then the smaller peak comes first."""


def _order(candidate: Candidate) -> tuple:
    if candidate.fits:
        return False, round(math.log(candidate.seconds) / ALIKE), candidate.peak.total
    return True, candidate.peak.total


def meshes(devices: int, fixed: Mapping[str, int | None]) -> Iterator[MeshConfig]:
    """Every factorisation of the devices into the axes; `expert` stays 1, for there are no experts yet."""

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


def choices(config: Config, mesh: MeshConfig) -> Iterator[tuple[Config, int]]:
    """The config with each number of microbatches, way to gather and ZeRO-1; and pipeline chunks."""
    sequences, rest = divmod(config.train.batch_size, mesh.batch_shards)
    if rest:
        return
    gathers = ("per_layer", "per_step") if mesh.fsdp > 1 and mesh.pipeline == 1 else (config.parallel.gather,)
    zeros = ("none", "data") if mesh.data > 1 else (config.parallel.optimizer_sharding,)
    layers = config.model.layers // mesh.pipeline
    chunked = [n for n in (1, 2, 4) if layers % n == 0] if mesh.pipeline > 1 else [1]
    for microbatches in divisors(sequences):
        train = dataclasses.replace(config.train, microbatches=microbatches)
        for gather in gathers:
            for zero in zeros:
                parallel = dataclasses.replace(config.parallel, gather=gather, optimizer_sharding=zero)
                choice = dataclasses.replace(config, train=train, parallel=parallel)
                for chunks in chunked:
                    if mesh.pipeline > 1:
                        parallel = dataclasses.replace(parallel, schedule="1f1b", chunks=chunks)
                        choice = dataclasses.replace(choice, parallel=parallel)
                    yield choice, chunks


def _first_that_fits(config: Config, mesh: MeshConfig, chunks: int, hardware: Hardware) -> Candidate:
    """With the remat policy that recomputes least of those that fit; else with the one that holds least."""
    room = hardware.memory_bytes - RESERVE
    for remat in REMAT:  # from the one that keeps all to the one that keeps least
        choice = dataclasses.replace(config, memory=dataclasses.replace(config.memory, remat=remat))
        peak = peak_memory(choice, mesh, chunks=chunks)
        if peak.total <= room:
            break
    time = step_time(choice, mesh, hardware, chunks=chunks)
    return Candidate(choice, mesh, chunks, peak, time, peak.total <= room)


def best_of_each_mesh(ranked: Iterable[Candidate]) -> list[Candidate]:
    """The first of every mesh, in order."""
    first: dict[MeshConfig, Candidate] = {}
    for candidate in ranked:
        first.setdefault(candidate.mesh, candidate)
    return list(first.values())


def reason(candidate: Candidate, best: Candidate, hardware: Hardware) -> str:
    """One line: why it does not fit; else what the best one gains, or what this one loses against the best."""
    peak, time = candidate.peak, candidate.time
    if not candidate.fits:
        parts = sorted(vars(peak).items(), key=lambda item: -item[1])
        largest = " and ".join(f"{name} {gib(size)}" for name, size in parts[:2])
        return f"needs {gib(peak.total)} of {gib(hardware.memory_bytes - RESERVE)} GiB: {largest}{_whole(candidate)}"
    losses = {
        f"waits for {_across(axes, candidate, hardware)}": seconds - best.time.exposed.get(axes, 0.0)
        for axes, seconds in time.exposed.items()
    }
    losses["recomputes and multiplies narrower matrices"] = time.matmul - best.time.matmul
    losses["computes attention again"] = time.attention - best.time.attention
    losses["moves more memory"] = time.memory - best.time.memory
    losses["stages idle"] = time.bubble - best.time.bubble
    worst = sorted(((s, name) for name, s in losses.items() if s > 0.002 * best.seconds), reverse=True)[:2]
    if worst:
        share = candidate.seconds / best.seconds - 1
        return f"{share:.1%} slower: " + ", ".join(f"{name} (+{s:.2f} s)" for s, name in worst)
    waits = sum(time.exposed.values())
    covered = sum(time.hidden.values())
    told = f"{time.compute / time.total:.0%} of the step is computation"
    if covered:
        told += f"; {covered:.2f} s of {' and '.join(time.hidden)} traffic run beside it"
    if waits > 0.001 * time.total:
        told += f", {waits:.2f} s are waited for"
    return f"{told}; {gib(hardware.memory_bytes - RESERVE - peak.total)} GiB to spare"


def _across(axes: str, candidate: Candidate, hardware: Hardware) -> str:
    names = tuple(axes.split("+"))
    size = math.prod(getattr(candidate.mesh, axis) for axis in names)
    near = members_near(names, candidate.mesh, hardware.domain)
    return f"{axes}={size}" + (" over the network" if near < size else "")


def _whole(candidate: Candidate) -> str:
    """Over which axes the state is held several times."""
    mesh, zero = candidate.mesh, candidate.config.parallel.optimizer_sharding == "data"
    axes = [axis for axis in ("data", "sequence") if getattr(mesh, axis) > 1 and not (axis == "data" and zero)]
    return f"; nothing of them is shared out over {' and '.join(axes)}" if axes else ""


def gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def as_json(candidate: Candidate, best: Candidate, hardware: Hardware) -> dict[str, Any]:
    """One candidate as `--json` writes it: bytes of a device, seconds of a step."""
    config, time = candidate.config, candidate.time
    found = transfers(config, candidate.mesh, chunks=candidate.chunks)
    return {
        "mesh": dataclasses.asdict(candidate.mesh),
        "microbatches": config.train.microbatches,
        "schedule": "1f1b" if candidate.mesh.pipeline > 1 else None,
        "chunks": candidate.chunks,
        "remat": config.memory.remat,
        "gather": config.parallel.gather,
        "optimizer_sharding": config.parallel.optimizer_sharding,
        "fits": candidate.fits,
        "memory": _memory(vars(candidate.peak), candidate.peak.total),
        "step_seconds": time.total,
        "time": {**dataclasses.asdict(time), "compute": time.compute},
        "tokens_per_second": step_flops(config).tokens / time.total,
        "mfu": candidate.mfu(hardware),
        "bubble_fraction": bubble_fraction(config.train.microbatches, candidate.mesh.pipeline, candidate.chunks),
        "communication": by_axes(found),
        "reason": reason(candidate, best, hardware),
        "flags": candidate.flags(),
        "verified": False,
    }


def _memory(parts: Mapping[str, int], total: int) -> dict[str, int]:
    names = {"parameters": "params", "vocabulary": "logits"}
    return {names.get(name, name): size for name, size in parts.items()} | {"reserve": RESERVE, "total": total}


def verify(rows: list[dict[str, Any]], candidates: list[Candidate], hardware: Hardware, timeout: float) -> None:
    """Compiles candidates and puts compiled peaks and bytes in the place of predicted ones."""
    target = Target(hardware, hardware.topology(candidates[0].mesh.devices))
    for row, candidate in zip(rows, candidates, strict=False):
        try:
            report = compile_report(candidate.config, dataclasses.asdict(candidate.mesh), target, timeout)
        except CompileFailed as error:
            row["reason"] = f"could not be compiled: {error}"
            continue
        peak = report["memory"]["peak"]
        row["predicted_total"], row["verified"] = row["memory"]["total"], True
        row["memory"] = _memory(report["memory"]["parts"], peak)
        row["fits"] = peak + RESERVE <= hardware.memory_bytes
        row["communication"] = {}
        for found in report["collectives"]:
            axes = "+".join(found["axes"])
            row["communication"][axes] = row["communication"].get(axes, 0) + found["bytes"]


def print_table(report: dict[str, Any], top: int) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    rows = report["candidates"]
    fitting = [row for row in rows if row["fits"]]
    table = Table(
        Column("mesh"), "micro-\nbatches", "remat", "gather", "ZeRO", "peak\nGiB", "step s", "tokens/s\na GPU", "MFU",
        Column("why", ratio=1),
        title=f"{report['devices']} x {report['hardware']}: {len(fitting)} of {len(rows)} meshes fit; predictions",
    )  # fmt: skip
    shown = fitting[:top] + [row for row in rows if not row["fits"]][: 3 if fitting else top]
    for row in shown:
        peak = gib(row["memory"]["total"]) + (" compiled" if row["verified"] else "")
        table.add_row(
            str(MeshConfig(**row["mesh"])),
            str(row["microbatches"]),
            row["remat"],
            row["gather"] if row["mesh"]["fsdp"] > 1 else "",
            row["optimizer_sharding"] if row["mesh"]["data"] > 1 else "",
            peak if row["fits"] else f"[red]{peak}",
            f"{row['step_seconds']:.2f}",
            f"{row['tokens_per_second'] / report['devices']:,.0f}",
            f"{row['mfu']:.1%}",
            row["reason"],
        )
    Console().print(table)
    if fitting:
        print(f"start the first with: {fitting[0]['flags']}")
    else:
        print("no mesh fits: use more devices, a smaller batch or shorter sequences")


def main(argv: list[str] | None = None) -> int:
    request = cli.parse(
        argv,
        __doc__ or "",
        hardware=cli.Option(None, f"{', '.join(NAMES)}, or a TOML file (see jaxpar/hardware.py)", required=True),
        devices=cli.Option(0, "how many GPUs", required=True),
        top=cli.Option(8, "meshes to show"),
        verify_top=cli.Option(0, "compile so many of the best, and show compiled memory in place of predictions"),
        timeout=cli.Option(600.0, "seconds that one compilation may take"),
        json=cli.Option(None, "write all meshes as JSON to this file; - is standard output, and nothing else"),
        html=cli.Option(None, "write a page to this file"),
    )
    options, config = request.options, request.config
    if options["devices"] < 1:
        raise ConfigError(f"--devices={options['devices']} must be at least 1")
    hardware = find(options["hardware"])
    for flag in ("json", "html"):
        if options[flag] != "-":
            cli.check_output(flag, options[flag])
    if options["verify_top"]:
        check_gpu_compiler()
    ranked = best_of_each_mesh(rank(config, hardware, options["devices"], request.mesh))
    rows = [as_json(candidate, ranked[0], hardware) for candidate in ranked]
    if options["verify_top"]:
        verify(rows[: options["verify_top"]], ranked, hardware, options["timeout"])
        rows.sort(key=lambda row: not row["fits"])
    report = {"hardware": hardware.name, "devices": options["devices"], "candidates": rows}
    if options["html"]:
        Path(options["html"]).write_text(plan_page(report))
    if options["json"] == "-":
        print(json.dumps(report))
    else:
        print_table(report, options["top"])
        if options["json"]:
            Path(options["json"]).write_text(json.dumps(report, indent=2) + "\n")
    return 0 if any(row["fits"] for row in rows) else 1


if __name__ == "__main__":
    cli.run(main)
