"""Optimizers and learning-rate schedules, all from optax. `step.py` clips, because it has the
norm."""

from typing import Any

import jax
import optax
from optax import contrib

from jaxpar.config import Config, OptimizerConfig
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


def is_matrix(params: Any) -> Any:
    """True for every leaf but the norm scales: what weight decay acts on. Stacked scales are 2-D,
    so names decide."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not leaf_name(path).endswith("scale"), params
    )


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The optax transformation of a run, without clipping."""
    o = config.optimizer
    rate = schedule(o, config.train.steps)
    decay: dict[str, Any] = {"weight_decay": o.weight_decay, "mask": is_matrix}
    if o.name == "adamw":
        return optax.adamw(rate, b1=o.beta1, b2=o.beta2, eps=o.eps, **decay)
    if o.name == "lion":
        return optax.lion(rate, b1=o.beta1, b2=o.beta2, **decay)
    if o.name == "sgd":
        return optax.chain(optax.add_decayed_weights(**decay), optax.sgd(rate, momentum=o.beta1))
    if o.name == "adafactor":
        one = optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=32), optax.clip_by_block_rms(1.0)
        )
        # Each layer by itself: else statistics and clipping would mix layers where there are many.
        stack = optax.GradientTransformation(jax.vmap(one.init), jax.vmap(one.update))
        direction = optax.partition({"one": one, "stack": stack}, _one_or_stack)
        return _auto(
            optax.chain(
                direction, optax.add_decayed_weights(**decay), optax.scale_by_learning_rate(rate)
            )
        )
    direction = contrib.muon(
        -1.0,  # the direction itself: its weight decay would not spare the norm scales
        beta=o.beta1,
        eps=o.eps,
        adam_b1=o.beta1,
        adam_b2=o.beta2,
        muon_weight_dimension_numbers=_muon_dimensions,
    )
    return _auto(
        optax.chain(
            direction, optax.add_decayed_weights(**decay), optax.scale_by_learning_rate(rate)
        )
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


def _one_or_stack(params: Any) -> Any:
    """Which leaves are one weight, and which a stack of those of all layers."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "stack" if leaf_name(path).startswith("layers.") else "one", params
    )


def _muon_dimensions(params: Any) -> Any:
    """Which dimensions of a stacked weight are rows and columns; None (NAdamW) for embedding, head
    and norms."""
    inward, outward = ((1,), (2,)), ((2,), (1,))  # dimension 0 is the layer
    to_heads, from_heads = ((1,), (2, 3)), ((2, 3), (1,))
    rows_columns = {
        "layers.attention.query": to_heads,
        "layers.attention.key": to_heads,
        "layers.attention.value": to_heads,
        "layers.attention.out": from_heads,
        "layers.mlp.gate": inward,
        "layers.mlp.up": inward,
        "layers.mlp.down": outward,
    }

    def dimensions(path: Any, _: jax.Array) -> contrib.MuonDimensionNumbers | None:
        found = rows_columns.get(leaf_name(path))
        return contrib.MuonDimensionNumbers(*found) if found else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _auto(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets the compiler place the update: it mixes whole matrices, for which no sharding is the
    natural one."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        placed: Any = jax.sharding.auto_axes(transformation.update, out_sharding=specs)
        return placed(updates, state, params)

    return optax.GradientTransformation(transformation.init, update)
