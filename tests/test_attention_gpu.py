"""On a GPU: cuDNN and XLA give the same results and gradients. Run with JAX_PLATFORMS=cuda."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cudnn import results, rows

from jaxpar.attention import Options
from jaxpar.config import MeshConfig
from jaxpar.kernels import cudnn
from jaxpar.sharding import make_mesh

LENGTH = 1024
ROWS = {
    "packed": rows([[300, 1, 1, 500, 400], [7] * 100, [LENGTH]], LENGTH),
    "padding": rows([[300, 200], [1], [LENGTH]], LENGTH),
    "unpacked": rows([[300], [1], [LENGTH]], LENGTH),
}


@pytest.mark.parametrize("info", ROWS.values(), ids=ROWS)
def test_cudnn_and_xla_agree(info):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    packed = info is not ROWS["unpacked"]
    with jax.set_mesh(mesh):
        why = cudnn.refusal(
            cudnn.capability(), jnp.dtype("bfloat16"), (3, LENGTH, 4, 64), packed=packed
        )
    if why:
        pytest.skip(why)
    exact = results(mesh, info, Options(), head_dim=64)
    plain, fused = (
        results(mesh, info, Options(packed=packed, implementation=name), jnp.bfloat16, head_dim=64)
        for name in ("xla", "cudnn")
    )
    for e, p, f in zip(*map(jax.tree.leaves, (exact, plain, fused)), strict=True):
        e, p, f = (x.astype(np.float64) for x in (e, p, f))
        assert np.linalg.norm(f - e) < max(2 * np.linalg.norm(p - e), 0.005 * np.linalg.norm(e))
        assert np.linalg.norm(f - e) < 0.02 * np.linalg.norm(e)
