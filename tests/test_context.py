"""Context parallelism: every kind, mixed with every other axis, computes what one device
computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from test_parity import MODEL, check, make_config, text  # noqa: F401 (a fixture)

from jaxpar.attention import Options, TokenInfo, attend, sees
from jaxpar.config import MeshConfig
from jaxpar.data.batches import Batch, zigzag_tokens
from jaxpar.sharding import Rules, make_mesh

ALL_KINDS = [
    ("all_gather", False),
    ("all_gather", True),
    ("ring", False),
    ("ring", True),
    ("ulysses", False),
]


def context_config(text, kind, zigzag, *, remat="none", **groups):  # noqa: F811 (the fixture)
    settings = dict(train=dict(batch_size=8), parallel=dict(context=kind, zigzag=zigzag))
    return make_config(text, remat=remat, **settings | groups)


# Packed documents and grouped queries in all of them; each kind with remat and without, alone and
# mixed.
@pytest.mark.parametrize(
    ("kind", "zigzag", "sizes", "remat"),
    [
        ("all_gather", True, dict(sequence=8), "none"),
        ("ring", False, dict(sequence=8), "none"),
        ("ring", True, dict(sequence=4, tensor=2), "none"),
        ("ring", True, dict(data=2, sequence=2, tensor=2), "full"),
        ("ring", False, dict(fsdp=2, sequence=4), "full"),
        ("ulysses", False, dict(sequence=8), "full"),
        ("ulysses", False, dict(data=2, sequence=2, tensor=2), "none"),
    ],
    ids=str,
)
def test_kinds(text, kind, zigzag, sizes, remat):  # noqa: F811
    check(context_config(text, kind, zigzag, remat=remat), sizes)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(sequence=8),
        dict(sequence=4, tensor=2),
        dict(data=2, sequence=2, tensor=2),
        dict(fsdp=2, sequence=4),
        dict(expert=2, sequence=2),
    ],
    ids=str,
)
@pytest.mark.parametrize(("kind", "zigzag"), ALL_KINDS)
def test_every_kind_on_every_mesh(text, kind, zigzag, sizes, remat):  # noqa: F811
    check(context_config(text, kind, zigzag, remat=remat), sizes)


@pytest.mark.parametrize(
    ("kind", "zigzag", "sizes", "length", "model"),
    [
        # blocks of five tokens; three devices; one key-value head for six query heads
        (
            "ring",
            False,
            dict(sequence=3),
            15,
            dict(dim=30, layers=1, heads=6, kv_heads=1, head_dim=10, ffn_dim=33),
        ),
        # zigzag's chunks of one token
        ("ring", True, dict(sequence=3), 6, dict(layers=1)),
        ("ulysses", False, dict(sequence=3), 15, dict(layers=1, heads=6, kv_heads=3, head_dim=10)),
        # a ring of one: attention in tiles
        ("ring", True, dict(data=2), 32, dict(layers=1)),
    ],
    ids=["ring odd", "ring smallest", "ulysses odd", "ring of one"],
)
def test_odd_sizes(text, kind, zigzag, sizes, length, model):  # noqa: F811
    data = dict(
        source=str(text), tokenizer="bytes", sequence_length=length, validation_fraction=0.0
    )
    parallel = dict(context=kind, zigzag=zigzag, sequence_parallel=False)
    check(
        context_config(
            text,
            kind,
            zigzag,
            data=data,
            model=MODEL | dict(init_std=0.1) | model,
            parallel=parallel,
        ),
        sizes,
    )


@pytest.mark.parametrize(("kind", "zigzag"), [("ring", True), ("ulysses", False)])
def test_unpacked_documents_and_padding(text, kind, zigzag):  # noqa: F811
    config = context_config(
        text, kind, zigzag, data=dict(packing=False), train=dict(batch_size=8, microbatches=2)
    )
    check(config, dict(data=2, sequence=2, tensor=2))


def random_inputs(mesh, dtype):
    """q, k, v; two documents a row, in zigzag order over the axis."""
    rules, c = Rules(), mesh.shape["sequence"]
    B, S, H, G, K = 4, 32, 8, 4, 8
    draw = np.random.default_rng(0).standard_normal
    q, k, v = (draw((B, S, n, K), np.float32).astype(dtype) for n in (H, G, G))
    starts = np.arange(B)[:, None] * 5 + 3
    places = np.broadcast_to(np.arange(S), (B, S))
    segments = 1 + (places >= starts)
    positions = places - np.where(segments == 2, starts, 0)
    info = zigzag_tokens(
        Batch(*(x.astype(np.int32) for x in (places, places, positions, segments))), c
    )

    def put(x, *names):
        return jax.device_put(x, NamedSharding(mesh, rules.spec(*names)))

    heads = [
        put(x, "batch", "seq", n, "head_dim")
        for x, n in zip((q, k, v), ("heads", "kv_heads", "kv_heads"), strict=True)
    ]
    queries = TokenInfo(*(put(x, "batch", "seq") for x in (info.positions, info.segments)))
    keys = TokenInfo(*(put(x, "batch", None) for x in (info.positions, info.segments)))
    return heads, queries, keys


def gradients(kind, heads, queries, keys):
    def objective(q, k, v):
        return jnp.sum(
            jnp.sin(attend(q, k, v, queries, keys, Rules(), Options(kind)).astype(jnp.float32))
        )

    return [np.asarray(g, np.float64) for g in jax.jit(jax.grad(objective, (0, 1, 2)))(*heads)]


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_bfloat16_rounds_no_more_than_all_gather(kind):
    mesh = make_mesh(MeshConfig(data=2, sequence=2, tensor=1), jax.devices()[:4])
    with jax.set_mesh(mesh):
        exact = gradients("all_gather", *random_inputs(mesh, jnp.float32))
        plain = gradients("all_gather", *random_inputs(mesh, jnp.bfloat16))
        mine = gradients(kind, *random_inputs(mesh, jnp.bfloat16))
    for e, p, m in zip(exact, plain, mine, strict=True):
        assert np.linalg.norm(m - e) < 1.5 * np.linalg.norm(p - e) < 0.02 * np.linalg.norm(e)


@pytest.mark.parametrize("c", [2, 3, 8])
def test_zigzag_gives_every_device_the_same_work_in_every_turn(c):
    """Pairs of tiles that the ring visits: two of four in each turn, and three in its first."""
    positions = np.arange(4 * c, dtype=np.int32)[None]
    ordered = zigzag_tokens(Batch(*(positions,) * 4), c).positions.reshape(c, 2, 1, 2)

    def visits(i, j):
        tiles = (TokenInfo(x, np.ones_like(x)) for x in (ordered[i], ordered[j]))
        q, k = ([TokenInfo(p, s) for p, s in zip(*info, strict=True)] for info in tiles)
        return sum(bool(np.any(sees(a, b))) for a in q for b in k)

    work = np.array([[visits(i, (i - turn) % c) for i in range(c)] for turn in range(c)])
    assert (work[0] == 3).all() and (work[1:] == 2).all()
