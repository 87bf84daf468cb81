"""Rank meshes for a config without a device: which fit, how fast they will be, and why.

  python -m jaxpar.plan --config=configs/llama3_70b.py --hardware=h100 --devices=64 [--verify_top=3]
  [--json=FILE]

Tries every mesh with every number of microbatches, remat policy, way to gather weights, ZeRO-1 and
pipeline chunks, predicts memory and time of each by arithmetic, and ranks by tokens/s. What the
command line names is kept: --mesh.AXIS=N, --config.train.microbatches=N, --config.memory.remat=...
"""

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpar import cli
from jaxpar.config import ConfigError, MeshConfig
from jaxpar.estimate.counts import step_flops
from jaxpar.estimate.hardware import NAMES, Hardware, find
from jaxpar.estimate.memory import PART_NAMES, RESERVE, Peak
from jaxpar.estimate.ranking import (
    ANY,
    SEARCHED,
    Candidate,
    Pins,
    best_of_each_mesh,
    fewest_that_fit,
    illegal,
    order,
    rank,
    weigh,
)
from jaxpar.estimate.timing import bubble_fraction, members_near
from jaxpar.estimate.traffic import by_axes, transfers
from jaxpar.report.apart import (
    TIMEOUT,
    CompileFailed,
    Target,
    check_gpu_compiler,
    compile_report,
)
from jaxpar.report.gantt import picture
from jaxpar.report.page import plan_page, subject


def reason(candidate: Candidate, best: Candidate, hardware: Hardware) -> str:
    """One line: why it does not fit; else what the best one gains, or what this one loses against
    the best."""
    peak, time = candidate.peak, candidate.time
    if not candidate.fits:
        parts = sorted(vars(peak).items(), key=lambda item: -item[1])
        largest = " and ".join(f"{PART_NAMES[name]} {gib(size)}" for name, size in parts[:2])
        return (
            f"needs {gib(peak.total)} of {gib(hardware.memory_bytes - RESERVE)} GiB: "
            f"{largest}{_copies(candidate)}"
        )
    losses = {
        f"waits for {_across(axes, candidate, hardware)}": seconds
        - best.time.exposed.get(axes, 0.0)
        for axes, seconds in time.exposed.items()
    }
    losses["computes more a second time"] = time.again - best.time.again
    losses["multiplies narrower matrices"] = (
        time.matmul + time.attention - time.again
        - (best.time.matmul + best.time.attention - best.time.again)
    )  # fmt: skip
    losses["moves more memory"] = time.memory - best.time.memory
    losses["stages idle"] = time.bubble - best.time.bubble
    worst = sorted(
        ((s, name) for name, s in losses.items() if s > 0.002 * best.seconds), reverse=True
    )[:2]
    crowded = "" if candidate.overlaps or not _over_links(candidate) else _CROWDED
    if candidate is not best and worst:
        share = candidate.seconds / best.seconds - 1
        lost = ", ".join(f"{name} (+{duration(s)})" for s, name in worst)
        return f"{share:.1%} slower: {lost}{crowded}"
    told = [f"{time.compute / time.total:.0%} of the step is computation"]
    if time.again > 0.01 * time.total:
        told.append(f"{duration(time.again)} of it a second time, to save memory")
    if (covered := sum(time.hidden.values())) > 0.001 * time.total:
        axes = " and ".join(axes for axes, s in time.hidden.items() if s > 0.001 * time.total)
        told.append(f"{duration(covered)} of {axes} traffic run beside it")
    if (waits := sum(time.exposed.values())) > 0.001 * time.total:
        most = sorted(time.exposed, key=lambda axes: -time.exposed[axes])[:2]
        told.append(
            f"{duration(waits)} of traffic are waited for, most of it over {' and '.join(most)}"
        )
    if time.bubble:
        told.append(f"stages idle for {duration(time.bubble)}")
    told.append(f"{gib(hardware.memory_bytes - RESERVE - peak.total)} GiB to spare")
    return "; ".join(told) + crowded


_CROWDED = "; memory is too full for the compiler to run traffic beside computation"


def _over_links(candidate: Candidate) -> bool:
    """Whether something could run beside the computation if there was room."""
    return any(transfer.hidden for transfer in transfers(candidate.config, candidate.mesh))


def _across(axes: str, candidate: Candidate, hardware: Hardware) -> str:
    names = tuple(axes.split("+"))
    size = math.prod(getattr(candidate.mesh, axis) for axis in names)
    near = members_near(names, candidate.mesh, hardware.domain)
    return f"{axes}={size}" + (" over the network" if near < size else "")


