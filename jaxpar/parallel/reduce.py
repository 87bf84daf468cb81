"""Gathering weights and reducing their gradients: the `fsdp` and `data` axes.

The transposes are the point. Under Explicit sharding the cotangent of an array that is `reduced`
over an axis is `unreduced` over it: a sum still to be taken, until a `reshard` asks for it. So
gradients can be added up over microbatches first and reduced once:

    entered = enter_step(weight, ...)          # before the microbatch loop
    ...    gather(entered, ...)                # in each layer
    leave_step(gradient, weight)               # after the loop: the one reduction
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, reshard


def enter_step(
    weight: jax.Array, summed: Iterable[str], dtype: jnp.dtype, *, gather_fsdp: bool
) -> jax.Array:
    """The weight as the microbatches of a step use it.

    It is gathered over `data` where it is stored sharded there (ZeRO-1), and over `fsdp` with
    `gather_fsdp`, in the compute dtype; and it is typed so that its gradient stays a partial sum
    over every axis that spreads what it meets but not the weight itself.

    Args:
      weight: as stored, any rank.
      summed: the axes over which the activations that the weight meets are spread.
      dtype: compute dtype, of what travels.
      gather_fsdp: gather once a step instead of in every layer.

    Communication: at most one all-gather of the weight over these axes.
    """
    spec = jax.typeof(weight).sharding.spec
    if jax.sharding.get_abstract_mesh().size == 1:
        return weight  # nothing to sum; and jax cannot lower an unreduced result of a region here
    gathered = {"data", "fsdp"} if gather_fsdp else {"data"}
    entries = [_without(entry, gathered) for entry in spec.partitions]
    if entries != list(spec.partitions):
        weight = weight.astype(dtype)
    return reshard(weight, PartitionSpec(*entries, reduced=set(summed) - _axes(entries)))


def zero_gradient(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Where the gradients of microbatches are added up: zeros of the type of the gradient of an
    entered weight."""
    spec = jax.typeof(weight).sharding.spec
    zeros = jnp.zeros(weight.shape, dtype, out_sharding=PartitionSpec(*spec.partitions))
    return reshard(zeros, PartitionSpec(*spec.partitions, unreduced=spec.reduced))


def leave_step(gradient: jax.Array, weight: jax.Array) -> jax.Array:
    """Takes the sums that `enter_step` left open, in the dtype of the gradient.

    A reduce-scatter over the axes that shard the weight, then an all-reduce of what is left over
    the others. It takes two steps to say so: a single one is compiled to an all-reduce of the whole
    over all of these axes.

    Args:
      gradient: of an entered weight.
      weight: as stored.

    Returns:
      The gradient in the layout and dtype of `weight`.
    """
    stored = jax.typeof(weight).sharding.spec.partitions
    still_open = jax.typeof(gradient).sharding.spec.unreduced - _axes(stored)
    scattered = reshard(gradient, PartitionSpec(*stored, unreduced=still_open))
    return reshard(scattered, PartitionSpec(*stored)).astype(weight.dtype)


