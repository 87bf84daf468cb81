"""The table of parameters is the model: every leaf of it, and nothing else."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxpar.config import ACTIVATIONS, Config, MeshConfig, ModelConfig, configure
from jaxpar.dimensions import Dimensions
from jaxpar.model import Llama
from jaxpar.parameters import TABLE, in_layers, parameters
from jaxpar.sharding import Rules, make_mesh
from jaxpar.tree import named_leaves
from jaxpar.validation import resolve

MODEL = dict(vocab_size=64, dim=32, layers=4, heads=4, kv_heads=2, head_dim=6, ffn_dim=40)
ONE = MeshConfig()


def config_of(*, model=None, **groups) -> Config:
    return resolve(configure(model=MODEL | (model or {}), **groups))


CASES = {
    "plain": (config_of(), ONE),
    "tied": (config_of(model=dict(tie_embeddings=True)), MeshConfig(data=2, fsdp=2, tensor=2)),
    "bfloat16, no kv_heads": (
        config_of(model=dict(kv_heads=4, head_dim=8), precision=dict(params="bfloat16")),
        MeshConfig(fsdp=4, tensor=2),
    ),
    "ZeRO-1": (
        config_of(parallel=dict(optimizer_sharding="data", sequence_parallel=False)),
        MeshConfig(data=2, fsdp=2, tensor=2),
    ),
    "stages": (config_of(model=dict(qk_norm=True)), MeshConfig(pipeline=2, fsdp=2, tensor=2)),
}


@pytest.mark.parametrize("case", CASES)
def test_table_is_the_leaves_of_the_model(case):
    config, sizes = CASES[case]
    mesh = make_mesh(sizes, jax.devices()[: sizes.devices])
    with jax.set_mesh(mesh):
        leaves = named_leaves(jax.eval_shape(lambda: Llama(config, nnx.Rngs(params=0))))
        rules = Rules.make(config.parallel)
        expected = {
            name: (row.shape(config.model), rules.spec(*row.dims), config.precision.params)
            for name, row in parameters(config.model).items()
        }
    assert {
        name: (leaf.shape, leaf.sharding.spec, leaf.dtype.name) for name, leaf in leaves.items()
    } == expected
    dims = Dimensions.of(config.parallel, sizes.pipeline)
    for name, leaf in leaves.items():
        held = np.prod(leaf.sharding.shard_shape(leaf.shape))
        assert held * dims.shards(TABLE[name].dims, sizes) == leaf.size


def test_values_are_drawn_as_the_rows_say():
    """Spread, ones, and that no two parameters are drawn alike, nor depend on others."""
    model = dataclasses.replace(config_of().model, vocab_size=512, init_std=0.05)
    drawn: list[dict[str, np.ndarray]] = []
    with jax.set_mesh(make_mesh(ONE, jax.devices()[:1])):
        for changed in ({}, dict(tie_embeddings=True, qk_norm=True)):
            config = Config(model=dataclasses.replace(model, **changed))
            new = named_leaves(Llama(config, nnx.Rngs(params=1)))
            drawn.append({name: np.asarray(leaf) for name, leaf in new.items()})
    for name, values in drawn[0].items():
        if TABLE[name].kind == "norm_scale":
            assert (values == 1).all()
        else:
            expected = 0.05 / np.sqrt(8) if name.endswith((".out", ".down")) else 0.05
            assert np.std(values) == pytest.approx(expected, rel=0.05), name
            assert abs(np.mean(values)) < 0.1 * expected
    assert drawn[0].keys() - drawn[1].keys() == {"head"}
    common = drawn[0].keys() & drawn[1].keys()
    assert all((drawn[0][name] == drawn[1][name]).all() for name in common)
    first = [np.float32(v.ravel()[0]) / np.std(v) for v in drawn[0].values() if np.std(v)]
    assert len({round(float(x), 3) for x in first}) == len(first)


def test_first_values_stay_those_of_earlier_versions():
    """A run starts where it always has: the first draws of two parameters, known digits."""
    with jax.set_mesh(make_mesh(ONE, jax.devices()[:1])):
        leaves = named_leaves(Llama(config_of(), nnx.Rngs(params=0)))
    base = jax.random.key(0)
    for number, name in ((0, "embedding"), (7, "layers.mlp.down"), (8, "head")):
        normal = jax.random.normal(jax.random.fold_in(base, number), leaves[name].shape)
        scale = 1 / np.sqrt(8) if name.endswith("down") else 1
        np.testing.assert_allclose(leaves[name], 0.02 * scale * normal, rtol=1e-6)


def test_rows_are_consistent():
    for name, row in TABLE.items():
        assert name == row.name and in_layers(name) == row.in_layers
        assert set(row.contracts) < set(row.dims)
        assert row.decays == (row.kind != "norm_scale")
        assert row.makes in (*ACTIVATIONS, "down", "")
        assert all(hasattr(Dimensions(), dim) for dim in (*row.dims, *row.summed))
    assert in_layers("optimizer.mu.layers.mlp.up") and not in_layers("optimizer.mu.head")
    muon = {name for name, row in TABLE.items() if row.orthogonalized}
    assert muon == {name for name, row in TABLE.items() if row.in_layers and row.kind == "matrix"}
    assert "head" not in muon and "embedding" not in muon


def test_sizes_left_out_follow_from_others():
    model = ModelConfig(dim=64, heads=4)
    assert parameters(model)["layers.attention.key"].shape(model) == (8, 64, 4, 16)
