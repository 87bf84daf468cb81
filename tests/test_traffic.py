"""Bytes that `traffic` counts against those of the step that XLA's GPU compiler makes: within 2%,
axis by axis."""

import pytest
from test_lowering import SMALL, make_config, traffic

from jaxpar.config import MeshConfig
from jaxpar.estimate.counts import layer_elements
from jaxpar.estimate.traffic import by_axes, transfers

DEEP = dict(layers=16)
CASES = [
    (MeshConfig(fsdp=2, sequence=2, tensor=2), dict(remat="full", microbatches=2)),
    (MeshConfig(data=2, fsdp=4), dict(remat="dots", microbatches=4, optimizer_sharding="data")),
    (
        MeshConfig(data=2, fsdp=2, tensor=2),
        dict(gather="per_step", microbatches=2, sequence_parallel=False),
    ),
    # Three layers, which eight devices share.
    (MeshConfig(data=2, fsdp=2, tensor=2), dict(optimizer="muon", optimizer_sharding="data")),
    (MeshConfig(fsdp=2, sequence=4), dict(remat="full", context="ring")),
    (MeshConfig(fsdp=2, sequence=4), dict(remat="none", context="ulysses")),
    (
        MeshConfig(pipeline=2, fsdp=2, tensor=2),
        dict(remat="full", microbatches=4, model=dict(layers=4)),
    ),
    # So many stages that the embedding stands in a branch.
    pytest.param(
        MeshConfig(pipeline=4, tensor=2),
        dict(remat="none", microbatches=4, chunks=2, sequence_parallel=False, model=DEEP),
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("sizes", "fields"), CASES, ids=str)
def test_bytes_by_axes(sizes, fields):
    config = make_config(sizes, **fields)
    compiled: dict[str, float] = {}
    for found in traffic(config, sizes):
        axes = "+".join(found.axes)
        compiled[axes] = compiled.get(axes, 0) + found.bytes * found.count
    counted = by_axes(
        [transfer for transfer in transfers(config, sizes) if transfer.size > SMALL], listed=True
    )
    assert counted == {axes: pytest.approx(count, rel=0.02) for axes, count in compiled.items()}


@pytest.mark.parametrize(
    ("gather", "pipeline"), [("per_layer", 1), ("per_step", 1), ("per_step", 2)]
)
def test_weights_by_hand(gather, pipeline):
    """A device gathers what it has of layers and both ends: once, or twice a microbatch."""
    sizes, count = MeshConfig(pipeline=pipeline, fsdp=2, tensor=2), 4
    config = make_config(sizes, gather=gather, microbatches=count, model=dict(layers=4))
    sent = {"all-gather": 0.0, "reduce-scatter": 0.0}
    for transfer in transfers(config, sizes):
        if transfer.axes == ("fsdp",):
            sent[transfer.kind] += transfer.size * transfer.count
    split = 2 * pipeline
    layers = layer_elements(config.model) / split
    ends = 2 * config.model.vocab_size * config.model.dim / split
    if gather == "per_step":
        assert sent == {"all-gather": 2 * (layers + ends), "reduce-scatter": 4 * (layers + ends)}
    else:  # the backward pass gathers layers again, the ends not
        assert sent["all-gather"] == 2 * count * (2 * layers + ends)
        assert sent["reduce-scatter"] == 4 * count * (layers + ends)


def test_scales_of_heads_are_summed_over_tensor_whatever_the_residual():
    """Each of its devices has other heads. Those of the residual are, if it is sharded there."""
    sizes = MeshConfig(data=2, tensor=4)
    model = dict(qk_norm=True, layers=4, dim=64, head_dim=32)

    def scales(*, sequence_parallel: bool) -> dict[tuple[str, ...], float]:
        config = make_config(sizes, model=model, sequence_parallel=sequence_parallel)
        found = transfers(config, sizes)
        return {t.axes: t.size for t in found if t.kind == "all-reduce" and t.size < 4096}

    heads, residual = 4 * 2 * 4 * 32, 4 * (2 * 4 + 1) * 64
    assert scales(sequence_parallel=False) == {("data", "tensor"): heads, ("data",): residual}
    assert scales(sequence_parallel=True) == {("data", "tensor"): heads + residual}


def test_muon_sends_no_matrix_whole():
    """Its devices share the layers: two all-to-alls of what each holds, no gather."""
    sizes = MeshConfig(fsdp=4, tensor=2)
    config = make_config(sizes, optimizer="muon", model=dict(layers=8))
    moved = [t for t in transfers(config, sizes) if t.kind == "all-to-all"]
    held = 4 * layer_elements(config.model) / 8
    for axis in ("fsdp", "tensor"):
        assert sum(t.size * t.count for t in moved if t.axes == (axis,)) == 2 * held
