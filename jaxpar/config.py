"""The configuration: frozen dataclasses, one a group, with every field and its default.

`ml_collections` stops at the door: a `get_config()` file returns `configure(...)` (a ConfigDict
that takes dotted overrides), `validation.resolve` turns it into a frozen `Config`, and from there
on there is no `.get` and no default.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from jaxpar.hints import meant_field

AXES = ("pipeline", "data", "fsdp", "expert", "sequence", "tensor")
"""The mesh axes, outermost first: `tensor` is innermost because it needs the fastest links."""

BATCH_AXES = ("data", "fsdp", "expert")
"""The axes over which the batch dimension is sharded."""


ACTIVATIONS = (
    *("residual", "attention_input", "query", "key", "value", "attention", "attention_output"),
    *("mlp_input", "gate", "up"),
)
"""What a layer may keep for its backward pass, as `model.py` names it; `residual` is its input,
which it always keeps. The rest is recomputed: norms and SwiGLU's product are cheap, the attention
scores are quadratic in S, and gathered weights are what fsdp is there to avoid."""

REMAT = {
    "none": ACTIVATIONS,
    "dots": ("residual", "query", "key", "value", "attention", "attention_output", "gate", "up"),
    "attention": ("residual", "query", "key", "value", "attention", "attention_output"),
    "full": ("residual",),
}
"""The activations that each policy of `memory.remat` keeps. Elements a token and layer, in the
compute dtype, with D model dim, Q = heads x head dim, P = kv_heads x head dim, F ffn:

  none       4D + 2Q + 2P + 2F   Every matmul's inputs. Only the attention scores are computed
                                 again, as always.
  dots       2D + 2Q + 2P + 2F   Every matmul's result. The two norms are computed again and, with
                                 mesh.tensor, the two gathers of their results.
  attention  2D + 2Q + 2P        None of the MLP: gate and up are computed again, 4DF operations a
                                 token and layer. For long sequences: attention, quadratic in them,
                                 is not.
  full       D                   The whole layer but its last matmul (down) is computed again.
