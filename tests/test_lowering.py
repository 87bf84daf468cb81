"""What the compiled training step sends and holds, read from XLA's own output.

The GPU compiler runs without a GPU (`make test` puts `jax-cuda12-plugin` in place): eight H100s
that are not there. Bytes are those of one device and one step, whole over the axis that the
collective runs over. `layers` and `ends` are the elements of all layers' matrices and of embedding
and head; `A` is the bytes of one activation of the residual.
"""

import contextlib
import functools
import math
import os
import re
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from jaxpar.compile import absent_gpus, abstract_state, check_offload, compile_train_step
from jaxpar.config import ACTIVATIONS, Config, ConfigError, MeshConfig, configure
from jaxpar.estimate import counts, hardware, memory
from jaxpar.report.hlo import Collective, collectives, shapes
from jaxpar.sharding import make_mesh
from jaxpar.validation import resolve, validate_mesh

MODEL = dict(vocab_size=4096, dim=512, layers=3, heads=16, kv_heads=8, head_dim=32, ffn_dim=1024)
LENGTH, SEQUENCES = 1024, 2
BF16, F32 = 2, 4
SMALL = 64 * 1024
"""Bytes under which a collective is bookkeeping: loss sums, gradient norms, gradients of norm
scales."""


@functools.cache
def h100s():
    """Eight H100s on one host."""
    return absent_gpus(hardware.find("h100").target, "1x1x8")


def make_config(
    mesh: MeshConfig,
    *,
    microbatches=1,
    remat="none",
    offload="",
    precision=None,
    model=None,
    optimizer="adamw",
    **parallel,
) -> Config:
    config = resolve(
        configure(
            model={**MODEL, **(model or {})},
            precision=precision or {},
            data=dict(sequence_length=LENGTH),
            train=dict(
                batch_size=SEQUENCES * microbatches * mesh.batch_shards, microbatches=microbatches
            ),
            memory=dict(remat=remat, offload=offload),
            optimizer=dict(name=optimizer),
            parallel=parallel,
        )
    )
    validate_mesh(config, mesh)
    return config


@contextlib.contextmanager
def no_rematerialization() -> Iterator[None]:
    """Fails if XLA says, to file descriptor 2, that it gathers an array whole where it was only to
    be moved."""
    with tempfile.TemporaryFile() as written:
        terminal = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            written.seek(0)
            said = written.read()
            os.write(2, said)
    assert b"Involuntary full rematerialization" not in said


@pytest.mark.parametrize("devices", ["cpu", "gpu"])
def test_rematerialization_is_noticed(devices):
    """XLA cannot move an array from the columns of two axes to the rows of one of them."""
    mesh = make_mesh(
        MeshConfig(data=2, fsdp=2, tensor=2), h100s() if devices == "gpu" else jax.devices()
    )
    with (
        jax.set_mesh(mesh),
        pytest.raises(AssertionError, match="Involuntary"),
        no_rematerialization(),
    ):
        columns = jax.NamedSharding(mesh, jax.P(None, ("tensor", "data")))
        x = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=columns)
        jax.jit(lambda x: jax.sharding.reshard(jnp.sin(x), jax.P("tensor"))).lower(x).compile()


@functools.cache
def compile_step(config: Config, sizes: MeshConfig, devices: str):
    """The compiled training step and its mesh, on absent H100s or on simulated CPU devices."""
    mesh = make_mesh(sizes, h100s() if devices == "gpu" else jax.devices())
    with no_rematerialization():
        return compile_train_step(config, mesh), mesh


def traffic(config: Config, sizes: MeshConfig, devices: str = "gpu") -> list[Collective]:
    """The collectives of a step that send something, and are not bookkeeping."""
    compiled, mesh = compile_step(config, sizes, devices)
    return [c for c in collectives(compiled.as_text(), mesh) if c.bytes > SMALL and c.axes]


def total(found: list[Collective], kind: str, axis: str) -> int:
    """Bytes a step of one kind of collective over one axis."""
    return sum(c.bytes * c.count for c in found if c.kind == kind and c.axes == (axis,))


