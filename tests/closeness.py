"""What the tests against other implementations share: a drawn model, a training curve, and measured
differences.

`pytest -rP` prints every difference that is measured.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxpar.config import Config, MeshConfig, OptimizerConfig, configure
from jaxpar.data.batches import Batch, place
from jaxpar.model import Llama
from jaxpar.optimizer import make_optimizer
from jaxpar.sharding import make_mesh
from jaxpar.step import TrainState, make_train_step
from jaxpar.tree import leaf_name, named_leaves
from jaxpar.validation import resolve

Leaves = dict[str, np.ndarray]

QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}
"""Compiles twice as fast; what is compared here is small, and runs a few times."""


def config_of(**groups: Any) -> Config:
    """A resolved config that computes in float32."""
    return resolve(configure(precision=dict(compute="float32"), **groups))


def mesh_of(**axes: int) -> Mesh:
    """A mesh of the first of the simulated devices."""
    return make_mesh(MeshConfig(**axes))


def draw(config: Config, mesh: Mesh, std: float) -> Llama:
    """The same random model on every mesh: norm scales between 1/2 and 3/2, weights of spread
    `std`."""
    random = np.random.default_rng(1)

    def leaf(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        is_scale = leaf_name(path).endswith("scale")
        values = (
            random.uniform(0.5, 1.5, like.shape)
            if is_scale
            else std * random.normal(size=like.shape)
        )
        return jax.device_put(values.astype(np.float32), NamedSharding(mesh, like.sharding.spec))

    with jax.set_mesh(mesh):
        return jax.tree_util.tree_map_with_path(
            leaf, jax.eval_shape(lambda: Llama(config, nnx.Rngs(params=0)))
        )


def relative(value: Any, reference: Any) -> float:
    """Norm of the difference over the norm of the reference, in float64."""
    reference = np.asarray(reference, np.float64)
    return float(
        np.linalg.norm(np.asarray(value, np.float64) - reference) / np.linalg.norm(reference)
    )


def within(what: str, difference: float, limit: float) -> None:
    """Asserts that a difference is below its limit (not-a-number is not), and prints it."""
    print(f"{what}: {difference:.1e} (limit {limit:g})")
    assert difference < limit, f"{what}: {difference} is not below {limit}"


def all_within(
    what: str, values: Mapping[str, Any], expected: Mapping[str, Any], limit: float
) -> None:
    """The same for the relative difference of every array of a mapping."""
    assert values.keys() == expected.keys()
    errors = {name: relative(values[name], reference) for name, reference in expected.items()}
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    within(f"{what}, worst {worst}", errors[worst], limit)


WHOLE = {"embedding": "model.embed_tokens", "norm.scale": "model.norm", "head": "lm_head"}
LAYER = {
    "layers.attention_norm.scale": "input_layernorm",
    "layers.attention.query": "self_attn.q_proj",
    "layers.attention.key": "self_attn.k_proj",
    "layers.attention.value": "self_attn.v_proj",
    "layers.attention.query_norm.scale": "self_attn.q_norm",
    "layers.attention.key_norm.scale": "self_attn.k_norm",
    "layers.attention.out": "self_attn.o_proj",
    "layers.mlp_norm.scale": "post_attention_layernorm",
    "layers.mlp.gate": "mlp.gate_proj",
    "layers.mlp.up": "mlp.up_proj",
    "layers.mlp.down": "mlp.down_proj",
}


def to_hugging_face(tree: Llama) -> Leaves:
    """Weights or gradients under their Hugging Face names, on the host: layers apart, matrices
    [out, in]."""
    state = {}
    for name, leaf in named_leaves(tree).items():
        array = np.array(leaf)
        if name in WHOLE:
            state[f"{WHOLE[name]}.weight"] = array.T if name == "head" else array
            continue
        for layer, weight in enumerate(array):
            if weight.ndim > 1:
                weight = weight.reshape(
                    len(weight), -1
                )  # [out, in] of `out` and `down`, else [in, out]
                weight = weight if name.endswith((".out", ".down")) else weight.T
            state[f"model.layers.{layer}.{LAYER[name]}.weight"] = weight
    return state


def cosine_rate(n: int, o: OptimizerConfig, steps: int) -> float:
    """Learning rate of update n, counted from 0."""
    if n < o.warmup_steps:
        return o.learning_rate * (n + 1) / o.warmup_steps
    done = (n - o.warmup_steps) / (steps - o.warmup_steps)
    return (
        o.min_learning_rate
        + (o.learning_rate - o.min_learning_rate) * (1 + math.cos(math.pi * done)) / 2
    )


def train_ours(config: Config, mesh: Mesh, data: list[Batch]) -> tuple[np.ndarray, Leaves]:
    """Loss, gradient norm and learning rate of every step [steps, 3]; the weights under their
    Hugging Face names."""
    with jax.set_mesh(mesh):
        model, zero = draw(config, mesh, std=0.02), jnp.zeros((), jnp.int32)
        state = TrainState(
            zero,
            zero.copy(),
            jnp.ones(()),
            zero.copy(),
            model,
            jax.jit(make_optimizer(config).init)(model),
        )
        step = jax.jit(make_train_step(config), donate_argnums=0, compiler_options=QUICK)
        rows = []
        for batch in data:
            state, metrics = step(state, place(batch, config, mesh))
            rows.append([float(metrics[name]) for name in ("loss", "grad_norm", "learning_rate")])
    assert (state.step, state.skipped) == (len(data), 0)
    return np.array(rows), to_hugging_face(state.model)
