"""What a device holds, counted: state, activations, and the peak of a training step. Needs no
device."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType

from jaxpar.config import Config, MeshConfig, ModelConfig, ParallelConfig, PrecisionConfig
from jaxpar.dimensions import Dimensions
from jaxpar.estimate.counts import ITEMSIZE, layer_elements
from jaxpar.parameters import FACTORED_FROM, Parameter
from jaxpar.parameters import parameters as table


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bytes of a device when it holds the most. `gradients`: sums, and of entered weights those
    that are cast to them; `activations`: kept for the backward pass; `logits`: a chunk of them,
    head and embedding as gathered, and their gradients; `weights`: as gathered; `stash`: inputs of
    pipeline stages that wait for their backward pass; `working`: what the layer at work needs;
    `gaps`: between the buffers of a compiled step, not predicted."""

    params: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    weights: int
    stash: int
    working: int
    batch: int
    gaps: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())


RESERVE = 2 * 2**30
"""Bytes of a GPU that no program gets: the CUDA context and NCCL's buffers, 1 to 2 GiB."""

PART_NAMES = {
    "params": "parameters",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "activations": "activations kept for the backward pass",
    "logits": "logits, head and embedding",
    "weights": "gathered weights",
    "stash": "inputs of pipeline stages",
    "working": "what the layer at work needs",
    "batch": "the batch",
    "gaps": "gaps between buffers",
}
"""The parts of memory, by their names in JSON, in words. Of compiled steps `gradients` has what
the update makes of them too, `working` the gradients of the layer at work, and `gaps` is what lies
between buffers, because they cannot all be packed; arithmetic has none."""

# What cannot be told from the program alone, but only from what XLA makes of it; found by comparing
# with compiled steps (docs/predictions.md says how well, tests/compiled_memory.json holds it).
_LAYER = 2.2  # the gathered weights of a layer, times: most of them, and gradients in float32
_LAYER_WHOLE = 1.0  # the same where nothing is gathered in the layer
_WORKING = 1.4  # all activations of a layer, times: most of them and the gradients of some
_TWO_STAGES = 2  # the activations of one of two stages, times: see `peak_memory`
_LOGITS = 6  # bytes of a logit of a chunk: float32, and its gradient in the compute dtype


def peak_memory(config: Config, mesh: MeshConfig) -> Peak:
    """Predicted peak of one training step on a device, without the CUDA context and NCCL's buffers.

    The largest of three moments: the loss, the layers' backward pass, and the gradient of the
    embedding.

    Args:
      config: the run.
      mesh: sizes of the axes.
    """
    state, train, model = state_bytes(config, mesh), config.train, config.model
    sizes, chunks = (
        activation_bytes(config, mesh),
        config.parallel.chunks if mesh.pipeline > 1 else 1,
    )
    compute, shards = ITEMSIZE[config.precision.compute], mesh.tensor * mesh.pipeline
    tokens = (
        train.batch_size
        // (train.microbatches * mesh.batch_shards)
        * config.data.sequence_length
        // mesh.sequence
    )
    layers = layer_elements(model) // shards
    layer, ends = layers // (model.layers // mesh.pipeline), model.vocab_size * model.dim // shards
    gathered_once = config.parallel.gather == "per_step" and mesh.fsdp > 1
    zero = config.parallel.optimizer_sharding == "data" and mesh.data > 1
    entered = (
        compute * (layers + 2 * ends) // (1 if gathered_once else mesh.fsdp)
        if gathered_once or zero
        else 0
    )
    gradients = state["gradients"]
    if entered and train.microbatches == 1 and mesh.pipeline == 1:
        gradients = entered  # in the dtype of the entered weights; they are cast where reduced
    kept = sum(sizes[name] for name in config.memory.kept)
    if "attention" in config.memory.kept:
        kept += attention_residual_bytes(config, mesh)
    activations = model.layers // (mesh.pipeline * chunks) * kept
    if mesh.pipeline * chunks == 2:
        # The phases of forward and of backward passes alone are one tick each, no loops, and XLA
        # moves zeros and results of the others' loops out of them: the stacks exist twice.
        activations *= _TWO_STAGES
    in_layer = _LAYER if mesh.fsdp > 1 and not gathered_once else _LAYER_WHOLE
    backward = dict(
        gradients=gradients,
        activations=activations,
        logits=compute * ends if mesh.pipeline > 1 else 0,  # the head's gradient waits to be added
        weights=entered + int(in_layer * compute * layer),
        working=int(_WORKING * sum(sizes.values())),
    )
    residual, in_flight = compute * tokens * model.dim, mesh.pipeline == 1
    loss = dict(
        gradients=gradients if train.microbatches > 1 else 0,
        activations=activations if in_flight else 0,
        logits=_LOGITS * min(config.loss.chunk, tokens) * model.vocab_size // shards
        + (compute + 4) * ends,
        weights=entered,
        working=3 * residual,
    )
    embedding = dict(
        gradients=gradients, logits=(compute + 4) * ends, weights=entered, working=residual
    )
    worst = max(backward, loss, embedding, key=lambda moment: sum(moment.values()))
    return Peak(
        params=state["parameters"],
        optimizer=0 if config.memory.offload_optimizer else state["optimizer"],
        stash=_stash(config, mesh) * sizes["residual"],
        batch=16
        * train.batch_size
        * config.data.sequence_length
        // (mesh.batch_shards * mesh.sequence),
        **{"activations": 0} | worst,
    )


