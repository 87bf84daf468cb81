"""What the compiled step of a pipeline sends and holds, on 64 H100s that are not there (8 hosts of
8).

As in `test_lowering`: bytes of one device and one step. `A` is the residual of one microbatch on
one device.
"""

import functools
import math

import pytest
from test_lowering import BF16, F32, LENGTH, MODEL, SEQUENCES, SMALL, make_config, weights

from jaxpar.compile import absent_gpus, abstract_state, compile_train_step
from jaxpar.config import Config, MeshConfig
from jaxpar.estimate import hardware, memory
from jaxpar.parallel.timetable import Timetable, timetable
from jaxpar.report.hlo import Collective, collectives, shapes
from jaxpar.sharding import make_mesh
from jaxpar.tree import named_leaves

STAGES = MeshConfig(pipeline=8, fsdp=8)
FIVE = MeshConfig(pipeline=4, data=2, fsdp=2, sequence=2, tensor=2)
LAYERS = 16
MESHES = [STAGES, pytest.param(FIVE, marks=pytest.mark.slow)]


@functools.cache
def h100s():
    return absent_gpus(hardware.find("h100").target, "8x1x8")


def pipeline_config(sizes: MeshConfig, *, microbatches=16, gather="per_step", **groups) -> Config:
    return make_config(
        sizes,
        microbatches=microbatches,
        remat="full",
        gather=gather,
        model=dict(layers=LAYERS),
        **groups,
    )


@functools.cache
def compile_step(config: Config, sizes: MeshConfig):
    mesh = make_mesh(sizes, h100s())
    return compile_train_step(config, mesh), mesh


def all_traffic(config: Config, sizes: MeshConfig) -> list[Collective]:
    compiled, mesh = compile_step(config, sizes)
    return collectives(compiled.as_text(), mesh)


def table_of(config: Config, sizes: MeshConfig) -> Timetable:
    parallel = config.parallel
    return timetable(parallel.schedule, sizes.pipeline, config.train.microbatches, parallel.chunks)


def residual(sizes: MeshConfig) -> int:
    return BF16 * SEQUENCES * LENGTH // (sizes.sequence * sizes.tensor) * MODEL["dim"]


def ticks_that_run(table: Timetable) -> tuple[int, int, int]:
    """Ticks that look up the embedding, compute the head, and put gradients into the embedding: of
    a phase all, where at least half need it."""
    counts = [0, 0, 0]
    for phase in table.phases:
        flags = zip(
            *(
                (t.embedding() >= 0, t.loss(table.chunks) >= 0, t.embedding_gradient() >= 0)
                for t in phase
            ),
            strict=True,
        )
        for n, needed in enumerate(map(sum, flags)):
            assert needed == 0 or 2 * needed >= len(phase), "conditional: not counted by this test"
            counts[n] += len(phase) if needed else 0
    return tuple(counts)


@pytest.mark.parametrize(
    ("sizes", "chunks"),
    [
        (STAGES, 1),
        pytest.param(STAGES, 2, marks=pytest.mark.slow),
        pytest.param(FIVE, 1, marks=pytest.mark.slow),
    ],
    ids=["fsdp", "chunks", "five axes"],
)
def test_a_tick_sends_one_residual_each_way(sizes, chunks):
    config = pipeline_config(sizes, chunks=chunks)
    table, A = table_of(config, sizes), residual(sizes)
    found = [c for c in all_traffic(config, sizes) if "pipeline" in c.axes and c.bytes > SMALL]
    permutes = [c for c in found if c.kind == "collective-permute"]
    assert {(c.axes, c.dtype, c.bytes, c.depth) for c in permutes} == {
        (("pipeline",), "bf16", A, 1)
    }
    # one in a tick of forward passes alone, two in one of both, one in one of backward passes alone
    assert sorted(c.count for c in permutes) == sorted(
        len(phase) for phase in table.phases for works in phase[0].kind if works
    )
    # The vocabulary's: y of the last stage to all and its gradient back, rows of the embedding and
    # their gradient; the softmax statistics of a chunk of tokens are below SMALL.
    others = [c for c in found if c.kind != "collective-permute"]
    assert {(c.kind, c.axes, c.dtype) for c in others} == {("all-reduce", ("pipeline",), "bf16")}
    if chunks == 1:
        lookups, heads, gradients = ticks_that_run(table)
        assert sum(c.bytes * c.count for c in others) == A * (lookups + 2 * heads + gradients)