def weights(config: Config) -> tuple[int, int]:
    """Elements of the matrices of all layers, and of embedding and head together."""
    sizes = {
        name: math.prod(shape) for name, shape in counts.parameter_shapes(config.model).items()
    }
    layers = sum(
        size for name, size in sizes.items() if name.startswith("layers.") and "scale" not in name
    )
    return layers, sizes["embedding"] + sizes.get("head", sizes["embedding"])


@pytest.mark.parametrize("remat", ["none", "full"])
def test_fsdp_gathers_each_layer_inside_the_layer_loop_in_bf16(remat):
    sizes = MeshConfig(fsdp=8)
    config = make_config(sizes, remat=remat)
    found = traffic(config, sizes)
    layers, ends = weights(config)
    assert {(c.kind, c.axes, c.dtype) for c in found} == {
        ("all-gather", ("fsdp",), "bf16"),
        ("reduce-scatter", ("fsdp",), "f32"),
    }
    # forward and backward gather every layer, and once embedding and head; the gradients return
    # once
    assert total(found, "all-gather", "fsdp") == BF16 * (2 * layers + ends)
    assert total(found, "reduce-scatter", "fsdp") == F32 * (layers + ends)
    in_layers = [c for c in found if c.depth == max(c.depth for c in found)]
    assert {c.count for c in in_layers} == {config.model.layers}
    assert sum(c.bytes * c.count for c in in_layers if c.kind == "all-gather") == BF16 * 2 * layers


def test_fsdp_never_holds_the_weights_of_all_layers():
    sizes = MeshConfig(fsdp=8)
    compiled, _ = compile_step(make_config(sizes), sizes, "gpu")
    D, L, F = MODEL["dim"], MODEL["layers"], MODEL["ffn_dim"]
    assert not [
        shape
        for _, shape in shapes(compiled.as_text())
        if shape in ((L, D, F), (L, F, D), (L, D, 16, 32))
    ]


def test_context_parallelism_gathers_keys_and_values():
    sizes = MeshConfig(sequence=8)
    config = make_config(sizes, remat="full")
    found = traffic(config, sizes)
    layers, ends = weights(config)
    kv = BF16 * 2 * SEQUENCES * LENGTH * config.model.kv_heads * config.model.head_dim
    # forward, and again in the recomputation; their gradients return scattered
    assert total(found, "all-gather", "sequence") == kv * 2 * config.model.layers
    assert total(found, "reduce-scatter", "sequence") == kv * config.model.layers
    check_one_reduction(found, ("sequence",), layers + ends)
    assert {c.axes for c in found} == {("sequence",)}


def check_one_reduction(found: list[Collective], axes: tuple[str, ...], elements: int) -> None:
    """The float32 gradients, once a step whatever the microbatches; norm scales and loss sums
    travel along."""
    reductions = [c for c in found if c.kind == "all-reduce" and c.axes == axes]
    assert {(c.dtype, c.count, c.depth) for c in reductions} == {("f32", 1, 0)}
    assert 0 <= sum(c.bytes for c in reductions) - F32 * elements < SMALL


@pytest.mark.parametrize(
    "microbatches",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in (1, 2, 4))) for n in (1, 2, 4, 8)],
)
@pytest.mark.parametrize(
    ("sizes", "parallel"),
    [
        (MeshConfig(data=8), {}),
        (MeshConfig(data=8), dict(optimizer_sharding="data")),
        (MeshConfig(fsdp=8), dict(gather="per_step")),
    ],
    ids=["DDP", "ZeRO-1", "FSDP per step"],
)
def test_one_reduction_a_step_whatever_the_microbatches(sizes, parallel, microbatches):
    """And one gather of the weights, in one instruction: the model is small enough for XLA to
    combine all of them. The steps with one microbatch of the large model are in test_floors.py."""
    config = make_config(
        sizes, microbatches=microbatches, model=dict(layers=2, vocab_size=2048), **parallel
    )
    found, elements = traffic(config, sizes), sum(weights(config))
    (axis,) = {axis for c in found for axis in c.axes}
    if not parallel:
        assert len(found) == 1
        check_one_reduction(found, (axis,), elements)
        return
    assert sorted((c.kind, c.dtype, c.bytes, c.count, c.depth) for c in found) == [
        ("all-gather", "bf16", BF16 * elements, 1, 0),
        ("reduce-scatter", "f32", F32 * elements, 1, 0),
    ]