def _stash(config: Config, mesh: MeshConfig) -> int:
    """Inputs of stages that wait for their backward pass, and of GPipe the gradients of all losses;
    a stage's activations live only during it."""
    p, M, v = mesh.pipeline, config.train.microbatches, config.parallel.chunks
    if p == 1:
        return 0
    if config.parallel.schedule == "gpipe":
        return 2 * M
    return min((v + 1) * p - 1, M * v)


def state_bytes(config: Config, mesh: MeshConfig) -> Mapping[str, int]:
    """Bytes a device holds between and within steps: `parameters`, `gradients`, `optimizer` and
    their `total`.

    Parameters and their optimizer state are sharded as their dimensions lie, which is over `fsdp`
    and `tensor`, with ZeRO-1 over `data` too, and replicated over the other axes; Adafactor's row
    and column statistics, which are small, are counted as if they were on every device. Gradients
    are those that are added up over microbatches, in `precision.grad_reduce`. Step counters of a
    few bytes and weights that are gathered once a step are left out.
    """
    zero, gather = config.parallel.optimizer_sharding, config.parallel.gather
    return _state_bytes(config.model, config.optimizer.name, config.precision, zero, gather, mesh)


@functools.cache  # plans ask for it with every number of microbatches and every remat policy
def _state_bytes(
    model: ModelConfig,
    optimizer_name: str,
    precision: PrecisionConfig,
    optimizer_sharding: str,
    gather: str,
    mesh: MeshConfig,
) -> Mapping[str, int]:
    item, sum_item = ITEMSIZE[precision.params], ITEMSIZE[precision.grad_reduce]
    parts = _stored(model, optimizer_name, optimizer_sharding, mesh.pipeline > 1)
    gathered = ("data", "fsdp") if gather == "per_step" else ("data",)
    parameters = optimizer = gradients = 0
    for axes, size, sharded, replicated in parts:
        split = math.prod(getattr(mesh, axis) for axis in axes)
        parameters += item * size // split
        gradients += (
            sum_item
            * size
            // math.prod(getattr(mesh, axis) for axis in axes if axis not in gathered)
        )
        optimizer += item * (sharded // split + replicated)
    return MappingProxyType(
        {
            "parameters": parameters,
            "gradients": gradients,
            "optimizer": optimizer,
            "total": parameters + gradients + optimizer,
        }
    )


def update_bytes(config: Config, mesh: MeshConfig) -> int:
    """Bytes that a device reads and writes in one update: the gradient is read, parameter and
    optimizer state are read and written. What an optimizer sends is among the transfers."""
    state = state_bytes(config, mesh)
    return 3 * state["parameters"] + 2 * state["optimizer"]


@functools.cache
def _stored(
    model: ModelConfig, optimizer: str, optimizer_sharding: str, staged: bool
) -> tuple[tuple[tuple[str, ...], int, int, int], ...]:
    """Mesh axes, and of all parameters that lie on them: elements, and elements of optimizer state
    that are laid out like them, and that are on every device."""
    dims = Dimensions.of(ParallelConfig(optimizer_sharding=optimizer_sharding), 1 + staged)
    sums: dict[tuple[str, ...], list[int]] = {}
    for row in table(model).values():
        total = sums.setdefault(tuple(sorted(dims.axes(row.dims))), [0, 0, 0])
        counted = (row.size(model), *_optimizer_elements(optimizer, row, model))
        total[:] = map(sum, zip(total, counted, strict=True))
    return tuple((axes, size, like, whole) for axes, (size, like, whole) in sums.items())


def activation_bytes(config: Config, mesh: MeshConfig) -> Mapping[str, int]:
    """Bytes on a device of each of `config.ACTIVATIONS`, of one layer and one microbatch, in the
    compute dtype.

    The inputs of attention and MLP are whole over `tensor`; the residual, and what is added to it,
    are sharded over it along the sequence with sequence parallelism; everything between is sharded
    by heads and ffn.
    """
    train, item = config.train, ITEMSIZE[config.precision.compute]
    sequences = train.batch_size // (train.microbatches * mesh.batch_shards)
    each = item * sequences * config.data.sequence_length // mesh.sequence
    return _activation_bytes(config.model, each, mesh.tensor, config.parallel.sequence_parallel)


@functools.cache
def _activation_bytes(
    model: ModelConfig, each: int, tensor: int, sequence_parallel: bool
) -> Mapping[str, int]:
    """`each`: bytes of one number for every token of a microbatch."""
    whole, queries = model.dim, model.heads * model.head_dim // tensor
    keys = model.kv_heads * model.head_dim // tensor
    residual = whole // tensor if sequence_parallel else whole
    elements = {
        "residual": residual,
        "attention_input": whole,
        "query": queries,
        "key": keys,
        "value": keys,
        "attention": queries,
        "attention_output": residual,
        "mlp_input": whole,
        "gate": model.ffn_dim // tensor,
        "up": model.ffn_dim // tensor,
    }
    return MappingProxyType({name: each * count for name, count in elements.items()})


_STRIP, _WHOLE_ROWS = 512, 2048  # in kernels/rows.py and attention.py, which import jax


def attention_residual_bytes(config: Config, mesh: MeshConfig) -> int:
    """Bytes on a device that go by the name `attention` besides the result, of one layer and one
    microbatch.

    They are the log-sum-exp of the scores, float32, and with Ulysses the result before it goes back
    to the devices of its tokens. XLA's attention of short rows needs neither. What
    `attention.implementation=auto` takes depends on the GPU; cuDNN is assumed, which is too much by
    2 / head_dim of `attention` where it takes XLA for short rows.
    """
    parallel, length = config.parallel, config.data.sequence_length
    queries = length if parallel.context == "ulysses" else length // mesh.sequence
    short = parallel.context != "ring" and (queries <= _STRIP or length <= _WHOLE_ROWS)
    if config.attention.implementation == "xla" and short:
        return 0
    result = activation_bytes(config, mesh)["attention"]
    log_sum_exp = 4 * result // (ITEMSIZE[config.precision.compute] * config.model.head_dim)
    return log_sum_exp + (result if parallel.context == "ulysses" else 0)


def _optimizer_elements(optimizer: str, row: Parameter, model: ModelConfig) -> tuple[int, int]:
    """Elements of optimizer state of one parameter: laid out like it, and on every device."""
    size = row.size(model)
    if optimizer == "muon":  # momentum, or the two moments of Adam
        return (size if row.orthogonalized else 2 * size), 0
    if optimizer == "adafactor":  # each layer by itself
        own = sorted(row.shape(model)[int(row.in_layers) :])
        if len(own) < 2 or own[-2] < FACTORED_FROM:
            return size, 0
        return 0, size // own[-1] + size // own[-2]
    return {"adamw": 2, "lion": 1, "sgd": 1}[optimizer] * size, 0


def human(count: float) -> str:
    """Bytes for people."""
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{count / unit:,.2f} {name}"
