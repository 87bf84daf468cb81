"""What a run is made of, counted: parameters, FLOPs, the batch. Needs no device.

Dimensions: B batch, S sequence, D model dim, L layers, H query heads, G key-value heads, K head
dim, F ffn dim, V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

from jaxpar.config import BATCH_AXES, Config, MeshConfig, ModelConfig

Shape = tuple[int, ...]

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element."""


@functools.cache
def parameter_shapes(model: ModelConfig) -> Mapping[str, Shape]:
    """Every parameter by its name in checkpoints (without the leading `model.`); layers are
    stacked."""
    V, D, L, H, F = model.vocab_size, model.dim, model.layers, model.heads, model.ffn_dim
    G = model.kv_heads or H
    K = model.head_dim or D // H
    shapes: dict[str, Shape] = {
        "embedding": (V, D),
        "layers.attention_norm.scale": (L, D),
        "layers.attention.query": (L, D, H, K),
        "layers.attention.key": (L, D, G, K),
        "layers.attention.value": (L, D, G, K),
        "layers.attention.out": (L, D, H, K),
        "layers.mlp_norm.scale": (L, D),
        "layers.mlp.gate": (L, D, F),
        "layers.mlp.up": (L, D, F),
        "layers.mlp.down": (L, D, F),
        "norm.scale": (D,),
        "head": (D, V),
    }
    if model.tie_embeddings:
        del shapes["head"]
    return shapes


@functools.cache
def matrix_sizes(model: ModelConfig) -> Mapping[str, int]:
    """Elements of every parameter that is multiplied; norm scales are left out."""
    return {
        name: math.prod(shape) for name, shape in parameter_shapes(model).items() if is_matrix(name)
    }


@functools.cache
def layer_elements(model: ModelConfig) -> int:
    """Elements of the matrices of all layers."""
    return sum(size for name, size in matrix_sizes(model).items() if name.startswith("layers."))


@functools.cache
def parameter_count(model: ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(model).values())


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of training, forward and backward (3 x forward).

    What remat computes again is not counted: these are model FLOPs, the numerator of MFU (Chowdhery
    et al., 2022).

    Attributes:
      matmul: per token, 6 for each weight that is multiplied: the head is, tied or not; the
        embedding gather is not.
      attention: per token, QK and AV of a causal mask, half of the square.
      attention_square: per token, of the full square, as torchtitan and llm-foundry count.
      tokens: tokens of a step.
    """

    matmul: int
    attention: int
    attention_square: int
    tokens: int

    @property
    def per_token(self) -> int:
        return self.matmul + self.attention

    @property
    def per_token_square(self) -> int:
        return self.matmul + self.attention_square

    @property
    def per_step(self) -> int:
        """All devices together, causal attention counted once."""
        return self.per_token * self.tokens

    @property
    def per_step_square(self) -> int:
        return self.per_token_square * self.tokens


def step_flops(config: Config) -> Flops:
    """Model FLOPs of one optimizer step over the global batch."""
    model, S = config.model, config.data.sequence_length
    shapes = parameter_shapes(model)
    layers = sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if name.startswith("layers.") and is_matrix(name)
    )
    _, _, H, K = shapes["layers.attention.query"]
    square = 12 * model.layers * H * K * S  # 3 x (QK and AV) x 2 operations a multiply-add
    return Flops(
        matmul=6 * (layers + model.dim * model.vocab_size),
        attention=square // 2,
        attention_square=square,
        tokens=config.train.batch_size * S,
    )


def is_matrix(name: str) -> bool:
    return not name.endswith(".scale")


def describe_batch(config: Config, mesh: MeshConfig) -> str:
    """The arithmetic of the global batch, for people.

    `global batch 32 sequences x 256 tokens = 8,192 tokens a step = 2 a device x 4 microbatches x
    data=2 x fsdp=2`
    """
    train, length = config.train, config.data.sequence_length
    a_device = train.batch_size // (train.microbatches * mesh.batch_shards)
    plural = "" if train.microbatches == 1 else "es"
    factors = [f"{a_device} a device", f"{train.microbatches} microbatch{plural}"]
    factors += [f"{axis}={getattr(mesh, axis)}" for axis in BATCH_AXES if getattr(mesh, axis) > 1]
    return (
        f"global batch {train.batch_size:,} sequences x {length:,} tokens = "
        f"{train.batch_size * length:,} tokens "
        f"a step = {' x '.join(factors)}"
    )
