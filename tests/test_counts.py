"""Counts against published ones, FLOPs and bytes against arithmetic by hand."""

import dataclasses

import pytest

from jaxpar.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxpar.estimate import counts, hardware, memory
from jaxpar.validation import CHOICES

LLAMA2_7B = ModelConfig(vocab_size=32000, dim=4096, layers=32, heads=32, ffn_dim=11008)
SMALL = ModelConfig(vocab_size=512, dim=256, layers=2, heads=4, kv_heads=2, ffn_dim=512)


def llama3(dim: int, layers: int, heads: int, ffn_dim: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=128256, dim=dim, layers=layers, heads=heads, kv_heads=8, ffn_dim=ffn_dim
    )


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (LLAMA2_7B, 6_738_415_616),
        (llama3(4096, 32, 32, 14336), 8_030_261_248),
        (llama3(8192, 80, 64, 28672), 70_553_706_496),
        (llama3(16384, 126, 128, 53248), 405_853_388_800),
        (ModelConfig(vocab_size=50257, dim=4096, layers=48, heads=32, ffn_dim=6144), 7_257_206_784),
    ],
    ids=["llama2-7b", "llama3-8b", "llama3-70b", "llama3-405b", "seed-7.26b"],
)
def test_parameter_count_is_the_published_one(model, count):
    assert counts.parameter_count(model) == count


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_are_those_of_the_model(tied):
    import jax

    from jaxpar.sharding import make_mesh
    from jaxpar.step import init_state
    from jaxpar.tree import named_leaves

    model = dataclasses.replace(SMALL, head_dim=64, tie_embeddings=tied)
    with jax.set_mesh(make_mesh(MeshConfig())):
        leaves = named_leaves(jax.eval_shape(lambda: init_state(Config(model=model)).model))
    assert {name: leaf.shape for name, leaf in leaves.items()} == counts.parameter_shapes(model)


def test_a_tied_head_is_counted_once_but_still_multiplied():
    tied = dataclasses.replace(LLAMA2_7B, tie_embeddings=True)
    assert counts.parameter_count(LLAMA2_7B) - counts.parameter_count(tied) == 32000 * 4096
    assert counts.step_flops(Config(model=tied)) == counts.step_flops(Config(model=LLAMA2_7B))


def test_flops_of_llama2_7b_by_hand():
    config = Config(
        model=LLAMA2_7B, data=DataConfig(sequence_length=4096), train=TrainConfig(batch_size=8)
    )
    flops = counts.step_flops(config)
    norms = (2 * 32 + 1) * 4096
    assert flops.matmul == 6 * (6_738_415_616 - 32000 * 4096 - norms)
    assert (
        flops.attention_square == 12 * 32 * 4096 * 4096
    )  # torchtitan: 12 x layers x heads x head_dim x length
    assert flops.attention == flops.attention_square // 2
    assert flops.tokens == 8 * 4096
    assert flops.per_step == (flops.matmul + flops.attention) * 8 * 4096
    assert flops.per_step_square - flops.per_step == flops.attention * 8 * 4096
    # The floor of performance.md: 15.6k tokens/s on one H200 is 68% MFU.
    peak = hardware.peak_flops("NVIDIA H200", "bfloat16")
    assert peak and 15_600 * flops.per_token / peak == pytest.approx(0.68, abs=0.005)


@pytest.mark.parametrize(
    ("kind", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float32", 66.9),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 NVL", "bfloat16", 835.5),
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA GH200 480GB", "bfloat16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "float16", 312),
        ("NVIDIA A40", "bfloat16", 149.7),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362.05),
        ("NVIDIA GeForce RTX 3090", "bfloat16", 71),
        ("NVIDIA GeForce RTX 3090 Ti", "bfloat16", 80),
        ("NVIDIA GeForce RTX 3090 Ti", "float32", 40),
        ("Tesla V100-SXM2-16GB", "float32", 15.7),
        ("NVIDIA A40", "float32", 37.4),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5),
        ("NVIDIA L4", "float32", 30.3),
        ("NVIDIA L40S", "float32", 91.6),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA GB200", "bfloat16", 2500),
        ("NVIDIA B300 SXM6 AC", "bfloat16", 2250),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA A4000", "bfloat16", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_peak_of_device_kinds(kind, dtype, tera):
    assert hardware.peak_flops(kind, dtype) == (
        None if tera is None else pytest.approx(tera * 1e12)
    )


def bytes_of(optimizer: str, mesh: MeshConfig) -> dict[str, int]:
    return memory.state_bytes(Config(model=SMALL, optimizer=OptimizerConfig(name=optimizer)), mesh)


