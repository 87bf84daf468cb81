"""Context parallelism: attention when the tokens of a sequence are spread over the `sequence` axis.

Called inside a full-manual region, on the local block of each array. Who sees whom is a callable, so that the rule
(positions and segments) is written once, in `attention`.

    b, s: sequences and tokens of one device, S: of all   H = G R query heads of one device, G key-value heads
    K: head dim   n: tiles of a block of s tokens   q, k: tokens of one tile of queries and of keys
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

TILE = 1024
"""Tokens to a side of the scores that the ring holds at a time, about: a tile divides half a block."""

_HIDDEN = -1e30
"""Score of a key that is not seen: finite, so that a row of nothing else gives no NaN."""

Sees = Callable[[Any, Any], jax.Array]
"""Info of queries [b, q] and of keys [b, k] -> bool [b, q, k]: what each query sees."""


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

    Contiguous heads stay together, so query heads arrive where their key-value head does. Forward and backward: one
    all-to-all of `x.nbytes`, of which (n - 1) / n leave the device.

    Args:
      x: local block, [B, S / n, H, K]; n divides H.

    Returns:
      [B, S, H / n, K], tokens in the order of the axis.
    """
    return jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)


def heads_to_tokens(x: jax.Array, axis: str = "sequence") -> jax.Array:
    """The inverse of `tokens_to_heads`, at the same cost."""
    return jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)


# Ring attention (Liu et al., 2023): keys and values go round, the softmax is put together as they come by.


class _Softmax(NamedTuple):
    """A softmax over the keys so far, float32: its largest score and its sum of exponentials [b, G, R, q], and the
    values in their proportions [b, G, R, q, K], both relative to the largest score."""

    top: jax.Array
    total: jax.Array
    values: jax.Array


def ring(
    q_bsHK: jax.Array, k_bsGK: jax.Array, v_bsGK: jax.Array, queries: Any, keys: Any, sees: Sees, axis: str = "sequence"
) -> tuple[jax.Array, jax.Array]:
    """Attention of the local queries to the keys of all devices, of which one block at a time is here.

    Args:
      q_bsHK: queries, H a multiple of G; k_bsGK: keys, and v_bsGK: values.
      queries: info of the queries, a pytree of [b, s]; keys: of the keys of all devices, [b, S].
      sees: which query sees which key. Pairs of tiles in which none does are skipped.
      axis: mesh axis.

    Returns:
      [b, s, H, K] in the dtype of `q_bsHK`, and the log-sum-exp of every query's scores, float32 [b, H, s]. A query
      must see at least one key.

    Communication: c - 1 `ppermute`s of the local k and v, c the size of the axis. Each starts before the work on the
    block that is here, and needs none of its results. Memory: the float32 scores of H x tile x tile.
    """
    c = jax.lax.axis_size(axis)
    # Masks are the same in every layer, so the scan over layers would make those of all pairs of tiles ahead of it and
    # hold them: S * S / c bytes and more. Tied to this layer's queries they are not.
    q_bsHK, queries, keys = jax.lax.optimization_barrier((q_bsHK, queries, keys))
    q_nbqGRK, queries_n = _query_tiles(q_bsHK, k_bsGK.shape[2]), jax.tree.map(_tiles, queries)
    n, b, q, G, R, K = q_nbqGRK.shape

    def absorb(turn: Any, kv: tuple[jax.Array, jax.Array], softmax_n: _Softmax) -> _Softmax:
        k_nbkGK, v_nbkGK = map(_tiles, kv)

        def tile(old: _Softmax, _: tuple, i: jax.Array, j: jax.Array, mask_bqk: jax.Array) -> tuple[_Softmax, tuple]:
            scores = jnp.where(mask_bqk[:, None, None], _scores(q_nbqGRK[i], k_nbkGK[j]), _HIDDEN)
            # Hidden keys of a row that has seen none yet count 1 each, until its first visible one scales them by 0.
            top = jnp.maximum(old.top, scores.max(-1))
            shares, scale = jnp.exp(scores - top[..., None]), jnp.exp(old.top - top)
            values = _dot("bGRqk,bkGK->bGRqK", shares.astype(v_nbkGK.dtype), v_nbkGK[j])
            return _Softmax(top, old.total * scale + shares.sum(-1), old.values * scale[..., None] + values), ()

        return _sweep(tile, softmax_n, (), queries_n, _held(keys, turn, q_bsHK.shape[1], axis), sees)[0]

    def step(carry: tuple, turn: jax.Array) -> tuple[tuple, None]:
        kv, softmax_n = carry
        return (_pass_on(kv, axis), absorb(turn, kv, softmax_n)), None

    zero = jnp.zeros((n, b, G, R, q), jnp.float32)
    start = _Softmax(zero + _HIDDEN, zero, jnp.zeros((*zero.shape, K), jnp.float32))
    (kv, softmax_n), _ = jax.lax.scan(step, ((k_bsGK, v_bsGK), start), jnp.arange(c - 1))
    top, total, values = absorb(c - 1, kv, softmax_n)
    o_bGRsK = _whole(values / total[..., None], dim=3)
    o_bsHK = jnp.moveaxis(o_bGRsK.reshape(b, G * R, -1, K), 1, 2).astype(q_bsHK.dtype)
    return o_bsHK, _whole(top + jnp.log(total), dim=3).reshape(b, G * R, -1)


