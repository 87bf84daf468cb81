"""Context parallelism: attention when the tokens of a sequence are spread over the `sequence` axis.

Called inside a full-manual region, on the local block of each array.

    b, s: sequences and tokens of one device, S: of all
    H = G R query heads of one device, G key-value heads
    K: head dim   n: tiles of a block of s tokens   q, k: tokens of one tile of queries and of keys
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpar.kernels import tiles
from jaxpar.kernels.tiles import Operands, Sees


def all_gather_tokens(x: jax.Array, axis: str = "sequence") -> jax.Array:
    """All-gathers the token dimension (dim 1) over a mesh axis.

    Used on keys and values: with grouped-query attention they are small. Forward: one all-gather of
    `x.nbytes * (n - 1)` received bytes a device; backward: one reduce-scatter of the same size.

    Args:
      x: local block, [B, S / n, ...].

    Returns:
      [B, S, ...], tokens in the order of the axis.
    """
    return jax.lax.all_gather(x, axis, axis=1, tiled=True)


def tokens_to_heads(x: jax.Array, axis: str = "sequence") -> jax.Array:
    """All tokens of some heads, from some tokens of all heads (Ulysses; Jacobs et al., 2023).

    Contiguous heads stay together, so query heads arrive where their key-value head does. Forward
    and backward: one all-to-all of `x.nbytes`, of which (n - 1) / n leave the device.

    Args:
      x: local block, [B, S / n, H, K]; n divides H.

    Returns:
      [B, S, H / n, K], tokens in the order of the axis.
    """
    return jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)


def heads_to_tokens(x: jax.Array, axis: str = "sequence") -> jax.Array:
    """The inverse of `tokens_to_heads`, at the same cost."""
    return jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)


# Ring attention (Liu et al., 2023): keys and values go round, the softmax is put together as they
# come by.


def ring(x: Operands, sees: Sees, axis: str = "sequence") -> tuple[jax.Array, jax.Array]:
    """Attention of the local queries to the keys of all devices, of which one block at a time is
    here.

    Args, results and memory as of `tiles.attention`, but for `x.keys`: info of the keys of all
    devices, [b, S].

    Communication: c - 1 `ppermute`s of the local k and v, c the size of the axis. Each starts
    before the work on the block that is here, and needs none of its results.
    """
    c, s, x = jax.lax.axis_size(axis), x.q.shape[1], tiles.not_hoisted(x)
    q_nbqGRK, queries_n = tiles.query_tiles(x.q, x.k.shape[2]), jax.tree.map(tiles.tiles, x.queries)

    def absorb(
        turn: Any, kv: tuple[jax.Array, jax.Array], softmax_n: tiles.Softmax
    ) -> tiles.Softmax:
        return tiles.absorb(q_nbqGRK, kv, softmax_n, queries_n, _held(x.keys, turn, s, axis), sees)

    def step(carry: tuple, turn: jax.Array) -> tuple[tuple, None]:
        kv, softmax_n = carry
        return (_pass_on(kv, axis), absorb(turn, kv, softmax_n)), None

    start = (x.k, x.v), tiles.Softmax.empty(q_nbqGRK)
    (kv, softmax_n), _ = jax.lax.scan(step, start, jnp.arange(c - 1))
    return absorb(c - 1, kv, softmax_n).finish(x.q.dtype)


def ring_gradient(
    x: Operands,
    o_bsHK: jax.Array,
    lse_bHs: jax.Array,
    do_bsHK: jax.Array,
    sees: Sees,
    axis: str = "sequence",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of `ring` with respect to q, k and v, from its results and the gradient of the
    first.

    The gradients of keys and values go round with them and are at home when all have added theirs;
    they add up in float32 and travel in the dtype of k and v.

    Communication: c - 1 `ppermute`s of the local k and v, c of their gradients.
    """
    c, s = jax.lax.axis_size(axis), x.q.shape[1]
    known = tiles.Backward.of(x, o_bsHK, lse_bHs, do_bsHK)
    queries_n = jax.tree.map(tiles.tiles, x.queries)

    def visit(
        turn: Any, kv: tuple[jax.Array, jax.Array], dq_n: jax.Array
    ) -> tuple[jax.Array, tuple]:
        zero = jnp.zeros_like(kv[0], jnp.float32)
        return known.visit(kv, dq_n, (zero, zero), queries_n, _held(x.keys, turn, s, axis), sees)

    def add(arrived: tuple, here: tuple) -> tuple:
        return tuple(
            (a.astype(jnp.float32) + b).astype(a.dtype) for a, b in zip(arrived, here, strict=True)
        )

    def step(carry: tuple, turn: jax.Array) -> tuple[tuple, None]:
        kv, dkv, dq_n = carry
        kv_next, dkv = _pass_on((kv, dkv), axis)
        dq_n, here = visit(turn, kv, dq_n)
        return (kv_next, add(dkv, here), dq_n), None

    kv = x.k, x.v
    dq_n, here = visit(0, kv, jnp.zeros_like(known.q_nbqGRK, jnp.float32))
    dkv = tuple(part.astype(x.k.dtype) for part in here)
    if c > 1:
        (kv, dkv, dq_n), _ = jax.lax.scan(
            step, (_pass_on(kv, axis), dkv, dq_n), jnp.arange(1, c - 1)
        )
        dkv = _pass_on(dkv, axis)
        dq_n, here = visit(c - 1, kv, dq_n)
        dkv = _pass_on(add(dkv, here), axis)
    dq_bsHK = tiles.whole(dq_n, dim=1).reshape(x.q.shape).astype(x.q.dtype)
    return dq_bsHK, dkv[0], dkv[1]


def _pass_on(tree: Any, axis: str) -> Any:
    """Every array to the next device of the ring."""
    c = jax.lax.axis_size(axis)
    return jax.tree.map(
        lambda x: jax.lax.ppermute(x, axis, [(i, (i + 1) % c) for i in range(c)]), tree
    )


def _held(keys: Any, turn: Any, tokens: int, axis: str) -> Any:
    """Info of the block of keys that is here after `turn` turns: that of the device so many places
    back."""
    owner = (jax.lax.axis_index(axis) - turn) % jax.lax.axis_size(axis)
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, owner * tokens, tokens, axis=1), keys
    )
