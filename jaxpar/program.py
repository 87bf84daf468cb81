"""The step of a pipeline: the model as a `pipeline.Program`, and a batch through it.

Everything outside is as without a pipeline: weights enter the step, gradients leave it as partial
sums (`reduce`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpar import loss
from jaxpar.attention import TokenInfo
from jaxpar.config import Config
from jaxpar.data.batches import Batch
from jaxpar.model import Llama, remat_policy
from jaxpar.parallel import pipeline, reduce
from jaxpar.parallel.timetable import Timetable, forward_only, stack_order, timetable
from jaxpar.parallel.vocabulary import as_plain
from jaxpar.parameters import in_layers
from jaxpar.tree import named_leaves


def stages() -> int:
    """Number of stages of the current mesh."""
    return jax.sharding.get_abstract_mesh().shape.get("pipeline", 1)


def make_timetable(config: Config) -> Timetable:
    """The timetable of a step on the current mesh."""
    return timetable(
        config.parallel.schedule, stages(), config.train.microbatches, config.parallel.chunks
    )


def loss_and_gradients(
    entered: Llama, batch: Batch, config: Config, scale: jax.Array
) -> tuple[loss.LossSums, Llama]:
    """Sums of a batch [M, B, S], and the gradient of `scale` times the objective, for
    `reduce.leave_step`.

    Args:
      entered: the model, of weights from `reduce.enter_step`.
      scale: float32 scalar.
    """
    run = pipeline.loss_and_gradients if config.parallel.schedule == "1f1b" else _differentiated
    run = functools.partial(run, sum_dtype=entered.layout.sum_dtype)
    sums, gradients = _in_region(run, entered, batch, config, make_timetable(config), scale)
    return sums, gradients


def evaluate(entered: Llama, batch: Batch, config: Config) -> loss.LossSums:
    """Sums of a batch [M, B, S], by the forward passes of the timetable."""

    def run(program, table, layers, ends, batch):
        return pipeline.forward(program, table, layers, ends, batch), None, None

    table = forward_only(make_timetable(config))
    return _in_region(run, entered, batch, config, table, jnp.ones(()), gradients=False)[0]


def _differentiated(program, table, layers, ends, batch, *, sum_dtype):
    """GPipe: the forward passes, differentiated. Weights are held in `sum_dtype`, because jax adds
    up the gradients of ticks in the dtype of the weight."""
    weights = layers, ends
    wide = jax.tree.map(lambda w: w.astype(sum_dtype), weights)

    def objective(wide):
        layers, ends = jax.tree.map(lambda w, like: w.astype(like.dtype), wide, weights)
        result = pipeline.forward(program, table, layers, ends, batch)
        return result[0], result

    (dlayers, dends), result = jax.grad(objective, has_aux=True)(wide)
    return result, dlayers, dends


def _in_region(
    run: Callable,
    entered: Llama,
    batch: Batch,
    config: Config,
    table: Timetable,
    scale: jax.Array,
    *,
    gradients=True,
) -> tuple[loss.LossSums, Any]:
    """Runs `run(program, table, layers, ends, batch)` on the local blocks of weights and batch."""
    leaves, structure = jax.tree.flatten(entered)
    split = Split(list(named_leaves(entered)))
    rules = entered.layout.rules
    token, stacked = rules.spec("batch", "seq"), rules.spec("microbatch", "batch", "seq")
    open_specs = [reduce.open_spec(w) for w in leaves]
    dims = [reduce.fsdp_dim(w) for w in leaves]

    def local(leaves: list[jax.Array], batch: Batch, scale: jax.Array) -> Any:
        program = make_program(entered, structure, split, dims, config, scale)
        (_, sums), dlayers, dends = run(program, table, *split.apart(leaves), batch)
        sums = [part.reshape(1, 1) for part in sums]
        return (sums, split.join(dlayers, dends)) if gradients else (sums, None)

    region = jax.shard_map(
        local,
        in_specs=([jax.P(*spec.partitions) for spec in open_specs], stacked, jax.P()),
        out_specs=([token] * 3, open_specs if gradients else None),
        check_vma=False,  # gradients are shares of a sum by design; the parity tests hold them to it
    )
    sums, found = region([as_plain(w) for w in leaves], batch, scale)
    return loss.LossSums(*map(jnp.sum, sums)), jax.tree.unflatten(
        structure, found
    ) if gradients else None


def to_stages(tree: Any, config: Config) -> Any:
    """Puts stacked layers into the order in which the stages of the current mesh hold them.

    With `parallel.chunks` the layers of a stage do not follow one another, so state, optimizer
    state and gradients on the devices have another order than in a checkpoint, which knows the
    network's alone. Leaves are told by their name. Used where a state is made, saved or restored;
    see `pipeline.reorder`.
    """
    return _reorder(tree, config, to_stages=True)


def to_network(tree: Any, config: Config) -> Any:
    """The inverse of `to_stages`."""
    return _reorder(tree, config, to_stages=False)


def _reorder(tree: Any, config: Config, *, to_stages: bool) -> Any:
    chunks, layers = config.parallel.chunks, config.model.layers
    if chunks == 1 or stages() == 1:
        return tree
    order = stack_order(layers, stages(), chunks)
    order = order if to_stages else sorted(range(layers), key=order.__getitem__)

    @functools.partial(
        jax.jit, donate_argnums=0
    )  # one leaf at a time, in its place: a state may fill the memory
    def move(x: jax.Array) -> jax.Array:
        spec = jax.typeof(x).sharding.spec
        if (
            not spec.partitions or spec.partitions[0] is None
        ):  # small statistics that are on all devices
            return x.at[jnp.array(order)].get(out_sharding=spec)
        local = functools.partial(pipeline.reorder, chunks=chunks, to_stages=to_stages)
        return jax.shard_map(local, in_specs=spec, out_specs=spec)(x)

    leaves = [move(x) if in_layers(name) else x for name, x in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


class Split:
    """Takes the leaves of a model apart, into those of the layers and the others, and puts them
    together."""

    def __init__(self, names: list[str]):
        self.layers = [n for n, name in enumerate(names) if in_layers(name)]
        self.ends = [n for n in range(len(names)) if n not in self.layers]

    def apart(self, leaves: list[Any]) -> tuple[list[Any], list[Any]]:
        return [leaves[n] for n in self.layers], [leaves[n] for n in self.ends]

    def join(self, layers: list[Any], ends: list[Any]) -> list[Any]:
        places = dict(zip(self.layers + self.ends, layers + ends, strict=True))
        return [places[n] for n in range(len(places))]


def make_program(
    model: Llama,
    structure: Any,
    split: Split,
    dims: list[int | None],
    config: Config,
    scale: jax.Array,
) -> pipeline.Program:
    """The model as functions of local blocks.

    Args:
      model: only for its structure and layout.
      structure: of its leaves; split: which of them belong to layers; dims: which dimension of each
        is to be gathered over fsdp where it is used (per layer).
      scale: of the objective.
    """
    layout = model.layout
    layer_dims, end_dims = split.apart(dims)
    layer_dims = [None if dim is None else dim - 1 for dim in layer_dims]  # one layer of the stack
    block = jax.tree.structure(model.layers)

    def whole(weights: list[jax.Array], dims: list[int | None]) -> list[jax.Array]:
        return [
            w if dim is None else reduce.gather_block(w, dim, layout.dtype, layout.sum_dtype)
            for w, dim in zip(weights, dims, strict=True)
        ]

    def ends_of(ends: list[jax.Array]) -> Llama:
        missing = [None] * len(split.layers)
        return jax.tree.unflatten(structure, split.join(missing, whole(ends, end_dims)))

    def enter(ends: list[jax.Array], batch: Batch) -> jax.Array:
        return ends_of(ends).embed(batch.tokens)

    def context(batch: Batch) -> Any:
        return model.context(TokenInfo(batch.positions, batch.segments))

    def layer(weights: list[jax.Array], x_bsD: jax.Array, context: Any) -> jax.Array:
        return jax.tree.unflatten(block, whole(weights, layer_dims))(x_bsD, context)[0]

    def finish(
        ends: list[jax.Array], y_bsD: jax.Array, batch: Batch
    ) -> tuple[jax.Array, loss.LossSums]:
        model = ends_of(ends)
        sums = loss.cross_entropy(
            model.norm(y_bsD),
            model.head_weight(),
            batch.targets,
            layout.rules,
            config.loss.chunk,
            config.train.z_loss,
            layout.sum_dtype,
        )
        return sums.objective * scale, sums

    kept = jax.checkpoint(layer, policy=remat_policy(config.memory), prevent_cse=False)
    return pipeline.Program(enter, context, kept, finish, unroll=config.compile.unroll)
