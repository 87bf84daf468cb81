"""Attention in tiles: exact, with the scores of one pair of tiles at a time, and its gradient
written out.

Called inside a full-manual region, on local arrays. Who sees whom is a callable, so that the rule
(positions and segments) is written once, in `attention`. The sums over keys come in parts, so a
ring can add them block by block.

    b: sequences of one device   s, t: its query and key tokens
    H = G R: query heads, G: key-value heads
    K: head dim   n: tiles of queries   q, k: tokens of one tile of queries and of keys
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

TILE = 1024
"""Tokens to a side of the scores held at a time, about: a tile divides half a block."""

HIDDEN = -1e30
"""Score of a key that is not seen: finite, so that a row of nothing else gives no NaN."""

Sees = Callable[[Any, Any], jax.Array]
"""Info of queries [b, q] and of keys [b, k] -> bool [b, q, k]: what each query sees."""


class Operands(NamedTuple):
    """What attention is computed of: queries [b, s, H, K], H a multiple of G; keys and values [b,
    t, G, K]; and what tells which query sees which key: info of the queries, a pytree of [b, s],
    and of the keys, of [b, t]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    queries: Any
    keys: Any


class Softmax(NamedTuple):
    """A softmax over the keys so far, float32: its largest score and its sum of exponentials [n, b,
    G, R, q], and the values in their proportions [n, b, G, R, q, K], both relative to the largest
    score."""

    top: jax.Array
    total: jax.Array
    values: jax.Array

    @classmethod
    def empty(cls, q_nbqGRK: jax.Array) -> "Softmax":
        values = jnp.zeros_like(jnp.moveaxis(q_nbqGRK, 2, 4), jnp.float32)
        return cls(jnp.full_like(values[..., 0], HIDDEN), jnp.zeros_like(values[..., 0]), values)

    def finish(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """The result [b, s, H, K], and the log-sum-exp [b, H, s]."""
        o_bGRsK = whole(self.values / self.total[..., None], dim=3)
        b, G, R, s, K = o_bGRsK.shape
        o_bsHK = jnp.moveaxis(o_bGRsK.reshape(b, G * R, s, K), 1, 2).astype(dtype)
        return o_bsHK, whole(self.top + jnp.log(self.total), dim=3).reshape(b, G * R, s)


def absorb(
    q_nbqGRK: jax.Array,
    kv: tuple[jax.Array, jax.Array],
    softmax_n: Softmax,
    queries_n: Any,
    keys: Any,
    sees: Sees,
) -> Softmax:
    """Adds a block of keys and values, [b, t, G, K] each, to the softmax of every query; `keys`:
    their info [b, t]."""

    def tile(
        old: Softmax, _: tuple, i: jax.Array, kv: tuple, mask_bqk: jax.Array
    ) -> tuple[Softmax, tuple]:
        k_bkGK, v_bkGK = kv
        scores = jnp.where(mask_bqk[:, None, None], _scores(q_nbqGRK[i], k_bkGK), HIDDEN)
        # Hidden keys of a row that has seen none yet count 1 each, until its first visible one
        # scales them by 0.
        top = jnp.maximum(old.top, scores.max(-1))
        shares, scale = jnp.exp(scores - top[..., None]), jnp.exp(old.top - top)
        values = dot("bGRqk,bkGK->bGRqK", shares.astype(v_bkGK.dtype), v_bkGK)
        return Softmax(
            top, old.total * scale + shares.sum(-1), old.values * scale[..., None] + values
        ), ()

    return _sweep(tile, softmax_n, kv, (), (), queries_n, keys, sees)[0]


class Backward(NamedTuple):
    """What the gradients need of the queries, in tiles: themselves, the gradient of their result,
    the log-sum-exp over all keys, and the mean of the gradients of the shares."""

    q_nbqGRK: jax.Array
    do_nbqGRK: jax.Array
    lse_nbGRq: jax.Array
    mean_nbGRq: jax.Array

    @classmethod
    def of(cls, x: Operands, o_bsHK: jax.Array, lse_bHs: jax.Array, do_bsHK: jax.Array):
        (b, H, s), groups = lse_bHs.shape, x.k.shape[2]
        by_query = (lse_bHs, dot("bsHK,bsHK->bHs", o_bsHK, do_bsHK))
        statistics = (tiles(x.reshape(b, groups, H // groups, s), dim=3) for x in by_query)
        return cls(query_tiles(x.q, groups), query_tiles(do_bsHK, groups), *statistics)

    def visit(
        self,
        kv: tuple[jax.Array, jax.Array],
        dq_n: jax.Array,
        dkv: Any,
        queries_n: Any,
        keys: Any,
        sees: Sees,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Gradient of the queries so far (float32), and the contributions to those of a block of
        keys and values: added up in float32, and written into `dkv`, which may be the keys and
        values themselves, `kv`.

        With the log-sum-exp over all keys the shares of a block follow from its scores alone (Dao
        et al., 2022), so the scores are computed again and each block is visited once.
        """
        b, t, G, K = kv[0].shape

        def tile(
            dq_bqGRK: jax.Array, dkv: tuple, i: jax.Array, kv: tuple, mask_bqk: jax.Array
        ) -> tuple:
            (dk_bkGK, dv_bkGK), (k, v) = dkv, kv
            q, do = self.q_nbqGRK[i], self.do_nbqGRK[i]
            shares = jnp.where(
                mask_bqk[:, None, None], jnp.exp(_scores(q, k) - self.lse_nbGRq[i][..., None]), 0
            )
            dshares = dot("bqGRK,bkGK->bGRqk", do, v)
            dscores = (shares * (dshares - self.mean_nbGRq[i][..., None]) * K**-0.5).astype(q.dtype)
            dq_bqGRK += dot("bGRqk,bkGK->bqGRK", dscores, k)
            dk_bkGK += dot("bGRqk,bqGRK->bkGK", dscores, q)
            dv_bkGK += dot("bGRqk,bqGRK->bkGK", shares.astype(do.dtype), do)
            return dq_bqGRK, (dk_bkGK, dv_bkGK)

        zero = jnp.zeros_like(kv[0], jnp.float32, shape=(b, tile_size(t), G, K))
        return _sweep(tile, dq_n, kv, (zero, zero), dkv, queries_n, keys, sees)


def attention(x: Operands, sees: Sees) -> tuple[jax.Array, jax.Array]:
    """Attention to keys that are all here.

    Args:
      x: the queries, keys and values of this device, and their info.
      sees: which query sees which key. Pairs of tiles in which none does are skipped.

    Returns:
      [b, s, H, K] in the dtype of the queries, and the log-sum-exp of every query's scores, float32
      [b, H, s]. A query must see at least one key.

    No communication. Memory: the float32 scores of H x tile x tile.
    """
    x = not_hoisted(x)
    q_nbqGRK = query_tiles(x.q, x.k.shape[2])
    queries_n, start = jax.tree.map(tiles, x.queries), Softmax.empty(q_nbqGRK)
    return absorb(q_nbqGRK, (x.k, x.v), start, queries_n, x.keys, sees).finish(x.q.dtype)


def attention_gradient(
    x: Operands, o_bsHK: jax.Array, lse_bHs: jax.Array, do_bsHK: jax.Array, sees: Sees
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of `attention` with respect to q, k and v, from its results and the gradient of
    the first."""
    x = not_hoisted(x)
    known = Backward.of(x, o_bsHK, lse_bHs, do_bsHK)
    queries_n, zero_n = jax.tree.map(tiles, x.queries), jnp.zeros_like(known.q_nbqGRK, jnp.float32)
    # All keys and values are here, gathered for this: their gradients take their place and need no
    # second room of that size.
    kv = x.k, x.v
    dq_n, (dk_btGK, dv_btGK) = known.visit(kv, zero_n, kv, queries_n, x.keys, sees)
    return whole(dq_n, dim=1).reshape(x.q.shape).astype(x.q.dtype), dk_btGK, dv_btGK


def not_hoisted(x: Operands) -> Operands:
    """Masks are the same in every layer, so the scan over layers would make those of all pairs of
    tiles ahead of it and hold them: s x t bytes and more. Tied to this layer's queries they are
    not."""
    q, queries, keys = jax.lax.optimization_barrier((x.q, x.queries, x.keys))
    return x._replace(q=q, queries=queries, keys=keys)


def _sweep(
    work: Callable,
    by_query: Any,
    kv: Any,
    zero: Any,
    room: Any,
    queries_n: Any,
    keys: Any,
    sees: Sees,
) -> tuple[Any, Any]:
    """All pairs of tiles, one column of tiles of `kv` after the other.

    Updates `by_query[i]` with every pair in which a query sees a key, builds up from `zero` the
    result of every tile of `kv`, and writes it into `room`. `kv` itself may be the room: a tile is
    read before its result takes its place.

    Whether a query sees a key differs between devices, so nothing in `work` may communicate.
    """
    size, in_place = tile_size(kv[0].shape[1]), room is kv

    def column(carry: tuple, j: jax.Array) -> tuple[tuple, None]:
        def cut(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, j * size, size, axis=1)

        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), j * size, axis=1)

        by_query, room = carry
        kv_tile, keys_tile = jax.tree.map(cut, (room if in_place else kv, keys))
        by_query, result = _column(work, by_query, kv_tile, zero, queries_n, keys_tile, sees)
        return (by_query, jax.tree.map(put, room, result)), None

    return jax.lax.scan(column, (by_query, room), jnp.arange(kv[0].shape[1] // size))[0]


def _column(
    work: Callable,
    by_query: Any,
    kv_tile: Any,
    result: Any,
    queries_n: Any,
    keys_tile: Any,
    sees: Sees,
) -> tuple[Any, Any]:
    """One tile of keys with every tile of queries; see `_sweep`."""

    def pair(carry: tuple, i: jax.Array) -> tuple[tuple, None]:
        by_query, result = carry
        mask_bqk, old = sees(_at(queries_n, i), keys_tile), (_at(by_query, i), result)
        new = jax.lax.cond(jnp.any(mask_bqk), lambda: work(*old, i, kv_tile, mask_bqk), lambda: old)
        return (_put(by_query, i, new[0]), new[1]), None

    n = jax.tree.leaves(queries_n)[0].shape[0]
    return jax.lax.scan(pair, (by_query, result), jnp.arange(n))[0]


def _at(tree_n: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[i], tree_n)


def _put(tree_n: Any, i: jax.Array, tree: Any) -> Any:
    return jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, axis=0), tree_n, tree
    )


def _scores(q_bqGRK: jax.Array, k_bkGK: jax.Array) -> jax.Array:
    return dot("bqGRK,bkGK->bGRqk", q_bqGRK, k_bkGK) * q_bqGRK.shape[-1] ** -0.5


def dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Accumulated in float32."""
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def tile_size(tokens: int) -> int:
    """The divisor of half a block (zigzag's unit of what is visible), or of an odd one, that is
    nearest to `TILE`."""
    half = tokens // 2 if tokens % 2 == 0 else tokens
    return min(
        (d for d in range(1, half + 1) if half % d == 0), key=lambda d: abs(math.log(d / TILE))
    )


def tiles(x: jax.Array, dim: int = 1) -> jax.Array:
    """Cuts dimension `dim` into tiles and puts their number in front."""
    size = tile_size(x.shape[dim])
    return jnp.moveaxis(x.reshape(*x.shape[:dim], -1, size, *x.shape[dim + 1 :]), dim, 0)


def whole(x_n: jax.Array, dim: int) -> jax.Array:
    """The inverse of `tiles`."""
    x = jnp.moveaxis(x_n, 0, dim)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


def query_tiles(x_bsHK: jax.Array, groups: int) -> jax.Array:
    b, s, _, K = x_bsHK.shape
    return tiles(x_bsHK.reshape(b, s, groups, -1, K))
