"""The model as functions of layers and ends, and a batch through it: the one engine of loss,
gradients and evaluation, of which no microbatches, several, and a pipeline are cases.

Weights enter a step, and gradients leave it as partial sums (`reduce`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpar import loss
from jaxpar.attention import TokenInfo
from jaxpar.config import Config
from jaxpar.data.batches import Batch
from jaxpar.model import Llama, remat_policy
from jaxpar.parallel import microbatches, pipeline, reduce
from jaxpar.parallel.layers import Added
from jaxpar.parallel.microbatches import Program, Totals
from jaxpar.parallel.timetable import Timetable, forward_only, stack_order, timetable
from jaxpar.parallel.vocabulary import as_plain
from jaxpar.parameters import in_layers
from jaxpar.tree import named_leaves


class Sums(NamedTuple):
    """Of a batch, float32 scalars: the objective and its parts, summed over the valid tokens; and
    what the layers report, arrays [L, ...]."""

    objective: jax.Array
    cross_entropy: jax.Array
    z: jax.Array
    layers: Any


def stages() -> int:
    """Number of stages of the current mesh."""
    return jax.sharding.get_abstract_mesh().shape.get("pipeline", 1)


def make_timetable(config: Config) -> Timetable:
    """The timetable of a step on the current mesh."""
    train, parallel = config.train, config.parallel
    return timetable(parallel.schedule, stages(), train.microbatches, parallel.chunks)


def loss_and_gradients(
    entered: Llama, batch: Batch, config: Config, scale: jax.Array
) -> tuple[Sums, Llama]:
    """Sums of a batch [M, B, S], and the gradient of `scale` times its objective, for
    `reduce.leave_step`.

    Args:
      entered: the model, of weights from `reduce.enter_step`.
      scale: float32 scalar.
    """
    leaves, structure = jax.tree.flatten(entered)
    split = Split(list(named_leaves(entered)))
    if stages() > 1:
        run = functools.partial(pipeline.loss_and_gradients, sum_dtype=entered.layout.sum_dtype)
        totals, gradients = _in_region(run, entered, batch, config, make_timetable(config), scale)
    else:
        # A single microbatch has nothing to add to: its gradients stay as small as the weights.
        dtype = entered.layout.sum_dtype
        several = config.train.microbatches > 1
        zeros = split.apart(
            [reduce.zero_gradient(w, dtype if several else w.dtype) for w in leaves]
        )
        program = make_program(entered, [None] * len(leaves), config, scale)
        totals, *gradients = microbatches.loss_and_gradients(
            program, *split.apart(leaves), batch, zeros
        )
        gradients = [g.astype(dtype) for g in split.join(*gradients)]
    return _sums(totals, config), jax.tree.unflatten(structure, gradients)


def evaluate(entered: Llama, batch: Batch, config: Config) -> Sums:
    """Sums of a batch [M, B, S], without gradients."""
    if stages() > 1:

        def run(*given: Any) -> tuple[Totals, None, None]:
            return pipeline.evaluate(*given), None, None

        table = forward_only(make_timetable(config))
        totals, _ = _in_region(run, entered, batch, config, table, jnp.ones(()), gradients=False)
    else:
        leaves = jax.tree.leaves(entered)
        split = Split(list(named_leaves(entered)))
        program = make_program(entered, [None] * len(leaves), config, jnp.ones(()))
        totals = microbatches.evaluate(program, *split.apart(leaves), batch)
    return _sums(totals, config)


def _sums(totals: Totals, config: Config) -> Sums:
    ce, z = totals.sums
    objective = ce + config.train.z_loss * z
    for part in jax.tree.leaves(totals.added.objective):
        objective += jnp.sum(part)
    return Sums(objective, ce, z, totals.added.sums)


def _in_region(
    run: Callable,
    entered: Llama,
    batch: Batch,
    config: Config,
    table: Timetable,
    scale: jax.Array,
    *,
    gradients: bool = True,
) -> tuple[Totals, Any]:
    """Runs `run(program, table, layers, ends, batch)` on the local blocks of weights and batch."""
    leaves = jax.tree.leaves(entered)
    split = Split(list(named_leaves(entered)))
    rules = entered.layout.rules
    open_specs = [reduce.open_spec(w) for w in leaves]
    dims = [reduce.fsdp_dim(w) for w in leaves]
    others = tuple(a for a in jax.sharding.get_abstract_mesh().axis_names if a != pipeline.AXIS)

    def local(leaves: list[jax.Array], batch: Batch, scale: jax.Array) -> Any:
        program = make_program(entered, dims, config, scale)
        totals, dlayers, dends = run(program, table, *split.apart(leaves), batch)
        sums = [part.reshape(1, 1) for part in totals.sums]
        added = jax.tree.map(lambda x: x[None], totals.added)
        return sums, added, split.join(dlayers, dends) if gradients else None

    region = jax.shard_map(
        local,
        in_specs=(
            [jax.P(*spec.partitions) for spec in open_specs],
            rules.spec("microbatch", "batch", "seq"),
            jax.P(),
        ),
        out_specs=(
            [rules.spec("batch", "seq")] * 2,
            jax.P(others, pipeline.AXIS),
            open_specs if gradients else None,
        ),
        check_vma=False,  # gradients are shares of a sum by design: see the parity tests
    )
    sums, added, found = region([as_plain(w) for w in leaves], batch, scale)
    added = jax.tree.map(lambda x: jnp.sum(x, axis=0), added)
    added = to_network({"layers": added}, config)["layers"]
    return Totals(tuple(map(jnp.sum, sums)), added), found


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


def make_program(model: Llama, dims: list[int | None], config: Config, scale: jax.Array) -> Program:
    """The model as functions of the leaves of its layers and of its ends.

    Args:
      model: only for its structure and layout.
      dims: which dimension of each leaf is to be gathered over fsdp where it is used; None where
        the types say it, outside a manual region.
      scale: of the objective.
    """
    layout, structure = model.layout, jax.tree.structure(model)
    split = Split(list(named_leaves(model)))
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

    def embed(ends: list[jax.Array], batch: Batch) -> jax.Array:
        return ends_of(ends).embed(batch.tokens)

    def shared(batch: Batch) -> Any:
        return model.shared(TokenInfo(batch.positions, batch.segments))

    def layer(weights: list[jax.Array], x: jax.Array, shared: Any) -> tuple[jax.Array, Added]:
        y, added, _ = jax.tree.unflatten(block, whole(weights, layer_dims))(x, shared)
        return y, added

    def finish(
        ends: list[jax.Array], y: jax.Array, batch: Batch
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        model = ends_of(ends)
        sums = loss.cross_entropy(
            model.norm(y),
            model.head_weight(),
            batch.targets,
            scale,
            layout.rules,
            config.loss.chunk,
            config.train.z_loss,
            layout.sum_dtype,
        )
        return sums.objective, (sums.cross_entropy, sums.z)

    kept = jax.checkpoint(layer, policy=remat_policy(config.memory), prevent_cse=False)
    chunks = stages() * config.parallel.chunks if stages() > 1 else 1
    depth, unroll = config.model.layers // chunks, config.compile.unroll
    return Program(embed, shared, kept, finish, scale, depth, unroll)
