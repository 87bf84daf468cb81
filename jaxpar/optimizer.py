"""Optimizers and learning-rate schedules, all from optax. `step.py` clips, because it has the
norm."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxpar.config import Config, OptimizerConfig
from jaxpar.parallel.by_layer import by_layer
from jaxpar.parameters import FACTORED_FROM, TABLE, Parameter
from jaxpar.tree import leaf_name


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates made so far.

    Linear warmup over `warmup_steps` updates (at most `steps`; the first is not zero), then the
    decay: `cosine` and `linear` reach `min_learning_rate` after `steps` updates, `wsd` stays and
    falls linearly over the last `decay_fraction` of the steps, `constant` stays.
    """
    peak, low = config.learning_rate, config.min_learning_rate
    warmup = min(config.warmup_steps, steps)
    after = max(steps - warmup, 1)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, after, alpha=low / peak)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, low, after)
    elif config.schedule == "wsd":
        falling = min(max(round(steps * config.decay_fraction), 1), after)
        decay = optax.linear_schedule(peak, low, falling, transition_begin=after - falling)
    else:
        decay = optax.constant_schedule(peak)
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The optax transformation of a run, without clipping."""
    o = config.optimizer
    rate = schedule(o, config.train.steps)
    decay: dict[str, Any] = {"weight_decay": o.weight_decay, "mask": _rows(lambda row: row.decays)}
    if o.name == "adamw":
        return optax.adamw(rate, b1=o.beta1, b2=o.beta2, eps=o.eps, **decay)
    if o.name == "lion":
        return optax.lion(rate, b1=o.beta1, b2=o.beta2, **decay)
    if o.name == "sgd":
        return optax.chain(optax.add_decayed_weights(**decay), optax.sgd(rate, momentum=o.beta1))
    if o.name == "adafactor":
        one = optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=FACTORED_FROM),
            optax.clip_by_block_rms(1.0),
        )
        # Each layer by itself: else statistics and clipping would mix layers where there are many.
        stack = optax.GradientTransformation(jax.vmap(one.init), jax.vmap(one.update))
        direction = optax.partition(
            {"one": one, "stack": stack}, _rows(lambda row: "stack" if row.in_layers else "one")
        )
        return _auto(
            optax.chain(
                direction, optax.add_decayed_weights(**decay), optax.scale_by_learning_rate(rate)
            )
        )
    adam = optax.adamw(
        -1.0,  # the direction itself
        **dict(b1=o.beta1, b2=o.beta2, eps=o.eps, weight_decay=0.0, nesterov=True),
    )
    direction = optax.partition(
        {"muon": _orthogonal_momentum(o.beta1, o.eps), "adam": adam},
        _rows(lambda row: "muon" if row.orthogonalized else "adam"),
    )
    return optax.chain(
        direction, optax.add_decayed_weights(**decay), optax.scale_by_learning_rate(rate)
    )


def to_host(state: optax.OptState, config: Config) -> optax.OptState:
    """The optimizer state where it waits between updates: with `memory.offload=optimizer` in pinned
    host memory, sharded as it was on the devices. Counters stay."""
    return _move(state, jax.memory.Space.Host) if config.memory.offload_optimizer else state


def to_device(state: optax.OptState, config: Config) -> optax.OptState:
    """The optimizer state where the update needs it; undoes `to_host`. Copies the bytes of the
    device's own shards."""
    return _move(state, jax.memory.Space.Device) if config.memory.offload_optimizer else state


def _move(state: optax.OptState, space: jax.memory.Space) -> optax.OptState:
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, state)


def _rows(choose: Callable[[Parameter], Any]) -> Callable[[Any], Any]:
    """From a tree of parameters to one of what `choose` says of each one's row in the table."""

    def chosen(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: choose(TABLE[leaf_name(path)]), params
        )

    return chosen


def _orthogonal_momentum(beta: float, eps: float) -> optax.GradientTransformation:
    """`contrib.scale_by_muon` and its scaling by shape (Jordan et al., 2024), with the same state,
    for stacks of matrices that are cut over devices, which share the layers."""
    like_optax = contrib.scale_by_muon(beta=beta, eps=eps)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, contrib.MuonState]:
        del params
        count = state.count + 1
        momentum = optax.tree.update_moment(updates, state.mu, beta, 1)
        ahead = jax.tree.map(
            lambda m, g: beta * m + (1 - beta) * g,
            optax.tree.bias_correction(momentum, beta, count + 1),
            optax.tree.bias_correction(updates, beta, count),
        )

        def orthogonal(path: Any, stack: jax.Array) -> jax.Array:
            row = TABLE[leaf_name(path)]
            rows = [n for n, dim in enumerate(row.dims[1:]) if dim in row.contracts]
            return by_layer(lambda x: _orthogonal(x, rows, eps), stack)

        directions = jax.tree_util.tree_map_with_path(orthogonal, ahead)
        return directions, contrib.MuonState(count, momentum, state.ns_coeffs)

    return optax.GradientTransformation(like_optax.init, update)


def _orthogonal(x: jax.Array, rows: list[int], eps: float) -> jax.Array:
    """A matrix whose singular values are all made nearly equal, by five Newton-Schulz steps.

    Args:
      x: one weight's; its dimensions `rows` are those over which the product sums.
      eps: added to the norm.
    """
    rows_first = (*rows, *(n for n in range(x.ndim) if n not in rows))
    moved = x.transpose(rows_first)
    inputs = math.prod(moved.shape[: len(rows)])
    matrix = moved.reshape(inputs, -1)
    outputs = matrix.shape[1]
    wide = matrix.T if inputs > outputs else matrix
    wide = wide / (jnp.linalg.norm(wide) + eps)
    for _ in range(5):
        square = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    matrix = math.sqrt(max(1, outputs / inputs)) * (wide.T if inputs > outputs else wide)
    back = sorted(range(x.ndim), key=rows_first.__getitem__)
    return matrix.reshape(moved.shape).transpose(back)


def _auto(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets the compiler place the update: it mixes whole matrices, for which no sharding is the
    natural one."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        placed: Any = jax.sharding.auto_axes(transformation.update, out_sharding=specs)
        return placed(updates, state, params)

    return optax.GradientTransformation(transformation.init, update)
