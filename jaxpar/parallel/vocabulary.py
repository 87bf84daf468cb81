"""The vocabulary sharded over `tensor`: softmax statistics and gradients of the head, inside a full-manual region."""

import jax
import jax.numpy as jnp

_REPLICATED = ("data", "expert", "sequence")
"""Axes over which the head is replicated while tokens are spread: its gradient is summed over them."""


def gather_tokens(x_bsD: jax.Array) -> jax.Array:
    """Residual sharded along the sequence over `tensor` -> whole there. All-gather of b*S*D."""
    return jax.lax.all_gather(x_bsD, "tensor", axis=1, tiled=True)


def scatter_tokens(dx_bSD: jax.Array) -> jax.Array:
    """Sums partial gradients over `tensor` and leaves each device its tokens. Reduce-scatter of b*S*D."""
    return jax.lax.psum_scatter(dx_bSD, "tensor", scatter_dimension=1, tiled=True)


def sum_tokens(dx_bSD: jax.Array) -> jax.Array:
    """Sums partial gradients over `tensor`. All-reduce of b*S*D."""
    return jax.lax.psum(dx_bSD, "tensor")


def gather_weight(w_dv: jax.Array) -> jax.Array:
    """[D/fsdp, V/tensor] -> [D, V/tensor]. All-gather over `fsdp`."""
    return jax.lax.all_gather(w_dv, "fsdp", axis=0, tiled=True)


def scatter_weight(dw_Dv: jax.Array) -> jax.Array:
    """The gradient of `gather_weight`: reduce-scatter over `fsdp`, all-reduce over the other axes of the tokens."""
    return jax.lax.psum(jax.lax.psum_scatter(dw_Dv, "fsdp", scatter_dimension=0, tiled=True), _REPLICATED)


def log_partition(logits_cv: jax.Array, target_c: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax statistics over a vocabulary sharded over `tensor` (Megatron's vocabulary-parallel loss).

    The target is found by comparison with an iota, because a gather of a logit would need its owner's index. Two
    all-reduces: the maximum (c float32), then the sum of exponentials and the target logit together (2c float32).

    Args:
      logits_cv: float32 [C, V / tensor].
      target_c: int32 [C], ids in the whole vocabulary, or -1.

    Returns:
      Log of the partition function [C], logit of the target [C] (0 where there is none), and where this device holds
      the target [C, V / tensor].
    """
    first = jax.lax.axis_index("tensor") * logits_cv.shape[1]
    hit_cv = jnp.arange(logits_cv.shape[1]) + first == target_c[:, None]
    top_c = jax.lax.pmax(jnp.max(logits_cv, axis=1), "tensor")
    partial_c2 = jnp.stack(
        [jnp.sum(jnp.exp(logits_cv - top_c[:, None]), axis=1), jnp.sum(jnp.where(hit_cv, logits_cv, 0), axis=1)], axis=1
    )
    total_c2 = jax.lax.psum(partial_c2, "tensor")
    return jnp.log(total_c2[:, 0]) + top_c, total_c2[:, 1], hit_cv
