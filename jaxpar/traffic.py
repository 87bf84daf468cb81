"""What a device sends in a step, counted: every collective by axis, dtype and bytes. Needs no device.

The arithmetic of what the step does; `tests/test_traffic.py` holds it against compiled steps. Sizes are as in `hlo`: of
the whole, which is the result of a gather and the input of a scatter. Sums of a few numbers (the loss, the norm) are
left out.
"""

import dataclasses
import math
from collections.abc import Iterator

from jaxpar.config import Config, MeshConfig
from jaxpar.counts import ITEMSIZE, matrix_sizes, parameter_shapes


@dataclasses.dataclass(frozen=True)
class Transfer:
    """`count` collectives of `size` bytes over `axes` in a step. `hidden`: it has nothing to wait for, and so runs
    beside the computation of a layer; the rest is waited for."""

    kind: str
    axes: tuple[str, ...]
    size: float
    count: int
    hidden: bool = False

    @property
    def bytes(self) -> float:
        return self.size * self.count


def transfers(config: Config, mesh: MeshConfig, *, chunks: int = 1) -> list[Transfer]:
    """The collectives of one step on one device.

    Args:
      config: the run.
      mesh: sizes of the axes; collectives over axes of size 1 are left out.
      chunks: parts of the model that each pipeline stage holds.
    """
    every = [*_weights(config, mesh), *_activations(config, mesh), *_pipeline(config, mesh, chunks)]
    return [transfer for transfer in every if transfer.axes and transfer.size]


def by_axes(found: list[Transfer]) -> dict[str, float]:
    """Bytes by axes, as `fsdp` or `data+sequence`."""
    sums: dict[str, float] = {}
    for transfer in found:
        name = "+".join(transfer.axes)
        sums[name] = sums.get(name, 0.0) + transfer.bytes
    return sums


def _weights(config: Config, mesh: MeshConfig) -> Iterator[Transfer]:
    """Gathers of weights, reductions of their gradients."""
    model, parallel = config.model, config.parallel
    compute, summed = ITEMSIZE[config.precision.compute], ITEMSIZE[config.precision.grad_reduce]
    sizes = matrix_sizes(model)
    layers = sum(size for name, size in sizes.items() if name.startswith("layers.")) / (mesh.tensor * mesh.pipeline)
    embedding = sizes["embedding"] / (mesh.tensor * mesh.pipeline)
    ends = embedding * (1 if model.tie_embeddings else 2)
    count, L = config.train.microbatches, model.layers // mesh.pipeline
    zero = parallel.optimizer_sharding == "data" and mesh.data > 1
    once = parallel.gather == "per_step" or mesh.pipeline > 1
    fsdp = ("fsdp",) if mesh.fsdp > 1 else ()
    if zero:
        yield Transfer("all-gather", ("data",), compute * (layers + ends) / mesh.fsdp, 1)
    if once:
        yield Transfer("all-gather", fsdp, compute * (layers + ends), 1)
        yield Transfer("reduce-scatter", fsdp, summed * (layers + ends), 1)
    else:
        yield Transfer("all-gather", fsdp, compute * layers / L, 2 * L * count, hidden=True)
        yield Transfer("all-gather", fsdp, compute * embedding, 2 * count, hidden=True)
        yield Transfer("reduce-scatter", fsdp, summed * layers / L, L * count, hidden=True)
        yield Transfer("reduce-scatter", fsdp, summed * embedding, 2 * count, hidden=True)
    left = summed * (layers + ends) / mesh.fsdp
    if zero:
        yield Transfer("reduce-scatter", ("data",), left, 1)
        left /= mesh.data
    axes = ("data",) if mesh.data > 1 and not zero else ()
    axes += tuple(axis for axis in ("expert", "sequence") if getattr(mesh, axis) > 1)
    yield Transfer("all-reduce", axes, left, 1)
    scales = summed * sum(map(math.prod, parameter_shapes(model).values())) - summed * sum(sizes.values())
    spread = [axis for axis in ("data", "fsdp", "expert", "sequence") if getattr(mesh, axis) > 1]
    spread += ["tensor"] * (mesh.tensor > 1 and parallel.sequence_parallel)
    yield Transfer("all-reduce", tuple(spread), scales / mesh.pipeline, 1)


def _activations(config: Config, mesh: MeshConfig) -> Iterator[Transfer]:
    """What layers exchange over `tensor` and `sequence`, and embedding and head over `tensor`."""
    model, train, kept = config.model, config.train, config.memory.kept + config.memory.offloaded
    item = ITEMSIZE[config.precision.compute]
    sequences = train.batch_size // (train.microbatches * mesh.batch_shards)
    tokens = sequences * config.data.sequence_length
    residual = item * tokens * model.dim / mesh.sequence
    runs = model.layers // mesh.pipeline * train.microbatches
    if mesh.tensor > 1:
        # The head and the embedding are shared out over the stages, but every stage has the tokens of all of them.
        if config.parallel.sequence_parallel:
            again = ("attention_input" not in kept) + ("mlp_input" not in kept)
            yield Transfer("all-gather", ("tensor",), residual, (4 + again) * runs + 2 * train.microbatches)
            scatters = 4 + ("attention_output" not in kept)
            yield Transfer("reduce-scatter", ("tensor",), residual, scatters * runs + 2 * train.microbatches)
        else:
            sums = 4 + ("attention_output" not in kept)
            yield Transfer("all-reduce", ("tensor",), residual, sums * runs + 2 * train.microbatches)
    if mesh.sequence > 1:
        yield from _context(config, mesh, item * tokens, runs)


def _context(config: Config, mesh: MeshConfig, tokens: float, runs: int) -> Iterator[Transfer]:
    """Context parallelism; `tokens` is bytes of one number for every token of the whole sequence."""
    model, axes, n = config.model, ("sequence",), mesh.sequence
    kept = config.memory.kept + config.memory.offloaded
    keys = tokens * model.kv_heads * model.head_dim / mesh.tensor
    queries = tokens * model.heads * model.head_dim / mesh.tensor
    again = "attention" not in kept
    if config.parallel.context == "all_gather":
        yield Transfer("all-gather", axes, keys, 4 * runs)
        yield Transfer("reduce-scatter", axes, keys, 2 * runs)
    elif config.parallel.context == "ring":
        # Keys and values go round but for the last hop, their gradients all the way. Of two devices, the one hop that
        # is recomputed is that of the backward pass.
        turns = 2 if again and n > 2 else 1
        yield Transfer("collective-permute", axes, 2 * keys / n, (turns * (n - 1) + 2 * n - 1) * runs, hidden=True)
    else:
        yield Transfer("all-to-all", axes, queries / n, (4 + 2 * again) * runs)
        yield Transfer("all-to-all", axes, keys / n, (4 + 2 * again) * runs)


def _pipeline(config: Config, mesh: MeshConfig, chunks: int) -> Iterator[Transfer]:
    """The residual of a microbatch, to the next stage and its gradient back, every tick; and the last stage's output to
    all stages, which share the head."""
    if mesh.pipeline == 1:
        return
    model, train = config.model, config.train
    sequences = train.batch_size // (train.microbatches * mesh.batch_shards)
    tokens = sequences * config.data.sequence_length / mesh.sequence
    split = mesh.tensor if config.parallel.sequence_parallel else 1
    residual = ITEMSIZE[config.precision.compute] * tokens * model.dim / split
    ticks = train.microbatches * chunks + mesh.pipeline - 1
    yield Transfer("collective-permute", ("pipeline",), residual, 2 * ticks, hidden=True)
    yield Transfer("all-reduce", ("pipeline",), residual, 2 * train.microbatches)
