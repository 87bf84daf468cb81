"""Compile one training step and account for its memory and its collectives, by name.

  python -m jaxpar.explain --config=configs/llama3_8b.py --mesh.fsdp=64 --hardware=h100 \\
      --topology=8x1x8
  python -m jaxpar.explain --config=configs/tiny.py --cpu_devices=8 --mesh.fsdp=4 --mesh.tensor=2

For GPUs that are not there (--hardware), for simulated CPU devices (--cpu_devices), or for the
devices of this machine. Everything is of one device and one step. When the step does not fit, it
says what fills the memory and compiles the cheapest changes that would make it fit.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from jaxpar import cli
from jaxpar.config import Config, ConfigError, MeshConfig
from jaxpar.estimate import remedy
from jaxpar.estimate.counts import parameter_count
from jaxpar.estimate.hardware import NAMES, find, of_kind
from jaxpar.estimate.memory import PART_NAMES, RESERVE, human, peak_memory
from jaxpar.estimate.ranking import Pins
from jaxpar.report.apart import (
    TIMEOUT,
    CompileFailed,
    Target,
    check_gpu_compiler,
    compile_report,
)
from jaxpar.report.gantt import picture
from jaxpar.report.page import explain_page, subject
from jaxpar.validation import resolve_mesh, validate_mesh


def find_target(request: cli.Request) -> Target:
    """The target that the flags name.

    Raises:
      ConfigError: unknown hardware, a topology that is none or does not multiply to the mesh, no
        GPU compiler.
    """
    name, topology = request.options["hardware"], request.options["topology"]
    if not name:
        if topology:
            raise ConfigError(
                f"--topology={topology} is of absent GPUs; say which, as --hardware=h100"
            )
        return Target(cpu_devices=request.cpu_devices or 0)
    if request.cpu_devices:
        raise ConfigError("--hardware and --cpu_devices exclude each other; leave one out")
    gpu = find(name)
    if not topology:
        if -1 in request.mesh.values():
            raise ConfigError(
                "a mesh size of -1 needs to know the number of devices; give --topology, as 8x1x8"
            )
        topology = gpu.topology(resolve_mesh(request.mesh, None).devices)
    target = Target(gpu, topology)
    try:
        resolve_mesh(request.mesh, target.devices)
    except ConfigError as error:
        raise ConfigError(f"--topology={topology} has {target.devices} devices: {error}") from error
    check_gpu_compiler()
    return target


def explain(config: Config, request: cli.Request, target: Target, timeout: float) -> dict[str, Any]:
    """The whole report; where the step does not fit, with compiled remedies.

    Raises:
      ConfigError: the mesh does not fit the devices.
      CompileFailed: the step as it is could not be compiled.
    """
    report = compile_report(config, request.mesh, target, timeout)
    peak, capacity = report["memory"]["peak"], report["capacity"]
    room = capacity - RESERVE if capacity and target.hardware else capacity
    report |= {"room": room, "fits": None if room is None else peak <= room, "remedies": []}
    if report["fits"] is False:
        report["remedies"] = compile_remedies(
            config, report, target, timeout, Pins(request.mesh, request.named)
        )
    if target.hardware and report["fits"] and peak > 0.75 * capacity:
        report["warnings"].append(
            "jax takes 75% of a GPU's memory unless it is told otherwise; start this run with "
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
        )
    return report


def compile_remedies(
    config: Config,
    report: Mapping[str, Any],
    target: Target,
    timeout: float,
    pins: Pins,
    most: int = 3,
) -> list[dict[str, Any]]:
    """The cheapest changes, compiled in order of predicted time until `most` of them fit; at most
    twice as many."""
    mesh, peak, room = MeshConfig(**report["mesh"]), report["memory"]["peak"], report["room"]
    gpu = target.hardware or of_kind(report["backend"])  # for the order alone
    scale = peak / peak_memory(config, mesh).total
    changes = remedy.changes(config, mesh, gpu, room=room, scale=scale, pins=pins)
    tried: list[dict[str, Any]] = []
    for change in changes[: 2 * most]:
        if sum(row["fits"] for row in tried) == most:
            break
        try:
            made = compile_report(change.config, dataclasses.asdict(change.mesh), target, timeout)
        except CompileFailed:
            continue
        compiled = made["memory"]["peak"]
        tried.append(
            {
                "flags": change.flags,
                "peak": compiled,
                "fits": compiled <= room,
                "predicted_step_seconds": change.seconds,
            }
        )
    return [row for row in tried if row["fits"]]


def check_simulated(config: Config, mesh: MeshConfig) -> None:
    """Refuses a step that simulated devices, which share this machine's memory, could not run."""
    needed = mesh.devices * peak_memory(config, mesh).total
    parameters = f"{parameter_count(config.model):,} parameters"
    cli.check_memory(needed, f"a step of {parameters} on {mesh.devices} simulated devices")


