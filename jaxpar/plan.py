"""Arithmetic that needs no device: parameters, FLOPs, peaks and bytes of a run.

Dimensions: B batch, S sequence, D model dim, L layers, H query heads, G key-value heads, K head dim, F ffn dim,
V vocabulary.
"""

import dataclasses
import math
import re

from jaxpar.config import BATCH_AXES, Config, MeshConfig, ModelConfig

Shape = tuple[int, ...]

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element."""


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Every parameter by its name in checkpoints (without the leading `model.`); layers are stacked."""
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


def parameter_count(model: ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(model).values())


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of training, forward and backward (3 x forward).

    What remat computes again is not counted: these are model FLOPs, the numerator of MFU (Chowdhery et al., 2022).

    Attributes:
      matmul: per token, 6 for each weight that is multiplied: the head is, tied or not; the embedding gather is not.
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
    layers = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("layers.") and _is_matrix(name))
    _, _, H, K = shapes["layers.attention.query"]
    square = 12 * model.layers * H * K * S  # 3 x (QK and AV) x 2 operations a multiply-add
    return Flops(
        matmul=6 * (layers + model.dim * model.vocab_size),
        attention=square // 2,
        attention_square=square,
        tokens=config.train.batch_size * S,
    )


def _is_matrix(name: str) -> bool:
    return not name.endswith(".scale")


