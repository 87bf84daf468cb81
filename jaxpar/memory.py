"""What a device holds, counted: state, activations, and the peak of a training step. Needs no device."""

import math

from jaxpar.config import Config, MeshConfig
from jaxpar.counts import ITEMSIZE, Shape, is_matrix, parameter_shapes


def state_bytes(config: Config, mesh: MeshConfig) -> dict[str, int]:
    """Bytes a device holds between and within steps: `parameters`, `gradients`, `optimizer` and their `total`.

    Matrices and their optimizer state are sharded over `fsdp` and `tensor`, with ZeRO-1 over `data` too, and replicated
    over the other axes; norm scales and Adafactor's row and column statistics are replicated. Gradients are those that
    are added up over microbatches, in `precision.grad_reduce`. Step counters of a few bytes and weights that are
    gathered once a step are left out.
    """
    item, sum_item = ITEMSIZE[config.precision.params], ITEMSIZE[config.precision.grad_reduce]
    stored_shards = mesh.fsdp * mesh.tensor * (mesh.data if config.parallel.optimizer_sharding == "data" else 1)
    gradient_shards = mesh.tensor * (mesh.fsdp if config.parallel.gather == "per_layer" else 1)
    parameters = optimizer = gradients = 0
    for name, shape in parameter_shapes(config.model).items():
        split, gradient_split = (stored_shards, gradient_shards) if is_matrix(name) else (1, 1)
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
        hidden = name.startswith("layers.") and is_matrix(name)
        return (size if hidden else 2 * size), 0
    if optimizer == "adafactor":
        smaller, larger = sorted(shape)[-2:] if len(shape) > 1 else (0, 0)
        if smaller < _SMALLEST_FACTORED:
            return size, 0
        return 0, size // larger + size // smaller
    return {"adamw": 2, "lion": 1, "sgd": 1}[optimizer] * size, 0
