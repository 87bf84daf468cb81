"""One training step: `train_step(state, batch) -> (state, metrics)`, and one evaluation step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxpar import loss, program
from jaxpar.config import Config
from jaxpar.data.batches import Batch
from jaxpar.model import Llama
from jaxpar.optimizer import make_optimizer, schedule, to_device, to_host
from jaxpar.parallel import reduce
from jaxpar.parameters import TABLE, in_layers
from jaxpar.tree import leaf_name, named_leaves

# M microbatches, B sequences of one microbatch over all devices, S sequence.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`step` counts batches consumed, `skipped` those whose update was dropped because it was not
    finite. `loss_scale` is 1 but for float16; `since_scaled` counts updates since it changed.
    `model` is a `Llama` (Any, because optax's types do not know modules as pytrees)."""

    step: jax.Array
    skipped: jax.Array
    loss_scale: jax.Array
    since_scaled: jax.Array
    model: Any
    optimizer: optax.OptState


Metrics = dict[str, Any]


def init_state(config: Config) -> TrainState:
    """The state before the first step: a function of `config` alone, whatever the mesh. Run it
    under `jax.jit`."""
    model: Any = program.to_stages(Llama(config, nnx.Rngs(params=config.train.seed)), config)
    zero = jnp.zeros((), jnp.int32)
    scale = jnp.float32(config.precision.loss_scale or 1)
    optimizer_state = to_host(make_optimizer(config).init(model), config)
    return TrainState(zero, zero, scale, zero, model, optimizer_state)


def loss_and_gradients(
    model: Llama, batch: Batch, config: Config, loss_scale: jax.Array | None = None
) -> tuple[program.Sums, Any]:
    """Mean losses of a batch of M microbatches, with the sums of its layers as they are, and the
    gradient of the objective in the dtype and layout of the parameters.

    Sums over valid tokens are divided once, by their number in the whole batch, so the result does
    not depend on how the batch is cut into microbatches or spread over devices. With a `loss_scale`
    the gradients are computed scaled, so that small ones survive in float16, and are divided by it
    at the end.
    """
    valid = jnp.maximum(loss.count_valid(batch.targets), 1)
    scale = 1.0 if loss_scale is None else loss_scale
    entered = enter(model, config)
    sums, gradients = program.loss_and_gradients(entered, batch, config, scale / valid)
    gradients = jax.tree.map(reduce.leave_step, gradients, model)
    if loss_scale is not None:
        gradients = jax.tree.map(lambda g: (g / loss_scale).astype(g.dtype), gradients)
    means = dict(
        objective=sums.objective / valid, cross_entropy=sums.cross_entropy / valid, z=sums.z / valid
    )
    return sums._replace(**means), gradients


def enter(model: Llama, config: Config) -> Any:
    """The model as the microbatches of a step use it; see `reduce.enter_step`."""
    layout, per_step = model.layout, config.parallel.gather == "per_step"

    def enter_leaf(path: Any, weight: jax.Array) -> jax.Array:
        summed = layout.rules.axes(TABLE[leaf_name(path)].summed)
        return reduce.enter_step(weight, summed, layout.dtype, gather_fsdp=per_step)

    return jax.tree_util.tree_map_with_path(enter_leaf, model)


def make_train_step(config: Config) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the training step. Jit it with `donate_argnums=0`.

    Metrics (float32): `loss` (mean cross-entropy of the valid tokens), `grad_norm`,
    `learning_rate`, `valid_tokens`, `skipped` (int32, so far), and `gradient_norms`, per leaf, one
    number a layer for stacked leaves.

    A loss or gradient that is not finite leaves parameters and optimizer as they were.
    """
    optimizer, rate = make_optimizer(config), schedule(config.optimizer, config.train.steps)
    scaled = config.precision.loss_scale > 0

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        losses, gradients = loss_and_gradients(
            state.model, batch, config, state.loss_scale if scaled else None
        )
        norms = gradient_norms(gradients)
        grad_norm = jnp.sqrt(sum(jnp.sum(jnp.square(n)) for n in jax.tree.leaves(norms)))
        finite = jnp.isfinite(losses.objective) & jnp.isfinite(grad_norm)
        if config.optimizer.clip_norm:
            clip = jnp.minimum(1.0, config.optimizer.clip_norm / grad_norm)
            gradients = jax.tree.map(lambda g: (g * clip).astype(g.dtype), gradients)
        old = (state.model, to_device(state.optimizer, config))
        updates, optimizer_state = optimizer.update(gradients, old[1], state.model)
        new = (optax.apply_updates(state.model, updates), optimizer_state)
        model, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), new, old
        )
        skipped = state.skipped + jnp.where(finite, 0, 1)
        loss_scale, since_scaled = (
            _next_scale(state, finite, config) if scaled else (state.loss_scale, state.since_scaled)
        )
        metrics = {
            "loss": losses.cross_entropy,
            "grad_norm": grad_norm,
            "learning_rate": rate(state.step - state.skipped),
            "valid_tokens": loss.count_valid(batch.targets),
            "skipped": skipped,
            "gradient_norms": program.to_network(norms, config),
        } | ({"loss_scale": state.loss_scale} if scaled else {})
        return TrainState(
            state.step + 1,
            skipped,
            loss_scale,
            since_scaled,
            model,
            to_host(optimizer_state, config),
        ), metrics

    return train_step


def _next_scale(
    state: TrainState, finite: jax.Array, config: Config
) -> tuple[jax.Array, jax.Array]:
    """Dynamic loss scale (Micikevicius et al., 2018): halved when a gradient overflows, doubled
    after long without."""
    grown = state.since_scaled + 1 >= config.precision.loss_scale_growth_steps
    scale = jnp.where(
        finite, jnp.where(grown, state.loss_scale * 2, state.loss_scale), state.loss_scale / 2
    )
    return jnp.clip(scale, 1, 2.0**24), jnp.where(finite & ~grown, state.since_scaled + 1, 0)


def gradient_norms(gradients: Llama) -> dict[str, jax.Array]:
    """Norm of every gradient leaf by name; a vector of L norms for the stacked leaves of the
    layers."""

    def norm(name: str, g: jax.Array) -> jax.Array:
        dims = range(int(in_layers(name)), g.ndim)
        return jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.float32)), axis=dims))

    return {name: norm(name, g) for name, g in named_leaves(gradients).items()}


def make_eval_step(config: Config) -> Callable[[Llama, Batch], tuple[jax.Array, jax.Array]]:
    """Builds the evaluation step: summed cross-entropy and number of valid tokens of one batch [M,
    B, S]."""

    def eval_step(model: Llama, batch: Batch) -> tuple[jax.Array, jax.Array]:
        sums = program.evaluate(enter(model, config), batch, config)
        return sums.cross_entropy, loss.count_valid(batch.targets)

    return eval_step
