"""Matrix products whose sums are taken in float32, in the forward and in the backward pass.

A GPU does so by itself and rounds its result in the same kernel. XLA for CPUs multiplies bfloat16
at half the speed of its own float32 products unless the result is asked for in float32, so on a
single CPU it is; on several simulated ones, where nobody waits, the sharding of every gradient is
left to jax's own rule.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def einsum(
    subscripts: str, x: jax.Array, weight: jax.Array, out_sharding: PartitionSpec | None = None
) -> jax.Array:
    """`jnp.einsum` of two operands, every index of which occurs twice among them and the result.

    Args:
      subscripts: such as "BSD,DF->BSF".
      x, weight: of the same dtype, which is that of the result.
      out_sharding: as `jnp.einsum` takes it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    on_one_cpu = (
        mesh.size == 1
        and mesh.abstract_device is not None
        and mesh.abstract_device.platform == "cpu"
    )
    if not on_one_cpu or x.dtype != jnp.bfloat16:
        return jnp.einsum(subscripts, x, weight, out_sharding=out_sharding)
    return _wide(subscripts, out_sharding, x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _wide(
    subscripts: str, out_sharding: PartitionSpec | None, x: jax.Array, weight: jax.Array
) -> jax.Array:
    product = jnp.einsum(
        subscripts, x, weight, preferred_element_type=jnp.float32, out_sharding=out_sharding
    )
    return product.astype(x.dtype)


def _wide_forward(
    subscripts: str, out_sharding: PartitionSpec | None, x: jax.Array, weight: jax.Array
):
    return _wide(subscripts, out_sharding, x, weight), (x, weight)


def _wide_backward(
    subscripts: str, out_sharding, residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
):
    del out_sharding
    x, weight = residuals
    operands, result = subscripts.split("->")
    of_x, of_weight = operands.split(",")
    dx = _wide(f"{result},{of_weight}->{of_x}", _of_gradient(x), gradient, weight)
    return dx, _wide(f"{of_x},{result}->{of_weight}", _of_gradient(weight), x, gradient)


_wide.defvjp(_wide_forward, _wide_backward)


def _of_gradient(x: jax.Array) -> PartitionSpec:
    spec = jax.typeof(x).sharding.spec
    return PartitionSpec(*spec.partitions, unreduced=spec.reduced)