def print_report(report: Mapping[str, Any], rows: int, console: Console | None = None) -> None:
    """The verdict, and what would make it fit; then tables of at most so many rows."""
    console = console or Console(highlight=False)
    mesh = MeshConfig(**report["mesh"])
    for line in verdict(report):
        console.print(line, markup=False, soft_wrap=True)
    console.print(
        f"{report['devices']} x {report['backend']}, mesh {mesh}; of one device and step:"
    )
    console.print(f"attention: {report['attention']}", markup=False)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    for table in (
        memory_table(report),
        leaf_table(report, rows),
        buffer_table(report, rows),
        traffic_table(report, rows),
    ):
        console.print()
        console.print(table)
    console.print(f"\nmatmuls and attention: {report['flops'] / 1e12:,.2f} TFLOP")


def verdict(report: Mapping[str, Any]) -> list[str]:
    """Whether it fits, and what would, in lines; none where the room is not known."""
    if report["fits"] is None:
        return []
    peak, room = human(report["memory"]["peak"]), human(report["room"])
    if report["fits"]:
        return [f"fits: {peak} of {room}, besides {human(RESERVE)} for the CUDA context and NCCL"]
    blamed = remedy.blame(report["memory"]["parts"])
    lines = [f"DOES NOT FIT: {peak} of {room}; most of it for {blamed}"]
    lines += [f"  {human(row['peak'])} with {row['flags']}" for row in report["remedies"]]
    if not report["remedies"]:
        lines.append(
            "  no change of remat, microbatches, sharding or mesh on these devices was found to "
            "fit: use more devices"
        )
    return lines


def memory_table(report: Mapping[str, Any]) -> Table:
    """What the peak is made of, the largest first."""
    memory, room = report["memory"], report["room"]
    of = f" of {human(room)}" if room else ""
    table = _table(f"peak {human(memory['peak'])}{of}", "bytes", text="for", bar=True)
    for name, size in sorted(memory["parts"].items(), key=lambda item: -item[1]):
        if size:
            bar = "█" * round(24 * size / max(memory["peak"], room or 0))
            table.add_row(human(size), PART_NAMES[name], bar)
    return table


def leaf_table(report: Mapping[str, Any], rows: int) -> Table:
    """Parameters and optimizer state, the largest first."""
    leaves = sorted(report["by_parameter"], key=lambda leaf: -leaf["bytes_per_device"])
    many = f"the {min(rows, len(leaves))} largest of {len(leaves)} leaves"
    table = _table(f"{many} that a device holds between steps", "MiB", text="leaf")
    for leaf in leaves[:rows]:
        told = f"{leaf['dtype']}{leaf['shape']}, {leaf['sharding']}"
        table.add_row(mib(leaf["bytes_per_device"]), _two_lines(leaf["name"], told))
    return table


