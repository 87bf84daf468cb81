"""Reads compiled HLO text: collectives by mesh axis and source line, FLOPs, and what lives at the
peak of memory."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
ITEMSIZE = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}

_SHAPE = re.compile(r"\b(" + "|".join(ITEMSIZE) + r")\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*[a-z])\((.*)")
_PACKAGE = str(Path(__file__).parents[1])


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction. `bytes` is the size of its whole (the result of a gather, the
    input of a scatter) on one device, `count` how often a step runs it, `depth` in how many nested
    loops it stands. `axes` is empty where every device is alone in its group and nothing is sent:
    the CPU compiler leaves such ones in. `group` is one of the device groups; `source` the line
    that asked for it, `phase` forward, backward or update; `asynchronous`: it is split into a start
    and a done, so that other work can run meanwhile."""

    kind: str
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    count: int
    depth: int
    group: tuple[int, ...] = ()
    source: str = ""
    phase: str = ""
    asynchronous: bool = False


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One array that lives when memory is at its peak. `operation` is jax's name for what made it;
    of an argument it is the path of the leaf."""

    name: str
    shape: str
    bytes: int
    operation: str
    source: str
    argument: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """What a step runs `count` times, in `depth` nested loops, a branch as if it was taken every
    time, and at least: a loop whose length depends on the data counts as one turn, and `known` says
    whether there was none. `rest` is the text after the opening parenthesis."""

    computation: str
    name: str
    result: str
    operation: str
    rest: str
    count: int
    depth: int
    known: bool


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Every collective of a compiled module.

    A combined collective (a tuple) counts as one, with the bytes of all its parts.
    """
    groups, source = _axis_groups(mesh), _Sources(text)
    everything = list(instructions(text))
    made_by = {found.name: found.rest for found in everything}
    return [
        _collective(kind, found, groups, source, _described(found.rest, made_by))
        for found in everything
        if (kind := found.operation.removesuffix("-start")) in KINDS
    ]


def flops(text: str) -> int:
    """Floating-point operations of matmuls on one device, run by run of every loop: those of dots,
    of cuBLAS calls and of cuDNN's fused attention (as if every query saw every key). What remat
    repeats is in them; loops whose length depends on the data (attention of packed documents,
    several at a time) count as one turn."""
    computations, _ = _computations(text)
    types: dict[str, dict[str, str]] = {}
    total = 0
    for found in instructions(text):
        if found.operation != "dot" and "custom_call_target" not in found.rest:
            continue
        if found.computation not in types:
            lines = map(_INSTRUCTION.match, computations[found.computation])
            types[found.computation] = {match[1]: match[2] for match in lines if match}
        operands = [types[found.computation].get(name, "") for name in _operands(found.rest)]
        total += found.count * _matmul_flops(found, operands)
    return total


def peak_buffers(live_ranges: str, text: str) -> list[Buffer]:
    """What lives at the peak, largest first.

    Args:
      live_ranges: XLA's dump `*-live-range.txt`.
      text: the module's text.
    """
    match = re.search(r"Live ranges at \d+ \(peak\):\n(.*?)(?:\n  \S|\Z)", live_ranges, re.S)
    assert match, "no peak in the live ranges"
    computations, entry = _computations(text)
    source, lines = _Sources(text), {}
    for name, body in computations.items():
        lines |= {
            found[1]: (found, name == entry) for found in map(_INSTRUCTION.match, body) if found
        }
    buffers = []
    for name, index, size in re.findall(r"^ +([\w.\-]+)\{([\d,]*)\}: (\d+) bytes", match[1], re.M):
        found, in_entry = lines.get(name, (None, False))
        rest = found[4] if found else ""
        parts = _types(found[2]) if found else []
        shape = parts[int(index.split(",")[0])] if index and parts else ", ".join(parts[:1])
        operation = re.search(r'op_name="([^"]*)"', rest)
        argument = bool(found) and in_entry and found[3] == "parameter"
        buffers.append(
            Buffer(
                name, shape, int(size), operation[1] if operation else "", source.of(rest), argument
            )
        )
    return sorted(buffers, key=lambda buffer: -buffer.bytes)


def instructions(text: str) -> Iterator[Instruction]:
    """Every instruction of a compiled module, walked from its entry through loops, calls and
    fusions."""
    computations, entry = _computations(text)
    lines = {
        match[1]: match
        for body in computations.values()
        for line in body
        if (match := _INSTRUCTION.match(line))
    }

    def walk(name: str, count: int, depth: int, known: bool) -> Iterator[Instruction]:
        for match in filter(None, map(_INSTRUCTION.match, computations[name])):
            found = Instruction(name, match[1], match[2], match[3], match[4], count, depth, known)
            yield found
            if found.operation == "while":
                body = re.search(r"body=%?([\w.\-]+)", found.rest)
                assert body
                trips = _trips(found, computations, lines)
                yield from walk(
                    body[1],
                    count * (1 if trips is None else trips),
                    depth + 1,
                    known and trips is not None,
                )
            elif found.operation == "conditional":
                for branch in _branches(found.rest):
                    yield from walk(branch, count, depth, known)
            elif found.operation in ("call", "fusion", "async-start"):
                for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", found.rest):
                    yield from walk(called, count, depth, known)

    return walk(entry, 1, 0, True)