def _copies(candidate: Candidate) -> str:
    """Over which axes the state is held several times."""
    mesh, zero = candidate.mesh, candidate.config.parallel.optimizer_sharding == "data"
    axes = [
        f"{axis}={getattr(mesh, axis)}"
        for axis in ("data", "sequence")
        if getattr(mesh, axis) > 1 and not (axis == "data" and zero)
    ]
    return f"; every device along {' and '.join(axes)} holds the same weights" if axes else ""


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def as_json(
    candidate: Candidate, best: Candidate, hardware: Hardware, pins: Pins = ANY
) -> dict[str, Any]:
    """One candidate as `--json` writes it: bytes of a device, seconds of a step."""
    config, time = candidate.config, candidate.time
    return {
        "mesh": dataclasses.asdict(candidate.mesh),
        "microbatches": config.train.microbatches,
        "schedule": config.parallel.schedule if candidate.mesh.pipeline > 1 else None,
        "chunks": candidate.chunks,
        "remat": config.memory.remat,
        "gather": config.parallel.gather,
        "optimizer_sharding": config.parallel.optimizer_sharding,
        "fits": candidate.fits,
        "overlaps": candidate.overlaps,
        "memory": _memory(candidate.peak),
        "step_seconds": time.total,
        "time": {**dataclasses.asdict(time), "compute": time.compute},
        "tokens_per_second": step_flops(config).tokens / time.total,
        "mfu": candidate.mfu(hardware),
        "bubble_fraction": bubble_fraction(
            config.train.microbatches, candidate.mesh.pipeline, candidate.chunks
        ),
        "communication": by_axes(transfers(config, candidate.mesh)),
        "reason": reason(candidate, best, hardware),
        "flags": shlex.join(candidate.flags(pins)),
        "verified": False,
    }


def _memory(peak: Peak) -> dict[str, int]:
    return {**vars(peak), "reserve": RESERVE, "total": peak.total}


def verify(
    ranked: Sequence[Candidate], hardware: Hardware, top: int, timeout: float
) -> tuple[list[Candidate], dict[MeshConfig, dict[str, Any]]]:
    """Compiles the best until the first `top` are compiled: those that turn out slower make room
    for others, four at most.

    Returns:
      The candidates with compiled peaks in place of predicted ones, and waiting for collectives
      that are not asynchronous, in their new order; and by mesh what JSON says besides.
    """
    ranked = list(ranked)
    target = Target(hardware, hardware.topology(ranked[0].mesh.devices))
    told: dict[MeshConfig, dict[str, Any]] = {}
    for _ in range(top + 4):
        todo = next(
            (n for n, candidate in enumerate(ranked[:top]) if candidate.mesh not in told), None
        )
        if todo is None:
            break
        before = ranked[todo]
        try:
            report = compile_report(before.config, before.mesh, target, timeout)
        except CompileFailed as error:
            told[before.mesh] = {"reason": f"could not be compiled: {error}"}
            continue
        sent, waited = _traffic(report["collectives"])
        synchronous = {axes: seconds / sent[axes][1] for axes, seconds in waited.items()}
        peak = Peak(**report["memory"]["parts"])
        ranked[todo] = weigh(before.config, before.mesh, hardware, peak, synchronous)
        told[before.mesh] = {
            "verified": True,
            "predicted_total": before.peak.total,
            "predicted_seconds": before.seconds,
            "communication": {axes: size for axes, (size, _) in sent.items()},
            "synchronous": synchronous,
        }
        ranked.sort(key=order)
    return ranked, told


def _traffic(
    collectives: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, tuple[int, float]], dict[str, float]]:
    """Bytes and seconds of compiled collectives by axes, and seconds of those that are not
    asynchronous."""
    sent: dict[str, tuple[int, float]] = {}
    waited: dict[str, float] = {}
    for collective in collectives:
        axes, seconds = "+".join(collective["axes"]), collective["seconds"] or 0.0
        size, so_far = sent.get(axes, (0, 0.0))
        sent[axes] = size + collective["bytes"], so_far + seconds
        if not collective["asynchronous"] and seconds:
            waited[axes] = waited.get(axes, 0.0) + seconds
    return sent, waited


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
    title = f"{report['devices']} x {report['hardware']}"
    counts = f"{len(fitting)} of {len(rows)} legal meshes fit"
    console.print(f"[bold]{title}: {counts}[/bold]; predicted by arithmetic\n")
    console.print(table)
    for rule, refused in list(report["illegal"].items())[:3]:
        count = f"{len(refused)} mesh{'es' if len(refused) > 1 else ''}"
        console.print(f"not legal, {count}: {escape(rule)}", style="dim")
    if any(
        sum(row["time"]["hidden"].values()) > 0 and not row["verified"] for row in fitting[:top]
    ):
        console.print(_CAVEAT, style="dim")