"""


class ConfigError(ValueError):
    """The request is wrong. The command line prints it without a traceback and exits with 2."""


LARGEST = 2**63 - 1
"""The largest integer that jax can be given."""


def field(default: Any, doc: str, *, derived: bool = False) -> Any:
    """A field of the configuration: its default, and the line that `--help` says of it.

    A `derived` one follows from others unless it is given; its default, 0, stands for not given.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, "derived": derived})


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1 frequency scaling (`rope_type: llama3` of Hugging Face)."""

    factor: float = field(1.0, "how much longer RoPE's slow waves become; 1 leaves them alone")
    low_freq_factor: float = field(
        1.0, "waves longer than original_sequence_length over this are stretched"
    )
    high_freq_factor: float = field(
        4.0, "waves shorter than original_sequence_length over this are not"
    )
    original_sequence_length: int = field(8192, "sequence length before the stretching")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama."""

    vocab_size: int = field(50304, "rows of the embedding; at least the tokenizer's ids")
    dim: int = field(512, "width of the residual stream (hidden size)")
    layers: int = field(8, "transformer layers")
    heads: int = field(8, "query heads of a layer")
    kv_heads: int = field(
        0,
        "key and value heads of a layer, shared by queries where fewer (default: heads)",
        derived=True,
    )
    head_dim: int = field(0, "width of a head (default: dim / heads)", derived=True)
    ffn_dim: int = field(1408, "width of the MLP between its matmuls (intermediate size)")
    rope_theta: float = field(10_000.0, "base of RoPE's frequencies")
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = field(1e-5, "added to the mean square by RMSNorm")
    tie_embeddings: bool = field(False, "the head is the embedding, transposed")
    qk_norm: bool = field(
        False, "normalise queries and keys of each head before RoPE, as Qwen3 does"
    )
    init_std: float = field(0.02, "standard deviation of initial weights")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    source: str = field(
        "stories",
        "stories (built in), tinystories (downloaded once), synthetic, or a path or glob of .txt, "
        ".jsonl, .parquet or .bin (token shards), or a folder that prepare wrote",
    )
    tokenizer: str = field(
        "gpt2",
        "gpt2 (built in), bytes, or the path of a Hugging Face tokenizer.json or a SentencePiece "
        "model",
    )
    sequence_length: int = field(256, "tokens of a sequence")
    packing: bool = field(
        True, "documents share sequences, without seeing each other; false: each has its own"
    )
    validation_fraction: float = field(0.05, "share of the documents held out for evaluation")
    validation_source: str = field("", "evaluate on this source instead of a held-out fraction")
    text_field: str = field("text", "where .jsonl and .parquet have the text")
    shard_dtype: str = field("auto", "of the ids in .bin files that do not say")
    prefetch: int = field(2, "batches made ahead")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = field(1000, "optimizer steps in all")
    batch_size: int = field(32, "sequences a step, of all devices and microbatches together")
    microbatches: int = field(1, "parts of the batch computed one after another (accumulation)")
    seed: int = field(0, "of the initial weights and the data order")
    eval_every: int = field(200, "steps between evaluations; 0: only at the end")
    eval_batches: int = field(20, "batches of an evaluation; 0: the whole validation split")
    z_loss: float = field(0.0, "weight of the squared log of the softmax's sum in the loss")
    max_nonfinite_steps: int = field(5, "skipped updates in a row that end the run")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update."""

    name: str = field("adamw", "the optimizer")
    learning_rate: float = field(3e-4, "after the warmup, before the decay")
    schedule: str = field("cosine", "how the learning rate falls; wsd: warmup, stable, decay")
    warmup_steps: int = field(100, "steps in which the learning rate rises from 0")
    decay_fraction: float = field(0.2, "share of the steps in which wsd falls")
    min_learning_rate: float = field(0.0, "where the schedule ends; at most learning_rate")
    weight_decay: float = field(0.1, "of matrices; decoupled from the gradient")
    beta1: float = field(0.9, "decay of the gradient's running mean (momentum)")
    beta2: float = field(0.95, "decay of the squared gradient's running mean")
    eps: float = field(1e-8, "added to the root of the squared gradient's mean")
    clip_norm: float = field(1.0, "largest norm of the whole gradient; 0: any")


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """In which dtype what is kept, computed and summed."""

    params: str = field("float32", "dtype of master weights and optimizer state")
    compute: str = field("bfloat16", "dtype of matmuls, activations and travelling weights")
    grad_reduce: str = field("float32", "dtype in which gradients are summed over devices")
    loss_scale: float = field(
        0.0, "first scale of the loss, for compute=float16; halved by a gradient that overflows"
    )
    loss_scale_growth_steps: int = field(2000, "finite steps after which the loss scale doubles")


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """What the backward pass finds, computes again or fetches."""

    remat: str = field(
        "none",
        f"activations to keep for the backward pass, which computes the others again: "
        f"{' | '.join(REMAT)}, or names separated by commas, of {', '.join(ACTIVATIONS)}",
    )
    offload: str = field(
        "", "activations that wait in host memory instead, by name, and optimizer for its state"
    )

    @functools.cached_property
    def kept(self) -> tuple[str, ...]:
        """Names of the activations that stay on the device."""
        asked, away = (
            REMAT.get(self.remat) or ("residual", *split_names(self.remat)),
            self.offloaded,
        )
        return tuple(name for name in ACTIVATIONS if name in asked and name not in away)

    @functools.cached_property
    def offloaded(self) -> tuple[str, ...]:
        """Names of the activations that go to host memory."""
        away = split_names(self.offload)
        return tuple(name for name in ACTIVATIONS if name in away)

    @property
    def offload_optimizer(self) -> bool:
        return "optimizer" in split_names(self.offload)


@functools.cache
def split_names(text: str) -> tuple[str, ...]:
    """The names of a list separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the axes of the mesh are used; their sizes are flags, `--mesh.AXIS=N`."""

    sequence_parallel: bool = field(
        True, "between the matmuls split over tensor, split the sequence over it (Megatron)"
    )
    gather: str = field("per_layer", "when weights are gathered over fsdp")
    optimizer_sharding: str = field(
        "none", "data (ZeRO-1): split optimizer state and master weights over data too"
    )
    context: str = field("all_gather", "how attention sees the tokens of other sequence devices")
    zigzag: bool = field(
        False, "balance causal attention over sequence: early and late tokens for each"
    )
    schedule: str = field("1f1b", "order in which a pipeline runs its microbatches")
    chunks: int = field(1, "times that layers go round the stages (interleaved 1F1B)")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The kernel of attention."""

    implementation: str = field("auto", "auto: cuDNN where it can keep documents apart, else XLA")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The cross-entropy."""

    chunk: int = field(1024, "tokens that a device turns into logits at a time")


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """What is asked of XLA."""

    preset: bool = field(True, "use the compiler options of jaxpar.xla.PRESET")
    cache: str = field(
        "auto",
        "where compiled programs are kept for the next start: auto (the user's cache folder), "
        "none, or a folder",
    )
    unroll: int = field(
        1, "layers in one turn of the layer loop; more stack fewer activations, compile longer"
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Saving, and what to start from."""

    every: int = field(500, "steps between checkpoints; 0: only at the end")
    keep: int = field(2, "newest checkpoints kept")
    keep_best: int = field(0, "checkpoints of lowest eval loss kept besides")
    async_: bool = field(True, "write while training goes on")
    restore: str = field(
        "auto",
        "auto continues from the workdir, none refuses a used one, a path starts from that run; if "
        "its data or their order were others, at their beginning",
    )
    allow_changes: bool = field(
        False,
        "go on even where changed fields give the run another curve or other data, or its "
        "parameters another meaning",
    )


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run tells."""

    every: int = field(10, "steps between rows of metrics.jsonl")
    progress: bool = field(True, "show a bar on a terminal")
    tensorboard: bool = field(False, "write the metrics for TensorBoard too")


@dataclasses.dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: PrecisionConfig = PrecisionConfig()
    memory: MemoryConfig = MemoryConfig()
    parallel: ParallelConfig = ParallelConfig()
    attention: AttentionConfig = AttentionConfig()
    loss: LossConfig = LossConfig()
    compile: CompileConfig = CompileConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the six axes, all known."""

    pipeline: int = 1
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @functools.cached_property
    def devices(self) -> int:
        return math.prod(self.shape)

    @functools.cached_property
    def batch_shards(self) -> int:
        return math.prod(getattr(self, axis) for axis in BATCH_AXES)

    def __str__(self) -> str:
        used = [f"{axis}={size}" for axis, size in zip(AXES, self.shape, strict=True) if size > 1]
        return " x ".join(used) or "one device"


