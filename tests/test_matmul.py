"""Products in bfloat16 are sums in float32, rounded once, in the result and in both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import mesh_of

from jaxpar.kernels.matmul import einsum

SHAPES = {
    "BSD,DHK->BSHK": ((2, 5, 64), (64, 3, 8), (2, 5, 3, 8)),
    "BSF,DF->BSD": ((2, 5, 64), (16, 64), (2, 5, 16)),
}


@pytest.mark.parametrize("subscripts", SHAPES)
def test_sums_are_in_float32(subscripts):
    random = np.random.default_rng(0)
    x, w, g = (jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in SHAPES[subscripts])
    with jax.set_mesh(mesh_of()):
        result, transpose = jax.vjp(lambda x, w: einsum(subscripts, x, w), x, w)
        gradients = transpose(g)
    wide = [a.astype(jnp.float32) for a in (x, w)]
    expected, transpose = jax.vjp(lambda x, w: jnp.einsum(subscripts, x, w), *wide)
    for ours, exact in zip(
        (result, *gradients), (expected, *transpose(g.astype(jnp.float32))), strict=True
    ):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            ours.astype(jnp.float32), exact, rtol=2**-8, atol=1e-5
        )  # one rounding


def test_what_a_backend_does_by_itself_is_left_to_it():
    def text(mesh, dtype):
        x, w = jnp.ones((4, 8, 16), dtype), jnp.ones((16, 16), dtype)
        with jax.set_mesh(mesh):
            return str(jax.make_jaxpr(lambda x, w: einsum("BSD,DF->BSF", x, w))(x, w))

    assert "custom_vjp" in text(mesh_of(), jnp.bfloat16)
    assert "custom_vjp" not in text(mesh_of(), jnp.float32)
    assert "custom_vjp" not in text(mesh_of(data=2), jnp.bfloat16)
