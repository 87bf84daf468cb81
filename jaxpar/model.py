"""Llama 2 and 3 in Flax NNX.

Modules are pytrees that hold parameters; jax transforms them. Layers are stacked: every parameter
of `Block` has a leading dimension L, and `lax.scan` walks along it.

Shapes: B batch, S sequence, D model dim, L layers, H query heads, G key-value heads, K head dim, F
ffn, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as keep
from jax.sharding import reshard

from jaxpar.attention import Options, TokenInfo, attend
from jaxpar.config import Config, MemoryConfig, ModelConfig, RopeScaling
from jaxpar.kernels.matmul import einsum
from jaxpar.parallel import layers, reduce, vocabulary
from jaxpar.parallel.context import all_gather_tokens
from jaxpar.parallel.layers import Added
from jaxpar.parameters import DRAWN, parameters
from jaxpar.sharding import Rules, all_manual


@dataclasses.dataclass(frozen=True)
class Layout:
    """What every module needs besides its parameters; static, so equal layouts share one compiled
    program."""

    rules: Rules
    dtype: jnp.dtype
    sum_dtype: jnp.dtype
    stored_dtype: jnp.dtype
    norm_eps: float
    attention: Options

    def column_input(self, x_BSD: jax.Array) -> jax.Array:
        """Residual -> input of column-parallel matmuls: replicated over `tensor`, its gradient one
        sum over it."""
        if all_manual():
            return vocabulary.gather_tokens(x_BSD) if self.shards_sequence else x_BSD
        return reshard(x_BSD, self.rules.spec("batch", "seq", "embed", reduced={"tensor"}))

    def row_parallel(self, subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
        """Row-parallel matmul -> residual: the partial products of the `tensor` axis are summed
        once."""
        if all_manual():
            partial = einsum(subscripts, x, weight)
            return (
                vocabulary.scatter_tokens(partial)
                if self.shards_sequence
                else vocabulary.sum_tokens(partial)
            )
        partial = einsum(
            subscripts,
            x,
            weight,
            out_sharding=self.rules.spec("batch", "seq", "embed", unreduced={"tensor"}),
        )
        return reshard(partial, self.residual)

    @property
    def shards_sequence(self) -> bool:
        return "tensor" in self.rules.residual_seq

    @property
    def residual(self) -> jax.sharding.PartitionSpec:
        return self.rules.spec("batch", "residual_seq", "embed")

    def weight(self, parameter: nnx.Param | jax.Array) -> jax.Array:
        """A weight as a matmul takes it, gathered over `fsdp` in the compute dtype."""
        return reduce.gather(parameter[...], self.dtype, self.sum_dtype)


@dataclasses.dataclass(frozen=True)
class Initializer:
    """Draws parameters as their rows in `parameters` say, the same on every mesh. A module asks for
    its own by name; `prefix` is where it stands."""

    config: ModelConfig
    layout: Layout
    key: jax.Array
    prefix: str = ""

    def module(self, kind: Callable[["Initializer"], Any], name: str) -> Any:
        """A module in the module at hand; None if the model has no parameter of it."""
        new = dataclasses.replace(self, prefix=f"{self.prefix}{name}.")
        named = any(name.startswith(new.prefix) for name in parameters(self.config))
        return kind(new) if named else None

    def __call__(self, name: str) -> Any:
        """A parameter as `nnx.Param`, in its stored dtype; None if the model does not have it."""
        row = parameters(self.config).get(self.prefix + name)
        if row is None:
            return None
        shape, dtype = row.shape(self.config), self.layout.stored_dtype
        sharding = self.layout.rules.spec(*row.dims)
        if row.initial == "ones":
            return nnx.Param(jnp.ones(shape, dtype, out_sharding=sharding))
        key = jax.random.fold_in(self.key, DRAWN.index(row.name))
        normal = jax.random.normal(key, shape, jnp.float32, out_sharding=sharding)
        return nnx.Param((normal * row.std(self.config)).astype(dtype))


class RMSNorm(nnx.Module):
    """Root mean square normalisation (Zhang and Sennrich, 2019); statistics in float32."""

    def __init__(self, new: Initializer):
        self.scale = new("scale")
        self.layout = new.layout

    def __call__(self, x: jax.Array) -> jax.Array:
        """Over the last dimension."""
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(
            jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.layout.norm_eps
        )
        # A contraction, not a product: only this lets the gradient of the scale stay a partial sum
        # over the tokens (and heads).
        scale = self.scale[...].astype(jnp.float32)
        return jnp.einsum("...D,D->...D", x32 * inverse, scale).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions."""

    def __init__(self, new: Initializer):
        self.query, self.key, self.value = new("query"), new("key"), new("value")
        self.query_norm = new.module(RMSNorm, "query_norm")
        self.key_norm = new.module(RMSNorm, "key_norm")
        self.out = new("out")
        self.layout = new.layout

    def __call__(
        self, x_BSD: jax.Array, shared: "Shared", cache: "KVCache | None"
    ) -> tuple[jax.Array, "KVCache | None"]:
        layout = self.layout
        x_BSD = keep(layout.column_input(x_BSD), "attention_input")
        q_BSHK = einsum("BSD,DHK->BSHK", x_BSD, layout.weight(self.query))
        k_BSGK = einsum("BSD,DGK->BSGK", x_BSD, layout.weight(self.key))
        if self.query_norm is None:
            q_BSHK = keep(shared.rotate(q_BSHK), "query")
            k_BSGK = keep(shared.rotate(k_BSGK), "key")
        else:  # whose backward pass needs its input: kept, the rest is cheap to compute again
            q_BSHK = shared.rotate(self.query_norm(keep(q_BSHK, "query")))
            k_BSGK = shared.rotate(self.key_norm(keep(k_BSGK, "key")))
        v_BSGK = keep(einsum("BSD,DGK->BSGK", x_BSD, layout.weight(self.value)), "value")
        if cache is not None:
            cache = cache.extend(k_BSGK, v_BSGK, shared.start)
            k_BSGK, v_BSGK = cache
        o_BSHK = attend(
            q_BSHK, k_BSGK, v_BSGK, shared.queries, shared.keys, layout.rules, layout.attention
        )
        out_BSD = layout.row_parallel("BSHK,DHK->BSD", o_BSHK, layout.weight(self.out))
        return keep(out_BSD, "attention_output"), cache


