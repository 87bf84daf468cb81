"""Rank meshes for a config without a device: which fit, how fast they will be, and why.

  python -m jaxpar.plan --config=configs/llama3_70b.py --hardware=h100 --devices=64 [--verify_top=3]
  [--json=FILE]

Tries every mesh with every number of microbatches, remat policy, way to gather weights, and
pipeline schedule, predicts memory and time of each by arithmetic, and ranks by tokens/s. Sizes
given as --mesh.AXIS=N are kept.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpar import cli
from jaxpar.config import Config, ConfigError, MeshConfig
from jaxpar.estimate.counts import step_flops
from jaxpar.estimate.hardware import NAMES, Hardware, find
from jaxpar.estimate.memory import RESERVE
from jaxpar.estimate.ranking import Candidate, best_of_each_mesh, fewest_that_fit, illegal, rank
from jaxpar.estimate.timing import bubble_fraction, members_near
from jaxpar.estimate.traffic import by_axes, transfers
from jaxpar.report.apart import CompileFailed, Target, check_gpu_compiler, compile_report
from jaxpar.report.gantt import picture
from jaxpar.report.page import plan_page, subject
from jaxpar.validation import validate_mesh


def reason(candidate: Candidate, best: Candidate, hardware: Hardware) -> str:
    """One line: why it does not fit; else what the best one gains, or what this one loses against
    the best."""
    peak, time = candidate.peak, candidate.time
    if not candidate.fits:
        parts = sorted(vars(peak).items(), key=lambda item: -item[1])
        largest = " and ".join(f"{name} {gib(size)}" for name, size in parts[:2])
        return f"needs {gib(peak.total)} of {gib(hardware.memory_bytes - RESERVE)} GiB: {largest}{_whole(candidate)}"
    losses = {
        f"waits for {_across(axes, candidate, hardware)}": seconds
        - best.time.exposed.get(axes, 0.0)
        for axes, seconds in time.exposed.items()
    }
    again = (
        candidate.config.memory.remat != best.config.memory.remat
        or candidate.mesh.pipeline != best.mesh.pipeline
    )
    losses["multiplies again or narrower" if again else "multiplies narrower matrices"] = (
        time.matmul - best.time.matmul
    )
    losses["computes attention again"] = time.attention - best.time.attention
    losses["moves more memory"] = time.memory - best.time.memory
    losses["stages idle"] = time.bubble - best.time.bubble
    worst = sorted(
        ((s, name) for name, s in losses.items() if s > 0.002 * best.seconds), reverse=True
    )[:2]
    if worst:
        share = candidate.seconds / best.seconds - 1
        return f"{share:.1%} slower: " + ", ".join(f"{name} (+{duration(s)})" for s, name in worst)
    waits = sum(time.exposed.values())
    covered = sum(time.hidden.values())
    told = f"{time.compute / time.total:.0%} of the step is computation"
    if covered:
        told += f"; {duration(covered)} of {' and '.join(time.hidden)} traffic run beside it"
    if waits > 0.001 * time.total:
        most = sorted(time.exposed, key=lambda axes: -time.exposed[axes])[:2]
        told += (
            f"; {duration(waits)} of traffic are waited for, most of it over {' and '.join(most)}"
        )
    if time.bubble:
        told += f"; stages idle for {duration(time.bubble)}"
    return f"{told}; {gib(hardware.memory_bytes - RESERVE - peak.total)} GiB to spare"


def _across(axes: str, candidate: Candidate, hardware: Hardware) -> str:
    names = tuple(axes.split("+"))
    size = math.prod(getattr(candidate.mesh, axis) for axis in names)
    near = members_near(names, candidate.mesh, hardware.domain)
    return f"{axes}={size}" + (" over the network" if near < size else "")


def _whole(candidate: Candidate) -> str:
    """Over which axes the state is held several times."""
    mesh, zero = candidate.mesh, candidate.config.parallel.optimizer_sharding == "data"
    axes = [
        axis
        for axis in ("data", "sequence")
        if getattr(mesh, axis) > 1 and not (axis == "data" and zero)
    ]
    return f"; nothing of them is shared out over {' and '.join(axes)}" if axes else ""


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def as_json(candidate: Candidate, best: Candidate, hardware: Hardware) -> dict[str, Any]:
    """One candidate as `--json` writes it: bytes of a device, seconds of a step."""
    config, time = candidate.config, candidate.time
    found = transfers(config, candidate.mesh)
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
        "bubble_fraction": bubble_fraction(
            config.train.microbatches, candidate.mesh.pipeline, candidate.chunks
        ),
        "communication": by_axes(found),
        "reason": reason(candidate, best, hardware),
        "flags": candidate.flags(),
        "verified": False,
    }


def _memory(parts: Mapping[str, int], total: int) -> dict[str, int]:
    return {**parts, "reserve": RESERVE, "total": total}


def verify(
    rows: list[dict[str, Any]], candidates: list[Candidate], hardware: Hardware, timeout: float
) -> None:
    """Compiles candidates and puts compiled peaks and bytes in the place of predicted ones."""
    target = Target(hardware, hardware.topology(candidates[0].mesh.devices))
    for row, candidate in zip(rows, candidates, strict=False):
        try:
            report = compile_report(
                candidate.config, dataclasses.asdict(candidate.mesh), target, timeout
            )
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
    """The best, and the smallest of those that do not fit: figures, and beside them the mesh, its
    settings, and why."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    rows, console = report["candidates"], Console(highlight=False)
    fitting = [row for row in rows if row["fits"]]
    numbers = (
        Column(name, justify="right", no_wrap=True)
        for name in ("peak\nGiB", "step", "tokens/s\na GPU", "MFU")
    )
    table = Table(
        *numbers,
        Column("mesh, settings, why", ratio=1),
        box=None,
        padding=(0, 2, 1, 0),
        pad_edge=False,
    )
    for row in fitting[:top] + [row for row in rows if not row["fits"]][: 3 if fitting else top]:
        peak = gib(row["memory"]["total"]) + ("\ncompiled" if row["verified"] else "")
        table.add_row(
            peak if row["fits"] else f"[red]{peak}",
            duration(row["step_seconds"]),
            f"{row['tokens_per_second'] / report['devices']:,.0f}",
            f"{row['mfu']:.1%}",
            f"[bold]{MeshConfig(**row['mesh'])}[/bold]\n{_settings(row)}\n{escape(row['reason'])}",
        )
    title = f"{report['devices']} x {report['hardware']}: {len(fitting)} of {len(rows)} legal meshes fit"
    console.print(f"[bold]{title}[/bold]; predictions by arithmetic\n")
    console.print(table)
    for rule, refused in list(report["illegal"].items())[:3]:
        count = f"{len(refused)} mesh{'es' if len(refused) > 1 else ''}"
        console.print(f"not legal, {count}: {escape(rule)}", style="dim")


