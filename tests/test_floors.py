"""Every kind of parallelism sends what its table says, near its floor, on both compilers. Harness:
test_lowering's.

A floor is the bytes that a device has to send in a step over rings of n devices, x = (n - 1) / n:
2x for an all-reduced byte, x for one that is gathered, scattered or exchanged. P are the bytes of
the weights in bf16, G those of their float32 gradients, A of a residual, KV of the keys and values
of a layer, Q of its queries.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import pytest
from test_lowering import (
    BF16,
    F32,
    LENGTH,
    MODEL,
    SEQUENCES,
    SMALL,
    compile_step,
    make_config,
    traffic,
    weights,
)
from test_lowering_context import block_bytes
from test_lowering_context import make_config as context_config

from jaxpar.config import Config, MeshConfig
from jaxpar.report.hlo import Collective, collectives

L = MODEL["layers"]
LAYERS, ENDS = weights(make_config(MeshConfig()))
WEIGHTS = LAYERS + ENDS
P, G = BF16 * WEIGHTS, F32 * WEIGHTS
RESIDUAL = SEQUENCES * LENGTH * MODEL["dim"]
A = BF16 * RESIDUAL
STATISTICS = 3 * F32 * SEQUENCES * LENGTH
"""Of the vocabulary-parallel loss: maximum, sum and target logit of every token."""

EIGHT = MeshConfig(sequence=8)
KV, Q = block_bytes(EIGHT)  # of one device


def x(n: int) -> float:
    return (n - 1) / n


@dataclass(frozen=True)
class Mode:
    """`table`: (kind, axis) -> dtype, elements a step on one device (whole over the axis), how
    often each runs."""

    sizes: MeshConfig
    settings: dict
    table: dict[tuple[str, str], tuple[str, int, set[int]]]
    floor: float
    context: str = ""

    @property
    def config(self) -> Config:
        if self.context:
            return context_config(self.sizes, self.context, **self.settings)
        return make_config(self.sizes, **self.settings)


def tensor(settings: dict, gathers: int, scatters: int, floor: float) -> Mode:
    """Gathers and scatters of a layer, or with no gathers its all-reduces. Embedding and head are
    parallel over the
    vocabulary: one of each kind for either, which send 4xA, as do two all-reduces."""
    table = (
        {("all-gather", "tensor"): ("bf16", (gathers * L + 2) * RESIDUAL, {1, L})}
        if gathers
        else {}
    )
    kind = "reduce-scatter" if gathers else "all-reduce"
    table[kind, "tensor"] = ("bf16", (scatters * L + 2) * RESIDUAL, {1, L})
    return Mode(
        MeshConfig(tensor=8), settings, table, x(8) * (floor * L * A + 4 * A + 2 * STATISTICS)
    )


# The gradient of a sequence-parallel run: every device has every weight.
SEQUENCE_GRADIENT = {("all-reduce", "sequence"): ("f32", WEIGHTS, {1})}

MODES = {
    "DDP": Mode(
        MeshConfig(data=8),
        {},
        {("all-reduce", "data"): ("f32", WEIGHTS, {1})},
        2 * x(8) * G,
    ),
    "ZeRO-1": Mode(
        MeshConfig(data=8),
        dict(optimizer_sharding="data"),
        {
            ("all-gather", "data"): ("bf16", WEIGHTS, {1}),
            ("reduce-scatter", "data"): ("f32", WEIGHTS, {1}),
        },
        x(8) * (G + P),
    ),
    # forward and backward gather each layer; embedding and head, which stand at the turn, are
    # gathered once
    "FSDP per layer": Mode(
        MeshConfig(fsdp=8),
        {},
        {
            ("all-gather", "fsdp"): ("bf16", 2 * LAYERS + ENDS, {1, L}),
            ("reduce-scatter", "fsdp"): ("f32", WEIGHTS, {1, L}),
        },
        x(8) * (2 * BF16 * LAYERS + BF16 * ENDS + G),
    ),
    "FSDP per step": Mode(
        MeshConfig(fsdp=8),
        dict(gather="per_step"),
        {
            ("all-gather", "fsdp"): ("bf16", WEIGHTS, {1}),
            ("reduce-scatter", "fsdp"): ("f32", WEIGHTS, {1}),
        },
        x(8) * (P + G),
    ),
    # what fsdp has scattered, data all-reduces
    "hybrid": Mode(
        MeshConfig(data=2, fsdp=4),
        {},
        {
            ("all-gather", "fsdp"): ("bf16", 2 * LAYERS + ENDS, {1, L}),
            ("reduce-scatter", "fsdp"): ("f32", WEIGHTS, {1, L}),
            ("all-reduce", "data"): ("f32", WEIGHTS // 4, {1}),
        },
        x(4) * (2 * BF16 * LAYERS + BF16 * ENDS + G) + 2 * x(2) * G / 4,
    ),
    "hybrid ZeRO-1": Mode(
        MeshConfig(data=2, fsdp=4),
        dict(optimizer_sharding="data"),
        {
            ("all-gather", "fsdp"): ("bf16", 2 * LAYERS + ENDS, {1, L}),
            ("reduce-scatter", "fsdp"): ("f32", WEIGHTS, {1, L}),
            ("all-gather", "data"): ("bf16", WEIGHTS // 4, {1}),
            ("reduce-scatter", "data"): ("f32", WEIGHTS // 4, {1}),
        },
        x(4) * (2 * BF16 * LAYERS + BF16 * ENDS + G) + x(2) * (P + G) / 4,
    ),
    # two gathers and two scatters a layer and direction, or two all-reduces; with full remat
    # besides the forward ones again, but for the last, whose result the backward pass does not need
    "tensor with sequence parallelism": tensor({}, 4, 4, 8),
    "tensor": tensor(dict(sequence_parallel=False), 0, 4, 8),
    "tensor with sequence parallelism, full remat": tensor(dict(remat="full"), 6, 5, 12),
    "tensor, full remat": tensor(dict(sequence_parallel=False, remat="full"), 0, 5, 12),
    # keys and values forward, again backward, and back their gradients; nothing else travels in a
    # layer
    "all_gather": Mode(
        EIGHT,
        {},
        {
            ("all-gather", "sequence"): ("bf16", 2 * L * 8 * KV // BF16, {L}),
            ("reduce-scatter", "sequence"): ("bf16", L * 8 * KV // BF16, {L}),
            **SEQUENCE_GRADIENT,
        },
        L * 3 * 7 * KV + 2 * x(8) * G,
        "all_gather",
    ),
    # 7 hops forward and backward; the gradients take 8, for they have to come home
    "ring": Mode(
        EIGHT,
        {},
        {
            ("collective-permute", "sequence"): (
                "bf16",
                L * (7 + 7 + 8) * KV // BF16,
                {L, 6 * L, 7 * L},
            ),
            **SEQUENCE_GRADIENT,
        },
        L * 3 * 7 * KV + 2 * x(8) * G,
        "ring",
    ),
    "ulysses": Mode(
        EIGHT,
        {},
        {
            ("all-to-all", "sequence"): ("bf16", 2 * L * (2 * Q + KV) // BF16, {L}),
            **SEQUENCE_GRADIENT,
        },
        x(8) * 2 * L * (2 * Q + KV) + 2 * x(8) * G,
        "ulysses",
    ),
}


SLOW = ("hybrid ZeRO-1", "tensor with sequence parallelism, full remat", "tensor, full remat")
EACH = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in MODES]
)


def sent(c: Collective, sizes: MeshConfig) -> float:
    """Bytes a device sends for a collective in a step."""
    n = math.prod(getattr(sizes, axis) for axis in c.axes)
    return c.count * c.bytes * {"collective-permute": 1, "all-reduce": 2 * x(n)}.get(c.kind, x(n))


@EACH
def test_gpu_step_sends_what_its_table_says_and_little_above_the_floor(name):
    mode = MODES[name]
    elements, dtypes, counts = defaultdict(int), defaultdict(set), defaultdict(set)
    for c in traffic(mode.config, mode.sizes):
        assert len(c.axes) == 1, c
        key = (c.kind, c.axes[0])
        elements[key] += c.bytes * c.count // (BF16 if c.dtype == "bf16" else F32)
        dtypes[key].add(c.dtype)
        counts[key].add(c.count)
    assert dtypes == {key: {dtype} for key, (dtype, _, _) in mode.table.items()}
    assert counts == {key: times for key, (_, _, times) in mode.table.items()}
    for key, (_, expected, _) in mode.table.items():
        assert 0 <= elements[key] - expected < SMALL // F32, (
            key
        )  # an all-reduce takes norm scales and loss sums along
    compiled, mesh = compile_step(mode.config, mode.sizes, "gpu")
    everything = sum(sent(c, mode.sizes) for c in collectives(compiled.as_text(), mesh))
    print(f"{everything / mode.floor:.3f} of the floor")
    assert everything <= 1.05 * mode.floor


@pytest.mark.slow
@EACH
def test_cpu_step_sends_the_same(name):
    """The CPU compiler widens bf16 to float32 and may all-reduce where the GPU's scatters:
    elements, axes and counts are the same."""
    mode = MODES[name]
    merged = {"reduce-scatter": "reduce", "all-reduce": "reduce"}
    found, expected = (defaultdict(lambda: [0, set()]) for _ in range(2))
    for c in traffic(mode.config, mode.sizes, "cpu"):
        assert (c.dtype, len(c.axes)) == ("f32", 1), c
        entry = found[merged.get(c.kind, c.kind), c.axes[0]]
        entry[0] += c.bytes * c.count // F32
        entry[1].add(c.count)
    for (kind, axis), (_, elements, counts) in mode.table.items():
        entry = expected[merged.get(kind, kind), axis]
        entry[0] += elements
        entry[1] |= counts
    assert found.keys() == expected.keys()
    for key, (elements, counts) in expected.items():
        assert 0 <= found[key][0] - elements < SMALL // F32, key
        assert found[key][1] == counts, key
