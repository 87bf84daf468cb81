"""Twenty combinations of every option, drawn from a fixed seed, against one device. Harness:
test_parity's."""

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
from test_parity import MODEL, check, make_config, text  # noqa: F401 (a fixture)

from jaxpar.config import ConfigError, MeshConfig
from jaxpar.validation import validate_mesh

SEED, COUNT, FAST = 1, 20, 3
"""The first seed for which `test_every_value_is_drawn_where_it_matters` holds."""

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
OPTIONS: dict[str, tuple[Any, ...]] = {
    "sizes": tuple(
        sizes
        for sizes in itertools.product((1, 2, 4, 8), repeat=len(AXES))
        if math.prod(sizes) == 8
    ),
    "heads": ((16, 8), (8, 8), (8, 2), (4, 1)),
    "tied": (False, True),
    "qk_norm": (False, True),
    "packing": (True, False),
    "microbatches": (1, 2, 4),
    "gather": ("per_layer", "per_step"),
    "optimizer_sharding": ("none", "data"),
    "context": ("all_gather", "ring", "ulysses"),
    "zigzag": (False, True),
    "sequence_parallel": (True, False),
    "remat": ("none", "dots", "attention", "full", "value,up", "attention_input,query,mlp_input"),
    "offload": ("", "residual,key,gate"),
}
NEEDS = {
    "gather": ("fsdp",),
    "optimizer_sharding": ("data",),
    "context": ("sequence",),
    "zigzag": ("sequence",),
    "sequence_parallel": ("tensor",),
}
"""The axis without which an option changes nothing."""

Draw = dict[str, Any]


def config_of(text, draw: Draw):  # noqa: F811 (the fixture)
    heads, kv_heads = draw["heads"]
    return make_config(
        text,
        model=dict(
            MODEL,
            heads=heads,
            kv_heads=kv_heads,
            tie_embeddings=draw["tied"],
            qk_norm=draw["qk_norm"],
            init_std=0.1,
        ),
        data=dict(packing=draw["packing"]),
        microbatches=draw["microbatches"],
        parallel={name: draw[name] for name in (*NEEDS,)},
        memory=dict(remat=draw["remat"], offload=draw["offload"]),
    )


def mesh_of(draw: Draw) -> dict[str, int]:
    return {axis: size for axis, size in zip(AXES, draw["sizes"], strict=True) if size > 1}


def drawn(seed: int) -> Iterator[Draw]:
    """Legal combinations, without end."""
    choose = random.Random(seed).choice
    while True:
        draw = {name: choose(values) for name, values in OPTIONS.items()}
        try:
            validate_mesh(config_of("any.txt", draw), MeshConfig(**mesh_of(draw)))
        except ConfigError:
            continue
        yield draw


def name_of(draw: Draw) -> str:
    mesh = "x".join(f"{axis}{size}" for axis, size in mesh_of(draw).items())
    options = [
        f"{name}={value}"
        for name, value in draw.items()
        if name != "sizes" and value != OPTIONS[name][0]
    ]
    return " ".join([mesh, *options])


DRAWS = list(itertools.islice(drawn(SEED), COUNT))


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(d, id=name_of(d), marks=[pytest.mark.slow] * (n >= FAST))
        for n, d in enumerate(DRAWS)
    ],
)
def test_drawn_combination(text, draw):  # noqa: F811
    check(config_of(text, draw), mesh_of(draw))


def acting(draw: Draw) -> Iterator[tuple[str, Any]]:
    """What of a combination is more than words."""
    mesh = mesh_of(draw)
    yield from mesh.items()
    yield from (
        (name, value)
        for name, value in draw.items()
        if name != "sizes" and {*NEEDS.get(name, ())} <= {*mesh}
    )


def test_every_value_is_drawn_where_it_matters():
    wanted = {
        (name, value) for name, values in OPTIONS.items() if name != "sizes" for value in values
    }
    wanted |= {(axis, size) for axis in AXES for size in (2, 4)}
    assert not wanted - {item for draw in DRAWS for item in acting(draw)}
    assert len({name_of(draw) for draw in DRAWS}) == COUNT