def test_gradients_are_reduced_in_the_dtype_that_is_asked_for():
    sizes = MeshConfig(data=2, fsdp=4)
    config = make_config(sizes, precision=dict(grad_reduce="bfloat16"))
    found = traffic(config, sizes)
    reductions = {(c.kind, c.axes, c.dtype) for c in found if c.kind != "all-gather"}
    assert reductions == {("reduce-scatter", ("fsdp",), "bf16"), ("all-reduce", ("data",), "bf16")}
    assert total(found, "reduce-scatter", "fsdp") == BF16 * sum(weights(config))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_axes_do_not_mix(microbatches):
    sizes = MeshConfig(data=2, fsdp=2, tensor=2)
    config = make_config(sizes, microbatches=microbatches)
    found = traffic(config, sizes)
    layers, ends = weights(config)
    per_microbatch = BF16 * (2 * layers + ends) // 2, F32 * (layers + ends) // 2
    assert total(found, "all-gather", "fsdp") == microbatches * per_microbatch[0], (
        "tensor halves what fsdp gathers"
    )
    assert total(found, "reduce-scatter", "fsdp") == microbatches * per_microbatch[1]
    A = BF16 * SEQUENCES * LENGTH * MODEL["dim"]
    assert total(found, "all-gather", "tensor") == microbatches * A * (4 * config.model.layers + 2)
    check_one_reduction(found, ("data",), (layers + ends) // 4)
    assert {(c.kind, c.axes) for c in found} == {
        *(("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",)), ("all-reduce", ("data",))),
        *(("all-gather", ("tensor",)), ("reduce-scatter", ("tensor",))),
    }


@pytest.mark.parametrize("devices", ["cpu", "gpu"])
@pytest.mark.parametrize("sizes", [MeshConfig(), MeshConfig(fsdp=2, sequence=2, tensor=2)], ids=str)
def test_logits_of_the_batch_never_exist(sizes, devices):
    """The largest array with a vocabulary dimension in float32 is one chunk of one device, or the
    weight's gradient."""
    config = make_config(sizes, model=dict(vocab_size=8192))
    compiled, _ = compile_step(config, sizes, devices)
    columns = config.model.vocab_size // sizes.tensor
    tokens = SEQUENCES * LENGTH // sizes.sequence
    assert config.loss.chunk < tokens or sizes.sequence > 1
    for _, shape in shapes(compiled.as_text()):
        if (
            columns in shape
            and config.model.dim not in shape
            and config.model.dim // sizes.fsdp not in shape
        ):
            assert math.prod(shape) <= min(config.loss.chunk, tokens) * columns, shape


@pytest.mark.parametrize("devices", ["cpu", "gpu"])
@pytest.mark.parametrize("sizes", [MeshConfig(), MeshConfig(fsdp=2, sequence=2, tensor=2)], ids=str)
def test_donation_is_complete(sizes, devices):
    config = make_config(sizes, model=dict(vocab_size=8192))
    compiled, mesh = compile_step(config, sizes, devices)
    leaves = jax.tree.leaves(abstract_state(config, mesh))
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    assert compiled.memory_analysis().alias_size_in_bytes == held


