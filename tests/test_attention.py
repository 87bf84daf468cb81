"""Attention on one device; over meshes it is held by test_parity.py, against `transformers` by test_llama_torch.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import attention
from jaxpar.attention import Options, TokenInfo, attend
from jaxpar.config import MeshConfig
from jaxpar.parallel import tiles
from jaxpar.sharding import Rules, make_mesh


def results(sizes: MeshConfig, length: int, options: Options, **held: int) -> list:
    """Sum and gradients of attention in packed documents, with other limits of what is held at a time."""
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
            patch.setattr(tiles if name == "TILE" else attention, name, value)
        spec = Rules().spec("batch", "seq", "heads", "head_dim")
        return jax.tree.leaves(
            jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*(jax.reshard(x, spec) for x in (q, k, v)))
        )


@pytest.mark.parametrize("length", [512, 600, 1024])
def test_queries_in_chunks_change_nothing(length):
    """Against one chunk; 600 queries leave a padded remainder."""
    found, whole = (results(MeshConfig(), length, Options(), _QUERIES=n) for n in (512, 4096))
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
    """Long rows of keys, in tiles: the same result and gradients, where tiles divide the tokens and where not."""
    small = dict(_QUERIES=8, _WHOLE_ROWS=16, TILE=16)
    whole = results(MeshConfig(), length, Options(), _QUERIES=4096, _WHOLE_ROWS=4096)
    for one, other in zip(results(sizes, length, Options(context), **small), whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
