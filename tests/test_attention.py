"""Attention on one device; over meshes it is held by test_parity.py, against `transformers` by test_llama_torch.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import attention
from jaxpar.attention import Options, TokenInfo, attend
from jaxpar.config import MeshConfig
from jaxpar.sharding import Rules, make_mesh


@pytest.mark.parametrize("length", [512, 600, 1024])
def test_queries_in_chunks_change_nothing(length):
    """Against one chunk; 600 queries leave a padded remainder."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, length, heads, 8), np.float32) for heads in (4, 2, 2))
    segments = np.sort(rng.integers(0, 5, (2, length))).astype(np.int32)
    info = TokenInfo(np.broadcast_to(np.arange(length, dtype=np.int32), (2, length)), segments)

    def run(queries: int):
        def total(q, k, v):
            queries = TokenInfo(*(jax.reshard(x, Rules().spec("batch", "seq")) for x in info))
            keys = TokenInfo(*(jax.reshard(x, Rules().spec("batch", None)) for x in info))
            return jnp.sum(jnp.sin(attend(q, k, v, queries, keys, Rules(), Options())))

        with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "_QUERIES", queries)
            spec = Rules().spec("batch", "seq", "heads", "head_dim")
            return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*(jax.reshard(x, spec) for x in (q, k, v)))

    for chunked, whole in zip(jax.tree.leaves(run(512)), jax.tree.leaves(run(4096)), strict=True):
        np.testing.assert_allclose(chunked, whole, rtol=2e-5, atol=2e-5)
