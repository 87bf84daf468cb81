"""Context parallelism: every kind, on every mix of meshes, computes what one device computes."""

import pytest
from test_parity import check, make_config, text  # noqa: F401 (a fixture)

SHORT = dict(train=dict(batch_size=8))


def context_config(text, kind, zigzag=False, **groups):  # noqa: F811
    parallel = dict(sequence_parallel=True, context=kind, zigzag=zigzag, **groups.pop("parallel", {}))
    return make_config(text, **{**SHORT, **groups}, parallel=parallel)


@pytest.mark.parametrize(
    ("kind", "sizes", "remat"),
    [
        ("ring", dict(sequence=8), "none"),
        ("ring", dict(data=2, sequence=2, tensor=2), "full"),
        ("ulysses", dict(sequence=8), "none"),
        ("ulysses", dict(data=2, sequence=2, tensor=2), "full"),
    ],
    ids=str,
)
def test_kind(text, kind, sizes, remat):  # noqa: F811
    check(context_config(text, kind, memory=dict(remat=remat)), sizes)
