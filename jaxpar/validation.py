"""Every rule that a request must obey.

A wrong request raises `ConfigError`, before jax starts wherever the number of devices is not
needed. Its message gives the value, the rule, and the legal values nearest to it.
"""

import dataclasses
import math
from collections.abc import Mapping

from ml_collections import config_dict

from jaxpar.config import (
    ACTIVATIONS,
    AXES,
    BATCH_AXES,
    REMAT,
    Config,
    ConfigError,
    MeshConfig,
    field_paths,
    from_mapping,
    split_names,
    value_of,
)
from jaxpar.hints import nearest

CHOICES = {
    "optimizer.name": ("adamw", "lion", "adafactor", "muon", "sgd"),
    "optimizer.schedule": ("cosine", "linear", "wsd", "constant"),
    "precision.params": ("float32", "bfloat16"),
    "precision.compute": ("bfloat16", "float32", "float16"),
    "precision.grad_reduce": ("float32", "bfloat16"),
    "parallel.gather": ("per_layer", "per_step"),
    "parallel.optimizer_sharding": ("none", "data"),
    "parallel.schedule": ("gpipe", "1f1b"),
    "parallel.context": ("all_gather", "ring", "ulysses"),
    "attention.implementation": ("auto", "cudnn", "xla"),
    "data.shard_dtype": ("auto", "uint16", "uint32"),
}

_POSITIVE = (
    "model.vocab_size model.dim model.layers model.heads model.kv_heads model.head_dim "
    "model.ffn_dim model.rope_theta "
    "model.rope_scaling.factor model.rope_scaling.low_freq_factor "
    "model.rope_scaling.high_freq_factor "
    "model.rope_scaling.original_sequence_length model.norm_eps model.init_std "
    "data.sequence_length data.prefetch "
    "train.steps train.batch_size train.microbatches train.max_nonfinite_steps "
    "optimizer.learning_rate optimizer.eps "
    "precision.loss_scale_growth_steps parallel.chunks loss.chunk compile.unroll checkpoint.keep "
    "log.every"
).split()

_NOT_NEGATIVE = (
    "train.seed train.eval_every train.eval_batches train.z_loss optimizer.warmup_steps "
    "optimizer.min_learning_rate "
    "optimizer.weight_decay optimizer.clip_norm precision.loss_scale checkpoint.every "
    "checkpoint.keep_best"
).split()

_NOT_EMPTY = "data.source data.tokenizer data.text_field compile.cache checkpoint.restore".split()


def resolve(raw: config_dict.ConfigDict) -> Config:
    """Turns a ConfigDict into a frozen `Config` and holds it against every rule that needs no mesh.

    Raises:
      ConfigError: an unknown field, a value of the wrong type, or a broken rule.
    """
    config = from_mapping(Config, raw.to_dict())
    model = config.model
    _positive("model.dim", model.dim)
    _positive("model.heads", model.heads)
    kv_heads = model.kv_heads or model.heads
    if model.head_dim == 0 and model.dim % model.heads:
        raise ConfigError(
            f"model.dim={model.dim} is not divisible by model.heads={model.heads}; use model.heads "
            "in "
            f"{_nearest_divisors(model.dim, model.heads)}, or set model.head_dim"
        )
    head_dim = model.head_dim or model.dim // model.heads
    model = dataclasses.replace(model, kv_heads=kv_heads, head_dim=head_dim)
    config = dataclasses.replace(config, model=model)
    _validate(config)
    return config


def _positive(path: str, value: float, *, zero: bool = False) -> None:
    legal = math.isfinite(value) and (value >= 0 if zero else value > 0)
    if not legal:
        rule = "must be finite and not negative" if zero else "must be finite and positive"
        default = value_of(Config(), path) if path in field_paths() else None
        least = "at least 0" if zero else "at least 1" if isinstance(value, int) else "above 0"
        raise ConfigError(
            f"{path}={value} {rule}; use {least}" + (f" (default: {default})" if default else "")
        )


