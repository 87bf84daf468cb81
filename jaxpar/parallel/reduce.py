"""Gathering and reducing weights: the `fsdp` and `data` axes.

The transposes are the point. Under Explicit sharding the cotangent of an all-gather is a reduce-scatter, and the
cotangent of an array that is `reduced` over an axis is `unreduced` over it, a sum still to be taken, until a `reshard`
asks for it. So the forward text below also decides what the backward pass sends.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, reshard

REPLICAS = ("data", "expert", "sequence")
"""Axes over which weights are replicated while tokens are spread: weight gradients are summed over them."""


def gather(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """All-gathers one layer's weight over `fsdp`, in the dtype of the computation.

    The cast comes first, so the bytes on the wire are those of `dtype`. Forward: one all-gather over `fsdp`, repeated
    in the backward pass, for its result is not kept. Backward: the gradient is reduce-scattered over `fsdp`, and what
    is left of it all-reduced over `REPLICAS`. It takes two steps to say so: a single one is compiled to an all-reduce
    of the whole over all of these axes.

    Args:
      weight: as stored, any rank, sharded over `fsdp` on at most one dimension.
      dtype: compute dtype.

    Returns:
      The weight in `dtype`, with `fsdp` gone from its sharding.
    """
    spec = jax.typeof(weight).sharding.spec
    stored = reshard(weight.astype(dtype), PartitionSpec(*spec, reduced={*REPLICAS}))
    whole = (_without(entry, "fsdp") for entry in spec)
    return reshard(stored, PartitionSpec(*whole, reduced={*REPLICAS, "fsdp"}))


def _without(entry: str | tuple[str, ...] | None, axis: str) -> str | tuple[str, ...] | None:
    if isinstance(entry, tuple):
        return tuple(name for name in entry if name != axis) or None
    return None if entry == axis else entry
