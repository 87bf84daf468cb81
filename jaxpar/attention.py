"""Attention: one manual island that picks the context parallelism and the local kernel.

Masks come from positions and segment ids alone, never from an offset, so packed documents, padding, context parallelism
and a key-value cache all use the same rule: a query sees the keys of its own segment up to its own position.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpar.parallel import context
from jaxpar.sharding import Rules

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
) -> jax.Array:
    """Causal grouped-query attention within segments.

    Args:
      q_BSHK: queries, sharded (batch, seq, heads); H is a multiple of G.
      k_BTGK: keys, and v_BTGK: values, sharded (batch, seq, kv_heads).
      queries: positions and segments of the queries, sharded (batch, seq).
      keys: the same of the keys, sharded over batch only: they are needed whole, and are the same in every layer.
      rules: the sharding table.

    Returns:
      [B, S, H, K] in the dtype of `q_BSHK`, sharded as the queries are.

    Communication: an all-gather of k and v over `sequence`; in the backward pass a reduce-scatter of their gradients.
    """
    island = jax.shard_map(
        _attend_local,
        in_specs=(
            rules.spec("batch", "seq", "heads", "head_dim"),
            rules.spec("batch", "seq", "kv_heads", "head_dim"),
            rules.spec("batch", "seq", "kv_heads", "head_dim"),
            rules.spec("batch", "seq"),
            rules.spec("batch", None),
        ),
        out_specs=rules.spec("batch", "seq", "heads", "head_dim"),
    )
    return island(q_BSHK, k_BTGK, v_BTGK, queries, keys)


def _attend_local(
    q_BSHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, queries: TokenInfo, keys: TokenInfo
) -> jax.Array:
    return _softmax_attention(
        q_BSHK, context.all_gather_tokens(k_BTGK), context.all_gather_tokens(v_BTGK), queries, keys
    )


def _softmax_attention(
    q_BSHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, queries: TokenInfo, keys: TokenInfo
) -> jax.Array:
    """Attention in chunks of `_QUERIES` queries, so that only B x H x _QUERIES x T scores exist at a time."""
    # In float32 here and back inside: so the gradients of all chunks add up in float32.
    k32_BTGK, v32_BTGK = (x.astype(jnp.float32) for x in (k_BTGK, v_BTGK))

    @jax.checkpoint  # the scores are quadratic in S: recompute them instead of keeping them
    def chunk(q_BCHK: jax.Array, queries: TokenInfo) -> jax.Array:
        mask_BCT = (queries.segments[:, :, None] == keys.segments[:, None, :]) & (
            queries.positions[:, :, None] >= keys.positions[:, None, :]
        )
        k_BTGK, v_BTGK = (x.astype(q_BSHK.dtype) for x in (k32_BTGK, v32_BTGK))
        return jax.nn.dot_product_attention(q_BCHK, k_BTGK, v_BTGK, mask=mask_BCT[:, None])

    batch, length = q_BSHK.shape[:2]
    if length <= _QUERIES:
        return chunk(q_BSHK, queries)

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, -length % _QUERIES), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(batch, -1, _QUERIES, *x.shape[2:]), 1, 0)

    o_NBCHK = jax.lax.map(lambda x: chunk(*x), (split(q_BSHK), TokenInfo(*map(split, queries))))
    return jnp.moveaxis(o_NBCHK, 0, 1).reshape(batch, -1, *q_BSHK.shape[2:])[:, :length]