def _validate(config: Config) -> None:
    for path, choices in CHOICES.items():
        value = value_of(config, path)
        if value not in choices:
            raise ConfigError(
                f"{path}={value!r} is not one of {', '.join(choices)}.{nearest(value, choices)}"
            )
    for path in _NOT_EMPTY:
        if not value_of(config, path).strip():
            raise ConfigError(f"{path} is empty (default: {value_of(Config(), path)})")
    _known_names("memory.remat", config.memory.remat, ACTIVATIONS, *REMAT)
    _known_names("memory.offload", config.memory.offload, (*ACTIVATIONS, "optimizer"), "")
    for path in _POSITIVE:
        _positive(path, value_of(config, path))
    for path in _NOT_NEGATIVE:
        _positive(path, value_of(config, path), zero=True)
    for path in ("optimizer.beta1", "optimizer.beta2", "data.validation_fraction"):
        if not 0 <= (value := value_of(config, path)) < 1:
            raise ConfigError(f"{path}={value} must be at least 0 and below 1")
    if not 0 < config.optimizer.decay_fraction <= 1:
        raise ConfigError(
            f"optimizer.decay_fraction={config.optimizer.decay_fraction} must be above 0 and at "
            "most 1"
        )
    decays = config.optimizer.schedule != "constant"
    if decays and config.optimizer.min_learning_rate > config.optimizer.learning_rate:
        peak, least = config.optimizer.learning_rate, config.optimizer.min_learning_rate
        raise ConfigError(
            f"optimizer.learning_rate={peak} is below optimizer.min_learning_rate={least}, where "
            f"the schedule ends; use optimizer.min_learning_rate of at most {peak}, or "
            f"optimizer.learning_rate of at least {least}"
        )
    model = config.model
    _divisible("model.heads", model.heads, "model.kv_heads", model.kv_heads)
    if model.head_dim % 2:
        near = f"{{{model.head_dim - 1}, {model.head_dim + 1}}}" if model.head_dim > 1 else "{2}"
        raise ConfigError(
            f"model.head_dim={model.head_dim} must be even, because RoPE rotates pairs; use one of "
            f"{near}"
        )
    scaling = model.rope_scaling
    if scaling.factor != 1 and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ConfigError(
            f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor} must be below "
            f"high_freq_factor={scaling.high_freq_factor}; Llama 3.1 has 1 and 4"
        )
    _divisible(
        "train.batch_size", config.train.batch_size, "train.microbatches", config.train.microbatches
    )
    scaled = config.precision.loss_scale > 0
    if scaled != (config.precision.compute == "float16"):
        raise ConfigError(
            f"precision.compute={config.precision.compute} and "
            f"precision.loss_scale={config.precision.loss_scale}: "
            "float16 needs a loss scale and no other dtype takes one; use "
            "precision.loss_scale=65536 with float16, or "
            "precision.compute=bfloat16 and precision.loss_scale=0"
        )
    if config.parallel.zigzag and config.parallel.context == "ulysses":
        raise ConfigError(
            "parallel.zigzag=True balances causal work between tokens, but with "
            "parallel.context=ulysses every device "
            "has all of them; use parallel.zigzag=false, or parallel.context=ring"
        )


def _known_names(path: str, value: str, names: tuple[str, ...], *whole: str) -> None:
    """Refuses what is neither one of `whole` nor a list of `names`."""
    given = split_names(value)
    unknown = next((name for name in given if name not in names), "")
    if value in whole or (given and not unknown):
        return
    policies = f"{', '.join(whole)}, or " if any(whole) else ""
    wrong = f"has {unknown!r}, which is unknown" if unknown else "names nothing"
    raise ConfigError(
        f"{path}={value!r} {wrong}; use {policies}"
        f"names separated by commas, of {', '.join(names)}.{_close(unknown, (*whole, *names))}"
    )


def _close(name: str, names: tuple[str, ...]) -> str:
    hint = nearest(name, names)
    return hint if hint.startswith(" Did") else ""


def _nearest_divisors(n: int, near: int, most: int = 6) -> str:
    divisors = [d for d in range(1, n + 1) if n % d == 0] if n <= 1_000_000 else [1]
    chosen = sorted(sorted(divisors, key=lambda d: (abs(math.log(d / near)), d))[:most])
    return "{" + ", ".join(map(str, chosen)) + "}"


def _nearest_multiples(n: int, of: int) -> str:
    below = n // of * of
    return "{" + ", ".join(str(m) for m in (below, below + of) if m > 0) + "}"


def _divisible(name: str, value: int, by: str, divisor: int, *, why: str = "") -> None:
    if value % divisor:
        raise ConfigError(
            f"{name}={value} is not divisible by {by}={divisor}{why}; use {by} in "
            f"{_nearest_divisors(value, divisor)}, or {name} in "
            f"{_nearest_multiples(value, divisor)}"
        )


