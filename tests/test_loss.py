"""The vocabulary-parallel, chunked cross-entropy and its gradients against float64, on one device
and on meshes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from closeness import Leaves, all_within, mesh_of
from jax.sharding import NamedSharding

from jaxpar.config import ParallelConfig
from jaxpar.loss import LossSums, cross_entropy
from jaxpar.parallel import reduce
from jaxpar.sharding import Rules

Z_LOSS = 1e-2


def loss_in_float64(
    x_BSD: np.ndarray, w_DV: np.ndarray, targets_BS: np.ndarray
) -> tuple[LossSums, Leaves]:
    """Sums over the valid tokens, and the gradients of the objective."""
    x, w = (torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (x_BSD, w_DV))
    targets = torch.from_numpy(targets_BS).long()
    logits, valid = (x @ w)[targets >= 0], targets[targets >= 0]
    log_partition = logits.logsumexp(-1)
    ce, z = (
        (log_partition - logits[torch.arange(len(valid)), valid]).sum(),
        log_partition.square().sum(),
    )
    total = ce + Z_LOSS * z
    total.backward()
    return LossSums(total.item(), ce.item(), z.item()), {"x": x.grad.numpy(), "w": w.grad.numpy()}


@pytest.mark.parametrize(
    "axes, vocab, chunk, parallel, scale",
    [
        ({}, 67, 7, True, 1),
        ({}, 67, 1000, False, 300),  # logits that overflow exp
        (dict(tensor=4), 68, 7, True, 1),
        (dict(tensor=4), 68, 5, False, 300),
        (dict(fsdp=2, sequence=2, tensor=2), 66, 3, True, 1),
    ],
)
def test_cross_entropy_equals_torch(
    axes: Any, vocab: int, chunk: int, parallel: bool, scale: int
) -> None:
    """Sums and gradients with a z-loss, ignored targets, and chunks that do not divide the
    tokens."""
    random = np.random.default_rng(0)
    x_BSD = scale * random.normal(size=(2, 16, 8)).astype(np.float32)
    w_DV = random.normal(size=(8, vocab)).astype(np.float32)
    targets_BS = np.where(
        random.random((2, 16)) < 0.3, -1, random.integers(vocab, size=(2, 16))
    ).astype(np.int32)
    targets_BS[0, :3] = 0, vocab - 1, -1
    rules, mesh = Rules.make(ParallelConfig(sequence_parallel=parallel)), mesh_of(**axes)

    def third(x: jax.Array, w: jax.Array, targets: jax.Array) -> tuple[jax.Array, LossSums]:
        half = jnp.float32(0.5)
        sums = cross_entropy(x, w, targets, half, rules, chunk, Z_LOSS, jnp.dtype("float32"))
        sums = sums._replace(objective=2 * sums.objective)
        return sums.objective / 3, sums  # a third, to see that the backward pass scales too

    def gradients_of(
        x: jax.Array, w: jax.Array, targets: jax.Array
    ) -> tuple[LossSums, jax.Array, jax.Array]:
        entered = reduce.enter_step(
            w, rules.axes(("batch", "seq", "residual_seq")), jnp.float32, gather_fsdp=False
        )
        (_, sums), (dx, dw) = jax.value_and_grad(third, argnums=(0, 1), has_aux=True)(
            x, entered, targets
        )
        return sums, dx, reduce.leave_step(dw, w)

    arrays = (x_BSD, w_DV, targets_BS)
    dims = ("batch", "residual_seq", "embed"), ("embed_fsdp", "vocab"), ("batch", "seq")
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, NamedSharding(mesh, rules.spec(*d)))
            for a, d in zip(arrays, dims, strict=True)
        ]
        sums, dx, dw = jax.jit(gradients_of)(*placed)
        _, alone = jax.jit(third)(*placed)
    expected, gradients = loss_in_float64(*arrays)
    all_within("sums", sums._asdict(), expected._asdict(), 1e-5)
    all_within("sums without gradients", alone._asdict(), expected._asdict(), 1e-5)
    all_within("gradients", {"x": 3 * np.array(dx), "w": 3 * np.array(dw)}, gradients, 5e-5)
    assert not np.array(dx)[targets_BS < 0].any()


def test_float16_tells_small_gradients_of_the_head_from_zero():
    """The scale of the loss reaches the logits: a token of probability 1e-9 has a gradient."""
    x_BSD = np.zeros((1, 8, 4), np.float16)
    x_BSD[..., 0] = 1
    w_DV = np.zeros((4, 16), np.float16)
    w_DV[0, 5], w_DV[0, 6] = 20, 17
    targets_BS, scale = np.full((1, 8), 5, np.int32), 2.0**14
    rules = Rules.make(ParallelConfig())

    def objective(w: jax.Array, x: jax.Array, targets: jax.Array) -> jax.Array:
        options = (rules, 4, 0.0, jnp.dtype("float32"))
        return cross_entropy(x, w, targets, jnp.float32(scale), *options).objective

    dims = ("embed_fsdp", "vocab"), ("batch", "residual_seq", "embed"), ("batch", "seq")
    with jax.set_mesh(mesh := mesh_of()):
        placed = [
            jax.device_put(array, NamedSharding(mesh, rules.spec(*names)))
            for array, names in zip((w_DV, x_BSD, targets_BS), dims, strict=True)
        ]
        dw_DV = np.asarray(jax.jit(jax.grad(objective))(*placed), np.float64) / scale
    logits = w_DV[0].astype(np.float64)
    probability = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert probability[0] < 3e-9 < np.finfo(np.float16).smallest_subnormal
    np.testing.assert_allclose(dw_DV[0, 0], 8 * probability[0], rtol=0.02)
