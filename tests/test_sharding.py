"""The rules table and the layout of the mesh over hosts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxpar.config import AXES, MeshConfig, ParallelConfig
from jaxpar.sharding import Rules, arrange, axes_across_hosts, make_mesh


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    process_index: int


def hosts(count: int, each: int) -> list[FakeDevice]:
    """Devices of several hosts, in an order that the mesh must not depend on."""
    devices = [
        FakeDevice(id=host * each + n, process_index=host)
        for host in range(count)
        for n in range(each)
    ]
    return [devices[n] for n in np.random.default_rng(0).permutation(len(devices))]


def crossing(sizes: MeshConfig, devices: list[FakeDevice]) -> list[str]:
    return axes_across_hosts(arrange(sizes, devices))


def test_spec_maps_names_to_axes():
    rules = Rules()
    assert rules.spec("batch", "seq", "embed") == jax.P(
        ("data", "fsdp", "expert"), "sequence", None
    )
    assert rules.spec("batch", "residual_seq", "embed")[1] == ("sequence", "tensor")
    assert rules.spec("layers", "embed_fsdp", "ffn") == jax.P(None, "fsdp", "tensor")
    assert rules.spec("batch", None) == jax.P(("data", "fsdp", "expert"), None)
    assert Rules.make(ParallelConfig(sequence_parallel=False)).spec("residual_seq") == jax.P(
        "sequence"
    )


def test_spec_carries_reductions():
    spec = Rules().spec("batch", "seq", "embed", unreduced={"tensor"})
    assert spec.unreduced == {"tensor"} and not spec.reduced


def test_spec_refuses_an_unknown_name():
    with pytest.raises(ValueError, match=r"unknown dimension 'sequenc'.*Did you mean"):
        Rules().spec("batch", "sequenc")


def test_spec_refuses_two_dimensions_on_one_axis_and_names_both():
    with pytest.raises(ValueError, match="'heads' and 'ffn' both lie on mesh axis 'tensor'"):
        Rules().spec("heads", "ffn")


def test_spec_leaves_out_manual_axes():
    seen = []

    def local(x):
        seen.append(Rules().spec("batch", "seq", "embed", unreduced={"tensor"}))
        return x

    with jax.set_mesh(make_mesh(MeshConfig(data=2, sequence=2, tensor=2))):
        x = jnp.zeros((8, 8, 8), out_sharding=jax.P("data", "sequence", None))
        batch = {"data", "fsdp", "expert"}
        jax.shard_map(local, in_specs=jax.P("data"), out_specs=jax.P("data"), axis_names=batch)(x)
    assert seen[0] == jax.P(None, "sequence", None)


def test_mesh_has_all_axes_and_all_explicit():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    assert mesh.axis_names == AXES and mesh.shape["fsdp"] == 4 and mesh.shape["pipeline"] == 1
    assert set(mesh.axis_types) == {AxisType.Explicit}


def test_inner_axes_stay_inside_a_host():
    devices = hosts(4, 8)
    assert crossing(MeshConfig(data=4, tensor=8), devices) == ["data"]
    assert crossing(MeshConfig(fsdp=8, tensor=4), devices) == ["fsdp"]
    assert crossing(MeshConfig(pipeline=2, data=2, sequence=2, tensor=4), devices) == [
        "pipeline",
        "data",
    ]
    array = arrange(MeshConfig(data=4, tensor=8), devices)
    assert [d.id for d in array.ravel()] == list(range(32))


def test_an_axis_that_cannot_stay_inside_a_host_is_reported():
    assert "tensor" in crossing(MeshConfig(data=2, tensor=16), hosts(4, 8))
    assert "tensor" in crossing(MeshConfig(fsdp=3, tensor=4), hosts(2, 6)), "4 does not divide 6"
    assert crossing(MeshConfig(tensor=8), hosts(1, 8)) == []