def resolve_mesh(sizes: Mapping[str, int | None], devices: int | None) -> MeshConfig:
    """The mesh that was asked for.

    Args:
      sizes: size of each axis; `None` (not given) is 1, except that `data` takes the devices left
        over when no axis was given -1.
      devices: number of devices, or None where it is not known yet; then a -1 counts as 1.

    Raises:
      ConfigError: unknown axis, two -1, a size below 1, or a product that is not the number of
        devices.
    """
    for axis, size in sizes.items():
        if axis not in AXES:
            raise ConfigError(f"unknown mesh axis {axis!r}.{nearest(axis, AXES)}")
        if size is not None and size != -1 and size < 1:
            raise ConfigError(
                f"mesh.{axis}={size} must be at least 1, or -1 for the devices left over"
            )
    given = {axis: sizes.get(axis) for axis in AXES}
    free = [axis for axis, size in given.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(
            f"mesh.{free[0]}=-1 and mesh.{free[1]}=-1: only one axis can take the devices left over"
        )
    if not free and given["data"] is None:
        free = ["data"]
    known = {axis: size or 1 for axis, size in given.items() if axis not in free}
    product = math.prod(known.values())
    if devices is None:
        return MeshConfig(**known)
    asked = " x ".join(f"{axis}={size}" for axis, size in known.items() if size > 1) or "1"
    if free:
        if devices % product:
            raise ConfigError(
                f"mesh {asked} = {product} does not divide {devices} devices, so mesh.{free[0]}=-1 "
                "has no size; " + _mesh_remedy(known, devices)
            )
        known[free[0]] = devices // product
    elif product != devices:
        raise ConfigError(
            f"mesh {asked} = {product} does not use {devices} devices; "
            + _mesh_remedy(known, devices)
        )
    return MeshConfig(**known)


def _mesh_remedy(known: Mapping[str, int], devices: int) -> str:
    """What to change so that the sizes multiply to the devices: the largest size that, alone, can
    make it right."""
    product = math.prod(known.values())
    simulate = f"or simulate the mesh with --cpu_devices={product}"
    if devices % product == 0:
        return f"leave mesh.data out, and it takes the {devices // product} left over, {simulate}"
    for axis, size in sorted(known.items(), key=lambda item: -item[1]):
        rest = product // size
        if size > 1 and devices % rest == 0:
            if "data" in known and axis != "data":
                return f"use mesh.{axis}={devices // rest}, {simulate}"
            if "data" in known:
                return f"use mesh.data={devices // rest}, or leave it out, {simulate}"
            return f"use mesh.{axis} in {_nearest_divisors(devices // rest, size)}, {simulate}"
    return f"use sizes whose product divides {devices}, {simulate}"


def validate_mesh(config: Config, mesh: MeshConfig, *, training: bool = True) -> None:
    """Holds a config against a mesh: every sharded dimension must divide; of the model, and if
    `training` of the batch.

    Raises:
      ConfigError: the first dimension that does not, with the sizes that do.
    """
    model, tensor, fsdp = config.model, mesh.tensor, mesh.fsdp
    if mesh.pipeline > 1:
        _validate_pipeline(config, mesh, training=training)
    sharded = {
        name: getattr(model, name) for name in ("heads", "kv_heads", "ffn_dim", "vocab_size")
    }
    for name, size in sharded.items():
        if size % tensor:
            raise ConfigError(
                f"model.{name}={size} is not divisible by mesh.tensor={tensor}; use mesh.tensor in "
                f"{_nearest_divisors(math.gcd(*sharded.values()), tensor)}, which divide heads, "
                "kv_heads, ffn_dim and "
                f"vocab_size, or model.{name} in {_nearest_multiples(size, tensor)}"
            )
    _divisible("model.dim", model.dim, "mesh.fsdp", fsdp, why=" (weights are sharded along it)")
    if config.parallel.optimizer_sharding == "data" and model.dim % (fsdp * mesh.data):
        raise ConfigError(
            f"model.dim={model.dim} is not divisible by mesh.fsdp x mesh.data = "
            f"{fsdp * mesh.data}, over which "
            "parallel.optimizer_sharding=data spreads it; use mesh.data in "
            f"{_nearest_divisors(model.dim // fsdp, mesh.data)}"
        )
    if not training:
        return
    length = config.data.sequence_length
    _divisible("data.sequence_length", length, "mesh.sequence", mesh.sequence)
    if config.parallel.sequence_parallel and length % (mesh.sequence * tensor):
        raise ConfigError(
            f"data.sequence_length={length} is not divisible by mesh.sequence x mesh.tensor = "
            f"{mesh.sequence * tensor}"
            f", which sequence_parallel needs; use data.sequence_length in "
            f"{_nearest_multiples(length, mesh.sequence * tensor)}, or "
            "--config.parallel.sequence_parallel=false"
        )
    _validate_context(config, mesh)
    train = config.train
    whole = train.microbatches * mesh.batch_shards
    if train.batch_size % whole:
        axes = " x ".join(f"{axis}={getattr(mesh, axis)}" for axis in BATCH_AXES)
        factors = f"microbatches={train.microbatches} x {axes} = {whole}"
        per_microbatch = train.batch_size // train.microbatches
        raise ConfigError(
            f"train.batch_size={train.batch_size} is not divisible by {factors} "
            f"(sequences a device x microbatches x data x fsdp x expert); use train.batch_size in "
            f"{_nearest_multiples(train.batch_size, whole)}, or data x fsdp x expert in "
            f"{_nearest_divisors(per_microbatch, mesh.batch_shards)}"
        )


def _validate_pipeline(config: Config, mesh: MeshConfig, *, training: bool) -> None:
    """Layers must divide into stages and chunks, the vocabulary into stages x tensor, and chunks
    want microbatches that are a multiple of the stages."""
    model, stages, chunks = config.model, mesh.pipeline, config.parallel.chunks
    M = config.train.microbatches
    if not training:
        raise ConfigError(
            f"mesh.pipeline={stages}: tokens are generated one by one, which leaves all stages but "
            "one idle; use "
            "mesh.pipeline=1 with mesh.tensor or mesh.fsdp (the checkpoint of a pipeline restores "
            "onto any mesh)"
        )
    if model.layers % (stages * chunks):
        by = (
            f"mesh.pipeline x parallel.chunks = {stages * chunks}"
            if chunks > 1
            else f"mesh.pipeline={stages}"
        )
        remedies = []
        if model.layers % chunks == 0 and model.layers > chunks:
            remedies.append(f"mesh.pipeline in {_nearest_divisors(model.layers // chunks, stages)}")
        if chunks > 1 and model.layers % stages == 0:
            remedies.append(
                f"parallel.chunks in {_nearest_divisors(model.layers // stages, chunks)}"
            )
        remedies.append(f"model.layers in {_nearest_multiples(model.layers, stages * chunks)}")
        raise ConfigError(
            f"model.layers={model.layers} is not divisible by {by}: every stage takes as many "
            "layers; use " + ", or ".join(remedies)
        )
    parts = stages * mesh.tensor
    if model.vocab_size % parts:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is not divisible by mesh.pipeline x mesh.tensor "
            f"= {parts}, over "
            f"which embedding and head are spread; use mesh.pipeline in "
            f"{_nearest_divisors(model.vocab_size, stages)}, or model.vocab_size in "
            f"{_nearest_multiples(model.vocab_size, parts)}"
        )
    if chunks > 1 and config.parallel.schedule == "gpipe":
        raise ConfigError(
            f"parallel.chunks={chunks} needs parallel.schedule=1f1b, which interleaves them; use "
            "it, or "
            "parallel.chunks=1 with gpipe"
        )
    if chunks > 1 and M % stages:
        raise ConfigError(
            f"train.microbatches={M} is not divisible by mesh.pipeline={stages}, which "
            f"parallel.chunks={chunks} needs "
            "(a chunk takes as many microbatches as there are stages before the next one's turn); "
            "use "
            f"train.microbatches in {_nearest_multiples(M, stages)}, or parallel.chunks=1"
        )
    if config.memory.offload:
        raise ConfigError(
            f"memory.offload={config.memory.offload} is not built for a pipeline "
            f"(mesh.pipeline={stages}), whose "
            "stages keep only their inputs; leave it out and save memory by memory.remat"
        )


