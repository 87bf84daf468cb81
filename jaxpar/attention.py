"""Attention: one manual island that picks the context parallelism and the local kernel.

Masks come from positions and segment ids alone, never from an offset, so packed documents, padding, context parallelism
and a key-value cache all use the same rule: a query sees the keys of its own segment up to its own position.
"""

from typing import NamedTuple

import jax

from jaxpar.parallel import context
from jaxpar.sharding import Rules

# B batch, S query tokens, T key tokens, H query heads, G key-value heads, K head dim. Sizes are logical, never shards.


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


@jax.checkpoint  # the scores are quadratic in S: recompute them instead of keeping them
def _softmax_attention(
    q_BSHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, queries: TokenInfo, keys: TokenInfo
) -> jax.Array:
    mask_BST = (queries.segments[:, :, None] == keys.segments[:, None, :]) & (
        queries.positions[:, :, None] >= keys.positions[:, None, :]
    )
    return jax.nn.dot_product_attention(q_BSHK, k_BTGK, v_BTGK, mask=mask_BST[:, None])
