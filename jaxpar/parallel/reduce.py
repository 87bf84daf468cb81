"""Gathering weights and reducing their gradients: the `fsdp` and `data` axes.

The transposes are the point. Under Explicit sharding the cotangent of an all-gather is a reduce-scatter, and the
cotangent of an array that is `reduced` over an axis is `unreduced` over it: a sum still to be taken, until a `reshard`
asks for it. So gradients can be added up over microbatches first and reduced once:

    entered = enter_step(weight, token_axes)   # before the microbatch loop
    ...    gather(entered, dtype)              # in each layer
    leave_step(gradient, weight)               # after the loop: the one reduction
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, reshard


def enter_step(weight: jax.Array, token_axes: Iterable[str]) -> jax.Array:
    """The weight, typed so that its gradient stays a partial sum over each axis that spreads tokens but not the weight.

    Args:
      weight: as stored, any rank.
      token_axes: the axes over which the tokens of the residual are spread.

    Returns:
      The same array, `reduced` over those axes. No communication.
    """
    spec = jax.typeof(weight).sharding.spec
    if jax.sharding.get_abstract_mesh().size == 1:
        return weight  # nothing to sum; and jax cannot lower an unreduced result of a manual region here
    return reshard(weight, PartitionSpec(*spec.partitions, reduced=set(token_axes) - _axes(spec)))


def zero_gradient(weight: jax.Array) -> jax.Array:
    """Where the gradients of microbatches are added up: zeros of the type of the gradient of an entered weight."""
    spec = jax.typeof(weight).sharding.spec
    zeros = jnp.zeros(weight.shape, weight.dtype, out_sharding=PartitionSpec(*spec.partitions))
    return reshard(zeros, PartitionSpec(*spec.partitions, unreduced=spec.reduced))


def scale_partial(gradient: jax.Array, scale: jax.Array) -> jax.Array:
    """A partial sum times a scalar."""
    return gradient * reshard(scale, PartitionSpec(reduced=jax.typeof(gradient).sharding.spec.unreduced))


def leave_step(gradient: jax.Array, weight: jax.Array) -> jax.Array:
    """Takes the sum that `enter_step` left open: one all-reduce over those axes, in the dtype of the gradient.

    Args:
      gradient: of an entered weight.
      weight: as stored.
    """
    return reshard(gradient, jax.typeof(weight).sharding.spec)


def gather(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """All-gathers one layer's weight over `fsdp`, in the dtype of the computation.

    The cast comes first, so the bytes on the wire are those of `dtype`. Forward: one all-gather over `fsdp`, repeated
    in the backward pass, for its result is not kept. Backward: the gradient is reduce-scattered over `fsdp`.

    Args:
      weight: stored or entered, any rank, sharded over `fsdp` on at most one dimension.
      dtype: compute dtype.

    Returns:
      The weight in `dtype`, with `fsdp` gone from its sharding.
    """
    spec = jax.typeof(weight).sharding.spec
    whole = (_without(entry, "fsdp") for entry in spec.partitions)
    reduced = spec.reduced | {"fsdp"} if spec.reduced else spec.reduced
    return reshard(weight.astype(dtype), PartitionSpec(*whole, reduced=reduced))


def _axes(spec: PartitionSpec) -> set[str]:
    return {
        axis
        for entry in spec.partitions
        for axis in (entry if isinstance(entry, tuple) else (entry,))
        if axis is not None
    }


def _without(entry: str | tuple[str, ...] | None, axis: str) -> str | tuple[str, ...] | None:
    if isinstance(entry, tuple):
        return tuple(name for name in entry if name != axis) or None
    return None if entry == axis else entry