@pytest.mark.parametrize("layers", [2, 300], ids=["few layers", "more layers than dim"])
@pytest.mark.parametrize("name", CHOICES["optimizer.name"])
def test_state_bytes_are_those_optax_allocates(name, layers):
    import jax

    from jaxpar.optimizer import make_optimizer

    model = dataclasses.replace(SMALL, layers=layers)
    config = Config(model=model, optimizer=OptimizerConfig(name=name))
    shapes = {
        name: jax.ShapeDtypeStruct(s, "float32")
        for name, s in counts.parameter_shapes(model).items()
    }
    state = jax.eval_shape(make_optimizer(config).init, shapes)
    parameters, optimizer = (
        sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
            if leaf.size > 32 and leaf.size != layers
        )
        for tree in (shapes, state)
    )
    assert memory.state_bytes(config, MeshConfig()) == {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer": optimizer,
        "total": 2 * parameters + optimizer,
    }


def test_state_bytes_by_hand():
    count = counts.parameter_count(SMALL)
    hidden = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    for name, elements in [
        ("adamw", 2 * count),
        ("lion", count),
        ("sgd", count),
        ("muon", 2 * count - hidden),
    ]:
        assert bytes_of(name, MeshConfig())["optimizer"] == 4 * elements


def test_state_is_sharded_over_fsdp_and_tensor_only():
    scales = 5 * 256
    matrices = counts.parameter_count(SMALL) - scales
    split = bytes_of("adamw", MeshConfig(fsdp=4, tensor=2))
    assert split["parameters"] == 4 * (matrices // 8 + scales)
    assert split["optimizer"] == 2 * split["parameters"]
    assert bytes_of("adamw", MeshConfig(data=8)) == bytes_of("adamw", MeshConfig())


@pytest.mark.parametrize(("name", "moved"), [("adamw", 28), ("lion", 20), ("sgd", 20)])
def test_an_update_moves_the_bytes_of_its_optimizer(name, moved):
    """Gradient read; parameter and moments read and written: 4 bytes each, on the device's part."""
    config = Config(model=SMALL, optimizer=OptimizerConfig(name=name))
    count = counts.parameter_count(SMALL)
    assert memory.update_bytes(config, MeshConfig()) == moved * count
    scales = 5 * 256
    part = (count - scales) // 8 + scales
    assert memory.update_bytes(config, MeshConfig(fsdp=4, tensor=2)) == moved * part


def test_an_update_of_muon_and_adafactor_by_hand():
    def moved(name: str) -> int:
        config = Config(model=SMALL, optimizer=OptimizerConfig(name=name))
        return memory.update_bytes(config, MeshConfig())

    count, hidden = counts.parameter_count(SMALL), counts.layer_elements(SMALL)
    assert moved("muon") == 20 * hidden + 28 * (count - hidden)
    assert 12 * count < moved("adafactor") < 12.2 * count


def test_what_muon_makes_orthogonal_by_hand():
    """Two layers on eight devices: each parameter's matrices are one a device, none is cut."""
    config = Config(model=SMALL, optimizer=OptimizerConfig(name="muon"))
    found = counts.orthogonalized(config, MeshConfig(fsdp=4, tensor=2))
    assert {own.axes for own in found} == {("fsdp", "tensor")}
    assert sorted((own.count, own.rows, own.columns) for own in found) == [
        *[(1, 256, 128)] * 2,  # key and value
        *[(1, 256, 256)] * 2,
        *[(1, 256, 512)] * 2,
        (1, 512, 256),
    ]
    down = next(own for own in found if own.rows == 512)
    assert down.flops == 5 * (4 * 256 * 256 * 512 + 2 * 256**3)
    alone = counts.orthogonalized(config, MeshConfig(pipeline=2))
    assert {(own.axes, own.count) for own in alone} == {((), 1)}
    assert counts.orthogonalized(Config(model=SMALL), MeshConfig(fsdp=4)) == []


def test_describe_batch():
    config = Config(train=TrainConfig(batch_size=32, microbatches=4))
    assert counts.describe_batch(config, MeshConfig(data=2, fsdp=2, tensor=2)) == (
        "global batch 32 sequences x 256 tokens = 8,192 tokens a step = 2 a device x 4 "
        "microbatches x data=2 x fsdp=2"
    )
    single = counts.describe_batch(Config(), MeshConfig())
    assert single.endswith("= 8,192 tokens a step = 32 a device x 1 microbatch")
