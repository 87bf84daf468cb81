"""Every optimizer against its formula and on a mesh against one device; schedules by hand."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import all_within, config_of, cosine_rate, mesh_of, train_ours, within
from optax import contrib

from jaxpar.config import OptimizerConfig
from jaxpar.data.batches import Batch
from jaxpar.optimizer import make_optimizer, schedule
from jaxpar.parameters import parameters
from jaxpar.sharding import Rules
from jaxpar.tree import named_leaves
from jaxpar.validation import CHOICES

ELEMENTWISE = ("adamw", "lion", "sgd")
RATES = {"adamw": 1e-2, "lion": 3e-3, "adafactor": 1e-2, "muon": 1e-2, "sgd": 0.3}
SHAPES = {
    "embedding": (33, 40),
    "layers.attention.query": (2, 6, 2, 4),
    "layers.attention.out": (2, 6, 2, 4),
    "layers.mlp.up": (2, 6, 10),
    "layers.mlp_norm.scale": (2, 6),
}


class Formula:
    """One leaf under one optimizer, in float64: `rule(g, decay, t)` is what the learning rate
    multiplies, t from 1."""

    def __init__(self, name: str, o: OptimizerConfig) -> None:
        self.name, self.beta1, self.beta2, self.eps = name, o.beta1, o.beta2, o.eps
        self.rule, self.memory = getattr(self, o.name), {}

    def average(self, key: str, value: np.ndarray, keep: float) -> np.ndarray:
        self.memory[key] = keep * self.memory.get(key, 0) + (1 - keep) * value
        return self.memory[key]

    def sgd(self, g: np.ndarray, decay: np.ndarray, t: int) -> np.ndarray:
        """torch.optim.SGD: the decay is part of the gradient, and so of the momentum."""
        return self.average("m", (g + decay) / (1 - self.beta1), self.beta1)

    def lion(self, g: np.ndarray, decay: np.ndarray, t: int) -> np.ndarray:
        """Chen et al., 2023, algorithm 2."""
        direction = np.sign(self.beta1 * self.memory.get("m", 0) + (1 - self.beta1) * g)
        self.average("m", g, self.beta2)
        return direction + decay

    def adamw(self, g: np.ndarray, decay: np.ndarray, t: int) -> np.ndarray:
        """Loshchilov and Hutter, 2019, algorithm 2."""
        return self.scaled(self.average("m", g, self.beta1) / (1 - self.beta1**t), g, t) + decay

    def scaled(self, m: np.ndarray, g: np.ndarray, t: int) -> np.ndarray:
        return m / (np.sqrt(self.average("v", g**2, self.beta2) / (1 - self.beta2**t)) + self.eps)

    def adafactor(self, g: np.ndarray, decay: np.ndarray, t: int) -> np.ndarray:
        """Shazeer and Stern, 2018, algorithm 4, without relative steps; factored from 32 rows and
        columns on. Each layer of a stack by itself."""
        keep, layer = 1 - t**-0.8, tuple(range(self.name.startswith("layers."), g.ndim))
        if len(layer) == 2 and min(g.shape[-2:]) >= 32:
            rows = self.average("rows", np.mean(g**2, axis=-1, keepdims=True), keep)
            columns = self.average("columns", np.mean(g**2, axis=-2, keepdims=True), keep)
            v = rows * columns / np.mean(rows, axis=-2, keepdims=True)
        else:
            v = self.average("v", g**2, keep)
        direction = g / np.sqrt(v)
        return (
            direction / np.maximum(1.0, np.sqrt(np.mean(direction**2, axis=layer, keepdims=True)))
            + decay
        )

    def muon(self, g: np.ndarray, decay: np.ndarray, t: int) -> np.ndarray:
        """Jordan et al., 2024: Nesterov momentum, then each layer's [in, out] matrix made
        orthogonal; else NAdamW.

        `out` is stored [out, in]."""
        ahead = self.average("m", g, self.beta1) / (1 - self.beta1 ** (t + 1))
        m = self.beta1 * ahead + (1 - self.beta1) * g / (1 - self.beta1**t)
        if self.name == "embedding" or self.name.endswith("scale"):
            return self.scaled(m, g, t) + decay
        matrices = [layer.reshape(len(layer), -1) for layer in m]
        if self.name.endswith(".out"):
            matrices = [self.orthogonal(matrix.T).T for matrix in matrices]
        else:
            matrices = [self.orthogonal(matrix) for matrix in matrices]
        return np.stack(matrices).reshape(g.shape) + decay

    def orthogonal(self, x: np.ndarray) -> np.ndarray:
        """Five Newton-Schulz steps."""
        scale, x = math.sqrt(max(1.0, x.shape[1] / x.shape[0])), x / (np.linalg.norm(x) + self.eps)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return scale * x


@pytest.mark.parametrize("name", RATES)
def test_optimizer_equals_its_formula(name: str) -> None:
    """Four updates of leaves of every kind, under warmup and decay; weight decay on all but norm
    scales."""
    settings = dict(
        name=name, warmup_steps=2, learning_rate=0.1, weight_decay=0.3, beta1=0.8, eps=1e-3
    )
    config = config_of(train=dict(steps=4), optimizer=settings)
    optimizer, random = make_optimizer(config), np.random.default_rng(0)
    start, *gradients = (
        {k: random.normal(size=v).astype(np.float32) for k, v in SHAPES.items()} for _ in range(5)
    )
    formulas = {leaf: Formula(leaf, config.optimizer) for leaf in SHAPES}
    expected = {leaf: p.astype(np.float64) for leaf, p in start.items()}
    with jax.set_mesh(mesh_of()):
        params = jax.tree.map(jnp.asarray, start)
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for n, g in enumerate(gradients):
            updates, state = update(jax.tree.map(jnp.asarray, g), state, params)
            params = jax.tree.map(jnp.add, params, updates)
            for leaf, p in expected.items():
                decay = (0.0 if leaf.endswith("scale") else 0.3) * p
                change = formulas[leaf].rule(g[leaf].astype(np.float64), decay, n + 1)
                expected[leaf] = p - cosine_rate(n, config.optimizer, 4) * change
    changes = ({leaf: p - start[leaf] for leaf, p in tree.items()} for tree in (params, expected))
    all_within(f"{name}, change", *changes, limit=1e-5)


@pytest.mark.parametrize("name", RATES)
def test_layers_do_not_mix(name: str) -> None:
    """Two updates of a stack of more layers than any layer has rows or columns equal those of each
    layer alone."""
    config = config_of(
        train=dict(steps=4), optimizer=dict(name=name, warmup_steps=0, weight_decay=0.3)
    )
    layers, optimizer, random = 40, make_optimizer(config), np.random.default_rng(0)
    shapes = {
        "layers.attention.query": (layers, 33, 2, 4),
        "layers.mlp.up": (layers, 33, 35),
        "layers.mlp_norm.scale": (layers, 33),
    }
    # Layers whose gradients differ in size: what is mixed is not nearly the same.
    sizes = np.geomspace(1e-2, 1e2, layers)
    params, *gradients = (
        {k: (random.normal(size=v).T * sizes).T.astype(np.float32) for k, v in shapes.items()}
        for _ in range(3)
    )
    update = jax.jit(optimizer.update)

    def updates(only: slice) -> list[dict[str, np.ndarray]]:
        mine, *steps = (
            {k: jnp.asarray(x[only]) for k, x in tree.items()} for tree in (params, *gradients)
        )
        state, found = optimizer.init(mine), []
        for g in steps:
            change, state = update(g, state, mine)
            found.append(jax.tree.map(np.asarray, change))
        return found

    with jax.set_mesh(mesh_of()):
        alone = [updates(slice(n, n + 1)) for n in range(layers)]
        for step, together in enumerate(updates(slice(None))):
            expected = {k: np.concatenate([one[step][k] for one in alone]) for k in shapes}
            all_within(f"{name}, update {step}", together, expected, limit=1e-5)


# adafactor and muon mix a whole matrix; for the others, which do not, the curve above stands in the
# fast tests.
@pytest.mark.parametrize(
    "name", ["adafactor", "muon", *(pytest.param(n, marks=pytest.mark.slow) for n in ELEMENTWISE)]
)
def test_optimizer_on_a_mesh_equals_one_device(name: str) -> None:
    """Ten steps on one batch lower its loss, by the same on fsdp=2 x tensor=2."""
    config = config_of(
        model=dict(vocab_size=64, dim=64, layers=1, heads=2, ffn_dim=96),
        data=dict(sequence_length=8),
        train=dict(steps=10, batch_size=2),
        optimizer=dict(name=name, learning_rate=RATES[name], warmup_steps=2),
    )
    tokens = np.random.default_rng(0).integers(64, size=(1, 2, 9)).astype(np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), (1, 2, 8))
    data = [Batch(tokens[..., :-1], tokens[..., 1:], positions, np.ones_like(positions))] * 10
    one, mesh = (
        train_ours(config, mesh_of(**axes), data)[0][:, 0] for axes in ({}, dict(fsdp=2, tensor=2))
    )
    assert one[-1] < one[0] - 1, f"the loss went from {one[0]} to {one[-1]}"
    within(f"{name}, loss at any step", np.abs(mesh - one).max(), 1e-5)


@pytest.mark.parametrize(
    "axes",
    [
        dict(data=2, fsdp=2, tensor=2),
        *(
            pytest.param(axes, marks=pytest.mark.slow)
            for axes in ({}, dict(fsdp=4, tensor=2), dict(pipeline=2, fsdp=2))
        ),
    ],
    ids=str,
)
def test_muon_is_that_of_optax_and_its_devices_share_the_layers(axes: dict[str, int]) -> None:
    """Two updates, and the names of the state, of four layers over up to eight devices; compiled,
    it gathers nothing."""
    config = config_of(
        model=dict(vocab_size=64, dim=32, layers=4, heads=4, kv_heads=2, ffn_dim=48),
        parallel=dict(optimizer_sharding="data"),
        optimizer=dict(name="muon", schedule="constant", warmup_steps=0, learning_rate=1.0)
        | dict(weight_decay=0.0, eps=1e-3),
    )
    o, rows, random = config.optimizer, parameters(config.model), np.random.default_rng(0)
    params, *gradients = (
        {name: random.normal(size=row.shape(config.model)) for name, row in rows.items()}
        for _ in range(3)
    )
    numbers = contrib.MuonDimensionNumbers
    inward = dict.fromkeys(("mlp.gate", "mlp.up"), numbers((1,), (2,)))
    to_heads = dict.fromkeys(
        ("attention.query", "attention.key", "attention.value"), numbers((1,), (2, 3))
    )
    outward = {"mlp.down": numbers((2,), (1,)), "attention.out": numbers((2, 3), (1,))}
    known = inward | to_heads | outward
    dimensions = {name: known.get(name.removeprefix("layers.")) for name in rows}
    settings = dict(beta=o.beta1, eps=o.eps, adam_b1=o.beta1, adam_b2=o.beta2)
    theirs = contrib.muon(1.0, **settings, muon_weight_dimension_numbers=lambda _: dimensions)

    def updates(optimizer: Any, mesh: Any) -> tuple[dict[str, np.ndarray], set[str], str]:
        with jax.set_mesh(mesh):
            spec = Rules.make(config.parallel).spec

            def placed(tree: dict[str, np.ndarray]) -> dict[str, jax.Array]:
                return {
                    name: jax.device_put(x.astype(np.float32), spec(*rows[name].dims))
                    for name, x in tree.items()
                }

            mine = placed(params)
            state = jax.jit(optimizer.init)(mine)
            update = jax.jit(optimizer.update).lower(mine, state, mine).compile()
            for g in gradients:
                change, state = update(placed(g), state, mine)
        names = set(named_leaves(state)) - {"count"}  # of the schedule
        return jax.tree.map(np.asarray, change), names, update.as_text()

    found, names, compiled = updates(make_optimizer(config), mesh_of(**axes))
    with jax.set_mesh(mesh_of()):
        plain = {name: x.astype(np.float32) for name, x in params.items()}
        state = theirs.init(plain)
        for g in gradients:
            g = {name: x.astype(np.float32) for name, x in g.items()}
            expected, state = jax.jit(theirs.update)(g, state, plain)
    assert names == set(named_leaves(state))
    all_within("muon, second update", found, expected, limit=1e-5)
    assert "all-gather" not in compiled and ("all-to-all" in compiled) == bool(axes)


@pytest.mark.parametrize(
    "settings, steps, expected",
    [
        (dict(schedule="cosine", warmup_steps=0), 4, [1, 0.868198, 0.55, 0.231802, 0.1, 0.1]),
        (dict(schedule="cosine", warmup_steps=2), 4, [0.5, 1, 1, 0.55, 0.1]),
        (dict(schedule="linear", warmup_steps=1), 4, [1, 1, 0.7, 0.4, 0.1, 0.1]),
        (
            dict(schedule="linear", warmup_steps=4),
            10,
            [0.25, 0.5, 0.75, 1, 1, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1],
        ),
        (
            dict(schedule="wsd", warmup_steps=2, decay_fraction=0.3),
            10,
            [0.5, 1, 1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1],
        ),
        (dict(schedule="wsd", warmup_steps=0, decay_fraction=1.0), 3, [1, 0.7, 0.4, 0.1]),
        (dict(schedule="wsd", warmup_steps=2, decay_fraction=0.8), 5, [0.5, 1, 1, 0.7, 0.4, 0.1]),
        (dict(schedule="constant", warmup_steps=2), 4, [0.5, 1, 1, 1, 1]),
        (dict(schedule="linear", warmup_steps=4), 4, [0.25, 0.5, 0.75, 1]),
        *[
            (dict(schedule=s, warmup_steps=9), 4, [0.25, 0.5, 0.75, 1])
            for s in CHOICES["optimizer.schedule"]
        ],
        *[
            (dict(schedule=s, warmup_steps=w), 1, [1])
            for s in CHOICES["optimizer.schedule"]
            for w in (0, 1, 9)
        ],
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_schedule(settings: dict[str, Any], steps: int, expected: list[float]) -> None:
    """Rates of the updates 0, 1, ... worked out by hand; entry `steps` is where the decay ends."""
    rate = schedule(OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, **settings), steps)
    assert [float(rate(n)) for n in range(len(expected))] == pytest.approx(expected, abs=1e-6)
