"""Attention: one manual island that picks the context parallelism and the kernel.

Masks come from positions and segment ids alone, never from an offset, so packed documents, padding,
context parallelism and a key-value cache all use the same rule: a query sees the keys of its own
segment up to its own position.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as keep

from jaxpar.config import Config, ConfigError
from jaxpar.kernels import cudnn, rows, tiles
from jaxpar.kernels.tiles import Operands
from jaxpar.parallel import context
from jaxpar.sharding import Rules, all_manual

# B batch, S query tokens, T key tokens, H query heads, G key-value heads, K head dim. Sizes are
# logical, never shards.


_WHOLE_ROWS = 2048
"""Keys up to which the scores of `rows.STRIP` queries and all keys are held; beyond, those of
tiles."""


class TokenInfo(NamedTuple):
    """Where each token stands: int32 [B, S] each. `segments` numbers the documents of a row from 1;
    0 is padding."""

    positions: jax.Array
    segments: jax.Array


@dataclasses.dataclass(frozen=True)
class Options:
    """What of a config decides how attention is computed. `context`: all_gather, ring or ulysses;
    `zigzag`: tokens are not in the order of the text; `packed`: a row may hold several documents;
    `implementation`: auto, cudnn or xla."""

    context: str = "all_gather"
    zigzag: bool = False
    packed: bool = True
    implementation: str = "xla"

    @classmethod
    def make(cls, config: Config) -> "Options":
        parallel = config.parallel
        return cls(
            parallel.context, parallel.zigzag, config.data.packing, config.attention.implementation
        )


def attend(
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    queries: TokenInfo,
    keys: TokenInfo,
    rules: Rules,
    options: Options,
) -> jax.Array:
    """Causal grouped-query attention within segments.

    Args:
      q_BSHK: queries, sharded (batch, seq, heads); H is a multiple of G.
      k_BTGK: keys, and v_BTGK: values, sharded (batch, seq, kv_heads).
      queries: positions and segments of the queries, sharded (batch, seq).
      keys: the same of the keys, sharded over batch only: they are needed whole, and are the same
        in every layer. T is S, or with all_gather the length of a cache, which is always read by
        XLA.
      rules: the sharding table.
      options: kind of context parallelism, order and packing of the tokens, implementation.

    Returns:
      [B, S, H, K] in the dtype of `q_BSHK`, sharded as the queries are; in padding arbitrary, but
      finite. It bears the name `attention` for remat, and so does what else the backward pass needs
      in order not to compute it again.

    Communication, over `sequence`: all_gather: an all-gather of k and v; in the backward pass a
    reduce-scatter of their gradients. ring and ulysses: see `context.ring`, `context.ring_gradient`
    and `context.tokens_to_heads`.

    Raises:
      ConfigError: `implementation=cudnn` where cuDNN cannot compute this.
    """
    cached = q_BSHK.shape[1] != k_BTGK.shape[1]
    assert options.context == "all_gather" or not cached, "a cache is read with all_gather"
    local = q_BSHK.shape if all_manual() else jax.typeof(q_BSHK).sharding.shard_shape(q_BSHK.shape)
    kernel = (
        None if cached or refuses_cudnn(local, q_BSHK.dtype, options) else _CUDNN[_layout(options)]
    )
    island = jax.shard_map(
        functools.partial(_LOCAL[options.context], kernel),
        in_specs=(_specs(rules),),
        out_specs=rules.spec("batch", "seq", "heads", "head_dim"),
        check_vma=not all_manual(),  # nor in a region that does not check
    )
    return island(Operands(q_BSHK, k_BTGK, v_BTGK, queries, keys))


def refuses_cudnn(local_shape: tuple[int, ...], dtype: Any, options: Options) -> str:
    """Why XLA and not cuDNN computes attention on the devices of the mesh, or an empty string.

    Args:
      local_shape: of the queries of one device, [B, S, H, K]; dtype: theirs.

    Raises:
      ConfigError: `implementation=cudnn` asked for what cuDNN cannot.
    """
    if options.implementation == "xla":
        return "attention.implementation=xla"
    layout, spread = _layout(options), _devices("sequence") > 1
    if options.context == "ring":
        why = (
            "the ring puts results together that its tiles of XLA compute; use "
            "parallel.context=ulysses or all_gather"
        )
    elif options.zigzag and spread:
        why = "it needs tokens in the order of the text; use parallel.zigzag=false"
    else:
        why = cudnn.refusal(cudnn.capability(), dtype, local_shape, packed=layout != "row")
    if why and options.implementation == "cudnn":
        raise ConfigError(
            f"attention.implementation=cudnn: {why}, or attention.implementation=auto"
        )
    return why


def _devices(axis: str) -> int:
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def _layout(options: Options) -> str:
    """What a device's queries and keys are: a `row` of one document, a row of `documents`, or a
    `part` of one."""
    if options.context == "all_gather" and _devices("sequence") > 1:
        return "part"
    return "documents" if options.packed else "row"


def sees(queries: TokenInfo, keys: TokenInfo) -> jax.Array:
    """The one rule of visibility: tokens [B, S] and [B, T] -> bool [B, S, T]."""
    return (queries.segments[:, :, None] == keys.segments[:, None, :]) & (
        queries.positions[:, :, None] >= keys.positions[:, None, :]
    )


def _specs(rules: Rules) -> Operands:
    q, kv = (rules.spec("batch", "seq", heads, "head_dim") for heads in ("heads", "kv_heads"))
    return Operands._make((q, kv, kv, rules.spec("batch", "seq"), rules.spec("batch", None)))


class Kernel(NamedTuple):
    """Attention of what is on one device, and its gradient: a function of the operands to the
    result and the log-sum-exp of the scores, and one of these and the result's gradient to the
    gradients of q, k and v. Where the gradient needs neither result nor log-sum-exp, the second is
    None, and so is what the gradient is given."""

    forward: Callable[[Operands], tuple[jax.Array, jax.Array | None]]
    backward: Callable[[Operands, Any, Any, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(kernel: Kernel, x: Operands) -> jax.Array:
    return _attention_forward(kernel, x)[0]


def _attention_forward(kernel: Kernel, x: Operands):
    """Remat keeps the log-sum-exp with the result, for without both attention runs again. They are
    named here because here they are residuals: a name given to the result outside would be that of
    a second copy."""
    o_BSHK, lse_BHS = jax.tree.map(lambda result: keep(result, "attention"), kernel.forward(x))
    return o_BSHK, (x, None if lse_BHS is None else o_BSHK, lse_BHS)


def _attention_backward(kernel: Kernel, residuals: tuple[Operands, Any, Any], do_BSHK: jax.Array):
    return (Operands(*kernel.backward(*residuals, do_BSHK), None, None),)


_attention.defvjp(_attention_forward, _attention_backward)


def _all_gathered(kernel: Kernel | None, x: Operands) -> jax.Array:
    return _local(
        kernel, x._replace(k=context.all_gather_tokens(x.k), v=context.all_gather_tokens(x.v))
    )


def _exchanged(kernel: Kernel | None, x: Operands) -> jax.Array:
    """Ulysses: all tokens of some heads. These are the copies that the backward pass needs, so
    where remat keeps something it keeps them, and the exchange is not repeated."""
    q = keep(context.tokens_to_heads(x.q), "query")
    k = keep(context.tokens_to_heads(x.k), "key")
    v = keep(context.tokens_to_heads(x.v), "value")
    o_BSHK = _local(
        kernel, Operands(q, k, v, x.keys, x.keys)
    )  # queries as whole as the keys, and the same tokens
    return keep(context.heads_to_tokens(o_BSHK), "attention")


def _passed_round(kernel: Kernel | None, x: Operands) -> jax.Array:
    assert kernel is None
    return _attention(_RING, x)


_LOCAL = {"all_gather": _all_gathered, "ulysses": _exchanged, "ring": _passed_round}


def _local(kernel: Kernel | None, x: Operands) -> jax.Array:
    if kernel is not None:
        return _attention(kernel, x)
    S, T = x.q.shape[1], x.k.shape[1]
    if S <= rows.STRIP or T <= _WHOLE_ROWS:
        return _attention(_ROWS, x)
    return _attention(_TILES, jax.tree.map(lambda x_BT: _padded(x_BT, tiles.TILE), x))[:, :S]


def _padded(x_BT: jax.Array, tokens: int) -> jax.Array:
    """With padding behind the tokens, up to a multiple of `tokens`. [B, T, ...]."""
    return jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % tokens), *((0, 0),) * (x_BT.ndim - 2)))


_RING = Kernel(
    functools.partial(context.ring, sees=sees), functools.partial(context.ring_gradient, sees=sees)
)
_ROWS = Kernel(
    functools.partial(rows.attention, sees=sees),
    functools.partial(rows.attention_gradient, sees=sees),
)
_TILES = Kernel(
    functools.partial(tiles.attention, sees=sees),
    functools.partial(tiles.attention_gradient, sees=sees),
)


def _cudnn(first_key: Callable[[jax.Array], Any]) -> Kernel:
    """`first_key`: where the first of these queries stands among the keys; see
    `cudnn.attention`."""

    def known(x: Operands) -> tuple:  # the keys are those of the queries' documents
        return x.q, x.k, x.v, x.queries.positions, x.queries.segments, first_key(x.q)

    return Kernel(
        lambda x: cudnn.attention(*known(x)),
        lambda x, *results: cudnn.attention_gradient(*known(x), *results),
    )


_CUDNN = {
    "row": _cudnn(lambda q_BSHK: None),
    "documents": _cudnn(lambda q_BSHK: 0),
    "part": _cudnn(lambda q_BSHK: jax.lax.axis_index("sequence") * q_BSHK.shape[1]),
}