class MLP(nnx.Module):
    """SwiGLU feed-forward (Shazeer, 2020)."""

    def __init__(self, new: Initializer):
        self.gate, self.up, self.down = new("gate"), new("up"), new("down")
        self.layout = new.layout

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        layout = self.layout
        x_BSD = keep(layout.column_input(x_BSD), "mlp_input")
        gate_BSF = keep(einsum("BSD,DF->BSF", x_BSD, layout.weight(self.gate)), "gate")
        up_BSF = keep(einsum("BSD,DF->BSF", x_BSD, layout.weight(self.up)), "up")
        return layout.row_parallel(
            "BSF,DF->BSD", jax.nn.silu(gate_BSF) * up_BSF, layout.weight(self.down)
        )


class Block(nnx.Module):
    def __init__(self, new: Initializer):
        self.attention_norm = new.module(RMSNorm, "attention_norm")
        self.attention = new.module(Attention, "attention")
        self.mlp_norm = new.module(RMSNorm, "mlp_norm")
        self.mlp = new.module(MLP, "mlp")

    def __call__(
        self, x_BSD: jax.Array, shared: "Shared", cache: "KVCache | None" = None
    ) -> tuple[jax.Array, Added, "KVCache | None"]:
        """The residual behind the layer, what it adds to the objective and to the sums of a step,
        and with a cache the keys and values extended."""
        x_BSD = keep(x_BSD, "residual")
        out_BSD, cache = self.attention(self.attention_norm(x_BSD), shared, cache)
        x_BSD = x_BSD + out_BSD
        return x_BSD + self.mlp(self.mlp_norm(x_BSD)), Added(), cache