# Dense peaks without sparsity, TFLOP/s: (bfloat16, float16, float32). float16 and bfloat16 are tensor-core rates with
# float32 accumulation; float32 is the plain rate, not TF32. A name matches a device whose kind has all of its words.
_PEAKS: dict[str, tuple[float | None, float, float]] = {
    "V100 SXM2": (None, 125.0, 15.7),  # NVIDIA V100 datasheet (no bfloat16 tensor cores)
    "V100 SXM3": (None, 125.0, 15.7),
    "V100 PCIE": (None, 112.0, 14.0),
    "A40": (149.7, 149.7, 37.4),  # NVIDIA A40 datasheet
    "A100": (312.0, 312.0, 19.5),  # NVIDIA A100 datasheet, SXM and PCIe alike
    "RTX 3090": (71.0, 71.0, 35.6),  # NVIDIA Ampere GA102 whitepaper
    "RTX 3090 TI": (80.0, 80.0, 40.0),  # the same, scaled to 84 SMs at 1.86 GHz
    "RTX 4090": (165.2, 165.2, 82.6),  # NVIDIA Ada GPU architecture whitepaper
    "L4": (121.0, 121.0, 30.3),  # NVIDIA L4 datasheet (242 with sparsity)
    "L40": (181.05, 181.05, 90.5),  # NVIDIA L40 datasheet
    "L40S": (362.05, 362.05, 91.6),  # NVIDIA L40S datasheet
    "H100": (989.4, 989.4, 66.9),  # NVIDIA H100 whitepaper, SXM5
    "H100 PCIE": (756.0, 756.0, 51.2),  # NVIDIA H100 whitepaper, PCIe
    "H100 NVL": (835.5, 835.5, 60.0),  # NVIDIA H100 datasheet (1,671 with sparsity)
    "H200": (989.4, 989.4, 66.9),  # NVIDIA H200 datasheet, SXM
    "H200 NVL": (835.5, 835.5, 60.0),  # NVIDIA H200 datasheet (1,671 with sparsity)
    "GH200": (989.4, 989.4, 66.9),  # NVIDIA GH200 datasheet
    "B200": (2250.0, 2250.0, 75.0),  # NVIDIA HGX B200: 36 and 0.6 PFLOP/s for eight, the first with sparsity
    "GB200": (2500.0, 2500.0, 80.0),  # NVIDIA GB200 NVL72: 10 and 0.16 PFLOP/s for two, the first with sparsity
    "B300": (2250.0, 2250.0, 75.0),  # NVIDIA HGX B300: 36 and 0.6 PFLOP/s for eight, the first with sparsity
    "GB300": (2500.0, 2500.0, 80.0),  # NVIDIA GB300 NVL72: 360 PFLOP/s for 72 with sparsity
}
_OTHER_CHIPS = {"MIG", "LAPTOP", "D"}  # a slice of a GPU, or another chip under the same name


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Dense peak of one device in FLOP/s.

    Args:
      device_kind: as jax reports it, such as "NVIDIA H100 80GB HBM3".
      dtype: `bfloat16`, `float16` or `float32` (the plain rate, not TF32).

    Returns:
      None where it is not known: CPUs, MIG slices, other chips.
    """
    words = set(re.split(r"[\s-]+", device_kind.upper()))
    names = [name for name in _PEAKS if set(name.split()) <= words]
    if not names or words & _OTHER_CHIPS:
        return None
    peak = _PEAKS[max(names, key=len)][("bfloat16", "float16", "float32").index(dtype)]
    return None if peak is None else peak * 1e12


def state_bytes(config: Config, mesh: MeshConfig) -> dict[str, int]:
    """Bytes a device holds between and within steps: `parameters`, `gradients`, `optimizer` and their `total`.

    Matrices and their optimizer state are sharded over `fsdp` and `tensor`, with ZeRO-1 over `data` too, and replicated
    over the other axes; norm scales and Adafactor's row and column statistics are replicated. Stages of a pipeline
    share all but the last norm and those statistics. Gradients are those that
    are added up over microbatches, in `precision.grad_reduce`. Step counters of a few bytes and weights that are
    gathered once a step are left out.
    """
    item, sum_item = ITEMSIZE[config.precision.params], ITEMSIZE[config.precision.grad_reduce]
    stored_shards = mesh.fsdp * mesh.tensor * (mesh.data if config.parallel.optimizer_sharding == "data" else 1)
    gradient_shards = mesh.tensor * (mesh.fsdp if config.parallel.gather == "per_layer" else 1)
    parameters = optimizer = gradients = 0
    for name, shape in parameter_shapes(config.model).items():
        split, gradient_split = (stored_shards, gradient_shards) if _is_matrix(name) else (1, 1)
        stages = 1 if name == "norm.scale" else mesh.pipeline
        split, gradient_split = split * stages, gradient_split * stages
        parameters += item * math.prod(shape) // split
        gradients += sum_item * math.prod(shape) // gradient_split
        sharded, replicated = _optimizer_elements(config.optimizer.name, name, shape)
        optimizer += item * (sharded // split + replicated)
    return {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": optimizer,
        "total": parameters + gradients + optimizer,
    }


def activation_bytes(config: Config, mesh: MeshConfig) -> dict[str, int]:
    """Bytes on a device of each of `config.ACTIVATIONS`, of one layer and one microbatch, in the compute dtype.

    The inputs of attention and MLP are whole over `tensor`; the residual, and what is added to it, are sharded over
    it along the sequence with sequence parallelism; everything between is sharded by heads and ffn.
    """
    model, train = config.model, config.train
    sequences = train.batch_size // (train.microbatches * mesh.batch_shards)
    tokens = ITEMSIZE[config.precision.compute] * sequences * config.data.sequence_length // mesh.sequence
    whole, queries, keys = model.dim, model.heads * model.head_dim // mesh.tensor, model.kv_heads * model.head_dim
    residual = whole // mesh.tensor if config.parallel.sequence_parallel else whole
    elements = {
        "residual": residual,
        "attention_input": whole,
        "query": queries,
        "key": keys // mesh.tensor,
        "value": keys // mesh.tensor,
        "attention": queries,
        "attention_output": residual,
        "mlp_input": whole,
        "gate": model.ffn_dim // mesh.tensor,
        "up": model.ffn_dim // mesh.tensor,
    }
    return {name: tokens * count for name, count in elements.items()}


_SMALLEST_FACTORED = 32  # min_dim_size_to_factor in optimizer.py, which imports jax


def _optimizer_elements(optimizer: str, name: str, shape: Shape) -> tuple[int, int]:
    """Elements of optimizer state of one parameter: laid out like it, and on every device."""
    size = math.prod(shape)
    if optimizer == "muon":  # momentum for hidden matrices; embedding, head and norms take Adam
        hidden = name.startswith("layers.") and _is_matrix(name)
        return (size if hidden else 2 * size), 0
    if optimizer == "adafactor":
        smaller, larger = sorted(shape)[-2:] if len(shape) > 1 else (0, 0)
        if smaller < _SMALLEST_FACTORED:
            return size, 0
        return 0, size // larger + size // smaller
    return {"adamw": 2, "lion": 1, "sgd": 1}[optimizer] * size, 0


def describe_batch(config: Config, mesh: MeshConfig) -> str:
    """The arithmetic of the global batch, for people.

    `global batch 32 sequences x 256 tokens = 8,192 tokens a step = 2 a device x 4 microbatches x data=2 x fsdp=2`
    """
    train, length = config.train, config.data.sequence_length
    a_device = train.batch_size // (train.microbatches * mesh.batch_shards)
    plural = "" if train.microbatches == 1 else "es"
    factors = [f"{a_device} a device", f"{train.microbatches} microbatch{plural}"]
    factors += [f"{axis}={getattr(mesh, axis)}" for axis in BATCH_AXES if getattr(mesh, axis) > 1]
    return (
        f"global batch {train.batch_size:,} sequences x {length:,} tokens = {train.batch_size * length:,} tokens "
        f"a step = {' x '.join(factors)}"
    )
