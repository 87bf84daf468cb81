"""What a device sends in a step, counted: every collective by axis, dtype and bytes. Needs no
device.

The arithmetic of what the step does; `tests/test_traffic.py` holds it against compiled steps. Sizes
are as in `hlo`: of the whole, which is the result of a gather and the input of a scatter. Sums of a
few numbers (the loss, the norm) are left out.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

from jaxpar.config import AXES, Config, MeshConfig, ModelConfig, ParallelConfig
from jaxpar.dimensions import Dimensions
from jaxpar.estimate.counts import ITEMSIZE, layer_elements, orthogonalized
from jaxpar.parallel.timetable import turns
from jaxpar.parameters import parameters


@dataclasses.dataclass(frozen=True)
class Transfer:
    """`count` collectives of `size` bytes over `axes` in a step. `hidden`: it has nothing to wait
    for, and so runs beside the computation of a layer; the rest is waited for. `listed`: as the
    compiled program has them, if that is another number: some of a pipeline's stand in a branch,
    which counts as taken in every tick."""

    kind: str
    axes: tuple[str, ...]
    size: float
    count: int
    hidden: bool = False
    listed: int | None = None


def transfers(config: Config, mesh: MeshConfig) -> list[Transfer]:
    """The collectives of one step on one device; those over axes of size 1 are left out."""
    run = _turns(config, mesh)
    every = [*_weights(config, mesh, run), *_activations(config, mesh, run)]
    every += _update(config, mesh)
    every += _pipeline(config, mesh, run) if mesh.pipeline > 1 else ()
    return [transfer for transfer in every if transfer.axes and transfer.size]


def by_axes(sent: list[Transfer], *, listed: bool = False) -> dict[str, float]:
    """Bytes by axes, as `fsdp` or `data+sequence`: as sent, or as the compiled program lists
    them."""
    sums: dict[str, float] = {}
    for transfer in sent:
        name = "+".join(transfer.axes)
        count = transfer.listed if listed and transfer.listed is not None else transfer.count
        sums[name] = sums.get(name, 0.0) + transfer.size * count
    return sums


@dataclasses.dataclass(frozen=True)
class _Turns:
    """How often a device runs what, in a step. `layers`: a layer and its backward pass; `forwards`:
    forward passes of each but the one that remat asks for (a pipeline's backward pass starts from
    the input of a chunk); `ends`: embedding, head with loss, gradient of the embedding, and the
    three as the program lists them."""

    layers: int
    forwards: int
    ends: tuple[int, int, int]
    listed: tuple[int, int, int]


def _turns(config: Config, mesh: MeshConfig) -> _Turns:
    parallel, M, L = config.parallel, config.train.microbatches, config.model.layers
    if mesh.pipeline == 1:
        return _Turns(L * M, 1, (M, M, M), (M, M, M))
    counted = turns(parallel.schedule, mesh.pipeline, M, parallel.chunks)
    ends = counted.embeddings, counted.losses, counted.gradients
    return _Turns(L // (mesh.pipeline * parallel.chunks) * counted.chunks, 2, ends, counted.listed)


def _weights(config: Config, mesh: MeshConfig, turns: _Turns) -> Iterator[Transfer]:
    """Gathers of weights, reductions of their gradients."""
    model, parallel = config.model, config.parallel
    compute, summed = ITEMSIZE[config.precision.compute], ITEMSIZE[config.precision.grad_reduce]
    layers = layer_elements(model) / (mesh.tensor * mesh.pipeline)
    embedding = model.vocab_size * model.dim / (mesh.tensor * mesh.pipeline)
    ends = embedding * (1 if model.tie_embeddings else 2)
    layer = layers * mesh.pipeline / model.layers
    zero = parallel.optimizer_sharding == "data" and mesh.data > 1
    fsdp = ("fsdp",) if mesh.fsdp > 1 else ()
    if zero:
        yield Transfer("all-gather", ("data",), compute * (layers + ends) / mesh.fsdp, 1)
    if parallel.gather == "per_step":
        yield Transfer("all-gather", fsdp, compute * (layers + ends), 1)
        yield Transfer("reduce-scatter", fsdp, summed * (layers + ends), 1)
    else:
        (embeddings, losses, gradients), listed, runs = turns.ends, turns.listed, turns.layers
        yield Transfer(
            "all-gather", fsdp, compute * layer, (1 + turns.forwards) * runs, hidden=True
        )
        yield Transfer("reduce-scatter", fsdp, summed * layer, runs, hidden=True)
        yield Transfer(
            "all-gather",
            fsdp,
            compute * embedding,
            embeddings + losses,
            True,
            listed[0] + listed[1],
        )
        yield Transfer(
            "reduce-scatter",
            fsdp,
            summed * embedding,
            gradients + losses,
            True,
            listed[2] + listed[1],
        )
    left = summed * (layers + ends) / mesh.fsdp
    if zero:
        yield Transfer("reduce-scatter", ("data",), left, 1)
        left /= mesh.data
    axes = ("data",) if mesh.data > 1 and not zero else ()
    axes += tuple(axis for axis in ("expert", "sequence") if getattr(mesh, axis) > 1)
    yield Transfer("all-reduce", axes, left, 1)
    replicated = _replicated(
        model, parallel.sequence_parallel, parallel.optimizer_sharding, mesh.pipeline > 1
    )
    for left_open, own, size in replicated:
        axes = tuple(axis for axis in left_open if getattr(mesh, axis) > 1)
        yield Transfer(
            "all-reduce", axes, summed * size / math.prod(getattr(mesh, axis) for axis in own), 1
        )


@functools.cache
def _replicated(
    model: ModelConfig, sequence_parallel: bool, optimizer_sharding: str, staged: bool
) -> tuple[tuple[tuple[str, ...], tuple[str, ...], int], ...]:
    """Axes over which gradients are summed, axes on which they lie, and elements of all parameters
    that are not sharded over fsdp, as norm scales are not."""
    parallel = ParallelConfig(
        sequence_parallel=sequence_parallel, optimizer_sharding=optimizer_sharding
    )
    table = Dimensions.of(parallel, 1 + staged)
    sums: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}
    for row in parameters(model).values():
        if "embed_fsdp" not in row.dims:
            # In the region of a pipeline all that lies on several devices is a sum over them.
            own, summed = table.axes(row.dims), AXES if staged else table.axes(row.summed)
            left_open = tuple(axis for axis in AXES if axis in summed and axis not in own)
            sums[left_open, own] = sums.get((left_open, own), 0) + row.size(model)
    return tuple((*axes, size) for axes, size in sums.items())


def _update(config: Config, mesh: MeshConfig) -> Iterator[Transfer]:
    """Muon: devices take whole matrices of some layers, and send them back."""
    item = ITEMSIZE[config.precision.params]
    for own in orthogonalized(config, mesh):
        for axis in own.axes:
            yield Transfer("all-to-all", (axis,), item * own.count * own.rows * own.columns, 2)


def _activations(config: Config, mesh: MeshConfig, turns: _Turns) -> Iterator[Transfer]:
    """What layers exchange over `tensor` and `sequence`, and embedding and head over `tensor`."""
    model, train, kept = config.model, config.train, config.memory.kept + config.memory.offloaded
    item = ITEMSIZE[config.precision.compute]
    sequences = train.batch_size // (train.microbatches * mesh.batch_shards)
    tokens = sequences * config.data.sequence_length
    residual = item * tokens * model.dim / mesh.sequence
    if vocabulary := tuple(axis for axis in ("pipeline", "tensor") if getattr(mesh, axis) > 1):
        chunk = min(config.loss.chunk, tokens // mesh.sequence)
        chunks = -(-tokens // mesh.sequence // chunk)
        for numbers in (
            1,
            2,
        ):  # of a token, in float32: the largest logit; the sum, and the target's
            size = 4 * numbers * chunk
            yield Transfer(
                "all-reduce",
                vocabulary,
                size,
                chunks * turns.ends[1],
                listed=chunks * turns.listed[1],
            )
    if mesh.tensor > 1:
        yield from _tensor(config, residual, turns, kept, pipelined=mesh.pipeline > 1)
    if mesh.sequence > 1:
        yield from _context(config, mesh, item * tokens, turns)


def _tensor(
    config: Config, residual: float, turns: _Turns, kept: tuple[str, ...], *, pipelined: bool
) -> Iterator[Transfer]:
    """Two halves of a layer, each there and back; the head's input and its gradient, the
    embedding's rows and theirs."""
    axes, runs, (embeddings, losses, gradients), listed = (
        ("tensor",),
        turns.layers,
        turns.ends,
        turns.listed,
    )
    there = 2 * turns.forwards
    out = there + 2 + ("attention_output" not in kept)
    if config.parallel.sequence_parallel:
        again = ("attention_input" not in kept) + ("mlp_input" not in kept)
        yield Transfer("all-gather", axes, residual, (there + 2 + again) * runs)
        yield Transfer("reduce-scatter", axes, residual, out * runs)
        yield Transfer(
            "all-gather", axes, residual, losses + gradients, listed=listed[1] + listed[2]
        )
        yield Transfer(
            "reduce-scatter", axes, residual, losses + embeddings, listed=listed[1] + listed[0]
        )
    else:
        yield Transfer("all-reduce", axes, residual, out * runs)
        if not pipelined:  # there over both axes at once: `_pipeline`
            yield Transfer("all-reduce", axes, residual, losses + embeddings)