_CAVEAT = (
    "That traffic runs beside computation is assumed where the peak leaves the compiler room for "
    "it; --verify_top=N compiles the first N and sees."
)


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


def best_pipeline(ranked: Sequence[Candidate]) -> tuple[str, str]:
    """The pipeline of the best candidate that has one, in words and as SVG; "" and "" where none
    has."""
    for place, candidate in enumerate(ranked, 1):
        if (stages := candidate.mesh.pipeline) > 1:
            parallel, M = candidate.config.parallel, candidate.config.train.microbatches
            return (
                f"the best pipelined mesh, number {place}: {candidate.mesh} with {M} microbatches",
                picture(parallel.schedule, stages, M, parallel.chunks),
            )
    return "", ""


def print_verdict(
    ranked: Sequence[Candidate], request: cli.Request, hardware: Hardware, pins: Pins
) -> None:
    """How to start the best; or how many devices it takes."""
    from rich.console import Console

    best, devices = ranked[0], ranked[0].mesh.devices
    if best.fits:
        print("start the first with:")
    else:
        kept = " and keeps what is named" if pins.flags(request.config) else ""
        print(f"no mesh fits{kept};")
        print("use more devices, a smaller batch or shorter sequences")
        best = fewest_that_fit(request.config, hardware, devices, pins)
        if best is None:
            return
        enough = f"--devices={best.mesh.devices} is enough, with {best.mesh}"
        Console().print(f"{enough} ({gib(best.peak.total)} GiB):", highlight=False, markup=False)
    flags = [f"--config={request.source}", *best.flags(pins)]
    print("  python -m jaxpar.train \\\n    " + " \\\n    ".join(map(shlex.quote, flags)))


def main(argv: list[str] | None = None) -> int:
    request = cli.parse(
        argv,
        __doc__ or "",
        chooses=SEARCHED,
        hardware=cli.Option(
            None,
            f"{', '.join(NAMES)}, or a TOML file (see jaxpar/estimate/hardware.py)",
            required=True,
        ),
        devices=cli.Option(0, "how many GPUs", required=True),
        top=cli.Option(8, "meshes to show", least=1),
        verify_top=cli.Option(
            0, "compile so many of the best, and show compiled memory in place of predictions"
        ),
        timeout=cli.Option(TIMEOUT, "seconds that one compilation may take", least=0),
        json=cli.Option(
            None, "write all meshes as JSON to this file; - is standard output, and nothing else"
        ),
        html=cli.Option(None, "write a page to this file"),
        timetable=cli.Option(None, "draw the pipeline of the best mesh that has one, as SVG"),
    )
    options, config, devices = request.options, request.config, request.options["devices"]
    if devices < 1:
        raise ConfigError(f"--devices={devices} must be at least 1")
    hardware, pins = find(options["hardware"]), Pins(request.mesh, request.named)
    for name in ("json", "html", "timetable"):
        if options[name] != "-":
            cli.check_output(name, options[name])
    if options["verify_top"]:
        hardware.topology(devices)
        check_gpu_compiler()
    ranked = best_of_each_mesh(rank(config, hardware, devices, pins))
    told: dict[MeshConfig, dict[str, Any]] = {}
    if options["verify_top"]:
        ranked, told = verify(ranked, hardware, options["verify_top"], options["timeout"])
    pipelined, drawing = best_pipeline(ranked)
    if options["timetable"] and not drawing:
        raise ConfigError(
            f"--timetable={options['timetable']}: no legal mesh of these devices has a pipeline"
        )
    arguments = sys.argv[1:] if argv is None else argv
    report = {
        "request": subject("jaxpar.plan", arguments, config),
        "hardware": hardware.name,
        "devices": devices,
        "pipelined": pipelined,
        "candidates": [
            as_json(candidate, ranked[0], hardware, pins) | told.get(candidate.mesh, {})
            for candidate in ranked
        ],
        "illegal": {
            rule: [str(mesh) for mesh in refused]
            for rule, refused in illegal(config, devices, pins).items()
        },
    }
    if options["html"]:
        Path(options["html"]).write_text(plan_page(report, drawing))
    if options["timetable"]:
        Path(options["timetable"]).write_text(drawing)
    if options["json"] == "-":
        print(json.dumps(report))
    else:
        print_table(report, options["top"])
        print_verdict(ranked, request, hardware, pins)
        if options["timetable"]:
            print(f"{options['timetable']}: timetable of {pipelined}")
        if options["json"]:
            Path(options["json"]).write_text(json.dumps(report, indent=2) + "\n")
    return 0 if ranked[0].fits else 1


if __name__ == "__main__":
    cli.run(main)
