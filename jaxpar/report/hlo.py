"""Reads compiled HLO text: collectives by mesh axis and source line, and FLOPs."""

import dataclasses
import itertools
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import numpy as np

if typing.TYPE_CHECKING:
    from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_NAMES = {
    0: "token opaque",
    8: "pred s1 u1 s2 u2 s4 u4 s8 u8 f4e2m1fn f8e3m4 f8e4m3 f8e4m3fn f8e4m3fnuz f8e4m3b11fnuz "
    "f8e5m2 f8e5m2fnuz f8e8m0fnu",
    16: "s16 u16 f16 bf16",
    32: "s32 u32 f32",
    64: "s64 u64 f64 c64",
    128: "c128",
}
_BITS = {name: bits for bits, names in _NAMES.items() for name in names.split()}
"""Bits that an element takes: at least eight, but where the layout packs narrower ones."""

_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*[a-z])\((.*)")
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


def collectives(text: str, mesh: "Mesh") -> list[Collective]:
    """Every collective of a compiled module.

    A combined collective (a tuple) counts as one, with the bytes of all its parts.
    """
    groups, source = _axis_groups(mesh), Sources(text)
    everything = list(instructions(text))
    made_by = {instruction.name: instruction.rest for instruction in everything}
    return [
        _collective(kind, instruction, groups, source, _described(instruction.rest, made_by))
        for instruction in everything
        if (kind := instruction.operation.removesuffix("-start")) in KINDS
    ]


def flops(text: str) -> int:
    """Floating-point operations of matmuls on one device, run by run of every loop: those of dots,
    of cuBLAS calls and of cuDNN's fused attention (as if every query saw every key). What remat
    repeats is in them; loops whose length depends on the data (attention of packed documents,
    several at a time) count as one turn."""
    computations, _ = computations_of(text)
    types: dict[str, dict[str, str]] = {}
    total = 0
    for instruction in instructions(text):
        if instruction.operation != "dot" and "custom_call_target" not in instruction.rest:
            continue
        if instruction.computation not in types:
            lines = map(INSTRUCTION.match, computations[instruction.computation])
            types[instruction.computation] = {match[1]: match[2] for match in lines if match}
        operands = [
            types[instruction.computation].get(name, "") for name in operands_of(instruction.rest)
        ]
        total += instruction.count * _matmul_flops(instruction, operands)
    return total


def instructions(text: str) -> Iterator[Instruction]:
    """Every instruction of a compiled module, walked from its entry through loops, calls and
    fusions."""
    computations, entry = computations_of(text)
    lines = {
        match[1]: match
        for body in computations.values()
        for line in body
        if (match := INSTRUCTION.match(line))
    }

    def walk(name: str, count: int, depth: int, known: bool) -> Iterator[Instruction]:
        for match in filter(None, map(INSTRUCTION.match, computations[name])):
            instruction = Instruction(
                name, match[1], match[2], match[3], match[4], count, depth, known
            )
            yield instruction
            if instruction.operation == "while":
                body = re.search(r"body=%?([\w.\-]+)", instruction.rest)
                assert body
                trips = _trips(instruction, computations, lines)
                yield from walk(
                    body[1],
                    count * (1 if trips is None else trips),
                    depth + 1,
                    known and trips is not None,
                )
            elif instruction.operation == "conditional":
                for branch in branches_of(instruction.rest):
                    yield from walk(branch, count, depth, known)
            elif instruction.operation in ("call", "fusion", "async-start"):
                for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", instruction.rest):
                    yield from walk(called, count, depth, known)

    return walk(entry, 1, 0, True)


def branches_of(rest: str) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
    named = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)
    return [name.strip(" %") for name in listed[1].split(",")] if listed else named