def _context(config: Config, mesh: MeshConfig, tokens: float, turns: _Turns) -> Iterator[Transfer]:
    """Context parallelism; `tokens` is bytes of one number for every token of the whole
    sequence."""
    model, axes, n = config.model, ("sequence",), mesh.sequence
    kept = config.memory.kept + config.memory.offloaded
    keys = tokens * model.kv_heads * model.head_dim / mesh.tensor
    queries = tokens * model.heads * model.head_dim / mesh.tensor
    again, runs, more = "attention" not in kept, turns.layers, turns.forwards - 1
    if config.parallel.context == "all_gather":
        yield Transfer("all-gather", axes, keys, (4 + 2 * more) * runs)
        yield Transfer("reduce-scatter", axes, keys, 2 * runs)
    elif config.parallel.context == "ring":
        # Keys and values go round but for the last hop, their gradients all the way. Of two
        # devices, the one hop that is recomputed is that of the backward pass.
        rounds = (2 if again and n > 2 else 1) + more
        yield Transfer(
            "collective-permute",
            axes,
            2 * keys / n,
            (rounds * (n - 1) + 2 * n - 1) * runs,
            hidden=True,
        )
    else:
        yield Transfer("all-to-all", axes, queries / n, (4 + 2 * again + 2 * more) * runs)
        yield Transfer("all-to-all", axes, keys / n, (4 + 2 * again + 2 * more) * runs)


