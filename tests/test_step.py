"""Mixed precision of the training step: the dynamic loss scale of float16, and purely bfloat16
training."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.config import MeshConfig, configure
from jaxpar.data.batches import Batch, place
from jaxpar.sharding import make_mesh
from jaxpar.step import init_state, make_train_step
from jaxpar.validation import resolve


def losses_and_state(precision: dict, steps: int):
    """Metrics of some steps on one batch, on a mesh of eight with ZeRO-1 and two microbatches, and
    the last state."""
    config = resolve(
        configure(
            model=dict(vocab_size=64, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64),
            data=dict(sequence_length=16),
            train=dict(batch_size=8, microbatches=2),
            optimizer=dict(learning_rate=1e-2, warmup_steps=0),
            parallel=dict(optimizer_sharding="data"),
            precision=precision,
        )
    )
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    tokens = np.random.default_rng(0).integers(0, 64, (2, 4, 16)).astype(np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(config))()
        batch = Batch(tokens, np.roll(tokens, -1, -1), positions, np.ones_like(tokens))
        placed = place(batch, config, mesh)
        step = jax.jit(make_train_step(config), donate_argnums=0)
        rows = []
        for _ in range(steps):
            state, metrics = step(state, placed)
            rows.append(
                {name: float(metrics[name]) for name in metrics if name != "gradient_norms"}
            )
    return rows, state


def test_float16_halves_the_scale_at_an_overflow_and_doubles_it_after_a_while():
    precision = dict(compute="float16", loss_scale=2.0**24, loss_scale_growth_steps=3)
    rows, state = losses_and_state(precision, 12)
    overflowed = [
        row["skipped"] > (rows[n - 1]["skipped"] if n else 0) for n, row in enumerate(rows)
    ]
    scales = [row["loss_scale"] for row in rows] + [float(state.loss_scale)]
    assert overflowed[0], "the first scale was meant to overflow"
    assert all(scales[n + 1] == scales[n] / 2 for n, bad in enumerate(overflowed) if bad)
    assert any(new == 2 * old for old, new in itertools.pairwise(scales)), "never doubled"
    assert rows[1]["loss"] == rows[0]["loss"], "a skipped update changed the model"
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3


def test_float16_gradients_are_those_of_float32():
    """The scale is divided out again: the gradient norm of the first step does not depend on it."""
    expected = losses_and_state(dict(compute="float32"), 1)[0][0]
    scaled = losses_and_state(dict(compute="float16", loss_scale=1024.0), 1)[0][0]
    assert scaled["skipped"] == 0
    assert scaled["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-3)
    assert scaled["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_pure_bfloat16_keeps_nothing_in_float32():
    rows, state = losses_and_state(dict(params="bfloat16", grad_reduce="bfloat16"), 8)
    arrays = [leaf for leaf in jax.tree.leaves((state.model, state.optimizer)) if leaf.ndim]
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype("bfloat16")}
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
