"""The loop over the layers, and its gradient added in place.

l layers of a loop   L layers of a stack, of which a loop may be a part   x, y: residual; dx, dy: their gradients
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Layer = Callable[[Any, jax.Array, Any], jax.Array]
"""(weights of one layer, x, context) -> y. Its residuals are what remat keeps of a layer."""
Pull = Callable[[Any, jax.Array], tuple[Any, jax.Array]]
"""(totals, dy) -> totals with the gradients of the layers added, and dx."""


def vjp(
    layer: Layer,
    weights: Any,
    x: jax.Array,
    context: Any,
    *,
    first: Any = 0,
    depth: int,
    unroll: int = 1,
) -> tuple[jax.Array, Pull]:
    """Runs layers, and returns how to add their gradients to totals.

    Spelt out, because jax's transpose of a scan makes the gradients of all its layers first,
    another copy of them.

    Args:
      layer: one layer.
      weights: leaves [L, ...].
      x: input of the first layer.
      context: what all layers share; it has no gradient.
      first: place in the stack of the first layer; an int or an int32 scalar.
      depth: l.
      unroll: layers in one turn of the loop.

    Returns:
      y of the last layer, and the function that goes back. Its totals have the shapes of `weights`,
      the dtype in which gradients are summed, and the layout of the gradients, partial sums
      (`unreduced`) where these are.
    """
    shared: list[Any] = []  # how to take a layer's residuals apart, the same for every layer

    def keep(x: jax.Array, i: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        here = at(weights, first + i)
        y, pull = jax.vjp(lambda w, x: layer(w, x, context), here, x)
        residuals, structure = jax.tree.flatten(pull)
        # Weights and what all layers share are here anyway: only the rest has to be kept for each
        # layer.
        places = {id(leaf): n for n, leaf in enumerate(jax.tree.leaves((here, context)))}
        shared[:] = structure, [places.get(id(leaf)) for leaf in residuals]
        return y, [leaf for leaf in residuals if id(leaf) not in places]

    y, kept_l = jax.lax.scan(keep, x, jnp.arange(depth), unroll=unroll)
    structure, places = shared

    def back(totals: Any, dy: jax.Array) -> tuple[Any, jax.Array]:
        def step(carry: tuple[jax.Array, Any], scanned: tuple) -> tuple[tuple, None]:
            dy, totals = carry
            i, kept = scanned
            leaves, rest = jax.tree.leaves((at(weights, first + i), context)), iter(kept)
            pull = jax.tree.unflatten(
                structure, [next(rest) if n is None else leaves[n] for n in places]
            )
            more, dx = pull(dy)
            totals = jax.tree.map(lambda total, d: _add_at(total, first + i, d), totals, more)
            return (dx, totals), None

        (dx, totals), _ = jax.lax.scan(
            step, (dy, totals), (jnp.arange(depth), kept_l), reverse=True, unroll=unroll
        )
        return totals, dx

    return y, back


def at(tree_n: Any, i: Any) -> Any:
    """Entry `i` of every leaf [n, ...]."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), tree_n)


def add(totals: Any, more: Any) -> Any:
    """Adds leaf by leaf, in the dtype of the totals."""
    return jax.tree.map(lambda total, m: total + m.astype(total.dtype), totals, more)


def _add_at(total_n: jax.Array, i: jax.Array, more: jax.Array) -> jax.Array:
    def add(total_n: jax.Array, i: jax.Array, more: jax.Array) -> jax.Array:
        return total_n.at[i].add(more.astype(total_n.dtype))

    spec, spec_more = (jax.typeof(x).sharding.spec for x in (total_n, more))
    if not spec.unreduced:
        return add(total_n, i, more)
    in_specs = (spec, jax.P(), spec_more)
    local = jax.shard_map(add, in_specs=in_specs, out_specs=spec, check_vma=False)  # partial sums
    return local(total_n, i, more)