def _settings(row: Mapping[str, Any]) -> str:
    count, chunks = row["microbatches"], row["chunks"]
    told = {
        f"{count} microbatch{'es' if count > 1 else ''}": True,
        f"remat {row['remat']}": True,
        f"weights gathered {row['gather'].replace('_', ' ')}": row["mesh"]["fsdp"] > 1,
        "ZeRO-1": row["mesh"]["data"] > 1 and row["optimizer_sharding"] == "data",
        f"{row['schedule']}, {chunks} chunk{'s' if chunks > 1 else ''} a stage": row["mesh"][
            "pipeline"
        ]
        > 1,
    }
    return ", ".join(text for text, here in told.items() if here)


def draw(config: Config, stages: int) -> str:
    """The picture of a run's pipeline."""
    parallel = config.parallel
    return picture(parallel.schedule, stages, config.train.microbatches, parallel.chunks)


def best_pipeline(
    config: Config, mesh: Mapping[str, int | None], ranked: list[Candidate]
) -> tuple[str, str]:
    """What to draw, in words and as SVG: the pipeline of the config's own settings where the mesh
    is given with one, else of the best candidate that has one; "" and "" where none has.

    Raises:
      ConfigError: the settings and the given mesh do not go together.
    """
    if (stages := mesh.get("pipeline") or 1) > 1:
        validate_mesh(config, MeshConfig(pipeline=stages))
        return (
            f"the config's own pipeline={stages} with {config.train.microbatches} microbatches",
            draw(config, stages),
        )
    for place, found in enumerate(ranked, 1):
        if found.mesh.pipeline > 1:
            return f"the best pipelined mesh, number {place}: {found.mesh}", draw(
                found.config, found.mesh.pipeline
            )
    return "", ""


