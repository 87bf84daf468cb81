"""What a run is made of, counted: parameters, FLOPs, the batch. Needs no device.

Dimensions: B batch, S sequence, D model dim, L layers, H query heads, G key-value heads, K head
dim, F ffn dim, V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

from jaxpar.config import BATCH_AXES, Config, MeshConfig, ModelConfig
from jaxpar.dimensions import Dimensions, size_of
from jaxpar.parameters import parameters

Shape = tuple[int, ...]

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element."""


@functools.cache
def parameter_shapes(model: ModelConfig) -> Mapping[str, Shape]:
    """Shape of every parameter by its name in checkpoints (without the leading `model.`); layers
    are stacked."""
    return {name: row.shape(model) for name, row in parameters(model).items()}


@functools.cache
def layer_elements(model: ModelConfig) -> int:
    """Elements of the matrices of all layers."""
    rows = parameters(model).values()
    return sum(row.size(model) for row in rows if row.in_layers and row.contracts)


@functools.cache
def parameter_count(model: ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(row.size(model) for row in parameters(model).values())


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
    H, K = model.heads, size_of("head_dim", model)
    square = 12 * model.layers * H * K * S  # 3 x (QK and AV) x 2 operations a multiply-add
    return Flops(
        matmul=6 * (layer_elements(model) + model.dim * model.vocab_size),
        attention=square // 2,
        attention_square=square,
        tokens=config.train.batch_size * S,
    )


@dataclasses.dataclass(frozen=True)
class Orthogonalized:
    """Matrices of one parameter that Muon makes orthogonal on a device: `count` of `rows` x
    `columns`, for which devices along `axes` share the layers (`parallel/by_layer.py`)."""

    axes: tuple[str, ...]
    count: int
    rows: int
    columns: int

    @property
    def flops(self) -> int:
        """Five Newton-Schulz steps of three products."""
        short, long = sorted((self.rows, self.columns))
        return self.count * 5 * (4 * short**2 * long + 2 * short**3)


def orthogonalized(config: Config, mesh: MeshConfig) -> list[Orthogonalized]:
    """What an update of Muon makes orthogonal; [] with other optimizers."""
    if config.optimizer.name != "muon":
        return []
    model, table = config.model, Dimensions.of(config.parallel, mesh.pipeline)
    stacks = []
    for row in parameters(model).values():
        if row.orthogonalized:
            axes = tuple(a for a in table.axes(row.dims[1:]) if getattr(mesh, a) > 1)
            sharers = mesh.pipeline * math.prod(getattr(mesh, axis) for axis in axes)
            rows = math.prod(size_of(dim, model) for dim in row.contracts)
            columns = row.size(model) // (model.layers * rows)
            stacks.append(Orthogonalized(axes, -(-model.layers // sharers), rows, columns))
    return stacks


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
