"""cuDNN's flash attention, forward and backward, with documents kept apart.

jax's public function masks documents only by a quadratic bias. cuDNN itself takes, as
`jax._src.cudnn` can pass on, a list of stretches of queries and keys ("packed layout": Hopper and
later), and computes nothing outside them. That is used here, below the level at which jax asks the
machine that traces for its GPU and its cuDNN: what a program may use depends on the devices it is
for, which may be absent.

B sequences, S query tokens, T key tokens, H query heads, G key-value heads, K head dim, all of one
device. N stretches a row at a time, V = B N.
"""

import functools
import inspect
import math
import re
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_UNSEEN = -1e30
"""Log-sum-exp of a query that sees no key."""


class Boxes(NamedTuple):
    """Stretches of queries and of keys of a row that belong together: int32 [B, N] each. An unused
    one has length 0; those of a row do not overlap."""

    q_start: jax.Array
    q_length: jax.Array
    k_start: jax.Array
    k_length: jax.Array


def capability() -> tuple[int, int] | None:
    """Compute capability of the NVIDIA GPUs of the mesh, absent or not; None of any other
    device."""
    if getattr(jax.sharding.get_abstract_mesh().abstract_device, "platform", "") == "cpu":
        return None
    from jax._src import mesh as jax_mesh  # as `_fused`

    mesh = jax_mesh.get_concrete_mesh()
    device = None if mesh is None or mesh.empty else mesh.devices.flat[0]
    version = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return (int(version[1]), int(version[2])) if version else None


def refusal(
    capability: tuple[int, int] | None, dtype: Any, shape: tuple[int, ...], *, packed: bool
) -> str:
    """Why these GPUs' cuDNN cannot compute attention for queries of a shape [B, S, H, K], or an
    empty string.

    `packed`: with documents or shards kept apart.
    """
    head_dim = shape[-1]
    if capability is None or capability < (8, 0):
        return "it needs NVIDIA GPUs of compute capability 8.0 (A100, A40) or later"
    try:
        _fused()
    except ImportError as error:
        return f"jax {jax.__version__} keeps its calls elsewhere ({error})"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16; precision.compute is {jnp.dtype(dtype).name}"
    most = 256 if capability[0] == 9 else 128
    if head_dim % 8 or head_dim > most:
        return f"model.head_dim={head_dim} must be a multiple of 8 and at most {most} on these GPUs"
    if packed and capability < (9, 0):
        return (
            "it keeps packed documents apart, and tokens of other devices in order, from Hopper on "
            "(compute capability "
            f"9.0), and these GPUs have {capability[0]}.{capability[1]}; use data.packing=false "
            "and mesh.sequence=1 or "
            "parallel.context=ulysses"
        )
    if packed and math.prod(shape) >= 2**31:
        return (
            f"{math.prod(shape)} elements of queries on a device are beyond its 32-bit offsets; "
            "use smaller batches"
        )
    return ""


