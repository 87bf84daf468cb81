"""Compiles one training step in a process of its own and accounts for its bytes; what `explain`
starts.

Reads a request as JSON from standard input and prints the account as one line of JSON. XLA aborts
where it meets what it cannot do, and says on file descriptor 2 what it could not: so this runs
apart, and its parent reads both.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxpar import cli
from jaxpar.compile import absent_gpus, abstract_state, check_attention, compile_train_step
from jaxpar.config import AXES, Config, ConfigError, MeshConfig, from_mapping
from jaxpar.estimate.hardware import Hardware, Rates
from jaxpar.estimate.memory import PART_NAMES
from jaxpar.estimate.timing import collective_seconds
from jaxpar.report import hlo
from jaxpar.report.buffers import Buffer, at_peak
from jaxpar.sharding import make_mesh
from jaxpar.tree import named_leaves
from jaxpar.validation import resolve_mesh, validate_mesh


def account(
    config: Config, mesh: Mesh, hardware: Hardware | None, dump: Path, *, with_text: bool = False
) -> dict[str, Any]:
    """Compiles the step and returns what `explain --json` writes, but for warnings.

    Args:
      config: the run.
      mesh: of devices, absent ones too.
      hardware: for the time at link speed; None leaves it out.
      dump: where XLA_FLAGS lets the compiler dump.
      with_text: whether the HLO of the step is in it, as `text`.
    """
    begin = time.perf_counter()
    compiled = compile_train_step(config, mesh)
    seconds = time.perf_counter() - begin
    stats, text = compiled.memory_analysis(), compiled.as_text()
    assert stats is not None and text is not None
    sizes = MeshConfig(*mesh.devices.shape)
    state = named_leaves(abstract_state(config, mesh))
    peak = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak += stats.temp_size_in_bytes
    device = mesh.devices.flat[0]
    report = {
        "backend": device.device_kind,
        "devices": mesh.size,
        "mesh": {axis: size for axis, size in zip(AXES, sizes.shape, strict=True) if size > 1},
        "attention": check_attention(config, mesh),
        "memory": {
            "arguments": stats.argument_size_in_bytes,
            "output": stats.output_size_in_bytes,
            "alias": stats.alias_size_in_bytes,
            "temporary": stats.temp_size_in_bytes,
            "peak": peak,
            "host": stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes,
        },
        "by_parameter": [
            {
                "name": name,
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype),
                "sharding": str(leaf.sharding.spec),
                "memory": memory_of(name, config),
                "bytes_per_device": math.prod(leaf.sharding.shard_shape(leaf.shape))
                * leaf.dtype.itemsize,
            }
            for name, leaf in state.items()
            if leaf.ndim
        ],
        "collectives": collectives_of(text, mesh, hardware),
        "flops": hlo.flops(text),
        "compile_seconds": seconds,
    }
    buffers = _buffers(dump, text)
    report["memory"]["parts"] = parts(report, buffers)
    report["temporaries"] = [
        dataclasses.asdict(buffer) for buffer in buffers if buffer.bytes >= 1024
    ]
    return report | ({"text": text} if with_text else {})


def memory_of(name: str, config: Config) -> str:
    """The memory in which an array of the state lies: `device` or `pinned_host`. Shardings over
    absent devices do not tell: jax drops their memory kind."""
    away = config.memory.offload_optimizer and name.startswith("optimizer.")
    return "pinned_host" if away else "device"


def collectives_of(text: str, mesh: Mesh, hardware: Hardware | None) -> list[dict[str, Any]]:
    """The collectives of a step, alike ones added up, the longest first. `bytes` and `seconds` are
    those of all `count`, `size` of one."""
    rows: dict[tuple, dict[str, Any]] = {}
    for collective in hlo.collectives(text, mesh):
        if not collective.axes:
            continue
        key = (
            collective.kind,
            collective.axes,
            collective.dtype,
            collective.bytes,
            collective.source,
            collective.phase,
            collective.asynchronous,
        )
        row = rows.setdefault(
            key,
            {
                "op": collective.kind,
                "axes": list(collective.axes),
                "dtype": collective.dtype,
                "size": collective.bytes,
                "bytes": 0,
                "count": 0,
                "source": collective.source,
                "phase": collective.phase,
                "asynchronous": collective.asynchronous,
                "seconds": None,
            },
        )
        row["count"] += collective.count
        row["bytes"] += collective.bytes * collective.count
        if hardware and collective.group:
            near = max(
                sum(n // hardware.domain == m // hardware.domain for m in collective.group)
                for n in collective.group[:1]
            )
            once = collective_seconds(
                collective.kind, collective.bytes, len(collective.group), near, hardware
            )
            row["seconds"] = (row["seconds"] or 0) + once * collective.count
    return sorted(rows.values(), key=lambda row: (-(row["seconds"] or 0), -row["bytes"]))


def parts(report: Mapping[str, Any], buffers: Iterable[Buffer]) -> dict[str, int]:
    """Bytes of a device at its peak by what they are for, as in `PART_NAMES`; none is below 0, and
    their sum is the peak. Arguments are there all along."""
    memory, parts = report["memory"], dict.fromkeys(PART_NAMES, 0)
    for leaf in report["by_parameter"]:
        if leaf["memory"] == "device":
            of_model = leaf["name"].startswith("model.")
            parts["params" if of_model else "optimizer"] += leaf["bytes_per_device"]
    parts["batch"] = memory["arguments"] - sum(parts.values())
    for buffer in buffers:
        parts[buffer.part] += buffer.bytes
    parts["gaps"] = memory["peak"] - sum(parts.values())
    assert min(parts.values()) >= 0, f"parts of memory below 0: {parts}"
    return parts


def _buffers(dump: Path, text: str) -> list[Buffer]:
    """What is temporary at the peak, of the step that XLA has dumped; nothing where it dumps
    nothing."""
    assignment = next(dump.rglob("*train_step*buffer-assignment.txt"), None)
    live_ranges = next(dump.rglob("*train_step*live-range.txt"), None)
    if not assignment or not live_ranges:
        return []
    return at_peak(assignment.read_text(), live_ranges.read_text(), text)


def main() -> None:
    request = json.load(sys.stdin)
    config = from_mapping(Config, request["config"])
    hardware = None
    if fields := request["hardware"]:
        hardware = Hardware(**fields | {"rates": Rates(**fields["rates"])})
    try:
        if hardware:
            devices = absent_gpus(hardware.target, request["topology"])
            sizes = resolve_mesh(request["mesh"], len(devices))
            validate_mesh(config, sizes)
            mesh = make_mesh(sizes, devices)
        else:
            launch = cli.Launch(
                request["mesh"], request["cpu_devices"] or None, None, None, None, {}
            )
            mesh = cli.start(launch, config)
        report = account(config, mesh, hardware, Path(request["dump"]), with_text=request["text"])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    stats = None if hardware else mesh.devices.flat[0].memory_stats()
    report["capacity"] = hardware.memory_bytes if hardware else stats and stats.get("bytes_limit")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