def _branches(rest: str) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
    named = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)
    return [name.strip(" %") for name in listed[1].split(",")] if listed else named


def _trips(
    found: Instruction, computations: dict[str, list[str]], lines: dict[str, re.Match]
) -> int | None:
    """How often a loop turns: as XLA notes it, or, where turns were taken out of it for pipelining,
    from where its counter starts to the constant that it stays below. None: it depends on the
    data."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', found.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", found.rest)
    place = re.search(r'known_induction_variable":\{"tuple_index":"(\d+)"', found.rest)
    if not condition or not place:
        return None
    text = list(computations[condition[1]])
    for called in re.findall(r"calls=%?([\w.\-]+)", "\n".join(text)):
        text += computations[called]
    bound = re.search(r"s32\[\] constant\((\d+)\)", "\n".join(text))
    start = _constant(_operands(lines[_operands(found.rest)[0]][4])[int(place[1])], lines)
    if not bound or start is None or "direction=LT" not in "\n".join(text):
        return None
    return int(bound[1]) - start


def _constant(name: str, lines: dict[str, re.Match]) -> int | None:
    """The number that a copy of a constant holds."""
    while name in lines and lines[name][3] in ("copy", "bitcast", "constant"):
        if lines[name][3] == "constant":
            return int(lines[name][4].partition(")")[0])
        name = _operands(lines[name][4])[0]
    return None


def _operands(rest: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", rest.partition(")")[0])


def _types(result: str) -> list[str]:
    """`dtype[dims]` of every array of a result."""
    return [f"{dtype}[{dims}]" for dtype, dims in _SHAPE.findall(result)]


def _matmul_flops(found: Instruction, operands: list[str]) -> int:
    target = re.search(r'custom_call_target="([^"]*)"', found.rest)
    dims = [_dims(operand) for operand in operands]
    if (
        target and "fmha" in target[1]
    ):  # q and k come first, [B, S, H, K]; QK and AV forward, five products backward
        (B, S, H, K), T = dims[0], dims[1][1]
        return 2 * B * S * T * H * K * (5 if "Backward" in target[1] else 2)
    if target and "gemm" not in target[1]:
        return 0
    contracted = re.search(r"lhs_contracting_dim(?:s=\{|ensions\":\[\")([\d\",]*)", found.rest)
    assert contracted, f"a matmul without contracted dimensions: {found.rest[:200]}"
    inner = math.prod(dims[0][int(dim)] for dim in re.findall(r"\d+", contracted[1]))
    return 2 * inner * math.prod(_dims(found.result))


def _dims(text: str) -> tuple[int, ...]:
    match = _SHAPE.search(text)
    assert match, f"no shape in {text[:100]}"
    return tuple(int(n) for n in match[2].split(",") if n)


class _Sources:
    """The source lines of a module, from the tables at its head."""

    def __init__(self, text: str):
        def table(name: str, pattern: str) -> dict[int, tuple[str, ...]]:
            block = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.M)
            return (
                {int(n): tuple(found) for n, *found in re.findall(r"(\d+) " + pattern, block[1])}
                if block
                else {}
            )

        self._files = table("FileNames", r'"(.*)"')
        self._functions = table("FunctionNames", r'"(.*)"')
        self._locations = table(
            "FileLocations", r"\{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)"
        )
        self._frames = table("StackFrames", r"\{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")

    def of(self, rest: str) -> str:
        """`model.py:98 Attention.__call__` of an instruction: the line of a module, else of a
        function, nearest to it; of a line outside of this package where there is none."""
        match = re.search(r"stack_frame_id=(\d+)", rest)
        frames = list(self._stack(int(match[1]))) if match else []
        ours = [frame for frame in frames if frame[0].startswith(_PACKAGE)]
        modules = [frame for frame in ours if frame[2].endswith("__call__")]
        for file, line, function in [*modules, *ours, *frames][:1]:
            name = (
                Path(file).relative_to(_PACKAGE)
                if file.startswith(_PACKAGE)
                else Path(*Path(file).parts[-2:])
            )
            return f"{name}:{line} {function.replace('.<locals>', '')}"
        return ""

    def _stack(self, number: int) -> Iterator[tuple[str, str, str]]:
        while number in self._frames:
            location, parent = self._frames[number]
            file, function, line = self._locations[int(location)]
            yield self._files[int(file)][0], line, self._functions[int(function)][0]
            number = int(parent or 0) - 1  # it is written one too high, so that 1 is none


def _described(rest: str, made_by: dict[str, str], steps: int = 8) -> str:
    """The instruction, or if it was combined of several and so has no source, the nearest of its
    operands that has."""
    for _ in range(steps):
        operands = _operands(rest)
        if "stack_frame_id" in rest or not operands:
            break
        rest = made_by.get(operands[0], "")
    return rest


def _phase(rest: str) -> str:
    name = re.search(r'op_name="([^"]*)"', rest)
    if not name or "jvp(" not in name[1]:
        return "update"
    return "backward" if "transpose(" in name[1] else "forward"


def shapes(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """Every (dtype, shape) that a module mentions."""
    return {
        (dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _SHAPE.findall(text)
    }


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return computations, entry


def _collective(
    kind: str,
    found: Instruction,
    groups: dict[frozenset, tuple[str, ...]],
    source: _Sources,
    described: str,
) -> Collective:
    result, rest, start = found.result, found.rest, found.operation.endswith("-start")
    parts = [
        (dtype, math.prod(int(n) for n in dims.split(",") if n))
        for dtype, dims in _SHAPE.findall(result)
    ]
    sizes = [ITEMSIZE[dtype] * n for dtype, n in parts]
    # The result of a start is ((operands), results): keep the larger half. Older all-reduce-starts
    # give results alone.
    if start and (kind != "all-reduce" or result.startswith("((")):
        half = len(sizes) // 2
        total = max(sum(sizes[:half]), sum(sizes[half : 2 * half]))
    else:
        total = sum(sizes)
    assert found.known, f"a collective in a loop of unknown length: {found.name}"
    group = _groups(rest)
    if kind == "reduce-scatter" and not start:
        total *= len(next(iter(group)))
    return Collective(
        kind,
        groups.get(group, ("?",)),
        "+".join(sorted({dtype for dtype, _ in parts})),
        total,
        found.count,
        found.depth,
        tuple(sorted(min(group, key=min))) if group else (),
        source.of(described),
        _phase(described),
        start and '"is_sync":true' not in rest,
    )


def _groups(rest: str) -> frozenset:
    """The device groups of a collective, in any of the notations of XLA."""
    if pairs := re.search(r"source_target_pairs=\{\{(.*?)\}\}", rest):
        return _connected(
            [tuple(int(n) for n in pair.split(",")) for pair in pairs[1].split("},{")]
        )
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return frozenset(
            frozenset(int(n) for n in group.split(","))
            for group in re.findall(r"\{([\d,]+)\}", listed[1])
        )
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _rows(_iota(tiled[3], tiled[4]).reshape(int(tiled[1]), int(tiled[2])))
    # a mesh of the compiler's own: mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}
    named = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
        r"\{(.*?)\}",
        rest,
    )
    if not named:
        return frozenset()
    assert ":" not in named[4], f"part of an axis: {named[0]}"
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    ids = _iota(named[2] or ",".join(map(str, sizes.values())), named[3]).reshape(*sizes.values())
    along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[4])]
    across = [dim for dim in range(ids.ndim) if dim not in along]
    return _rows(
        ids.transpose([*across, *along]).reshape(-1, math.prod(ids.shape[dim] for dim in along))
    )


def _iota(shape: str, order: str | None) -> np.ndarray:
    sizes = [int(n) for n in shape.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _rows(ids: np.ndarray) -> frozenset:
    return frozenset(frozenset(map(int, row)) for row in ids)


def _connected(links: list[tuple[int, ...]]) -> frozenset:
    groups: list[set[int]] = []
    for link in links:
        touching = [group for group in groups if group & set(link)]
        groups = [group for group in groups if group not in touching] + [set(link).union(*touching)]
    return frozenset(map(frozenset, groups))


def _axis_groups(mesh: Mesh) -> dict[frozenset, tuple[str, ...]]:
    """Device groups -> the mesh axes along which they communicate; none for groups of one
    device."""
    ids = np.arange(mesh.size).reshape(mesh.devices.shape)
    used = [dim for dim, size in enumerate(ids.shape) if size > 1]
    found = {}
    for dims in itertools.chain.from_iterable(
        itertools.combinations(used, n) for n in range(len(used) + 1)
    ):
        rest = [dim for dim in range(ids.ndim) if dim not in dims]
        rows = ids.transpose([*rest, *dims]).reshape(-1, math.prod(ids.shape[dim] for dim in dims))
        found[_rows(rows)] = tuple(mesh.axis_names[dim] for dim in dims)
    return found