@pytest.mark.parametrize("sizes", MESHES, ids=["fsdp", "five axes"])
def test_weights_are_gathered_and_gradients_reduced_once_a_step(sizes):
    config = pipeline_config(sizes)
    elements = sum(weights(config)) // (sizes.pipeline * sizes.tensor)
    found = [
        c for c in all_traffic(config, sizes) if {"data", "fsdp"} & set(c.axes) and c.bytes > SMALL
    ]
    assert {c.count for c in found} == {1} and {c.depth for c in found} == {0}
    gathered = [c for c in found if c.kind == "all-gather"]
    assert {(c.axes, c.dtype) for c in gathered} == {(("fsdp",), "bf16")}
    assert sum(c.bytes for c in gathered) == BF16 * elements
    scattered = [c for c in found if c.kind == "reduce-scatter"]
    assert {(c.axes, c.dtype) for c in scattered} == {(("fsdp",), "f32")}
    assert sum(c.bytes for c in scattered) == F32 * elements
    reduced = sum(c.bytes for c in found if c.kind == "all-reduce")
    expected = F32 * elements // sizes.fsdp if sizes.data > 1 else 0
    assert 0 <= reduced - expected < SMALL
    assert {c.kind for c in found} <= {"all-gather", "reduce-scatter", "all-reduce"}, (
        "no all-to-all"
    )


@pytest.mark.slow
def test_gathering_per_layer():
    """Each layer is gathered when it is computed: once a forward and twice a backward tick, and
    never whole."""
    config = pipeline_config(STAGES, gather="per_layer")
    table = table_of(config, STAGES)
    layers, _ = weights(config)
    compiled, _ = compile_step(config, STAGES)
    found = [
        c
        for c in all_traffic(config, STAGES)
        if c.axes == ("fsdp",) and c.bytes > SMALL and c.depth > 1
    ]
    n = sum(tick.kind[0] for tick in table.ticks)
    gathered = sum(c.bytes * c.count for c in found if c.kind == "all-gather")
    assert gathered == 3 * n * BF16 * layers // STAGES.pipeline
    scattered = sum(c.bytes * c.count for c in found if c.kind == "reduce-scatter")
    assert scattered == n * F32 * layers // STAGES.pipeline
    query = (LAYERS // STAGES.pipeline, MODEL["dim"], MODEL["heads"], MODEL["head_dim"])
    assert query not in {shape for _, shape in shapes(compiled.as_text())}


@pytest.mark.parametrize("chunks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_temporary_memory_does_not_grow_with_microbatches(chunks):
    held = []
    for microbatches in (16, 64):
        config = pipeline_config(STAGES, microbatches=microbatches, chunks=chunks)
        held.append(compile_step(config, STAGES)[0].memory_analysis().temp_size_in_bytes)
    batch = 4 * 4 * SEQUENCES * LENGTH * 64
    assert held[1] - held[0] <= batch, "more than the tokens themselves"


def test_the_stash_is_no_larger_than_the_timetable_says():
    config = pipeline_config(STAGES, microbatches=64)
    slots = table_of(config, STAGES).slots
    assert slots == 2 * STAGES.pipeline - 1
    compiled, _ = compile_step(config, STAGES)
    stacks = {
        shape[0]
        for dtype, shape in shapes(compiled.as_text())
        if shape[1:] == (SEQUENCES, LENGTH, MODEL["dim"])
    }
    assert slots in stacks and max(stacks) == slots


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sizes", MESHES, ids=["fsdp", "five axes"])
def test_the_vocabulary_is_shared_by_stages(sizes, tied):
    config = pipeline_config(sizes)
    model = dict(tie_embeddings=tied, layers=LAYERS)
    config = make_config(sizes, microbatches=16, remat="full", gather="per_step", model=model)
    V, D, parts = config.model.vocab_size, config.model.dim, sizes.pipeline * sizes.tensor
    state = named_leaves(abstract_state(config, make_mesh(sizes, h100s())))
    for name, leaf in state.items():
        if name.endswith(("embedding", "head")):
            assert math.prod(leaf.sharding.shard_shape(leaf.shape)) == V * D // (
                parts * sizes.fsdp
            ), name
    compiled, _ = compile_step(config, sizes)
    widest = max(
        n
        for _, shape in shapes(compiled.as_text())
        if D in shape
        for n in shape
        if n in (V, V // sizes.tensor, V // parts)
    )
    assert widest == V // parts


@pytest.mark.parametrize("sizes", MESHES, ids=["fsdp", "five axes"])
def test_state_is_what_the_planner_says_and_donated(sizes):
    config = pipeline_config(sizes)
    compiled, mesh = compile_step(config, sizes)
    leaves = abstract_state(config, mesh)
    held = {
        part: sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in named_leaves(tree).values()
        )
        for part, tree in (("parameters", leaves.model), ("optimizer", leaves.optimizer))
    }
    planned = memory.state_bytes(config, sizes)
    assert held["parameters"] == planned["parameters"]
    assert 0 <= held["optimizer"] - planned["optimizer"] < 64, "counters"
    assert compiled.memory_analysis().alias_size_in_bytes - sum(held.values()) < 64
