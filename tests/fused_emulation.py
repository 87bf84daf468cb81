"""cuDNN's two calls as XLA computes them, to the letter of their interface: flat memory, offsets
and lengths.

What cuDNN does not write is NaN here, and so is what it must not read.
"""

import jax
import jax.numpy as jnp

from jaxpar.kernels import cudnn


def _gathered(x_BTGK, offset, length_V, repeats=1):
    """The stretches of a [B, T, G, K] array, each padded to T tokens, and which tokens are of it:
    [V, T, G R, K]."""
    _, T, G, K = x_BTGK.shape
    flat_X = x_BTGK.reshape(-1)
    begin_V = offset.ravel()[: length_V.size]
    token_VT = begin_V[:, None] + jnp.arange(T) * (G * K)
    inside_VT = jnp.arange(T) < length_V[:, None]
    index = token_VT[..., None] + jnp.arange(G * K)
    x_VTGK = jnp.where(inside_VT[..., None], flat_X[jnp.minimum(index, flat_X.size - 1)], 0)
    return jnp.repeat(x_VTGK.reshape(-1, T, G, K), repeats, axis=2), index, inside_VT


def _scattered(x_VTGK, index, inside_VT, shape):
    """The inverse, into memory that nobody has written."""
    flat = jnp.full(shape, jnp.nan, x_VTGK.dtype).ravel()
    place = jnp.where(inside_VT[..., None], index, flat.size)
    return flat.at[place].set(x_VTGK.reshape(index.shape), mode="drop").reshape(shape)


def _stretches(q, k, packed):
    if packed is not None:
        return packed.q_length.ravel(), packed.k_length.ravel(), packed.q_offset, packed.k_offset
    B = q.shape[0]
    lengths = (jnp.full(B, x.shape[1]) for x in (q, k))
    return *lengths, *(jnp.arange(B + 1) * x[0].size for x in (q, k))


def _shares(q, k, packed, causal):
    """Scores of every pair of a stretch and whether it is seen, [V, H, S, T]."""
    q_length, k_length, q_offset, k_offset = _stretches(q, k, packed)
    q_VSHK, q_index, q_in = _gathered(q, q_offset, q_length)
    k_VTHK, k_index, k_in = _gathered(k, k_offset, k_length, q.shape[2] // k.shape[2])
    scores = (
        jnp.einsum("VSHK,VTHK->VHST", q_VSHK, k_VTHK, precision="highest") * q.shape[-1] ** -0.5
    )
    seen = q_in[:, :, None] & k_in[:, None]
    if causal:
        seen &= jnp.arange(q.shape[1])[:, None] >= jnp.arange(k.shape[1])
    return scores, seen[:, None], (q_VSHK, q_index, q_in), (k_VTHK, k_index, k_in)


def forward(q, k, v, packed, *, causal):
    scores, seen, (_, q_index, q_in), (_, _, _) = _shares(q, k, packed, causal)
    lse_VHS = jax.nn.logsumexp(jnp.where(seen, scores, -jnp.inf), axis=-1)
    shares = jnp.where(
        seen, jnp.exp(scores - jnp.where(jnp.isinf(lse_VHS), 0, lse_VHS)[..., None]), 0
    )
    _, k_length, _, k_offset = _stretches(q, k, packed)
    v_VTHK, *_ = _gathered(v, k_offset, k_length, q.shape[2] // k.shape[2])
    o_VSHK = jnp.einsum("VHST,VTHK->VSHK", shares, v_VTHK, precision="highest")
    lse_VHS = jnp.where(q_in[:, None], lse_VHS, jnp.nan)
    return _scattered(o_VSHK, q_index, q_in, q.shape), lse_VHS


def backward(q, k, v, stats, o, do, packed, *, causal):
    scores, seen, (q_VSHK, q_index, q_in), (k_VTHK, k_index, k_in) = _shares(q, k, packed, causal)
    q_length, k_length, q_offset, k_offset = _stretches(q, k, packed)
    groups = k.shape[2]
    v_VTHK, *_ = _gathered(v, k_offset, k_length, q.shape[2] // groups)
    o_VSHK, *_ = _gathered(o, q_offset, q_length)
    do_VSHK, *_ = _gathered(do, q_offset, q_length)
    shares = jnp.where(seen, jnp.exp(scores - stats[..., None]), 0)
    dshares = jnp.einsum("VSHK,VTHK->VHST", do_VSHK, v_VTHK, precision="highest")
    mean_VHS = jnp.einsum("VSHK,VSHK->VHS", o_VSHK, do_VSHK, precision="highest")
    dscores = jnp.where(seen, shares * (dshares - mean_VHS[..., None]), 0) * q.shape[-1] ** -0.5
    dq = jnp.einsum("VHST,VTHK->VSHK", dscores, k_VTHK, precision="highest")
    dk = jnp.einsum("VHST,VSHK->VTHK", dscores, q_VSHK, precision="highest")
    dv = jnp.einsum("VHST,VSHK->VTHK", shares, do_VSHK, precision="highest")
    dk, dv = (x.reshape(*x.shape[:2], groups, -1, x.shape[-1]).sum(3) for x in (dk, dv))
    return (
        _scattered(dq, q_index, q_in, q.shape),
        _scattered(dk, k_index, k_in, k.shape),
        _scattered(dv, k_index, k_in, v.shape),
    )


def install(patch) -> None:
    """Puts this in the place of cuDNN, for the devices of this machine and for float32 too."""
    patch.setattr(cudnn, "_forward_call", forward)
    patch.setattr(cudnn, "_backward_call", backward)
    patch.setattr(cudnn, "refusal", lambda *_, **__: "")