def ring_gradient(
    q_bsHK: jax.Array,
    k_bsGK: jax.Array,
    v_bsGK: jax.Array,
    queries: Any,
    keys: Any,
    o_bsHK: jax.Array,
    lse_bHs: jax.Array,
    do_bsHK: jax.Array,
    sees: Sees,
    axis: str = "sequence",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of `ring` with respect to q, k and v, from its results and the gradient of the first.

    With the log-sum-exp over all keys the shares of a block follow from its scores alone (Dao et al., 2022), so the
    scores are computed again and each block is visited once. The gradients of keys and values go round with them and
    are at home when all have added theirs; they add up in float32 and travel in the dtype of k and v.

    Communication: c - 1 `ppermute`s of the local k and v, c of their gradients.
    """
    c, G = jax.lax.axis_size(axis), k_bsGK.shape[2]
    q_nbqGRK, do_nbqGRK = _query_tiles(q_bsHK, G), _query_tiles(do_bsHK, G)
    queries_n = jax.tree.map(_tiles, queries)
    mean_bHs = _dot("bsHK,bsHK->bHs", o_bsHK, do_bsHK)
    b, H, s = lse_bHs.shape
    lse_nbGRq, mean_nbGRq = (_tiles(x.reshape(b, G, H // G, s), dim=3) for x in (lse_bHs, mean_bHs))
    scale = q_bsHK.shape[-1] ** -0.5

    def visit(turn: Any, kv: tuple[jax.Array, jax.Array], dq_n: jax.Array) -> tuple[jax.Array, tuple]:
        """Gradient of the queries so far, and the contributions to those of the block that is here, in float32."""
        k_nbkGK, v_nbkGK = map(_tiles, kv)

        def tile(dq_bqGRK: jax.Array, dkv: tuple, i: jax.Array, j: jax.Array, mask_bqk: jax.Array) -> tuple:
            dk_bkGK, dv_bkGK = dkv
            q, k, v, do = q_nbqGRK[i], k_nbkGK[j], v_nbkGK[j], do_nbqGRK[i]
            shares = jnp.where(mask_bqk[:, None, None], jnp.exp(_scores(q, k) - lse_nbGRq[i][..., None]), 0)
            dshares = _dot("bqGRK,bkGK->bGRqk", do, v)
            dscores = (shares * (dshares - mean_nbGRq[i][..., None]) * scale).astype(q.dtype)
            dq_bqGRK += _dot("bGRqk,bkGK->bqGRK", dscores, k)
            dk_bkGK += _dot("bGRqk,bqGRK->bkGK", dscores, q)
            dv_bkGK += _dot("bGRqk,bqGRK->bkGK", shares.astype(do.dtype), do)
            return dq_bqGRK, (dk_bkGK, dv_bkGK)

        zero = jnp.zeros(k_nbkGK.shape, jnp.float32)
        dq_n, dkv_n = _sweep(tile, dq_n, (zero, zero), queries_n, _held(keys, turn, s, axis), sees)
        return dq_n, tuple(_whole(x, dim=1) for x in dkv_n)

    def add(arrived: tuple, here: tuple) -> tuple:
        return tuple((a.astype(jnp.float32) + x).astype(a.dtype) for a, x in zip(arrived, here, strict=True))

    def step(carry: tuple, turn: jax.Array) -> tuple[tuple, None]:
        kv, dkv, dq_n = carry
        kv_next, dkv = _pass_on((kv, dkv), axis)
        dq_n, here = visit(turn, kv, dq_n)
        return (kv_next, add(dkv, here), dq_n), None

    kv = k_bsGK, v_bsGK
    dq_n, here = visit(0, kv, jnp.zeros(q_nbqGRK.shape, jnp.float32))
    dkv = tuple(x.astype(k_bsGK.dtype) for x in here)
    if c > 1:
        (kv, dkv, dq_n), _ = jax.lax.scan(step, (_pass_on(kv, axis), dkv, dq_n), jnp.arange(1, c - 1))
        dkv = _pass_on(dkv, axis)
        dq_n, here = visit(c - 1, kv, dq_n)
        dkv = _pass_on(add(dkv, here), axis)
    dq_bsHK = _whole(dq_n, dim=1).reshape(q_bsHK.shape).astype(q_bsHK.dtype)
    return dq_bsHK, dkv[0], dkv[1]


def _pass_on(tree: Any, axis: str) -> Any:
    """Every array to the next device of the ring."""
    c = jax.lax.axis_size(axis)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, [(i, (i + 1) % c) for i in range(c)]), tree)


def _held(keys: Any, turn: Any, tokens: int, axis: str) -> Any:
    """Info of the block of keys that is here after `turn` turns, in tiles: that of the device so many places back."""
    owner = (jax.lax.axis_index(axis) - turn) % jax.lax.axis_size(axis)
    return jax.tree.map(lambda x: _tiles(jax.lax.dynamic_slice_in_dim(x, owner * tokens, tokens, axis=1)), keys)


def _sweep(work: Callable, by_query: Any, by_key: Any, queries_n: Any, keys_n: Any, sees: Sees) -> tuple[Any, Any]:
    """Updates `by_query[i]` and `by_key[j]` with every pair of tiles in which a query sees a key.

    Whether one does differs between devices, so nothing in `work` may communicate.
    """
    n = jax.tree.leaves(queries_n)[0].shape[0]

    def pair(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
        i, j = number // n, number % n
        mask_bqk = sees(_at(queries_n, i), _at(keys_n, j))
        old = _at(carry[0], i), _at(carry[1], j)
        new = jax.lax.cond(jnp.any(mask_bqk), lambda: work(*old, i, j, mask_bqk), lambda: old)
        return (_put(carry[0], i, new[0]), _put(carry[1], j, new[1])), None

    return jax.lax.scan(pair, (by_query, by_key), jnp.arange(n * n))[0]


def _at(tree_n: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[i], tree_n)


def _put(tree_n: Any, i: jax.Array, tree: Any) -> Any:
    return jax.tree.map(lambda x, new: x.at[i].set(new), tree_n, tree)


def _scores(q_bqGRK: jax.Array, k_bkGK: jax.Array) -> jax.Array:
    return _dot("bqGRK,bkGK->bGRqk", q_bqGRK, k_bkGK) * q_bqGRK.shape[-1] ** -0.5


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def tile_size(tokens: int) -> int:
    """The divisor of half a block (zigzag's unit of what is visible), or of an odd one, that is nearest to `TILE`."""
    half = tokens // 2 if tokens % 2 == 0 else tokens
    return min((d for d in range(1, half + 1) if half % d == 0), key=lambda d: abs(math.log(d / TILE)))


def _tiles(x: jax.Array, dim: int = 1) -> jax.Array:
    """Cuts dimension `dim` into tiles and puts their number in front."""
    size = tile_size(x.shape[dim])
    return jnp.moveaxis(x.reshape(*x.shape[:dim], -1, size, *x.shape[dim + 1 :]), dim, 0)


def _whole(x_n: jax.Array, dim: int) -> jax.Array:
    """The inverse of `_tiles`."""
    x = jnp.moveaxis(x_n, 0, dim)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


def _query_tiles(x_bsHK: jax.Array, groups: int) -> jax.Array:
    b, s, _, K = x_bsHK.shape
    return _tiles(x_bsHK.reshape(b, s, groups, -1, K))
