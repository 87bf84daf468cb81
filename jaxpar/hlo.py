"""Reads collectives out of compiled HLO text: kind, mesh axes, dtype, bytes, and how often a step runs them."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

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
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z\-]*[a-z])\((.*)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction. `bytes` is the size of its whole (the result of a gather, the input of a scatter)
    on one device, `count` how often a step runs it, `depth` in how many nested loops it stands. `axes`
    is empty where every device is alone in its group and nothing is sent: the CPU compiler leaves such ones in."""

    kind: str
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    count: int
    depth: int


class Instruction(NamedTuple):
    """What a step runs `count` times, in `depth` nested loops, at the least: a loop of unknown length counts as one
    round, and `known` says whether there was none."""

    operation: str
    result: str
    rest: str
    count: int
    depth: int
    known: bool


def instructions(text: str) -> Iterator[Instruction]:
    """Every instruction of a compiled module, walked from its entry through loops, calls and fusions."""
    computations, entry = _computations(text)

    def walk(name: str, count: int, depth: int, known: bool) -> Iterator[Instruction]:
        for line in computations[name]:
            if not (match := _INSTRUCTION.match(line)):
                continue
            result, operation, rest = match.groups()
            yield Instruction(operation, result, rest, count, depth, known)
            if operation == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
                body = re.search(r"body=%?([\w.\-]+)", rest)
                assert body
                yield from walk(body[1], count * int(trips[1] if trips else 1), depth + 1, known and bool(trips))
            elif operation in ("call", "fusion", "conditional", "async-start"):
                for called in re.findall(r"(?:calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", rest):
                    yield from walk(called, count, depth, known)

    return walk(entry, 1, 0, True)


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Every collective of a compiled module.

    A combined collective (a tuple) counts as one, with the bytes of all its parts.
    """
    groups, found = _axis_groups(mesh), []
    for operation, result, rest, count, depth, known in instructions(text):
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            assert known, f"a collective in a loop of unknown length: {result} {operation}{rest[:200]}"
            found.append(_collective(kind, operation, result, rest, groups, count, depth))
    return found


def shapes(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """Every (dtype, shape) that a module mentions."""
    return {(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _SHAPE.findall(text)}


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
    kind: str, operation: str, result: str, rest: str, groups: dict[frozenset, tuple[str, ...]], count: int, depth: int
) -> Collective:
    parts = [(dtype, math.prod(int(n) for n in dims.split(",") if n)) for dtype, dims in _SHAPE.findall(result)]
    sizes = [ITEMSIZE[dtype] * n for dtype, n in parts]
    # The result of a start is ((operands), results): keep the larger half. Older all-reduce-starts give results alone.
    if operation.endswith("-start") and (kind != "all-reduce" or result.startswith("((")):
        half = len(sizes) // 2
        total = max(sum(sizes[:half]), sum(sizes[half : 2 * half]))
    else:
        total = sum(sizes)
    group = _groups(rest)
    axes = groups.get(group, ("?",))
    if kind == "reduce-scatter" and not operation.endswith("-start"):
        total *= len(next(iter(group)))
    return Collective(kind, axes, "+".join(sorted({dtype for dtype, _ in parts})), total, count, depth)


def _groups(rest: str) -> frozenset:
    """The device groups of a collective, in any of the notations of XLA."""
    if pairs := re.search(r"source_target_pairs=\{\{(.*?)\}\}", rest):
        return _connected([tuple(int(n) for n in pair.split(",")) for pair in pairs[1].split("},{")])
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return frozenset(
            frozenset(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", listed[1])
        )
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _rows(_iota(tiled[3], tiled[4]).reshape(int(tiled[1]), int(tiled[2])))
    # a mesh of the compiler's own: mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}
    named = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", rest
    )
    if not named:
        return frozenset()
    assert ":" not in named[4], f"part of an axis: {named[0]}"
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    ids = _iota(named[2] or ",".join(map(str, sizes.values())), named[3]).reshape(*sizes.values())
    along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[4])]
    across = [dim for dim in range(ids.ndim) if dim not in along]
    return _rows(ids.transpose([*across, *along]).reshape(-1, math.prod(ids.shape[dim] for dim in along)))


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
    """Device groups -> the mesh axes along which they communicate; none for groups of one device."""
    ids = np.arange(mesh.size).reshape(mesh.devices.shape)
    used = [dim for dim, size in enumerate(ids.shape) if size > 1]
    found = {}
    for dims in itertools.chain.from_iterable(itertools.combinations(used, n) for n in range(len(used) + 1)):
        rest = [dim for dim in range(ids.ndim) if dim not in dims]
        rows = ids.transpose([*rest, *dims]).reshape(-1, math.prod(ids.shape[dim] for dim in dims))
        found[_rows(rows)] = tuple(mesh.axis_names[dim] for dim in dims)
    return found