def _pipeline(config: Config, mesh: MeshConfig, turns: _Turns) -> Iterator[Transfer]:
    """The residual of a microbatch, to the next stage and its gradient back, every tick; the last
    stage's output to all stages, which share the head, and its gradient; and the rows of the
    embedding and theirs."""
    model, train, parallel = config.model, config.train, config.parallel
    sequences = train.batch_size // (train.microbatches * mesh.batch_shards)
    tokens = sequences * config.data.sequence_length / mesh.sequence
    split = mesh.tensor if parallel.sequence_parallel else 1
    residual = ITEMSIZE[config.precision.compute] * tokens * model.dim / split
    ticks = turns.layers * mesh.pipeline * parallel.chunks // model.layers
    # The very last one forward is for nobody; two stages have a phase of one tick, where the
    # compiler sees it.
    shifts = 2 * ticks - (mesh.pipeline * parallel.chunks == 2 and parallel.schedule == "1f1b")
    yield Transfer("collective-permute", ("pipeline",), residual, shifts, hidden=True)
    (embeddings, losses, gradients), listed = turns.ends, turns.listed
    yield Transfer("all-reduce", ("pipeline",), residual, 2 * losses, listed=2 * listed[1])
    axes = (
        ("pipeline",) if parallel.sequence_parallel or mesh.tensor == 1 else ("pipeline", "tensor")
    )
    yield Transfer(
        "all-reduce", axes, residual, embeddings + gradients, listed=listed[0] + listed[2]
    )
