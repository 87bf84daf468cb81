"""What each kind of context parallelism sends and holds, compiled for absent H100s. The harness is
`test_lowering`'s.

`KV` is the bytes of one device's keys and values of a layer, `Q` of its queries.
"""

import dataclasses
import math
import re
from collections import Counter

import pytest
from test_lowering import (
    BF16,
    LENGTH,
    MODEL,
    SEQUENCES,
    check_one_reduction,
    compile_step,
    traffic,
    weights,
)
from test_lowering import make_config as plain_config

from jaxpar.config import Config, MeshConfig
from jaxpar.kernels.tiles import tile_size
from jaxpar.report.hlo import shapes
from jaxpar.validation import validate_mesh

EIGHT = MeshConfig(sequence=8)
LAYERS = MODEL["layers"]


def make_config(sizes: MeshConfig, kind: str, *, zigzag=False, length=LENGTH, **settings) -> Config:
    config = plain_config(sizes, **settings)
    parallel = dataclasses.replace(config.parallel, context=kind, zigzag=zigzag)
    config = dataclasses.replace(
        config, parallel=parallel, data=dataclasses.replace(config.data, sequence_length=length)
    )
    validate_mesh(config, sizes)
    return config


def block_bytes(sizes: MeshConfig) -> tuple[int, int]:
    """KV and Q."""
    head = BF16 * SEQUENCES * LENGTH // sizes.sequence * MODEL["head_dim"] // sizes.tensor
    return 2 * MODEL["kv_heads"] * head, MODEL["heads"] * head


@pytest.mark.parametrize(
    ("sizes", "remat"),
    [(EIGHT, "none"), (EIGHT, "full"), (MeshConfig(sequence=4, tensor=2), "none")],
    ids=str,
)
def test_ring_sends_each_block_round_once(sizes, remat):
    """Keys and values take c - 1 hops, with remat=full once more; their gradients c, to be at
    home."""
    config = make_config(sizes, "ring", remat=remat)
    found = [c for c in traffic(config, sizes) if c.axes == ("sequence",)]
    KV, _ = block_bytes(sizes)
    rounds = 3 if remat == "full" else 2  # forward, backward, and forward recomputed
    hops = rounds * (sizes.sequence - 1) + sizes.sequence
    permutes = [c for c in found if c.kind == "collective-permute"]
    assert sum(c.bytes * c.count for c in permutes) == LAYERS * hops * KV
    assert {c.dtype for c in permutes} == {"bf16"}
    # besides them only the gradients of the weights
    layers, ends = weights(config)
    check_one_reduction(found, ("sequence",), (layers + ends) // sizes.tensor)
    assert {c.kind for c in found} == {"collective-permute", "all-reduce"}


def test_ring_sends_while_it_computes():
    """In both loops over the ring, the sweep over tiles stands between start and end of the
    transfer."""
    compiled, _ = compile_step(make_config(EIGHT, "ring"), EIGHT, "gpu")
    loops = [body for body in compiled.as_text().split("\n\n") if re.search(r"^%?\S*region", body)]
    rings = [body for body in loops if len(re.findall(r"collective-permute-start\(", body)) == 1]
    assert len(rings) == 2, "one forward, one backward"
    for body in rings:
        start, end = body.index("collective-permute-start("), body.index("collective-permute-done(")
        assert re.search(r" while\(", body[start:end]), "nothing is computed meanwhile"


@pytest.mark.parametrize(("kind", "zigzag"), [("ring", False), ("ring", True)])
def test_ring_holds_the_scores_of_one_pair_of_tiles(kind, zigzag):
    """Neither all keys, nor masks or scores of more than one pair, which the scan over layers would
    like to hoist."""
    compiled, _ = compile_step(make_config(EIGHT, kind, zigzag=zigzag), EIGHT, "gpu")
    tile = tile_size(LENGTH // 8)
    assert tile < LENGTH // 8
    heads, kv_heads, K = MODEL["heads"], MODEL["kv_heads"], MODEL["head_dim"]
    for dtype, shape in shapes(compiled.as_text()):
        if shape[-2:] == (tile, tile):
            assert math.prod(shape) <= SEQUENCES * heads * tile * tile, (dtype, shape)
        if LENGTH in shape and K in shape[1:]:
            assert math.prod(shape) < SEQUENCES * LENGTH * kv_heads * K, (dtype, shape)


@pytest.mark.parametrize(("sizes", "remat"), [(EIGHT, "none"), (EIGHT, "full")], ids=str)
def test_ulysses_exchanges_tokens_for_heads(sizes, remat):
    """Four all-to-alls a layer and direction, q, k, v and the output; with remat=full the forward
    ones once more."""
    config = make_config(sizes, "ulysses", remat=remat)
    found = [c for c in traffic(config, sizes) if c.axes == ("sequence",)]
    KV, Q = block_bytes(sizes)
    rounds = 3 if remat == "full" else 2
    exchanged: Counter[int] = Counter()
    for c in found:
        if c.kind == "all-to-all":
            exchanged[c.bytes] += c.count
    assert exchanged == {Q: 2 * rounds * LAYERS, KV // 2: 2 * rounds * LAYERS}
    layers, ends = weights(config)
    check_one_reduction(found, ("sequence",), layers + ends)
    assert {c.kind for c in found} == {"all-to-all", "all-reduce"}
    assert {c.dtype for c in found if c.kind == "all-to-all"} == {"bf16"}


LONG = 65_536
LONG_MODEL = dict(
    vocab_size=512, dim=512, layers=1, heads=2, kv_heads=1, head_dim=128, ffn_dim=1024
)


def long_memory(kind: str, n: int, implementation="auto") -> int:
    """Bytes that a device holds besides its state, for one row of 65,536 tokens on n devices."""
    sizes = MeshConfig(sequence=n)
    config = make_config(sizes, kind, remat="full", length=LONG, model=LONG_MODEL)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, batch_size=1),
        attention=dataclasses.replace(config.attention, implementation=implementation),
    )
    size = compile_step(config, sizes, "gpu")[0].memory_analysis().temp_size_in_bytes
    print(f"{kind} on {n}, {implementation}: {size / 2**20:.0f} MiB")
    return size


@pytest.mark.slow
def test_ring_memory_falls_with_the_number_of_devices():
    """What a device holds besides its state is inverse to the devices; constant are tiles of
    scores."""
    held = {n: long_memory("ring", n) for n in (2, 4, 8)}
    assert held[4] * 4 < 1.2 * held[2] * 2
    assert held[8] * 8 < 1.2 * held[2] * 2


@pytest.mark.slow
def test_all_gather_holds_keys_and_values_more_than_the_ring():
    """XLA's tiles write the gradients of all keys and values in their place. cuDNN cannot: once
    more that size."""
    KV = BF16 * 2 * LONG * LONG_MODEL["kv_heads"] * LONG_MODEL["head_dim"]
    ring = long_memory("ring", 8)
    assert 0 < long_memory("all_gather", 8, "xla") - ring < 1.05 * KV
    assert 0 < long_memory("all_gather", 8) - ring < 2.05 * KV
