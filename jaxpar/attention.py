"""Attention: one manual island that picks the context parallelism and the local kernel.

Masks come from positions and segment ids alone, never from an offset, so packed documents, padding, context parallelism
and a key-value cache all use the same rule: a query sees the keys of its own segment up to its own position.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as keep

from jaxpar.parallel import context
from jaxpar.sharding import Rules, all_manual

# B batch, S query tokens, T key tokens, H query heads, G key-value heads, K head dim. Sizes are logical, never shards.


_QUERIES = 512
"""Queries that are worked on at a time."""


class TokenInfo(NamedTuple):
    """Where each token stands: int32 [B, S] each. `segments` numbers the documents of a row from 1; 0 is padding."""

    positions: jax.Array
    segments: jax.Array


def attend(
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    queries: TokenInfo,
    keys: TokenInfo,
    rules: Rules,
    kind: str,
) -> jax.Array:
    """Causal grouped-query attention within segments.

    Args:
      q_BSHK: queries, sharded (batch, seq, heads); H is a multiple of G.
      k_BTGK: keys, and v_BTGK: values, sharded (batch, seq, kv_heads).
      queries: positions and segments of the queries, sharded (batch, seq).
      keys: the same of the keys, sharded over batch only: they are needed whole, and are the same in every layer.
      rules: the sharding table.
      kind: of context parallelism: all_gather, ring or ulysses. The last two are self-attention: T is S.

    Returns:
      [B, S, H, K] in the dtype of `q_BSHK`, sharded as the queries are. It bears the name `attention` for remat.

    Communication, over `sequence`: all_gather: an all-gather of k and v; in the backward pass a reduce-scatter of
    their gradients. ring and ulysses: see `context.ring`, `context.ring_gradient` and `context.tokens_to_heads`.
    """
    assert kind == "all_gather" or q_BSHK.shape[1] == k_BTGK.shape[1], "a cache is read with all_gather"
    if kind == "ring":
        return _ring(q_BSHK, k_BTGK, v_BTGK, queries, keys, rules)
    island = jax.shard_map(
        {"all_gather": _all_gathered, "ulysses": _exchanged}[kind],
        in_specs=_in_specs(rules),
        out_specs=rules.spec("batch", "seq", "heads", "head_dim"),
        check_vma=not all_manual(),  # a region around it that does not check cannot be checked in here
    )
    return keep(island(q_BSHK, k_BTGK, v_BTGK, queries, keys), "attention")


def sees(queries: TokenInfo, keys: TokenInfo) -> jax.Array:
    """The one rule of visibility: tokens [B, S] and [B, T] -> bool [B, S, T]."""
    return (queries.segments[:, :, None] == keys.segments[:, None, :]) & (
        queries.positions[:, :, None] >= keys.positions[:, None, :]
    )


def _in_specs(rules: Rules) -> tuple:
    q, kv = (rules.spec("batch", "seq", heads, "head_dim") for heads in ("heads", "kv_heads"))
    return q, kv, kv, rules.spec("batch", "seq"), rules.spec("batch", None)


def _all_gathered(
    q_BSHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, queries: TokenInfo, keys: TokenInfo
) -> jax.Array:
    return _softmax_attention(
        q_BSHK, context.all_gather_tokens(k_BTGK), context.all_gather_tokens(v_BTGK), queries, keys
    )


def _exchanged(
    q_BSHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, queries: TokenInfo, keys: TokenInfo
) -> jax.Array:
    """Ulysses: all tokens of some heads. These are the copies that the backward pass needs, so where remat keeps
    something it keeps them, and the exchange is not repeated."""
    del queries  # here they are as whole as the keys, and the same tokens
    q_BSHK = keep(context.tokens_to_heads(q_BSHK), "query")
    k_BSGK = keep(context.tokens_to_heads(k_BSGK), "key")
    v_BSGK = keep(context.tokens_to_heads(v_BSGK), "value")
    return context.heads_to_tokens(_softmax_attention(q_BSHK, k_BSGK, v_BSGK, keys, keys))


def _softmax_attention(
    q_BSHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, queries: TokenInfo, keys: TokenInfo
) -> jax.Array:
    """Attention in chunks of `_QUERIES` queries, so that only B x H x _QUERIES x T scores exist at a time."""
    # Not every backend multiplies float16 into float32.
    dtype = jnp.dtype("float32") if q_BSHK.dtype == jnp.float16 else q_BSHK.dtype
    # In float32 here and back inside: so the gradients of all chunks add up in float32.
    k32_BTGK, v32_BTGK = (x.astype(jnp.float32) for x in (k_BTGK, v_BTGK))

    @jax.checkpoint  # the scores are quadratic in S: recompute them instead of keeping them
    def chunk(q_BCHK: jax.Array, queries: TokenInfo) -> jax.Array:
        k_BTGK, v_BTGK = (x.astype(dtype) for x in (k32_BTGK, v32_BTGK))
        o_BCHK = jax.nn.dot_product_attention(q_BCHK.astype(dtype), k_BTGK, v_BTGK, mask=sees(queries, keys)[:, None])
        return o_BCHK.astype(q_BCHK.dtype)

    batch, length = q_BSHK.shape[:2]
    if length <= _QUERIES:
        return chunk(q_BSHK, queries)

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, -length % _QUERIES), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(batch, -1, _QUERIES, *x.shape[2:]), 1, 0)

    o_NBCHK = jax.lax.map(lambda x: chunk(*x), (split(q_BSHK), TokenInfo(*map(split, queries))))
    return jnp.moveaxis(o_NBCHK, 0, 1).reshape(batch, -1, *q_BSHK.shape[2:])[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ring(q_BSHK, k_BSGK, v_BSGK, queries: TokenInfo, keys: TokenInfo, rules: Rules) -> jax.Array:
    return _ring_forward(q_BSHK, k_BSGK, v_BSGK, queries, keys, rules)[0]


def _ring_forward(q_BSHK, k_BSGK, v_BSGK, queries, keys, rules):
    """Remat keeps the log-sum-exp with the result, for without both the ring runs again. They are named here because
    here they are residuals: a name given to the result outside would be that of a second copy."""
    island = _spelt_out(
        functools.partial(context.ring, sees=sees),
        in_specs=_in_specs(rules),
        out_specs=(rules.spec("batch", "seq", "heads", "head_dim"), rules.spec("batch", "heads", "seq")),
    )
    o_BSHK, lse_BHS = island(q_BSHK, k_BSGK, v_BSGK, queries, keys)
    o_BSHK, lse_BHS = keep(o_BSHK, "attention"), keep(lse_BHS, "attention")
    return o_BSHK, (q_BSHK, k_BSGK, v_BSGK, queries, keys, o_BSHK, lse_BHS)


def _ring_backward(rules: Rules, residuals: Any, do_BSHK: jax.Array):
    q, kv, _, _, _ = specs = _in_specs(rules)
    island = _spelt_out(
        functools.partial(context.ring_gradient, sees=sees),
        in_specs=(*specs, q, rules.spec("batch", "heads", "seq"), q),
        out_specs=(q, kv, kv),
    )
    return *island(*residuals, do_BSHK), None, None


_ring.defvjp(_ring_forward, _ring_backward)


def _spelt_out(local, *, in_specs, out_specs):
    """A full-manual region through which nothing is differentiated: both directions spell out their communication."""
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)  # see above
