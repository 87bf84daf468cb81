"""Context parallelism: attention when the tokens of a sequence are spread over the `sequence` axis.

Called inside a full-manual region, on the local block of each array.
"""

import jax


def all_gather_tokens(x: jax.Array, axis: str = "sequence") -> jax.Array:
    """All-gathers the token dimension (dim 1) over a mesh axis.

    Used on keys and values: with grouped-query attention they are small. Forward: one all-gather of
    `x.nbytes * (n - 1)` received bytes a device; backward: one reduce-scatter of the same size.

    Args:
      x: local block, [B, S / n, ...].

    Returns:
      [B, S, ...], tokens in the order of the axis.
    """
    return jax.lax.all_gather(x, axis, axis=1, tiled=True)