@pytest.mark.parametrize(
    ("remat", "kept", "microbatches"),
    [
        ("full", "D", 1),
        ("attention", "DDGGHH", 1),
        ("dots", "DDFFGGHH", 1),
        ("none", "DDDDFFGGHH", 1),
        ("gate,key", "DFG", 1),
        pytest.param("attention", "DDGGHH", 2, marks=pytest.mark.slow),
        ("none", "DDDDFFGGHH", 2),
    ],
)
def test_remat_decides_what_the_layer_loop_stacks(remat, kept, microbatches):
    """`full`: the residual alone. `attention`: besides it, q and attention, k, v, and what
    attention adds to the residual. `dots`: gate and up too. `none`: two norms too. A list: its
    names, and the residual."""
    sizes = MeshConfig(fsdp=8)
    config = make_config(sizes, remat=remat, microbatches=microbatches)
    compiled, _ = compile_step(config, sizes, "gpu")
    model, L = config.model, config.model.layers
    names = {
        (model.dim,): "D",
        (model.ffn_dim,): "F",
        (model.kv_heads, 32): "G",
        (model.heads, 32): "H",
    }
    loops = re.findall(r"= (\(.*\)) while\(", compiled.as_text())
    forward = max(loops, key=lambda carried: carried.count(f"[{L},{SEQUENCES},{LENGTH},"))
    stacked = [
        shape
        for shape in map(_dims, re.findall(r"bf16\[[\d,]+\]|f32\[[\d,]+\]", forward))
        if len(shape) > 3
    ]
    stacked = [shape[3:] for shape in stacked if shape[:3] == (L, SEQUENCES, LENGTH)]
    assert "".join(sorted(names[shape] for shape in stacked)) == kept


@pytest.mark.parametrize(
    "sizes",
    [
        MeshConfig(data=8),
        pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("remat", ["full", pytest.param("none", marks=pytest.mark.slow)])
def test_gradients_of_a_microbatch_are_added_in_place(sizes, remat):
    """With microbatches a device holds one stack of the layers' gradients, as without, and no
    other."""
    model = dict(layers=16, vocab_size=2048)
    configs = [make_config(sizes, microbatches=m, remat=remat, model=model) for m in (1, 4)]
    one, four = (
        compile_step(config, sizes, "gpu")[0].memory_analysis().temp_size_in_bytes
        for config in configs
    )
    layers, ends = (
        F32 * elements // (sizes.fsdp * sizes.tensor) for elements in weights(configs[0])
    )
    assert one > layers and four - one < ends + layers / 8


@pytest.mark.parametrize(
    ("sizes", "microbatches"),
    [
        (MeshConfig(fsdp=8), 1),
        (MeshConfig(fsdp=2, sequence=2, tensor=2), 1),
        (MeshConfig(fsdp=8), 2),
    ],
    ids=str,
)
def test_offload_leaves_the_device(sizes, microbatches):
    """Activations, and the optimizer state with its copy in the results, are in host memory to the
    byte."""
    config = make_config(
        sizes,
        remat="full",
        offload=",".join((*ACTIVATIONS, "optimizer")),
        microbatches=microbatches,
    )
    compiled, _ = compile_step(config, sizes, "gpu")
    check_offload(compiled, config, sizes)
    stats, state = compiled.memory_analysis(), memory.state_bytes(config, sizes)
    activations = sum(
        memory.activation_bytes(config, sizes).values()
    ) + memory.attention_residual_bytes(config, sizes)
    assert stats.host_temp_size_in_bytes == config.model.layers * activations
    assert stats.host_argument_size_in_bytes == stats.host_alias_size_in_bytes == state["optimizer"]
    assert stats.alias_size_in_bytes < state["parameters"] + SMALL


def test_offload_that_stays_is_refused():
    sizes = MeshConfig(fsdp=8)
    config = make_config(sizes, offload="gate,optimizer")
    compiled, _ = compile_step(config, sizes, "cpu")
    with pytest.raises(
        ConfigError, match=r"leaves 12.0 MiB of gate and 10.8 MiB of optimizer in the memory"
    ):
        check_offload(compiled, config, sizes)


def _dims(shape: str) -> tuple[int, ...]:
    return tuple(int(n) for n in shape.partition("[")[2].rstrip("]").split(","))
