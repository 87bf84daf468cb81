"""Context parallelism: every kind, mixed with every other axis, computes what one device computes."""

import pytest
from test_parity import MODEL, check, make_config, text  # noqa: F401 (a fixture)

ALL_KINDS = [("all_gather", False), ("all_gather", True), ("ring", False), ("ring", True), ("ulysses", False)]


def context_config(text, kind, zigzag, *, remat="none", **groups):  # noqa: F811 (the fixture)
    settings = dict(train=dict(batch_size=8), parallel=dict(context=kind, zigzag=zigzag))
    return make_config(text, remat=remat, **settings | groups)


# Packed documents and grouped queries in all of them; each kind with remat and without, alone and mixed.
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
        ("ring", False, dict(sequence=3), 15, dict(dim=30, layers=1, heads=6, kv_heads=1, head_dim=10, ffn_dim=33)),
        # zigzag's chunks of one token
        ("ring", True, dict(sequence=3), 6, dict(layers=1)),
        ("ulysses", False, dict(sequence=3), 15, dict(layers=1, heads=6, kv_heads=3, head_dim=10)),
        # a ring of one: attention in tiles
        ("ring", True, dict(data=2), 32, dict(layers=1)),
    ],
    ids=["ring odd", "ring smallest", "ulysses odd", "ring of one"],
)
def test_odd_sizes(text, kind, zigzag, sizes, length, model):  # noqa: F811
    data = dict(source=str(text), tokenizer="bytes", sequence_length=length, validation_fraction=0.0)
    parallel = dict(context=kind, zigzag=zigzag, sequence_parallel=False)
    check(
        context_config(text, kind, zigzag, data=data, model=MODEL | dict(init_std=0.1) | model, parallel=parallel),
        sizes,
    )


@pytest.mark.parametrize(("kind", "zigzag"), [("ring", True), ("ulysses", False)])
def test_unpacked_documents_and_padding(text, kind, zigzag):  # noqa: F811
    config = context_config(text, kind, zigzag, data=dict(packing=False), train=dict(batch_size=8, microbatches=2))
    check(config, dict(data=2, sequence=2, tensor=2))