def _trips(
    loop: Instruction, computations: dict[str, list[str]], lines: dict[str, re.Match]
) -> int | None:
    """How often a loop turns: as XLA notes it, or, where turns were taken out of it for pipelining,
    from where its counter starts to the constant that it stays below. None: it depends on the
    data."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    place = re.search(r'known_induction_variable":\{"tuple_index":"(\d+)"', loop.rest)
    if not condition or not place:
        return None
    text = list(computations[condition[1]])
    for called in re.findall(r"calls=%?([\w.\-]+)", "\n".join(text)):
        text += computations[called]
    bound = re.search(r"s32\[\] constant\((\d+)\)", "\n".join(text))
    start = _constant(operands_of(lines[operands_of(loop.rest)[0]][4])[int(place[1])], lines)
    if not bound or start is None or "direction=LT" not in "\n".join(text):
        return None
    return int(bound[1]) - start


def _constant(name: str, lines: dict[str, re.Match]) -> int | None:
    """The number that a copy of a constant holds."""
    while name in lines and lines[name][3] in ("copy", "bitcast", "constant"):
        if lines[name][3] == "constant":
            return int(lines[name][4].partition(")")[0])
        name = operands_of(lines[name][4])[0]
    return None


def operands_of(rest: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", rest.partition(")")[0])


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of one array of a result."""

    dtype: str
    dims: tuple[int, ...]
    bytes: int

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def arrays(result: str) -> list[Array]:
    """Every array of the type of a result, however deep in tuples.

    Raises:
      ValueError: a dtype whose size is not known.
    """
    parsed = []
    for dtype, text, layout in _SHAPE.findall(result):
        if dtype not in _BITS:
            raise ValueError(
                f"XLA's dtype {dtype} is not known to jaxpar/report/hlo.py: add its size there"
            )
        dims = tuple(int(n) for n in text.split(",") if n)
        packed = re.search(r"E\((\d+)\)", layout)
        bits = int(packed[1]) if packed else _BITS[dtype]
        parsed.append(Array(dtype, dims, -(-bits * math.prod(dims) // 8)))
    return parsed


def _matmul_flops(instruction: Instruction, operands: list[str]) -> int:
    target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    dims = [_dims(operand) for operand in operands]
    if (
        target and "fmha" in target[1]
    ):  # q and k come first, [B, S, H, K]; QK and AV forward, five products backward
        (B, S, H, K), T = dims[0], dims[1][1]
        return 2 * B * S * T * H * K * (5 if "Backward" in target[1] else 2)
    if target and "gemm" not in target[1]:
        return 0
    contracted = re.search(
        r"lhs_contracting_dim(?:s=\{|ensions\":\[\")([\d\",]*)", instruction.rest
    )
    assert contracted, f"a matmul without contracted dimensions: {instruction.rest[:200]}"
    inner = math.prod(dims[0][int(dim)] for dim in re.findall(r"\d+", contracted[1]))
    return 2 * inner * math.prod(_dims(instruction.result))


def _dims(text: str) -> tuple[int, ...]:
    parsed = arrays(text)
    assert parsed, f"no shape in {text[:100]}"
    return parsed[0].dims


class Sources:
    """The source lines of a module, from the tables at its head."""

    def __init__(self, text: str):
        def table(name: str, pattern: str) -> dict[int, tuple[str, ...]]:
            block = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.M)
            return (
                {
                    int(n): tuple(numbers)
                    for n, *numbers in re.findall(r"(\d+) " + pattern, block[1])
                }
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

    def files(self, rest: str) -> set[str]:
        """The files of this package through which the call of an instruction went."""
        match = re.search(r"stack_frame_id=(\d+)", rest)
        frames = self._stack(int(match[1])) if match else ()
        return {
            Path(file).relative_to(_PACKAGE).as_posix()
            for file, _, _ in frames
            if file.startswith(_PACKAGE)
        }

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
        operands = operands_of(rest)
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
    """Every (dtype, shape) that an instruction of a module makes."""
    matches = (
        INSTRUCTION.match(line) for body in computations_of(text)[0].values() for line in body
    )
    return {(array.dtype, array.dims) for line in matches if line for array in arrays(line[2])}


def computations_of(text: str) -> tuple[dict[str, list[str]], str]:
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
    instruction: Instruction,
    groups: dict[frozenset, tuple[str, ...]],
    source: Sources,
    described: str,
) -> Collective:
    result, rest, start = (
        instruction.result,
        instruction.rest,
        instruction.operation.endswith("-start"),
    )
    parts = arrays(result)
    sizes = [part.bytes for part in parts]
    # The result of a start is ((operands), results): keep the larger half. Older all-reduce-starts
    # give results alone.
    if start and (kind != "all-reduce" or result.startswith("((")):
        half = len(sizes) // 2
        total = max(sum(sizes[:half]), sum(sizes[half : 2 * half]))
    else:
        total = sum(sizes)
    assert instruction.known, f"a collective in a loop of unknown length: {instruction.name}"
    group = _groups(rest)
    if kind == "reduce-scatter" and not start:
        total *= len(next(iter(group)))
    return Collective(
        kind,
        groups.get(group, ("?",)),
        "+".join(sorted({part.dtype for part in parts if part.bytes})),
        total,
        instruction.count,
        instruction.depth,
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


def _axis_groups(mesh: "Mesh") -> dict[frozenset, tuple[str, ...]]:
    """Device groups -> the mesh axes along which they communicate; none for groups of one
    device."""
    ids = np.arange(mesh.size).reshape(mesh.devices.shape)
    used = [dim for dim, size in enumerate(ids.shape) if size > 1]
    groups = {}
    for dims in itertools.chain.from_iterable(
        itertools.combinations(used, n) for n in range(len(used) + 1)
    ):
        rest = [dim for dim in range(ids.ndim) if dim not in dims]
        rows = ids.transpose([*rest, *dims]).reshape(-1, math.prod(ids.shape[dim] for dim in dims))
        groups[_rows(rows)] = tuple(mesh.axis_names[dim] for dim in dims)
    return groups