def print_verdict(report: Mapping[str, Any], config: Config, hardware: Hardware) -> None:
    """How to start the best; or how many devices it takes."""
    best = next((row for row in report["candidates"] if row["fits"]), None)
    if best:
        print("start the first with:", *best["flags"].split(), sep="\n  ")
        return
    print("no mesh fits: use more devices, a smaller batch or shorter sequences")
    if enough := fewest_that_fit(config, hardware, report["devices"]):
        print(
            f"--devices={enough.mesh.devices} is enough, with {enough.mesh} "
            f"({gib(enough.peak.total)} GiB)"
        )


def main(argv: list[str] | None = None) -> int:
    request = cli.parse(
        argv,
        __doc__ or "",
        hardware=cli.Option(
            None,
            f"{', '.join(NAMES)}, or a TOML file (see jaxpar/estimate/hardware.py)",
            required=True,
        ),
        devices=cli.Option(0, "how many GPUs", required=True),
        top=cli.Option(8, "meshes to show"),
        verify_top=cli.Option(
            0, "compile so many of the best, and show compiled memory in place of predictions"
        ),
        timeout=cli.Option(600.0, "seconds that one compilation may take"),
        json=cli.Option(
            None, "write all meshes as JSON to this file; - is standard output, and nothing else"
        ),
        html=cli.Option(None, "write a page to this file"),
        timetable=cli.Option(
            None, "draw the pipeline of --mesh.pipeline, or of the best mesh with one, as SVG"
        ),
    )
    options, config = request.options, request.config
    if options["devices"] < 1:
        raise ConfigError(f"--devices={options['devices']} must be at least 1")
    hardware = find(options["hardware"])
    for flag in ("json", "html", "timetable"):
        if options[flag] != "-":
            cli.check_output(flag, options[flag])
    if options["verify_top"]:
        check_gpu_compiler()
    ranked = best_of_each_mesh(rank(config, hardware, options["devices"], request.mesh))
    pipelined, drawing = best_pipeline(config, request.mesh, ranked)
    if options["timetable"] and not drawing:
        raise ConfigError(
            f"--timetable={options['timetable']}: no legal mesh of these devices has a pipeline"
        )
    rows = [as_json(candidate, ranked[0], hardware) for candidate in ranked]
    if options["verify_top"]:
        verify(rows[: options["verify_top"]], ranked, hardware, options["timeout"])
        rows.sort(key=lambda row: not row["fits"])
    arguments = sys.argv[1:] if argv is None else argv
    report = {
        "request": subject("jaxpar.plan", arguments, config),
        "hardware": hardware.name,
        "devices": options["devices"],
        "pipelined": pipelined,
        "candidates": rows,
        "illegal": {
            rule: [str(mesh) for mesh in refused]
            for rule, refused in illegal(config, options["devices"], request.mesh).items()
        },
    }
    if options["html"]:
        Path(options["html"]).write_text(plan_page(report, drawing))
    if options["timetable"]:
        Path(options["timetable"]).write_text(drawing)
    if options["json"] == "-":
        print(json.dumps(report))
        return 0 if any(row["fits"] for row in rows) else 1
    print_table(report, options["top"])
    print_verdict(report, config, hardware)
    if options["timetable"]:
        print(f"{options['timetable']}: timetable of {pipelined}")
    if options["json"]:
        Path(options["json"]).write_text(json.dumps(report, indent=2) + "\n")
    return 0 if any(row["fits"] for row in rows) else 1


if __name__ == "__main__":
    cli.run(main)
