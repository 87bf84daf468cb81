"""Compiles one training step in a process of its own and accounts for its bytes; what `explain`
starts.

Reads a request as JSON from standard input and prints the account as one line of JSON. XLA aborts
where it meets what it cannot do, and says on file descriptor 2 what it could not: so this runs
apart, and its parent reads both.
"""

import json
import math
import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxpar import cli
from jaxpar.compile import absent_gpus, abstract_state, compile_train_step
from jaxpar.config import AXES, Config, ConfigError, MeshConfig, from_mapping
from jaxpar.estimate.hardware import Hardware, Rates
from jaxpar.estimate.timing import collective_seconds
from jaxpar.parallel.timetable import timetable
from jaxpar.report import hlo
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
    state = {
        f"state.{name}": leaf
        for name, leaf in named_leaves(abstract_state(config, mesh)).items()
        if leaf.ndim
    }
    peak = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak += stats.temp_size_in_bytes
    device = mesh.devices.flat[0]
    report = {
        "backend": device.device_kind,
        "devices": mesh.size,
        "mesh": {axis: size for axis, size in zip(AXES, sizes.shape, strict=True) if size > 1},
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
                "name": name.removeprefix("state."),
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype),
                "sharding": str(leaf.sharding.spec),
                "memory": leaf.sharding.memory_kind or "device",
                "bytes_per_device": math.prod(leaf.sharding.shard_shape(leaf.shape))
                * leaf.dtype.itemsize,
            }
            for name, leaf in state.items()
        ],
        "collectives": collectives_of(text, mesh, hardware),
        "flops": hlo.flops(text),
        "compile_seconds": seconds,
    }
    live_ranges = next(dump.rglob("*train_step*live-range.txt"), None)
    buffers = hlo.peak_buffers(live_ranges.read_text(), text) if live_ranges else []
    kinds, held = Parts(config, state.values()), {"parameters": 0, "optimizer": 0}
    for leaf in report["by_parameter"]:
        if leaf["memory"] == "device":
            held["parameters" if leaf["name"].startswith("model.") else "optimizer"] += leaf[
                "bytes_per_device"
            ]
    report["memory"]["parts"] = kinds.sums(buffers, held, stats.argument_size_in_bytes, peak)
    report["temporaries"] = [
        {
            "shape": buffer.shape,
            "bytes": buffer.bytes,
            "source": buffer.source,
            "operation": buffer.operation,
            "part": kinds.of(buffer),
        }
        for buffer in buffers
        if not buffer.argument and buffer.bytes >= 1024
    ]
    return report | ({"text": text} if with_text else {})


def collectives_of(text: str, mesh: Mesh, hardware: Hardware | None) -> list[dict[str, Any]]:
    """The collectives of a step, alike ones added up, the longest first. `bytes` and `seconds` are
    those of all `count`, `size` of one."""
    rows: dict[tuple, dict[str, Any]] = {}
    for found in hlo.collectives(text, mesh):
        if not found.axes:
            continue
        key = (
            found.kind,
            found.axes,
            found.dtype,
            found.bytes,
            found.source,
            found.phase,
            found.asynchronous,
        )
        row = rows.setdefault(
            key,
            {
                "op": found.kind,
                "axes": list(found.axes),
                "dtype": found.dtype,
                "size": found.bytes,
                "bytes": 0,
                "count": 0,
                "source": found.source,
                "phase": found.phase,
                "asynchronous": found.asynchronous,
                "seconds": None,
            },
        )
        row["count"] += found.count
        row["bytes"] += found.bytes * found.count
        if hardware and found.group:
            near = max(
                sum(n // hardware.domain == m // hardware.domain for m in found.group)
                for n in found.group[:1]
            )
            once = collective_seconds(found.kind, found.bytes, len(found.group), near, hardware)
            row["seconds"] = (row["seconds"] or 0) + once * found.count
    return sorted(rows.values(), key=lambda row: (-(row["seconds"] or 0), -row["bytes"]))


PARTS = (
    *(
        "parameters",
        "optimizer",
        "gradients",
        "activations",
        "vocabulary",
        "weights",
        "stash",
        "working",
        "batch",
    ),
    "gaps",
)
"""What memory is for: parameters and optimizer state; gradients (and updates, which look like
them); activations kept for the backward pass; whatever has the vocabulary as a dimension: logits,
and head and embedding as gathered, and their gradients; gathered weights; inputs of pipeline
stages; the rest of what a layer is working on; the batch; and gaps, which lie between buffers
because they cannot all be packed (below 0: what lies in the buffers of donated arguments, for which
no memory is needed)."""


class Parts:
    """Which of `PARTS` a temporary buffer belongs to, by its shape."""

    def __init__(self, config: Config, leaves: Iterable[jax.ShapeDtypeStruct]):
        shardings = [(leaf.shape, leaf.sharding) for leaf in leaves if leaf.ndim > 1]
        sizes, parallel, model = shardings[0][1].mesh.shape, config.parallel, config.model

        def entered(shape: tuple[int, ...], sharding: Any) -> list[int]:
            """Without `fsdp` and `data`: as gathered."""
            split = [(n, str(entry)) for n, entry in zip(shape, sharding.spec, strict=True)]
            return [
                n // math.prod(sizes[axis] for axis in ("pipeline", "tensor") if axis in text)
                for n, text in split
            ]

        self._stored = {_dims(sharding.shard_shape(shape)) for shape, sharding in shardings}
        self._stacks = {_dims(entered(*leaf)) for leaf in shardings if len(leaf[0]) > 2}
        self._gathered = {_dims(entered(*leaf)[1:]) for leaf in shardings if len(leaf[0]) > 2}
        tensor, stages = sizes["tensor"], sizes["pipeline"]
        self._vocabulary = {model.vocab_size // shards for shards in (1, tensor, tensor * stages)}
        self._layers, self._stash = {model.layers}, ()
        if stages > 1:
            self._layers.add(model.layers // (stages * parallel.chunks))
            table = timetable(parallel.schedule, stages, config.train.microbatches, parallel.chunks)
            self._stash = table.slots, model.dim

    def of(self, buffer: hlo.Buffer) -> str:
        shape = [int(n) for n in re.findall(r"\d+", buffer.shape.partition("[")[2])]
        dims = _dims(shape)
        if dims in self._stored:
            return "gradients"
        if dims in self._stacks:
            return "gradients" if buffer.shape.startswith("f32") else "weights"
        if len(shape) > 3 and (shape[0], shape[-1]) == self._stash:
            return "stash"
        if len(shape) > 2 and self._layers & set(shape[:2]):  # stacked, in whatever layout
            return "activations"
        in_layers = re.search(
            r"jvp\(\)\)?/while", buffer.operation
        )  # where another size may be the same number
        if self._vocabulary & set(dims) and not in_layers:
            return "vocabulary"
        return "weights" if dims in self._gathered else "working"

    def sums(
        self, buffers: Iterable[hlo.Buffer], state: Mapping[str, int], arguments: int, peak: int
    ) -> dict[str, int]:
        """Bytes of a device at its peak, by what they are for; their sum is the peak. Arguments are
        there all along."""
        found = dict.fromkeys(PARTS, 0) | dict(state) | {"batch": arguments - sum(state.values())}
        for buffer in buffers:
            if not buffer.argument:
                found[self.of(buffer)] += buffer.bytes
        return found | {"gaps": peak - sum(found.values())}


def _dims(shape: Iterable[int]) -> tuple[int, ...]:
    """Without order and without ones: XLA transposes and reshapes."""
    return tuple(sorted(n for n in shape if n > 1))


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
