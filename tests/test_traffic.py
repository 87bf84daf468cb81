"""Bytes that `traffic` counts against those of the step that XLA's GPU compiler makes: within 2%,
axis by axis."""

import pytest
from test_lowering import SMALL, make_config, traffic

from jaxpar.config import MeshConfig
from jaxpar.estimate.traffic import by_axes, transfers

DEEP = dict(layers=16)
CASES = [
    (MeshConfig(fsdp=2, sequence=2, tensor=2), dict(remat="full", microbatches=2)),
    (MeshConfig(data=2, fsdp=4), dict(remat="dots", microbatches=4, optimizer_sharding="data")),
    (
        MeshConfig(data=2, fsdp=2, tensor=2),
        dict(gather="per_step", microbatches=2, sequence_parallel=False),
    ),
    (MeshConfig(fsdp=2, sequence=4), dict(remat="full", context="ring")),
    (MeshConfig(fsdp=2, sequence=4), dict(remat="none", context="ulysses")),
    (
        MeshConfig(pipeline=2, fsdp=2, tensor=2),
        dict(remat="full", microbatches=4, model=dict(layers=4)),
    ),
    # So many stages that the embedding stands in a branch.
    (
        MeshConfig(pipeline=4, tensor=2),
        dict(remat="none", microbatches=4, chunks=2, sequence_parallel=False, model=DEEP),
    ),
]


@pytest.mark.parametrize(("sizes", "fields"), CASES, ids=[str(sizes) for sizes, _ in CASES])
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
