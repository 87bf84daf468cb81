"""Attention on one device; over meshes it is held by test_parity.py, against `transformers` by
test_llama_torch.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import attention
from jaxpar.attention import Options, TokenInfo, attend
from jaxpar.config import MeshConfig
from jaxpar.kernels import rows, tiles
from jaxpar.sharding import Rules, make_mesh


def results(sizes: MeshConfig, length: int, options: Options, **held: int) -> list:
    """Sum and gradients of attention in packed documents, with other limits of what is held at a
    time."""
    mesh = make_mesh(sizes, jax.devices()[: sizes.devices])
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, length, heads, 8), np.float32) for heads in (4, 2, 2))
    segments = np.sort(rng.integers(1, 6, (2, length))).astype(np.int32)
    info = TokenInfo(np.broadcast_to(np.arange(length, dtype=np.int32), (2, length)), segments)

    def total(q, k, v):
        queries = TokenInfo(*(jax.reshard(x, Rules().spec("batch", "seq")) for x in info))
        keys = TokenInfo(*(jax.reshard(x, Rules().spec("batch", None)) for x in info))
        return jnp.sum(jnp.sin(attend(q, k, v, queries, keys, Rules(), options)))

    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        for name, value in held.items():
            patch.setattr({"TILE": tiles, "STRIP": rows}.get(name, attention), name, value)
        spec = Rules().spec("batch", "seq", "heads", "head_dim")
        return jax.tree.leaves(
            jax.jit(jax.value_and_grad(total, (0, 1, 2)))(
                *(jax.reshard(x, spec) for x in (q, k, v))
            )
        )


@pytest.mark.parametrize(("heads", "shared"), [(4, 1), (3, 3), (6, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_are_jaxs_attention(heads, shared, dtype):
    """Result and gradients of whole rows, in strips with a remainder, against jax's own attention
    in float32."""
    b, s, t, K = 2, 11, 13, 8
    rng = np.random.default_rng(heads)
    q, do = (jnp.asarray(rng.standard_normal((b, s, heads, K)), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((b, t, shared, K)), dtype) for _ in range(2))
    last = np.sort(rng.integers(0, t, (b, s)))
    x = rows.Operands(q, k, v, last, np.broadcast_to(np.arange(t), (b, t)))

    def sees(last, places):
        return last[:, :, None] >= places[:, None, :]

    def reference(*qkv):
        return jax.nn.dot_product_attention(*qkv, mask=sees(last, x.keys)[:, None])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "STRIP", 4)
        result, _ = rows.attention(x, sees)
        gradients = rows.attention_gradient(x, None, None, do, sees)
    whole, pull = jax.vjp(reference, *(a.astype(jnp.float32) for a in (q, k, v)))
    assert {a.dtype for a in (result, *gradients)} == {jnp.dtype(dtype)}
    close = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}[dtype]
    for one, other in zip(
        (result, *gradients), (whole, *pull(do.astype(jnp.float32))), strict=True
    ):
        np.testing.assert_allclose(one.astype(np.float32), other, rtol=close, atol=close)


@pytest.mark.parametrize("length", [512, 600, 1024])
def test_queries_in_strips_change_nothing(length):
    """Against one strip; 600 queries leave a padded remainder."""
    found, whole = (results(MeshConfig(), length, Options(), STRIP=n) for n in (512, 4096))
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("sizes", "context", "length"),
    [
        (MeshConfig(), "all_gather", 96),
        (MeshConfig(), "all_gather", 101),
        (MeshConfig(sequence=4), "all_gather", 128),
        (MeshConfig(sequence=2, tensor=2), "all_gather", 94),
        (MeshConfig(data=2, sequence=2), "ulysses", 128),
    ],
    ids=["one device", "a prime length", "parts", "odd parts and heads", "Ulysses"],
)
def test_tiles_change_nothing(sizes, context, length):
    """Long rows of keys, in tiles: the same result and gradients, where tiles divide the tokens and
    where not."""
    small = dict(STRIP=8, _WHOLE_ROWS=16, TILE=16)
    whole = results(MeshConfig(), length, Options(), STRIP=4096, _WHOLE_ROWS=4096)
    for one, other in zip(results(sizes, length, Options(context), **small), whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