def buffer_table(report: Mapping[str, Any], rows: int) -> Table:
    """Temporary arrays that live at the peak."""
    buffers = report["temporaries"]
    many = f"the {min(rows, len(buffers))} largest of {len(buffers)} temporaries"
    table = _table(f"{many} at the peak", "MiB", text="array, and what made it")
    for buffer in buffers[:rows]:
        made_by = buffer["source"] or buffer["operation"] or "the compiler"
        told = f"{buffer['shape'] or 'an array'} for {PART_NAMES[buffer['part']]}"
        table.add_row(mib(buffer["bytes"]), _two_lines(told, made_by))
    return table


def traffic_table(report: Mapping[str, Any], rows: int) -> Table:
    """Collectives, the longest first."""
    collectives = report["collectives"]
    many = f"the {min(rows, len(collectives))} longest of {len(collectives)} collectives"
    numbers = ("MiB", "times", "ms")
    table = _table(f"{many}; ms at link speed, of all times", *numbers, text="collective")
    for row in collectives[:rows]:
        ms = "" if row["seconds"] is None else f"{1e3 * row['seconds']:.2f}"
        waits = ", asynchronous" if row["asynchronous"] else ""
        told = f"{row['op']} over {'+'.join(row['axes'])}, {row['dtype']}{waits}"
        made_by = f"{row['source'] or 'the compiler'} ({row['phase']})"
        count = f"{row['count']:,}"
        table.add_row(mib(row["bytes"]), count, ms, _two_lines(told, made_by))
    return table


def _table(title: str, *numbers: str, text: str, bar: bool = False) -> Table:
    """Numbers, which are never cut, and beside them text, which takes the lines that it needs."""
    columns = [Column(name, justify="right", no_wrap=True) for name in numbers]
    columns.append(Column(text, overflow="fold", ratio=None if bar else 1))
    if bar:
        columns.append(Column("", ratio=1, no_wrap=True, overflow="crop"))
    return Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)


def _two_lines(first: str, second: str) -> Text:
    return Text(first).append(f"\n  {second}", style="dim")


def _timetable(config: Config, mesh: Mapping[str, int]) -> str:
    """The picture of the pipeline of a mesh; "" where there is none."""
    stages, parallel = mesh.get("pipeline", 1), config.parallel
    return (
        picture(parallel.schedule, stages, config.train.microbatches, parallel.chunks)
        if stages > 1
        else ""
    )


def mib(count: float) -> str:
    return f"{count / 2**20:,.1f}"


def main(argv: list[str] | None = None) -> int:
    request = cli.parse(
        argv,
        __doc__ or "",
        hardware=cli.Option(None, f"GPUs that are not there: {', '.join(NAMES)}, or a TOML file"),
        topology=cli.Option(
            None, "NVLink domains x hosts in each x GPUs in each, as 8x1x8 (default: from the mesh)"
        ),
        timeout=cli.Option(TIMEOUT, "seconds that one compilation may take", least=0),
        rows=cli.Option(12, "rows of each table", least=1),
        json=cli.Option(
            None, "write the account as JSON to this file; - is standard output, and nothing else"
        ),
        html=cli.Option(None, "write a page to this file"),
    )
    output, page = request.options["json"], request.options["html"]
    if output != "-":
        cli.check_output("json", output)
    cli.check_output("html", page)
    target = find_target(request)
    if target.devices:
        validate_mesh(request.config, resolve_mesh(request.mesh, target.devices))
    if target.cpu_devices:
        check_simulated(request.config, resolve_mesh(request.mesh, target.cpu_devices))
    try:
        report = explain(request.config, request, target, request.options["timeout"])
    except CompileFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    arguments = sys.argv[1:] if argv is None else argv
    mesh = MeshConfig(**report["mesh"])
    report["request"] = subject("jaxpar.explain", arguments, request.config, mesh)
    if page:
        Path(page).write_text(explain_page(report, _timetable(request.config, report["mesh"])))
    if output == "-":
        print(json.dumps(report))
    else:
        print_report(report, request.options["rows"])
        if output:
            Path(output).write_text(json.dumps(report, indent=2) + "\n")
    return 1 if report["fits"] is False else 0


if __name__ == "__main__":
    cli.run(main)
