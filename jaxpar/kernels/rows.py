"""Attention with whole rows of scores: some queries and all keys at a time. Exact, with its
gradient written out.

For sequences so short that `tiles` would be many small products. Called inside a full-manual
region, on local arrays.

    b: sequences of one device   s, t: its query and key tokens
    H = G R: query heads, G: key-value heads   K: head dim
    c: a strip of queries   x: R c, the queries of a strip and of all heads that share keys
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpar.kernels.tiles import HIDDEN, Operands, Sees, dot, not_hoisted

STRIP = 512
"""Queries that are worked on at a time."""


def attention(x: Operands, sees: Sees) -> tuple[jax.Array, None]:
    """As `tiles.attention`, without a log-sum-exp: the gradient computes the softmax again and
    needs none.

    No communication. Memory: the float32 scores of H x `STRIP` queries and all keys.
    """
    x = not_hoisted(x)
    k_bGtK, v_bGtK = (_multiplied(kv_btGK.swapaxes(1, 2)) for kv_btGK in (x.k, x.v))

    def strip(carry: None, q_bcHK: jax.Array, queries: Any) -> tuple[None, jax.Array]:
        shares, total = _softmax(_rows(q_bcHK, k_bGtK), k_bGtK, sees(queries, x.keys))
        values = dot("bGxt,bGtK->bGxK", shares.astype(v_bGtK.dtype), v_bGtK) / total
        return carry, _heads(values.astype(q_bcHK.dtype), q_bcHK)

    return _by_strips(strip, None, x.q, x.queries)[1], None


def attention_gradient(
    x: Operands, o_bsHK: None, lse_bHs: None, do_bsHK: jax.Array, sees: Sees
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of `attention` with respect to q, k and v; those of k and v add up over the
    strips in float32."""
    del o_bsHK, lse_bHs
    x = not_hoisted(x)
    k_bGtK, v_bGtK = (_multiplied(kv_btGK.swapaxes(1, 2)) for kv_btGK in (x.k, x.v))

    def strip(
        dkv: tuple[jax.Array, jax.Array], q_bcHK: jax.Array, given: tuple
    ) -> tuple[tuple, jax.Array]:
        queries, do_bcHK = given
        q_bGxK, do_bGxK = _rows(q_bcHK, k_bGtK), _rows(do_bcHK, k_bGtK)
        shares, total = _softmax(q_bGxK, k_bGtK, sees(queries, x.keys))
        do_bGxK = (do_bGxK / total).astype(
            k_bGtK.dtype
        )  # the shares stay without their total, in one pass less
        weighted = shares * dot("bGxK,bGtK->bGxt", do_bGxK, v_bGtK)
        dscores = weighted - shares * (weighted.sum(-1, keepdims=True) / total)
        dscores = (dscores * q_bGxK.shape[-1] ** -0.5).astype(k_bGtK.dtype)
        dk_bGtK = dkv[0] + dot("bGxt,bGxK->bGtK", dscores, q_bGxK)
        dv_bGtK = dkv[1] + dot("bGxt,bGxK->bGtK", shares.astype(k_bGtK.dtype), do_bGxK)
        dq_bGxK = dot("bGxt,bGtK->bGxK", dscores, k_bGtK)
        return (dk_bGtK, dv_bGtK), _heads(dq_bGxK.astype(q_bcHK.dtype), q_bcHK)

    zero = jnp.zeros_like(k_bGtK, jnp.float32)
    dkv, dq_bsHK = _by_strips(strip, (zero, zero), x.q, (x.queries, do_bsHK))
    return dq_bsHK, *(dkv_bGtK.swapaxes(1, 2).astype(x.k.dtype) for dkv_bGtK in dkv)


def _softmax(
    q_bGxK: jax.Array, k_bGtK: jax.Array, mask_bct: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """exp(score - largest score of the row), float32 [b, G, x, t], and its sums [b, G, x, 1].

    In the words in which XLA's compiler for CPUs makes one kernel of it all: a mask that is added,
    in four dimensions.
    """
    bias_bct = jnp.where(mask_bct, 0, HIDDEN)
    bias_bGxt = jnp.tile(bias_bct[:, None], (1, 1, q_bGxK.shape[2] // mask_bct.shape[1], 1))
    scores = dot("bGxK,bGtK->bGxt", q_bGxK, k_bGtK) * q_bGxK.shape[-1] ** -0.5 + bias_bGxt
    shares = jnp.exp(scores - scores.max(-1, keepdims=True))
    return shares, shares.sum(-1, keepdims=True)


def _rows(x_bcHK: jax.Array, k_bGtK: jax.Array) -> jax.Array:
    """[b, G, R c, K]: heads that share keys one below the other."""
    b, c, H, K = x_bcHK.shape
    G = k_bGtK.shape[1]
    x_bGRcK = jnp.transpose(x_bcHK.reshape(b, c, G, H // G, K), (0, 2, 3, 1, 4))
    return _multiplied(x_bGRcK.reshape(b, G, -1, K))


def _heads(x_bGxK: jax.Array, like_bcHK: jax.Array) -> jax.Array:
    """The inverse of `_rows`."""
    b, c, H, K = like_bcHK.shape
    x_bGRcK = x_bGxK.reshape(b, x_bGxK.shape[1], -1, c, K)
    return jnp.transpose(x_bGRcK, (0, 3, 1, 2, 4)).reshape(b, c, H, K)


def _multiplied(x: jax.Array) -> jax.Array:
    """In the dtype of the products: not every backend multiplies float16 into float32."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def _by_strips(work: Callable, carry: Any, q_bsHK: jax.Array, given: Any) -> tuple[Any, jax.Array]:
    """`work(carry, q, given)` of one strip of queries, and of what is given for them, after the
    other."""
    length = q_bsHK.shape[1]
    if length <= STRIP:
        return work(carry, q_bsHK, given)

    def split(x_bs: jax.Array) -> jax.Array:
        b, s = x_bs.shape[:2]
        padded = jnp.pad(x_bs, ((0, 0), (0, -s % STRIP), *((0, 0),) * (x_bs.ndim - 2)))
        return jnp.moveaxis(padded.reshape(b, -1, STRIP, *x_bs.shape[2:]), 1, 0)

    carry, out_ncbHK = jax.lax.scan(
        lambda carry, one: work(carry, *one), carry, jax.tree.map(split, (q_bsHK, given))
    )
    out_bsHK = jnp.moveaxis(out_ncbHK, 0, 1)
    return carry, out_bsHK.reshape(out_bsHK.shape[0], -1, *out_bsHK.shape[3:])[:, :length]
