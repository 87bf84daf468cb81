"""The configuration: frozen dataclasses, one a group, with every field and its default.

`ml_collections` stops at the door: a `get_config()` file returns `configure(...)` (a ConfigDict
that takes dotted overrides), `validation.resolve` turns it into a frozen `Config`, and from there
on there is no `.get` and no default.
"""

import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import config_dict

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

  none       4D + 2Q + 2P + 2F   Every matmul's inputs. Only the attention scores are computed again, as always.
  dots       2D + 2Q + 2P + 2F   Every matmul's result. The two norms are computed again and, with mesh.tensor, the two
                                 gathers of their results.
  attention  2D + 2Q + 2P        None of the MLP: gate and up are computed again, 4DF operations a token and layer. For
                                 long sequences: attention, quadratic in them, is not.
  full       D                   The whole layer but its last matmul (down) is computed again.
"""


class ConfigError(ValueError):
    """The request is wrong. The command line prints it without a traceback and exits with 2."""


LARGEST = 2**63 - 1
"""The largest integer that jax can be given."""

_DERIVED = {"derived": True}
"""Marks a field that follows from others unless it is given; 0 stands for not given."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1 frequency scaling (`rope_type: llama3` of Hugging Face); `factor` 1 leaves the
    frequencies alone."""

    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_sequence_length: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama. Left out, `kv_heads` is `heads` and `head_dim` is `dim / heads`; `resolve` puts them
    in."""

    vocab_size: int = 50304
    dim: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = dataclasses.field(default=0, metadata=_DERIVED)
    head_dim: int = dataclasses.field(default=0, metadata=_DERIVED)
    ffn_dim: int = 1408
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on. `source`: `stories`, `tinystories`, `synthetic`, or a path or glob of .txt,
    .jsonl, .parquet or .bin (token shards); `validation_source` replaces the held-out fraction."""

    source: str = "stories"
    tokenizer: str = "gpt2"
    sequence_length: int = 256
    packing: bool = True
    validation_fraction: float = 0.05
    validation_source: str = ""
    text_field: str = "text"
    shard_dtype: str = "auto"
    prefetch: int = 2


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop. `batch_size` is global, in sequences; `eval_batches=0` evaluates the whole
    validation split."""

    steps: int = 1000
    batch_size: int = 32
    microbatches: int = 1
    seed: int = 0
    eval_every: int = 200
    eval_batches: int = 20
    z_loss: float = 0.0
    max_nonfinite_steps: int = 5


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str = "adamw"
    learning_rate: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    min_learning_rate: float = 0.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """`params`: the master weights and the optimizer state. `compute`: matmuls, activations,
    travelling weights. `grad_reduce`: in which gradients are summed over devices. `loss_scale`: the
    first scale of the loss, for `float16`; it doubles after `loss_scale_growth_steps` finite steps
    and halves after one that is not."""

    params: str = "float32"
    compute: str = "bfloat16"
    grad_reduce: str = "float32"
    loss_scale: float = 0.0
    loss_scale_growth_steps: int = 2000


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """`remat`: what the backward pass recomputes: a policy of `REMAT`, or the names of the
    activations to keep, separated by commas. `offload`: names of activations that wait for the
    backward pass in host memory, whatever `remat` says of them, and `optimizer` for the optimizer
    state."""

    remat: str = "none"
    offload: str = ""

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the activations that stay on the device."""
        asked, away = (
            REMAT.get(self.remat) or ("residual", *split_names(self.remat)),
            self.offloaded,
        )
        return tuple(name for name in ACTIVATIONS if name in asked and name not in away)

    @property
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
    """`sequence_parallel`: between the tensor-parallel matmuls, shard residual and norms over
    `tensor` along the sequence (Megatron). Without it they are replicated over `tensor`. `gather`:
    when weights are gathered over `fsdp`, in every layer or once a step. `optimizer_sharding=data`
    (ZeRO-1): optimizer state and master weights are sharded over `data` too. `context`: how
    attention sees tokens of other devices on `sequence`; `zigzag` balances its work. `schedule`:
    the order in which a pipeline runs its microbatches; `chunks`: how many times layers go round
    its stages (interleaved 1F1B); without a pipeline neither changes anything."""

    sequence_parallel: bool = True
    gather: str = "per_layer"
    optimizer_sharding: str = "none"
    context: str = "all_gather"
    zigzag: bool = False
    schedule: str = "1f1b"
    chunks: int = 1


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    implementation: str = "auto"


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """`chunk`: tokens a device turns into logits at a time."""

    chunk: int = 1024


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """`preset`: the options of `xla.PRESET`. `cache`: where compiled programs are kept for the next
    start: `auto` (the user's cache folder), `none`, or a folder. `unroll`: layers in one turn of
    the layer loop; more of them stack fewer activations and compile longer."""

    preset: bool = True
    cache: str = "auto"
    unroll: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """`every=0` saves only at the end. `keep`: newest ones kept; `keep_best`: ones of lowest eval
    loss kept besides. `restore`: `auto` continues from the workdir, `none` refuses to touch a used
    one, a path starts from that run, and if the data or its order are others, at their
    beginning."""

    every: int = 500
    keep: int = 2
    keep_best: int = 0
    async_: bool = True
    restore: str = "auto"


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = 10
    progress: bool = True
    tensorboard: bool = False


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

    @property
    def devices(self) -> int:
        return math.prod(self.shape)

    @property
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


def field_paths(kind: type = Config, prefix: str = "") -> dict[str, type]:
    """Every dotted field of a config dataclass with its type: `{"model.dim": int, ...}`."""
    paths: dict[str, type] = {}
    for field in dataclasses.fields(kind):
        kind = typing.cast(type, field.type)
        if dataclasses.is_dataclass(kind):
            paths |= field_paths(kind, f"{prefix}{field.name}.")
        else:
            paths[prefix + field.name] = kind
    return paths


def value_of(config: Config, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """` Did you mean ...?` for the closest of `names`, or the whole list when none is close;
    `prefix` is put before."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return (
        f" Did you mean {prefix}{close[0]}?"
        if close
        else f" Known: {', '.join(prefix + name for name in names)}."
    )


def check_field(path: str) -> None:
    """Refuses the dotted name of a config field that does not exist.

    Raises:
      ConfigError: with the field of that name in another group, else the nearest, else those of the
        group.
    """
    paths = field_paths()
    groups = {known.rpartition(".")[0] for known in paths}
    if path in paths or path in groups:
        return
    group, _, name = path.rpartition(".")
    namesakes = [known for known in paths if known.rpartition(".")[2] == name]
    if namesakes:
        hint = f" Did you mean {' or '.join(namesakes)}?"
    elif group in groups:
        siblings = [
            known.removeprefix(group + ".") for known in paths if known.rpartition(".")[0] == group
        ]
        hint = nearest(name, siblings, prefix=group + ".")
    else:
        hint = nearest(group or path, sorted({known.partition(".")[0] for known in groups}))
    raise ConfigError(f"unknown config field {path!r}.{hint}")


def _to_config_dict(value: Any) -> config_dict.ConfigDict:
    result = config_dict.ConfigDict()
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            result[field.name] = _to_config_dict(item)
        elif field.metadata == _DERIVED:
            result[field.name] = config_dict.placeholder(type(item))
        else:
            result[field.name] = item
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
        if value is None and field.metadata == _DERIVED:
            value = field.default
        elif value == 0 and field.metadata == _DERIVED:
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