def attention(
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    positions_BS: jax.Array,
    segments_BS: jax.Array,
    first_key: jax.Array | int | None,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of tokens in the order of the text, each document for itself.

    Args:
      q_BSHK: queries, H a multiple of G; k_BTGK: keys, and v_BTGK: values; bfloat16 or float16.
      positions_BS: of the queries in their documents, int32; segments_BS: their documents, 0 is
        padding.
      first_key: place among the keys of the first query; the keys before it may belong to the same
        document. None: no row has more than one document, with padding behind it, and queries and
        keys are the same tokens.

    Returns:
      [B, S, H, K] in the dtype of `q_BSHK`, 0 in padding (without `first_key` arbitrary), and the
      log-sum-exp of every query's scores, float32 [B, H, S].

    No communication. Memory: float32 [B N, H, S] for a moment, N documents at a time.
    """
    if first_key is None:
        return _forward_call(q_BSHK, k_BTGK, v_BTGK, None, causal=True)

    def one(boxes: Boxes, so_far: tuple, *, causal: bool) -> tuple:
        o_BSHK, lse_BHS = _boxed_forward(q_BSHK, k_BTGK, v_BTGK, boxes, causal=causal)
        total_BHS = jnp.logaddexp(so_far[1], lse_BHS)
        old, new = (
            jnp.exp(part - total_BHS).swapaxes(1, 2)[..., None] * o.astype(jnp.float32)
            for o, part in ((so_far[0], so_far[1]), (o_BSHK, lse_BHS))
        )
        return (old + new).astype(o_BSHK.dtype), total_BHS

    nothing = jnp.full_like(q_BSHK[..., 0].swapaxes(1, 2), _UNSEEN, jnp.float32)
    return _over_boxes(one, (jnp.zeros_like(q_BSHK), nothing), positions_BS, segments_BS, first_key)


def attention_gradient(
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    positions_BS: jax.Array,
    segments_BS: jax.Array,
    first_key: jax.Array | int | None,
    o_BSHK: jax.Array,
    lse_BHS: jax.Array,
    do_BSHK: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of `attention` with respect to q, k and v, from its results and the gradient of
    the first."""
    known = (q_BSHK, k_BTGK, v_BTGK, lse_BHS, o_BSHK, do_BSHK)
    if first_key is None:
        return _backward_call(*known, None, causal=True)

    def one(boxes: Boxes, so_far: tuple, *, causal: bool) -> tuple:
        return tuple(
            old + new
            for old, new in zip(so_far, _boxed_backward(*known, boxes, causal=causal), strict=True)
        )

    zero = tuple(map(jnp.zeros_like, (q_BSHK, k_BTGK, v_BTGK)))
    return _over_boxes(one, zero, positions_BS, segments_BS, first_key)


def _over_boxes(
    one: Any,
    start: Any,
    positions_BS: jax.Array,
    segments_BS: jax.Array,
    first_key: jax.Array | int,
) -> Any:
    """Adds up what queries see: of their documents the part that is here (causal), a few documents
    at a time and as often as the rows need, then the part that lies before (whole)."""
    number_BS = document_numbers(positions_BS, segments_BS)
    count, some = number_BS.max() + 1, documents_at_a_time(number_BS.shape[1])

    def group(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        first, so_far = carry
        return first + some, one(own_boxes(number_BS, first, some, first_key), so_far, causal=True)

    _, so_far = jax.lax.while_loop(
        lambda carry: carry[0] < count, group, (jnp.zeros_like(count), start)
    )
    if isinstance(first_key, int) and first_key == 0:
        return so_far
    return one(earlier_boxes(positions_BS, number_BS, first_key), so_far, causal=False)


def documents_at_a_time(tokens: int) -> int:
    """N. cuDNN starts a block of threads for each of them and each tile of a whole row, and most
    have nothing to do."""
    return min(max(tokens // 256, 2), 32)


def document_numbers(positions_BS: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """Numbers the documents of each row, or the parts of them that are here, from 0; -1 in padding.
    int32 [B, S]."""
    same_BS = (segments_BS[:, 1:] == segments_BS[:, :-1]) & (
        positions_BS[:, 1:] == positions_BS[:, :-1] + 1
    )
    begins_BS = jnp.pad(~same_BS, ((0, 0), (1, 0)), constant_values=True) & (segments_BS > 0)
    return jnp.where(segments_BS > 0, jnp.cumsum(begins_BS, axis=1, dtype=jnp.int32) - 1, -1)


def own_boxes(
    number_BS: jax.Array, first: jax.Array, some: int, first_key: jax.Array | int
) -> Boxes:
    """The documents `first` .. `first + some - 1` of each row, seen by themselves."""
    mine_BSN = number_BS[..., None] == first + jnp.arange(some)
    place_S1 = jnp.arange(number_BS.shape[1], dtype=jnp.int32)[:, None]
    length_BN = mine_BSN.sum(1, dtype=jnp.int32)
    start_BN = jnp.where(mine_BSN, place_S1, number_BS.shape[1]).min(1)
    return Boxes(start_BN, length_BN, start_BN + first_key, length_BN)


def earlier_boxes(
    positions_BS: jax.Array, number_BS: jax.Array, first_key: jax.Array | int
) -> Boxes:
    """The first document of each row, and what there is of it before the first query. Second box:
    none."""
    length_B = (number_BS == 0).sum(1, dtype=jnp.int32)
    before_B = jnp.where(number_BS[:, 0] == 0, positions_BS[:, 0], 0)
    none_B = jnp.zeros_like(length_B)
    length_B = jnp.where(before_B > 0, length_B, 0)
    stretches = (
        (none_B, none_B),
        (length_B, none_B),
        (first_key - before_B, none_B),
        (before_B, none_B),
    )
    return Boxes(*(jnp.stack(stretch, axis=1) for stretch in stretches))


class _Packed(NamedTuple):
    """Boxes as cuDNN takes them, used ones first: lengths int32 [B, N], where each begins in
    elements of queries and of keys [B, N + 1]; and their place in this order [B, N], V if
    unused."""

    q_length: jax.Array
    k_length: jax.Array
    q_offset: jax.Array
    k_offset: jax.Array
    place: jax.Array

    @classmethod
    def of(cls, boxes: Boxes, q_BSHK: jax.Array, k_BTGK: jax.Array) -> "_Packed":
        B, N = boxes.q_start.shape
        used_V = (boxes.q_length > 0).ravel()
        order_V = jnp.argsort(~used_V, stable=True)
        row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]

        def lengths(x_BN: jax.Array) -> jax.Array:
            return x_BN.ravel()[order_V].reshape(B, N)

        def offsets(start_BN: jax.Array, x_BTGK: jax.Array) -> jax.Array:
            T, G, K = x_BTGK.shape[1:]
            begin_V = jnp.where(used_V, (row_B1 * T + start_BN).ravel(), B * T)[order_V]
            return jnp.pad(begin_V, (0, B), constant_values=B * T).reshape(B, N + 1) * (G * K)

        place_V = jnp.where(used_V, jnp.cumsum(used_V, dtype=jnp.int32) - 1, B * N)
        return cls(
            lengths(boxes.q_length),
            lengths(jnp.where(boxes.q_length > 0, boxes.k_length, 0)),
            offsets(boxes.q_start, q_BSHK),
            offsets(boxes.k_start, k_BTGK),
            place_V.reshape(B, N),
        )


def _boxed_forward(
    q_BSHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, boxes: Boxes, *, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """Result and log-sum-exp of the queries in boxes, 0 and `_UNSEEN` of others, which cuDNN does
    not write."""
    packed = _Packed.of(boxes, q_BSHK, k_BTGK)
    o_BSHK, stats_VHS = _forward_call(q_BSHK, k_BTGK, v_BTGK, packed, causal=causal)
    inside_BSN = _inside(boxes.q_start, boxes.q_length, q_BSHK.shape[1])
    inside_BS, box_BS = inside_BSN.any(-1), inside_BSN.argmax(-1)
    place_BS, start_BS = (
        jnp.take_along_axis(x, box_BS, axis=1) for x in (packed.place, boxes.q_start)
    )
    # cuDNN counts the queries of a box from its own start.
    lse_BSH = stats_VHS[place_BS, :, jnp.arange(q_BSHK.shape[1]) - start_BS]
    lse_BHS = jnp.where(inside_BS[..., None], lse_BSH, _UNSEEN).swapaxes(1, 2)
    return jnp.where(inside_BS[..., None, None], o_BSHK, 0), lse_BHS


def _boxed_backward(
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    lse_BHS: jax.Array,
    o_BSHK: jax.Array,
    do_BSHK: jax.Array,
    boxes: Boxes,
    *,
    causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the pairs in boxes add to the gradients. `lse_BHS` and `o_BSHK` are over all keys of a
    query."""
    packed = _Packed.of(boxes, q_BSHK, k_BTGK)
    B, H, S = lse_BHS.shape
    _, _, _, K = q_BSHK.shape
    begin_V1 = packed.q_offset.ravel()[: B * boxes.q_start.shape[1], None] // (H * K)
    lse_XH = lse_BHS.swapaxes(1, 2).reshape(B * S, H)
    stats_VHS = lse_XH[jnp.minimum(begin_V1 + jnp.arange(S), B * S - 1)].swapaxes(1, 2)
    dq_BSHK, dk_BTGK, dv_BTGK = _backward_call(
        q_BSHK, k_BTGK, v_BTGK, stats_VHS, o_BSHK, do_BSHK, packed, causal=causal
    )
    q_inside = _inside(boxes.q_start, boxes.q_length, S).any(-1)[..., None, None]
    k_inside = _inside(boxes.k_start, boxes.k_length, k_BTGK.shape[1]).any(-1)[..., None, None]
    return (
        jnp.where(q_inside, dq_BSHK, 0),
        jnp.where(k_inside, dk_BTGK, 0),
        jnp.where(k_inside, dv_BTGK, 0),
    )


def _inside(start_BN: jax.Array, length_BN: jax.Array, tokens: int) -> jax.Array:
    """Which tokens lie in which box: bool [B, tokens, N]."""
    place_T1 = jnp.arange(tokens)[:, None]
    return (place_T1 >= start_BN[:, None]) & (place_T1 < (start_BN + length_BN)[:, None])


@functools.cache
def _fused() -> ModuleType:
    """jax's private module of cuDNN's calls, imported only for GPUs that make them: should it move,
    no other run notices."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _arguments(
    q_BSHK: jax.Array, packed: _Packed | None, *, causal: bool
) -> tuple[tuple, dict[str, Any]]:
    """What both primitives take besides arrays of queries, keys and values. No bias, no dropout, no
    pages."""
    none, fused = jnp.zeros(0, q_BSHK.dtype), _fused()
    kinds = fused.MaskType
    mask = (kinds.CAUSAL if causal else kinds.NO_MASK) if packed is None else None
    if packed is not None:
        mask = kinds.PADDING_CAUSAL if causal else kinds.PADDING
    settings = dict(
        scale=q_BSHK.shape[-1] ** -0.5,
        seed=42,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=mask,
        layout=fused.AttentionLayout.BTNH.value,
        sliding_window_length=None,
    )
    known = inspect.signature(fused._dot_product_attention_fwd_cuda_lowering).parameters
    newer = ("score_mod_name", "score_mod_jaxpr")
    settings |= {name: None for name in newer if "score_mod_name" in known}
    stretches = (none,) * 4 if packed is None else packed[:4]
    return (none, *stretches, none, none), settings


def _forward_call(
    q_BSHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, packed: _Packed | None, *, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """cuDNN's results [B, S, H, K], and log-sum-exp [B, H, S], or [V, H, S] of boxes."""
    others, settings = _arguments(q_BSHK, packed, causal=causal)
    operands = (q_BSHK, k_BTGK, v_BTGK, *others)
    o_BSHK, stats_VHS = _fused()._dot_product_attention_fwd_p.bind(
        *operands, **settings, is_training=True
    )
    return o_BSHK, stats_VHS


def _backward_call(
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    stats_VHS: jax.Array,
    o_BSHK: jax.Array,
    do_BSHK: jax.Array,
    packed: _Packed | None,
    *,
    causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """cuDNN's gradients of q, k and v."""
    others, settings = _arguments(q_BSHK, packed, causal=causal)
    operands = (q_BSHK, k_BTGK, v_BTGK, *others, stats_VHS, o_BSHK, do_BSHK)
    dq_BSHK, dk_BTGK, dv_BTGK = _fused()._dot_product_attention_bwd_p.bind(*operands, **settings)
    return dq_BSHK, dk_BTGK, dv_BTGK
