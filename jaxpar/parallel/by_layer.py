"""Functions of whole matrices, of stacks whose matrices are cut over devices."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpar.parallel.reduce import names_of


def by_layer(function: Callable[[jax.Array], jax.Array], x_l: jax.Array) -> jax.Array:
    """Applies a function to each entry of a stack, one after the other.

    Instead of gathering matrices, devices share the layers: each gets all of as many, and sends
    back its part of the others' results. Where there are more devices than layers, some get zeros.

    Args:
      function: [...] -> [...], of one layer; it keeps shape and dtype.
      x_l: [L, ...], sharded any how; axes that shard L keep their layers, and what an axis does
        not shard it computes as often as it is large.

    Returns:
      [L, ...], sharded as `x_l` is.

    Communication: two all-to-alls over each axis that shards another dimension than L, of the
    device's own share of `x_l` each, as if L were a multiple of the devices that share it.
    """
    spec = jax.typeof(x_l).sharding.spec
    sizes = jax.sharding.get_abstract_mesh().shape
    # Of a dimension on several axes, the last one cuts finest.
    moves = [
        (axis, dim)
        for dim, entry in enumerate(spec.partitions)
        for axis in reversed(names_of(entry))
        if dim > 0 and sizes[axis] > 1
    ]
    if not any(spec.partitions):
        return jax.lax.map(function, x_l)

    def local(x_l: jax.Array) -> jax.Array:
        layers = len(x_l)
        missing = -layers % math.prod(sizes[axis] for axis, _ in moves)
        x_l = jnp.pad(x_l, ((0, missing), *((0, 0),) * (x_l.ndim - 1)))
        for axis, dim in moves:
            x_l = jax.lax.all_to_all(x_l, axis, split_axis=0, concat_axis=dim, tiled=True)
        x_l = jax.lax.map(function, x_l)
        for axis, dim in reversed(moves):
            x_l = jax.lax.all_to_all(x_l, axis, split_axis=dim, concat_axis=0, tiled=True)
        return x_l[:layers]

    return jax.shard_map(local, in_specs=spec, out_specs=spec)(x_l)
