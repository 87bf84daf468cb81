"""What attention keeps for its backward pass is what the arithmetic says, whichever kernel computes
it."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from jaxpar.attention import Options, TokenInfo, attend
from jaxpar.config import MeshConfig, configure
from jaxpar.estimate.memory import activation_bytes, attention_residual_bytes
from jaxpar.kernels import cudnn
from jaxpar.sharding import Rules, make_mesh
from jaxpar.validation import resolve

SPREAD = MeshConfig(sequence=2, tensor=2)


@pytest.mark.parametrize(
    ("sizes", "context", "length", "implementation"),
    [
        (MeshConfig(), "all_gather", 128, "cudnn"),
        (MeshConfig(), "all_gather", 128, "xla"),
        (MeshConfig(), "all_gather", 2048, "xla"),
        (MeshConfig(), "all_gather", 4096, "xla"),
        (SPREAD, "all_gather", 128, "cudnn"),
        (SPREAD, "all_gather", 4096, "xla"),
        (MeshConfig(sequence=8), "all_gather", 4096, "xla"),
        (SPREAD, "ring", 128, "auto"),
        (SPREAD, "ring", 4096, "xla"),
        (SPREAD, "ulysses", 128, "cudnn"),
        (SPREAD, "ulysses", 128, "xla"),
        (MeshConfig(sequence=8), "ulysses", 4096, "xla"),
    ],
    ids=str,
)
def test_residuals_of_attention(sizes, context, length, implementation, monkeypatch):
    """Traced, with `attention` kept: all residuals but the inputs of attention."""
    monkeypatch.setattr(cudnn, "capability", lambda: (9, 0))
    config = resolve(
        configure(
            model=dict(vocab_size=256, dim=128, layers=1, heads=16, kv_heads=8, ffn_dim=64),
            data=dict(sequence_length=length),
            train=dict(batch_size=2, microbatches=1),
            parallel=dict(context=context),
            attention=dict(implementation=implementation),
            precision=dict(compute="bfloat16"),
        )
    )
    rules, model, mesh = Rules(), config.model, make_mesh(sizes, jax.devices()[: sizes.devices])

    def array(dtype, *names: str | None, **dims: int) -> jax.ShapeDtypeStruct:
        shape = (2, length, *dims.values())
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, rules.spec("batch", *names))
        )

    q, k, v = (
        array(jnp.bfloat16, "seq", name, "head_dim", heads=heads, head_dim=model.head_dim)
        for name, heads in (
            ("heads", model.heads),
            ("kv_heads", model.kv_heads),
            ("kv_heads", model.kv_heads),
        )
    )
    queries, keys = (TokenInfo(*[array(jnp.int32, dim)] * 2) for dim in ("seq", None))

    def residuals(q, k, v, queries, keys):
        def layer(q, k, v):
            return jnp.sin(attend(q, k, v, queries, keys, rules, Options.make(config)))

        policy = jax.checkpoint_policies.save_only_these_names("attention")
        return jax.vjp(jax.checkpoint(layer, policy=policy), q, k, v)[1]

    with jax.set_mesh(mesh):
        found = [
            x
            for x in jax.tree.leaves(jax.eval_shape(residuals, q, k, v, queries, keys))
            if x.dtype != jnp.int32
        ]
    kept = sum(x.dtype.itemsize * math.prod(x.shape) for x in found) - sum(
        2 * math.prod(x.shape) for x in (q, k, v)
    )
    expected = activation_bytes(config, sizes)["attention"] + attention_residual_bytes(
        config, sizes
    )
    assert kept == sizes.devices * expected