def _validate_context(config: Config, mesh: MeshConfig) -> None:
    """The two rules of context parallelism besides that tokens divide: zigzag's halves, and the
    heads of Ulysses."""
    model, length, sequence, tensor = (
        config.model,
        config.data.sequence_length,
        mesh.sequence,
        mesh.tensor,
    )
    if config.parallel.zigzag and sequence > 1 and length % (2 * sequence):
        unit = math.lcm(2 * sequence, sequence * tensor if config.parallel.sequence_parallel else 1)
        raise ConfigError(
            f"data.sequence_length={length} is not divisible by 2 x mesh.sequence = "
            f"{2 * sequence}, which "
            "parallel.zigzag needs (every device gets an early and a late piece); use "
            "data.sequence_length in "
            f"{_nearest_multiples(length, unit)}, or parallel.zigzag=false"
        )
    if config.parallel.context != "ulysses":
        return
    for name in ("heads", "kv_heads"):
        heads = getattr(model, name)
        if heads // tensor % sequence:
            legal = math.gcd(model.heads, model.kv_heads) // tensor
            raise ConfigError(
                f"model.{name}={heads} / mesh.tensor={tensor} = {heads // tensor} is not divisible "
                "by "
                f"mesh.sequence={sequence}, which parallel.context=ulysses needs (it gives every "
                "device all tokens of "
                f"some heads); use mesh.sequence in {_nearest_divisors(legal, sequence)}, which "
                "divide heads and "
                f"kv_heads / mesh.tensor, or parallel.context=ring"
            )