class Llama(nnx.Module):
    """Llama 2 (Touvron et al., 2023) and Llama 3 (Grattafiori et al., 2024), without the loss."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        layout = Layout(
            rules=Rules.make(config.parallel),
            dtype=jnp.dtype(config.precision.compute),
            sum_dtype=jnp.dtype(config.precision.grad_reduce),
            stored_dtype=jnp.dtype(config.precision.params),
            norm_eps=config.model.norm_eps,
            attention=Options.make(config),
        )
        new = Initializer(config.model, layout, rngs.params.key[...])
        self.embedding = new("embedding")
        self.layers = new.module(Block, "layers")
        self.norm = new.module(RMSNorm, "norm")
        self.head = new("head")
        self.config = config.model
        self.layout = layout

    def __call__(
        self, tokens_BS: jax.Array, queries: TokenInfo, cache: "Cache | None" = None
    ) -> tuple[jax.Array, "Cache | None"]:
        """Token ids to final hidden states; training runs the same parts by `program`.

        Args:
          tokens_BS: int32, sharded (batch, seq), as the arrays of `queries` are.
          queries: position and segment of every token.
          cache: keys and values of earlier tokens, for generation.

        Returns:
          [B, S, D] in the compute dtype, normalised, laid out as the residual; and the extended
          cache.
        """
        if cache is not None:
            cache = cache.extend_info(queries)

        def layer(weights: tuple, x_BSD: jax.Array, shared: Shared) -> tuple[jax.Array, Added]:
            block, kv = weights
            x_BSD, _, kv = block(x_BSD, shared, kv)
            return x_BSD, Added(sums=kv)

        shared, x_BSD = self.shared(queries, cache), self.embed(tokens_BS)
        weights = self.layers, cache and cache.kv
        x_BSD, added = layers.run(layer, weights, x_BSD, shared, layers.Part(self.config.layers))
        if cache is not None:
            length = cache.length + tokens_BS.shape[1]
            cache = dataclasses.replace(cache, kv=added.sums, length=length)
        return self.norm(x_BSD), cache

    def embed(self, tokens_BS: jax.Array) -> jax.Array:
        """The residual that enters the first layer."""
        return vocabulary.lookup(self.layout.weight(self.embedding), tokens_BS, self.layout.rules)

    def shared(self, queries: TokenInfo, cache: "Cache | None" = None) -> "Shared":
        """What all layers share; `cache` holds the info of all keys already."""
        keys = queries if cache is None else cache.info
        start = jnp.zeros((), jnp.int32) if cache is None else cache.length
        if all_manual():
            keys = TokenInfo(*map(all_gather_tokens, keys))
        else:
            keys = TokenInfo(*(reshard(x, self.layout.rules.spec("batch", None)) for x in keys))
        return Shared(queries, keys, rope_angles(queries.positions, self.config), start)

    def head_weight(self) -> jax.Array:
        """[D, V], as it is stored or entered."""
        return self.embedding[...].T if self.head is None else self.head[...]


def remat_policy(memory: MemoryConfig) -> Callable[..., Any]:
    """What `jax.checkpoint` does with each named activation: keep it, move it to pinned host
    memory, or recompute it.

    Offloaded activations travel asynchronously: out while the forward pass goes on, back ahead of
    their use.
    """
    policies = jax.checkpoint_policies
    if not memory.offloaded:
        return policies.save_only_these_names(*memory.kept)
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=memory.kept,
        names_which_can_be_offloaded=memory.offloaded,
        offload_src="device",
        offload_dst="pinned_host",
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """What is the same in every layer of one forward pass.

    `keys` is whole along the sequence; `angles` are cosines and sines [B, S, K/2] in float32;
    `start` is the place in the cache of the first query, 0 without one.
    """

    queries: TokenInfo
    keys: TokenInfo
    angles: tuple[jax.Array, jax.Array]
    start: jax.Array

    def rotate(self, x_BSHK: jax.Array) -> jax.Array:
        """Rotary position embedding (Su et al., 2021), pairs (i, i + K/2) as in Hugging Face
        checkpoints."""
        cos, sin = (angle[:, :, None, :] for angle in self.angles)
        first, second = jnp.split(x_BSHK.astype(jnp.float32), 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return rotated.astype(x_BSHK.dtype)


def rope_angles(positions_BS: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles, float32 [B, S, K/2] each, sharded as the positions
    are."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = scale_frequencies(config.rope_theta**-exponents, config.rope_scaling)
    angles = positions_BS[:, :, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def scale_frequencies(frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Llama 3.1: wavelengths beyond the original context are stretched by `factor`, short ones
    kept, those between interpolated."""
    if scaling.factor == 1:
        return frequencies
    turns = scaling.original_sequence_length * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


class KVCache(NamedTuple):
    """Keys and values so far, [B, T, G, K] each (stacked: [L, B, T, G, K]), sharded (batch, -,
    kv_heads)."""

    k: jax.Array
    v: jax.Array

    def extend(self, k_BSGK: jax.Array, v_BSGK: jax.Array, start: jax.Array) -> "KVCache":
        """Writes S new tokens at `start`."""
        put = jax.lax.dynamic_update_slice_in_dim
        return KVCache(put(self.k, k_BSGK, start, axis=1), put(self.v, v_BSGK, start, axis=1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, where their tokens stand ([B, T]; segment 0 is an empty
    place), and how many places are taken."""

    kv: KVCache
    info: TokenInfo
    length: jax.Array

    @classmethod
    def empty(cls, model: Llama, batch: int, size: int) -> "Cache":
        """A cache for `batch` sequences of at most `size` tokens."""
        config, rules = model.config, model.layout.rules
        spec = rules.spec("layers", "batch", "seq", "kv_heads", "head_dim")
        shape = (config.layers, batch, size, config.kv_heads, config.head_dim)
        k, v = (jnp.zeros(shape, model.layout.dtype, out_sharding=spec) for _ in range(2))
        info = TokenInfo(
            *(
                jnp.zeros((batch, size), jnp.int32, out_sharding=rules.spec("batch", "seq"))
                for _ in range(2)
            )
        )
        return cls(KVCache(k, v), info, jnp.zeros((), jnp.int32))

    def extend_info(self, queries: TokenInfo) -> "Cache":
        put = jax.lax.dynamic_update_slice_in_dim
        info = (
            put(old, new, self.length, axis=1) for old, new in zip(self.info, queries, strict=True)
        )
        return dataclasses.replace(self, info=TokenInfo(*info))
