"""The vocabulary over devices: lookup and softmax statistics, against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import mesh_of
from jax.sharding import NamedSharding

from jaxpar.config import ParallelConfig
from jaxpar.parallel import reduce, vocabulary
from jaxpar.sharding import Rules

V, D = 12, 8


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("axes", [dict(tensor=4), dict(data=2, sequence=2, tensor=2)], ids=str)
def test_lookup_and_its_gradient(axes, sequence_parallel):
    """Of every row, the first and the last of each device among them; a row that is looked up often
    has the sum of its gradients."""
    rules = Rules.make(ParallelConfig(sequence_parallel=sequence_parallel))
    random = np.random.default_rng(0)
    table = random.normal(size=(V, D)).astype(np.float32)
    tokens = np.concatenate([np.arange(V), np.full(4, 3)]).astype(np.int32).reshape(2, 8)
    dx = random.normal(size=(2, 8, D)).astype(np.float32)

    def run(table, tokens, dx):
        entered = reduce.enter_step(
            table, rules.axes(("batch", "seq", "residual_seq")), jnp.float32, gather_fsdp=False
        )
        x, pull = jax.vjp(lambda table: vocabulary.lookup(table, tokens, rules), entered)
        return x, reduce.leave_step(pull(dx)[0], table)

    dims = ("vocab", "embed"), ("batch", "seq"), ("batch", "residual_seq", "embed")
    mesh = mesh_of(**axes)
    with jax.set_mesh(mesh):
        placed = (
            jax.device_put(array, NamedSharding(mesh, rules.spec(*names)))
            for array, names in zip((table, tokens, dx), dims, strict=True)
        )
        x, gradient = jax.jit(run)(*placed)
    assert (np.asarray(x) == table[tokens]).all()
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, dx)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)


def test_log_partition_over_devices():
    """Large logits, a target on another device, and one that is ignored."""
    logits = np.random.default_rng(0).normal(size=(3, V)).astype(np.float32) * 100
    target = np.array([0, V - 1, -1], np.int32)
    mesh, P = mesh_of(tensor=4), jax.P
    local = functools.partial(vocabulary.log_partition, axes=("tensor",))
    with jax.set_mesh(mesh):
        shared = jax.shard_map(
            local, in_specs=(P(None, "tensor"), P()), out_specs=(P(), P(), P(None, "tensor"))
        )
        split = jax.device_put(logits, NamedSharding(mesh, P(None, "tensor")))
        found = jax.jit(shared)(split, target)
    log_partition, of_target, hit = map(np.asarray, found)
    exact = logits.astype(np.float64)
    top = exact.max(1)
    np.testing.assert_allclose(
        log_partition, np.log(np.exp(exact - top[:, None]).sum(1)) + top, rtol=1e-6
    )
    assert of_target.tolist() == [logits[0, 0], logits[1, V - 1], 0]
    assert hit.nonzero()[0].tolist() == [0, 1] and hit.nonzero()[1].tolist() == [0, V - 1]
