"""The compiled step of `compile.py`; what it offloads on GPUs is in test_lowering.py."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from jaxpar.checkpoint import Checkpointer, Position, locate, restore_state
from jaxpar.compile import abstract_state, check_host_memory, compile_train_step
from jaxpar.config import ConfigError, MeshConfig, configure
from jaxpar.data.batches import Batch, place
from jaxpar.sharding import make_mesh
from jaxpar.step import init_state
from jaxpar.tree import named_leaves
from jaxpar.validation import resolve

SIZES = MeshConfig(fsdp=2, tensor=2)


def make_config(offload: str, optimizer: str = "adamw"):
    return resolve(
        configure(
            model=dict(vocab_size=64, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48),
            data=dict(sequence_length=16),
            train=dict(batch_size=4),
            optimizer=dict(name=optimizer),
            memory=dict(offload=offload),
        )
    )


def two_steps(config, mesh):
    """The state after two steps."""
    step = compile_train_step(config, mesh)
    tokens = np.arange(64, dtype=np.int32).reshape(1, 4, 16)
    positions, segments = (
        np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape),
        np.ones_like(tokens),
    )
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(config))()
        batch = place(Batch(tokens, (tokens + 1) % 64, positions, segments), config, mesh)
        return step(step(state, batch)[0], batch)[0]


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_optimizer_state_in_host_memory_gives_the_same_parameters(optimizer):
    mesh = make_mesh(SIZES, jax.devices()[:4])
    here, away = (two_steps(make_config(offload, optimizer), mesh) for offload in ("", "optimizer"))
    for (name, one), other in zip(named_leaves(here).items(), jax.tree.leaves(away), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)
        if name.startswith("optimizer.") and one.ndim:
            assert (one.sharding.memory_kind, other.sharding.memory_kind) == (
                "device",
                "pinned_host",
            ), name
            assert one.sharding.spec == other.sharding.spec


def test_abstract_state_is_that_of_the_first_step():
    config, mesh = make_config("optimizer"), make_mesh(SIZES, jax.devices()[:4])
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(config))()
    for real, abstract in zip(
        jax.tree.leaves(state), jax.tree.leaves(abstract_state(config, mesh)), strict=True
    ):
        assert (real.shape, real.dtype) == (abstract.shape, abstract.dtype)
        assert real.sharding.is_equivalent_to(abstract.sharding, real.ndim)
        assert real.sharding.memory_kind == (abstract.sharding.memory_kind or "device")


def test_more_layers_are_no_longer_program():
    """The layers are one loop: what there is to compile does not grow with their number."""
    lengths = []
    for layers in (2, 8):
        config = make_config("")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, layers=layers))
        lengths.append(
            compile_train_step(config, make_mesh(SIZES, jax.devices()[:4])).as_text().count("\n")
        )
    assert lengths[0] > 1000 and lengths[0] == lengths[1]


@pytest.mark.parametrize(
    ("saved", "wanted"), [("optimizer", "optimizer"), ("", "optimizer"), ("optimizer", "")]
)
def test_a_checkpoint_comes_back_into_the_memory_that_is_asked_for(tmp_path, saved, wanted):
    """What a run with an offloaded optimizer needs to go on, or one without it to go on with it."""
    mesh = make_mesh(SIZES, jax.devices()[:4])
    state = two_steps(make_config(saved), mesh)
    checkpointer = Checkpointer(tmp_path, make_config(saved))
    checkpointer.save(2, state, position=Position(2, 8, 0))
    checkpointer.close()
    target = abstract_state(
        make_config(wanted), make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    )
    restored = restore_state(locate(tmp_path), target)
    for (name, leaf), asked, before in zip(
        named_leaves(restored).items(), jax.tree.leaves(target), jax.tree.leaves(state), strict=True
    ):
        in_host = wanted and name.startswith("optimizer.") and leaf.ndim
        assert leaf.sharding.memory_kind == ("pinned_host" if in_host else "device"), name
        assert leaf.sharding.is_equivalent_to(asked.sharding, leaf.ndim), name
        np.testing.assert_array_equal(leaf, before, err_msg=name)


def test_devices_without_host_memory_are_refused():
    @dataclasses.dataclass
    class Device:
        device_kind: str = "toaster"

        def addressable_memories(self):
            return [types.SimpleNamespace(kind="device")]

    mesh = types.SimpleNamespace(local_devices=[Device()])
    check_host_memory(make_config(""), mesh)
    with pytest.raises(
        ConfigError,
        match=r"memory.offload=gate needs pinned host memory, and toaster has only device",
    ):
        check_host_memory(make_config("gate"), mesh)
