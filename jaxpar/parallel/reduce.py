"""Gathering and reducing weights: the `fsdp` and `tensor` axes.

The transposes are the point. Under Explicit sharding the cotangent of an all-gather is a reduce-scatter, and the
cotangent of an array that is `reduced` over an axis is `unreduced` over it until something asks for the sum. So the
forward text below also decides what the backward pass sends.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def gather(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """All-gathers one layer's weight over `fsdp`, in the dtype of the computation.

    The cast comes first, so the bytes on the wire are those of `dtype`. Forward: one all-gather over `fsdp`; the
    remat policy repeats it in the backward pass instead of keeping the result. Backward: the gradient is
    reduce-scattered over `fsdp` (and summed over the other batch axes).

    Args:
      weight: stored weight, any rank, sharded over `fsdp` on at most one dimension.
      dtype: compute dtype.

    Returns:
      The weight in `dtype`, with `fsdp` gone from its sharding.
    """
    spec = jax.typeof(weight).sharding.spec
    return jax.sharding.reshard(weight.astype(dtype), PartitionSpec(*(_without(entry, "fsdp") for entry in spec)))


def _without(entry: str | tuple[str, ...] | None, axis: str) -> str | tuple[str, ...] | None:
    if isinstance(entry, tuple):
        return tuple(name for name in entry if name != axis) or None
    return None if entry == axis else entry
