"""Shardings as notebooks show them."""

import io

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from rich.console import Console

from jaxpar.compile import abstract_state
from jaxpar.config import MeshConfig, configure
from jaxpar.data.batches import abstract_batch
from jaxpar.sharding import make_mesh
from jaxpar.show import show_activations, show_array, show_model
from jaxpar.step import make_train_step
from jaxpar.validation import resolve

SIZES = MeshConfig(fsdp=2, sequence=2, tensor=2)


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    return console.file.getvalue()


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(SIZES)


def config():
    return resolve(
        configure(
            model=dict(vocab_size=64, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48),
            data=dict(sequence_length=16),
            train=dict(batch_size=4),
        )
    )


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((8,), jax.P("fsdp"), ["a device holds [4]", "2 different parts", "0:4", "4:8", "0,1,2,3"]),
        ((4, 6), jax.P(), ["a device holds [4, 6]", "1 different parts", "0,1,2,3,4,5,6,7"]),
        (
            (3, 8, 6),
            jax.P(None, "fsdp", "tensor"),
            ["a device holds [3, 4, 3]", "dim 2: 3:6", "0:4", "5,7"],
        ),
        (
            (2, 4, 8, 6),
            jax.P("fsdp", None, "sequence", "tensor"),
            ["dim 0: 0:1", "dim 0: 1:2", "8 different parts"],
        ),
    ],
    ids=str,
)
def test_any_rank(mesh, shape, spec, expected):
    out = console()
    show_array(
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)), "w", out
    )
    for text in expected:
        assert text in said(out)


def test_devices_of_a_cell_hold_its_part(mesh):
    out = console()
    x = jax.device_put(
        jnp.arange(48.0).reshape(3, 4, 4), NamedSharding(mesh, jax.P(None, "sequence", "tensor"))
    )
    show_array(x, "", out)
    rows = [line for line in said(out).splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in rows]
    for name, *held in cells:
        for shard in x.addressable_shards:
            start = shard.index[1].start or 0
            assert (str(shard.device.id) in ",".join(held).split(",")) == (
                name == f"{start}:{start + 2}"
            )


def test_model_and_activations(mesh):
    out, config_ = console(), config()
    state = abstract_state(config_, mesh)
    show_model(state.model, out)
    line = next(line for line in said(out).splitlines() if "layers.mlp.gate" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")][3:] == [
        "P(None, 'fsdp', 'tensor')",
        "[2, 16, 24]",
        "0.00",
        "2",
    ]
    with jax.set_mesh(mesh):
        batch = abstract_batch(config_, mesh)
        types = show_activations(make_train_step(config_), state, batch, console=out)
    assert types["residual"] == "bfloat16[4@(data,fsdp,expert),16@(sequence,tensor),32]"
    assert types["gate"] == "bfloat16[4@(data,fsdp,expert),16@sequence,48@tensor]"
    assert "attention_output" in said(out)