def scale_partial(gradient: jax.Array, scale: jax.Array) -> jax.Array:
    """A partial sum times a scalar."""
    return gradient * reshard(
        scale, PartitionSpec(reduced=jax.typeof(gradient).sharding.spec.unreduced)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(weight: jax.Array, dtype: jnp.dtype, sum_dtype: jnp.dtype) -> jax.Array:
    """All-gathers a weight over `fsdp`, in the dtype of the computation.

    The cast comes first, so the bytes on the wire are those of `dtype`. Forward: one all-gather
    over `fsdp`, repeated in the backward pass, for its result is not kept. Backward: the gradient
    is reduce-scattered over `fsdp` in `sum_dtype`. A weight that is not sharded over `fsdp` is only
    cast.

    Args:
      weight: stored or entered, any rank, sharded over `fsdp` on at most one dimension.
      dtype: compute dtype.
      sum_dtype: dtype in which gradients are summed over devices.

    Returns:
      The weight in `dtype`, with `fsdp` gone from its sharding.
    """
    spec = jax.typeof(weight).sharding.spec
    entries = [_without(entry, {"fsdp"}) for entry in spec.partitions]
    reduced = spec.reduced | {"fsdp"} if spec.reduced else spec.reduced
    # A weight that is already of this dtype is said to lie as it lies: else XLA of jax 0.12 takes
    # the gathered layout for that of the loop's constants, and gathers embedding and head before
    # the loop over microbatches, for all of it.
    here = reshard(weight.astype(dtype), spec)
    return reshard(here, PartitionSpec(*entries, reduced=reduced))


def _gather_forward(
    weight: jax.Array, dtype: jnp.dtype, sum_dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    return gather(
        weight, dtype, sum_dtype
    ), weight  # of which the backward pass takes only the type


def _gather_backward(
    dtype: jnp.dtype, sum_dtype: jnp.dtype, weight: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    del dtype
    return (scatter(gradient, weight, sum_dtype),)


gather.defvjp(_gather_forward, _gather_backward)


def scatter(gradient: jax.Array, weight: jax.Array, sum_dtype: jnp.dtype) -> jax.Array:
    """Reduce-scatters the gradient of a gathered weight over `fsdp` in `sum_dtype`: the transpose
    of `gather`.

    Args:
      gradient: of `gather(weight, ...)`.
      weight: of which only the type is taken.
      sum_dtype: dtype in which gradients are summed over devices.

    Returns:
      The gradient in the layout and dtype of `weight`, still a partial sum over the axes it was
      entered with.
    """
    spec = jax.typeof(weight).sharding.spec
    scattered = PartitionSpec(*spec.partitions, unreduced=spec.reduced)
    return reshard(gradient.astype(sum_dtype), scattered).astype(weight.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_block(weight: jax.Array, dim: int, dtype: jnp.dtype, sum_dtype: jnp.dtype) -> jax.Array:
    """`gather` inside a full-manual region, where types do not say which dimension `fsdp` shards:
    it is `dim`."""
    return jax.lax.all_gather(weight.astype(dtype), "fsdp", axis=dim, tiled=True)


def _gather_block_forward(weight, dim, dtype, sum_dtype):
    return gather_block(weight, dim, dtype, sum_dtype), jnp.zeros((), weight.dtype)


def _gather_block_backward(dim, dtype, sum_dtype, like, gradient):
    del dtype
    scattered = jax.lax.psum_scatter(
        gradient.astype(sum_dtype), "fsdp", scatter_dimension=dim, tiled=True
    )
    return (scattered.astype(like.dtype),)


gather_block.defvjp(_gather_block_forward, _gather_block_backward)


def fsdp_dim(weight: jax.Array) -> int | None:
    """The dimension of an entered weight that is still sharded over `fsdp`, for `gather_block`."""
    entries = jax.typeof(weight).sharding.spec.partitions
    return next((dim for dim, entry in enumerate(entries) if "fsdp" in names_of(entry)), None)


def open_spec(weight: jax.Array) -> PartitionSpec:
    """The type of a gradient of an entered weight that is a partial sum over every axis that does
    not shard it."""
    entries = jax.typeof(weight).sharding.spec.partitions
    return PartitionSpec(
        *entries, unreduced=set(jax.sharding.get_abstract_mesh().axis_names) - _axes(entries)
    )


Entry = str | tuple[str, ...] | None


def _axes(entries: Iterable[Entry]) -> set[str]:
    return {axis for entry in entries for axis in names_of(entry)}


def names_of(entry: Entry) -> tuple[str, ...]:
    """The axes of an entry of a `PartitionSpec`, the one that cuts finest last."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def _without(entry: Entry, axes: set[str]) -> Entry:
    left = tuple(axis for axis in names_of(entry) if axis not in axes)
    return left if len(left) > 1 else (left[0] if left else None)