# The door: ConfigDict in, frozen dataclasses out.


def configure(**groups: Any) -> config_dict.ConfigDict:
    """The ConfigDict of a run: every default, overridden by `groups` (`model=dict(dim=512),
    train=dict(steps=100)`).

    Raises:
      ConfigError: a group or field that does not exist, with the nearest one that does.
    """
    result = _to_config_dict(Config())
    for group, fields in groups.items():
        _merge(result, {group: fields})
    return result


def config_fields(kind: type = Config, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Every field of a config dataclass, by its dotted name."""
    fields: dict[str, dataclasses.Field[Any]] = {}
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(item.type):
            fields |= config_fields(typing.cast(type, item.type), f"{prefix}{item.name}.")
        else:
            fields[prefix + item.name] = item
    return fields


def field_paths() -> dict[str, type]:
    """Every dotted field of the config with its type: `{"model.dim": int, ...}`."""
    return {path: typing.cast(type, item.type) for path, item in config_fields().items()}


def value_of(config: Config, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def check_field(path: str) -> None:
    """Refuses the dotted name of a config field that does not exist.

    Raises:
      ConfigError: with what may have been meant.
    """
    paths = field_paths()
    if path not in paths and path not in {known.rpartition(".")[0] for known in paths}:
        raise ConfigError(f"unknown config field {path!r}.{meant_field(path, paths, AXES)}")


def _to_config_dict(value: Any) -> config_dict.ConfigDict:
    result = config_dict.ConfigDict()
    for item in dataclasses.fields(value):
        held = getattr(value, item.name)
        if dataclasses.is_dataclass(held):
            result[item.name] = _to_config_dict(held)
        elif item.metadata["derived"]:
            result[item.name] = config_dict.placeholder(type(held))
        else:
            result[item.name] = held
    return result


def _merge(target: config_dict.ConfigDict, updates: Mapping[str, Any], prefix: str = "") -> None:
    for name, value in updates.items():
        check_field(prefix + name)
        if isinstance(value, Mapping):
            _merge(target[name], value, f"{prefix}{name}.")
        else:
            try:
                target[name] = value
            except TypeError as error:
                raise ConfigError(f"{prefix}{name}={value!r}: {error}") from error


def from_mapping(kind: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A config dataclass from nested mappings that hold every field.

    Raises:
      ConfigError: an unknown or missing field, or a value of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            check_field(prefix + name)
    result = {}
    for name, field in fields.items():
        path = prefix + name
        if name not in values:
            raise ConfigError(
                f"the config has no {path}; make it with jaxpar.config.configure, which knows "
                "every field"
            )
        value = values[name]
        if dataclasses.is_dataclass(field.type):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path}={value!r} must be a group of fields")
            result[name] = from_mapping(typing.cast(type, field.type), value, path + ".")
            continue
        if value is None and field.metadata["derived"]:
            value = field.default
        elif value == 0 and field.metadata["derived"]:
            raise ConfigError(
                f"{path}=0 must be finite and positive; use at least 1, or leave it out"
            )
        wanted = typing.cast(type, field.type)
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise ConfigError(
                f"{path}={value!r} is a {type(value).__name__}; it must be {wanted.__name__}"
            )
        if wanted is int and not -LARGEST <= value <= LARGEST:
            raise ConfigError(f"{path}={value} does not fit into 64 bits; use at most {LARGEST}")
        result[name] = value
    return kind(**result)
