"""Cross-entropy over a sharded vocabulary, in chunks, with its gradient computed in the same pass.

Full logits never exist: each device turns `chunk` of its tokens at a time into float32 logits over
its part of the vocabulary, reduces them to three numbers a token, and turns them at once into the
gradients of its input and weight. The backward pass only scales those by the incoming scalar.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpar.kernels.matmul import einsum
from jaxpar.parallel import reduce, vocabulary
from jaxpar.sharding import Rules, all_manual

# B batch, S sequence, D model dim, V vocabulary, N tokens of one device, C tokens of one chunk.


class LossSums(NamedTuple):
    """float32 scalars, sums over the valid tokens: the scaled objective (differentiable), and its
    two parts, not scaled."""

    objective: jax.Array
    cross_entropy: jax.Array
    z: jax.Array


def count_valid(targets: jax.Array) -> jax.Array:
    """Number of tokens that have a target (target >= 0), float32 scalar."""
    return jnp.sum(targets >= 0, dtype=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def cross_entropy(
    x_BSD: jax.Array,
    w_DV: jax.Array,
    targets_BS: jax.Array,
    scale: jax.Array,
    rules: Rules,
    chunk: int,
    z_loss: float,
    sum_dtype: jnp.dtype,
) -> LossSums:
    """`scale` times the summed cross-entropy of next-token prediction, plus `z_loss` times the
    summed square of the log-partition.

    Args:
      x_BSD: final hidden states, laid out as the residual; its dtype is that of the matmuls.
      w_DV: head, stored or entered; gathered over fsdp here, in the dtype of x.
      targets_BS: int32 next tokens, sharded (batch, seq); -1 has no loss.
      scale: float32 scalar without a gradient. It is known here, and not only in the backward pass,
        so that the gradients of logits and head are never smaller than float16 can tell from 0.
      rules: the sharding table.
      chunk: tokens a device works on at a time.
      z_loss: weight of the z-loss (PaLM; Chowdhery et al., 2022).
      sum_dtype: dtype in which the gradient of the head is summed over devices.

    Returns:
      `LossSums`; only `objective` has a gradient.

    Communication: w over fsdp (all-gather); x over tensor if the residual lies there (all-gather);
    two all-reduces over the axes of `vocab` a chunk, of C and 2C float32. For the gradients: dx
    over tensor (reduce-scatter; without sequence parallelism all-reduce); dw over fsdp
    (reduce-scatter), otherwise it stays a partial sum over the tokens.
    """
    head_DV = reduce.gather(w_DV, x_BSD.dtype, sum_dtype)
    options = dict(rules=rules, chunk=chunk, z_loss=z_loss)
    return _island(x_BSD, head_DV, targets_BS, scale, **options, gradients=False)[0]


def _forward(x_BSD, w_DV, targets_BS, scale, rules, chunk, z_loss, sum_dtype):
    head_DV = reduce.gather(w_DV, x_BSD.dtype, sum_dtype)
    options = dict(rules=rules, chunk=chunk, z_loss=z_loss)
    sums, gradients = _island(x_BSD, head_DV, targets_BS, scale, **options, gradients=True)
    return sums, (gradients, w_DV)  # of which the backward pass takes only the type


def _backward(rules, chunk, z_loss, sum_dtype, residuals, cotangent: LossSums):
    del rules, chunk, z_loss
    (dx_BSD, dw_DV), w_DV = residuals
    scale = cotangent.objective
    dx_BSD = (dx_BSD * scale).astype(dx_BSD.dtype)
    dw_DV = reduce.scatter(reduce.scale_partial(dw_DV, scale), w_DV, sum_dtype)
    # The layers' backward pass needs dx alone: it has to wait, or dw waits for it, whole and
    # unsummed.
    return *jax.lax.optimization_barrier((dx_BSD, dw_DV)), None, None


cross_entropy.defvjp(_forward, _backward)


def _island(
    x_BSD, w_DV, targets_BS, scale, *, rules: Rules, chunk: int, z_loss: float, gradients: bool
):
    """Runs `_local` on every device's tokens and vocabulary; sums the results outside, where they
    are typed."""
    residual, weight = rules.spec("batch", "residual_seq", "embed"), rules.spec("embed", "vocab")
    dweight = (
        rules.spec("embed", "vocab", unreduced=vocabulary.deferred(w_DV)) if gradients else None
    )
    every_token_axis = rules.spec("batch", "seq")
    local = functools.partial(
        _local, chunk=chunk, z_loss=z_loss, gradients=gradients, rules=rules, shares=all_manual()
    )
    sums, grads = jax.shard_map(
        local,
        in_specs=(residual, weight, every_token_axis, jax.P()),
        out_specs=((every_token_axis,) * 2, (residual, dweight) if gradients else None),
        check_vma=False,  # not differentiated through; that dw is summed, the parity tests show
    )(x_BSD, vocabulary.as_plain(w_DV), targets_BS, scale)
    ce, z = (jnp.sum(part) for part in sums)
    return LossSums(scale * (ce + z_loss * z), ce, z), grads


def _local(
    x_bsD,
    w_Dv,
    targets_bs,
    scale,
    *,
    chunk: int,
    z_loss: float,
    gradients: bool,
    rules: Rules,
    shares: bool,
):
    """One device: sums of its tokens as [1, 1] arrays, and the gradients of its blocks; of x its
    share if `shares`."""
    dtype, shard_seq = x_bsD.dtype, "tensor" in rules.residual_seq
    x_bSD = vocabulary.gather_tokens(x_bsD) if shard_seq else x_bsD
    shape, dim, size = x_bSD.shape, w_Dv.shape[0], min(chunk, targets_bs.size)
    pad = -targets_bs.size % size
    x_CcD = jnp.pad(x_bSD.reshape(-1, dim), ((0, pad), (0, 0))).reshape(-1, size, dim)
    targets_Cc = jnp.pad(targets_bs.reshape(-1), (0, pad), constant_values=-1).reshape(-1, size)

    def step(carry, scanned):
        ce, z, dw_Dv = carry
        x_cD, target_c = scanned
        logits_cv = jnp.dot(x_cD, w_Dv, preferred_element_type=jnp.float32)
        lse_c, target_logit_c, hit_cv = vocabulary.log_partition(logits_cv, target_c, rules.vocab)
        valid_c = (target_c >= 0).astype(jnp.float32)
        ce += jnp.sum(valid_c * (lse_c - target_logit_c))
        z += jnp.sum(valid_c * lse_c**2)
        if not gradients:
            return (ce, z, dw_Dv), None
        probability_cv = jnp.exp(logits_cv - lse_c[:, None])
        scale_c = scale * valid_c
        share_cv = (scale_c * (1 + 2 * z_loss * lse_c))[:, None] * probability_cv
        dlogits_cv = (share_cv - jnp.where(hit_cv, scale_c[:, None], 0)).astype(dtype)
        dw_Dv += jnp.einsum("cD,cv->Dv", x_cD, dlogits_cv, preferred_element_type=jnp.float32)
        return (ce, z, dw_Dv), einsum("cv,Dv->cD", dlogits_cv, w_Dv)

    zero = jnp.zeros((), jnp.float32)
    dw_Dv = jnp.zeros(w_Dv.shape if gradients else (), jnp.float32)
    (ce, z, dw_Dv), dx_CcD = jax.lax.scan(step, (zero, zero, dw_Dv), (x_CcD, targets_Cc))
    sums = ce.reshape(1, 1), z.reshape(1, 1)
    if dx_CcD is None:
        return sums, None
    dx_bSD = dx_CcD.reshape(-1, dim)[: targets_bs.size].reshape(shape)
    if shard_seq:
        dx_bSD = vocabulary.scatter_tokens(dx_bSD)
    elif not shares:  # in a pipeline the sum is taken where x was made
        dx_bSD = vocabulary.sum_tokens(dx_bSD)
    return sums, (dx_bSD, dw_Dv.astype(dtype))
