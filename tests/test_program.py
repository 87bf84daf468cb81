"""The one engine: what layers add to the objective and to the sums of a step is the same on every
mesh, with any number of microbatches and every schedule; and so are its gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parity import check, first_batch, make_config, text  # noqa: F401  (a fixture)

from jaxpar import model, verify
from jaxpar.config import MeshConfig
from jaxpar.data.batches import Batch, place
from jaxpar.parallel.layers import Added
from jaxpar.program import evaluate
from jaxpar.sharding import all_manual, make_mesh
from jaxpar.step import enter, init_state, loss_and_gradients
from jaxpar.tree import named_leaves
from jaxpar.validation import validate_mesh

WEIGHT = 0.3


@pytest.fixture(scope="module", autouse=True)
def dummy_loss():
    """Every layer adds the mean square of its result, weighted, to the objective, and reports the
    sum of its result."""
    plain = model.Block.__call__

    def block(self: Any, x_BSD: jax.Array, shared: Any, cache: Any = None) -> Any:
        x_BSD, _, cache = plain(self, x_BSD, shared, cache)
        x32 = x_BSD.astype(jnp.float32)
        mean_BS, total = jnp.mean(jnp.square(x32), axis=-1), jnp.sum(x32)
        rules = self.mlp.layout.rules
        if all_manual() and "tensor" not in rules.residual_seq:  # all of `tensor` hold it
            once = jax.lax.axis_index("tensor") == 0
            mean_BS, total = once * mean_BS, once * total
        return x_BSD, Added((WEIGHT * mean_BS,), {"total": total}), cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.Block, "__call__", block)
        yield


def config_of(text, *, microbatches=1, layers=4, **groups):  # noqa: F811
    parallel = dict(groups.pop("parallel", {}))
    settings = dict(
        model=dict(
            **dict(vocab_size=320, dim=32, layers=layers, heads=4, kv_heads=2, head_dim=8),
            **dict(ffn_dim=48, init_std=0.2),
        ),
        train=dict(batch_size=8, microbatches=microbatches, z_loss=1e-3),
        parallel=parallel,
    )
    return make_config(text, microbatches=microbatches, **settings, **groups)


FAST = ("microbatches", "data x tensor", "unrolled by 3 of 4", "1f1b with chunks")
CASES: dict[str, tuple[dict, dict]] = {
    "microbatches": (dict(), dict(microbatches=4)),
    "data x tensor": (dict(data=2, tensor=2), dict(parallel=dict(sequence_parallel=False))),
    "sequence parallel, full remat": (
        dict(fsdp=2, sequence=2, tensor=2),
        dict(microbatches=2, memory=dict(remat="full")),
    ),
    "unrolled by 3 of 4": (dict(data=2), dict(microbatches=2, compile=dict(unroll=3))),
    "1f1b with chunks": (
        dict(pipeline=2, tensor=2),
        dict(microbatches=4, parallel=dict(chunks=2, sequence_parallel=False)),
    ),
    "1f1b": (dict(pipeline=4, data=2), dict(microbatches=2)),
    "gpipe": (dict(pipeline=2, fsdp=2), dict(microbatches=4, parallel=dict(schedule="gpipe"))),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in FAST)) for c in CASES]
)
def test_what_layers_add(text, case):  # noqa: F811
    sizes, groups = CASES[case]
    check(config_of(text, **groups), sizes)


@pytest.mark.parametrize(
    "case", ["microbatches", "1f1b with chunks", pytest.param("gpipe", marks=pytest.mark.slow)]
)
def test_evaluation_counts_it_too(text, case):  # noqa: F811
    """The objective, and what each layer reports in the order of the network."""
    sizes, groups = CASES[case]
    config = config_of(text, **groups)
    alone = verify.reference_config(config)
    ours = both(config, MeshConfig(**sizes))
    plain = both(alone, MeshConfig())
    assert plain["evaluated"]["layers"]["total"].shape == (4,)
    assert np.ptp(plain["evaluated"]["layers"]["total"]) > 0
    for found in (ours["evaluated"], ours["trained"], plain["trained"]):
        np.testing.assert_allclose(found["objective"], plain["evaluated"]["objective"], rtol=1e-6)
        np.testing.assert_allclose(
            found["layers"]["total"], plain["evaluated"]["layers"]["total"], rtol=1e-4, atol=1e-3
        )


def both(config, sizes: MeshConfig) -> dict[str, Any]:
    """The sums of a batch from evaluation and from training."""
    validate_mesh(config, sizes)
    mesh = make_mesh(sizes, jax.devices()[: sizes.devices])
    batch = first_batch(verify.reference_config(config))
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(config))()
        placed = place(batch, config, mesh)
        evaluated = jax.jit(lambda m, b: evaluate(enter(m, config), b, config))(state.model, placed)
        trained, _ = jax.jit(lambda m, b: loss_and_gradients(m, b, config))(state.model, placed)
        valid = float((np.asarray(batch.targets) >= 0).sum())
        evaluated, trained = jax.device_get((evaluated, trained))
    evaluated = evaluated._replace(objective=evaluated.objective / valid)
    return {"evaluated": evaluated._asdict(), "trained": trained._asdict()}


def test_the_gradient_is_that_of_the_plain_sum(text):  # noqa: F811
    """Against a forward pass written out here, differentiated by jax."""
    config = config_of(text, microbatches=2)
    plain = verify.reference_config(config)
    batch = first_batch(plain)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        llama = jax.jit(lambda: init_state(plain).model)()

        def objective(llama: Any, batch: Batch) -> jax.Array:
            one = jax.tree.map(lambda x: x[0], batch)
            shared = llama.shared(model.TokenInfo(one.positions, one.segments))
            x = llama.embed(one.tokens)
            added = jnp.zeros(())
            for n in range(config.model.layers):
                layer = jax.tree.map(lambda w, n=n: w[n], llama.layers)
                x, (terms, _), _ = layer(x, shared)
                added += jnp.sum(terms[0])
            logits = llama.norm(x) @ llama.head_weight()
            lse = jax.nn.logsumexp(logits, axis=-1)
            hit = jax.nn.one_hot(one.targets, logits.shape[-1], dtype=logits.dtype)
            target = jnp.einsum("BSV,BSV->BS", logits, hit)
            valid = one.targets >= 0
            total = jnp.sum(jnp.where(valid, lse - target + plain.train.z_loss * lse**2, 0))
            return (total + added) / valid.sum()

        placed = place(batch, plain, mesh)
        value, gradients = jax.jit(jax.value_and_grad(objective))(llama, placed)
        leaves = {n: np.asarray(g, np.float64) for n, g in named_leaves(gradients).items()}
    ours = verify.run_batch(config, mesh, batch)
    assert ours.loss == pytest.approx(float(value), rel=1e-6)
    for name, expected in leaves.items():
        assert verify.relative_error(ours.gradients[name], expected) < 1e-5, name
