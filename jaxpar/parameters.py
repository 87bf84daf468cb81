"""Every parameter of the model, once. Free of jax.

Initialisation, sharding, counts, FLOPs, memory, traffic, weight decay and the optimizers read this
table: a weight more is a row here and a use in `model.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal

from jaxpar.config import ModelConfig
from jaxpar.dimensions import size_of

Kind = Literal["matrix", "norm_scale", "bias", "embedding", "router", "expert", "adapter"]

Initial = Literal["normal", "residual", "ones"]
"""`normal`: standard deviation `init_std`; `residual`: of what adds to the residual, `init_std /
sqrt(2 layers)`, so that its spread does not grow with depth."""

FACTORED_FROM = 32
"""Rows and columns from which on Adafactor keeps statistics of both instead of all elements."""


def _always(model: ModelConfig) -> bool:
    del model
    return True


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter; those of layers are stacked, with a leading dimension `layers`.

    Attributes:
      name: in checkpoints, without the leading `model.`.
      dims: names of `dimensions.Dimensions`; shape and sharding follow from them.
      kind: what it is.
      contracts: those of `dims` over which its product sums; () if it is looked up or scales.
      makes: the activation that its product makes, as remat names it; `down` is never kept.
      initial: its first values.
      summed: the dimensions over which its gradient is a sum, those of the activations it meets;
        the axes on which it lies itself do not count.
      present: whether a model has it.
    """

    name: str
    dims: tuple[str, ...]
    kind: Kind
    contracts: tuple[str, ...] = ()
    makes: str = ""
    initial: Initial = "normal"
    summed: tuple[str, ...] = ("batch", "residual_seq")
    present: Callable[[ModelConfig], bool] = _always

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        return tuple(size_of(dim, model) for dim in self.dims)

    def size(self, model: ModelConfig) -> int:
        """Elements."""
        return math.prod(self.shape(model))

    def std(self, model: ModelConfig) -> float:
        """Standard deviation of its first values."""
        scale = {"normal": 1.0, "residual": 1 / math.sqrt(2 * model.layers), "ones": 0.0}
        return scale[self.initial] * model.init_std

    @property
    def in_layers(self) -> bool:
        return self.dims[0] == "layers"

    @property
    def decays(self) -> bool:
        """Whether weight decay acts on it."""
        return self.kind not in ("norm_scale", "bias")

    @property
    def orthogonalized(self) -> bool:
        """Whether Muon makes its updates orthogonal; the others take NAdamW (Jordan et al.,
        2024)."""
        return self.in_layers and self.kind in ("matrix", "expert")


def _layers(*rows: Parameter) -> tuple[Parameter, ...]:
    """The rows of one layer as those of the stack of all."""
    return tuple(
        dataclasses.replace(row, name=f"layers.{row.name}", dims=("layers", *row.dims))
        for row in rows
    )


def _norm(name: str) -> Parameter:
    return Parameter(f"{name}.scale", ("embed",), "norm_scale", initial="ones")


def _head_norm(name: str, heads: str) -> Parameter:
    """One scale for all heads, which may be spread over devices."""
    return Parameter(
        *(f"{name}.scale", ("head_dim",), "norm_scale"),
        initial="ones",
        summed=("batch", "seq", heads),
        present=lambda model: model.qk_norm,
    )


# Names of the dimensions of weights.
_D, _H, _G, _K, _F, _V = "embed_fsdp", "heads", "kv_heads", "head_dim", "ffn", "vocab"

# The place among the rows that are drawn chooses a row's random key, whether or not the model has
# those before it: a new one that is drawn goes to the end, else other models begin elsewhere.
TABLE: Mapping[str, Parameter] = {
    row.name: row
    for row in (
        Parameter("embedding", (_V, _D), "embedding"),
        *_layers(
            _norm("attention_norm"),
            Parameter("attention.query", (_D, _H, _K), "matrix", (_D,), "query"),
            Parameter("attention.key", (_D, _G, _K), "matrix", (_D,), "key"),
            Parameter("attention.value", (_D, _G, _K), "matrix", (_D,), "value"),
            Parameter(
                *("attention.out", (_D, _H, _K), "matrix", (_H, _K), "attention_output"),
                initial="residual",
            ),
            _head_norm("attention.query_norm", _H),
            _head_norm("attention.key_norm", _G),
            _norm("mlp_norm"),
            Parameter("mlp.gate", (_D, _F), "matrix", (_D,), "gate"),
            Parameter("mlp.up", (_D, _F), "matrix", (_D,), "up"),
            Parameter("mlp.down", (_D, _F), "matrix", (_F,), "down", initial="residual"),
        ),
        _norm("norm"),
        Parameter(
            "head", (_D, _V), "matrix", (_D,), present=lambda model: not model.tie_embeddings
        ),
    )
}
"""Every parameter that a model may have, by name."""

DRAWN = tuple(name for name, row in TABLE.items() if row.initial != "ones")
"""The names of those whose first values are random."""


@functools.cache
def parameters(model: ModelConfig) -> Mapping[str, Parameter]:
    """The parameters of a model by name."""
    return {name: row for name, row in TABLE.items() if row.present(model)}


def in_layers(name: str) -> bool:
    """Whether a leaf of this name, a parameter or the optimizer's state of one
    (`optimizer.mu.layers.mlp.up`), is a stack of those of all layers."""
    return "layers" in name.split(".")
