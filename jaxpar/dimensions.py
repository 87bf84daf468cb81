"""The logical dimensions of every array: on which mesh axes they lie, and how large those of
parameters are. Free of jax."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Self

from jaxpar.config import BATCH_AXES, MeshConfig, ModelConfig, ParallelConfig


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """Logical dimension -> mesh axes. Parameters and activations are laid out by the same table.

    `embed` is the model dimension of an activation or of a gathered weight; `embed_fsdp` that of a
    stored weight. `residual_seq` is the sequence dimension of the residual stream, `seq` that of
    everything between the tensor-parallel matmuls.
    """

    batch: tuple[str, ...] = BATCH_AXES
    seq: tuple[str, ...] = ("sequence",)
    residual_seq: tuple[str, ...] = ("sequence", "tensor")
    embed: tuple[str, ...] = ()
    embed_fsdp: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    head_dim: tuple[str, ...] = ()
    ffn: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)
    layers: tuple[str, ...] = ()
    microbatch: tuple[str, ...] = ()

    @classmethod
    def of(cls, parallel: ParallelConfig, stages: int) -> Self:
        """The table of a run: without sequence parallelism the residual is replicated over
        `tensor`; with ZeRO-1 what is stored is sharded over `data` too; stages share layers and
        vocabulary."""
        staged = ("pipeline",) if stages > 1 else ()
        return cls(
            layers=staged,
            vocab=(*staged, "tensor"),
            residual_seq=("sequence", "tensor") if parallel.sequence_parallel else ("sequence",),
            embed_fsdp=("fsdp", "data") if parallel.optimizer_sharding == "data" else ("fsdp",),
        )

    def axes(self, dims: Iterable[str]) -> tuple[str, ...]:
        """The mesh axes on which these dimensions lie."""
        return tuple(axis for dim in dims for axis in getattr(self, dim))

    def shards(self, dims: Iterable[str], mesh: MeshConfig) -> int:
        """Into how many parts an array of these dimensions is cut."""
        return math.prod(getattr(mesh, axis) for axis in self.axes(dims))


def size_of(dim: str, model: ModelConfig) -> int:
    """Elements along a dimension of a parameter."""
    heads = model.heads
    sizes = {
        "embed": model.dim,
        "embed_fsdp": model.dim,
        "heads": heads,
        "kv_heads": model.kv_heads or heads,
        "head_dim": model.head_dim or model.dim // heads,
        "ffn": model.ffn_dim,
        "vocab": model.vocab_size,
        "layers": model.layers,
    }
    return sizes[dim]
