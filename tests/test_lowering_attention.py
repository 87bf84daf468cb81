"""Attention of the compiled step for absent GPUs: cuDNN's calls forward and backward, once a layer,
and no scores.

The harness is `test_lowering`'s. On these devices nothing can be run; what the calls are given is
held by test_cudnn.py, and what they compute by test_attention_gpu.py.
"""

import dataclasses
import math
import re
from collections import Counter

import pytest
from test_lowering import BF16, MODEL, compile_step, traffic
from test_lowering_context import make_config as context_config

from jaxpar.compile import absent_gpus, check_attention, compile_train_step
from jaxpar.config import Config, ConfigError, MeshConfig
from jaxpar.estimate import hardware
from jaxpar.report.hlo import instructions, shapes
from jaxpar.sharding import make_mesh

LENGTH = 1536
"""Of no other dimension."""


def make_config(
    sizes: MeshConfig,
    kind="all_gather",
    *,
    packing=True,
    implementation="auto",
    length=LENGTH,
    **settings,
) -> Config:
    config = context_config(sizes, kind, length=length, **settings)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, packing=packing),
        attention=dataclasses.replace(config.attention, implementation=implementation),
    )


def fused_calls(text: str) -> tuple[float, float]:
    """Forward and backward calls a layer, at the least (documents are worked through in a loop)."""
    calls: Counter[str] = Counter()
    for found in instructions(text):
        if target := re.search(r'"__cudnn\$fmhaSoftmax(\w*)"', found.rest):
            calls[target[1]] += found.count
    return calls[""] / MODEL["layers"], calls["Backward"] / MODEL["layers"]


def check_no_scores(text: str, sizes: MeshConfig, queries: int) -> None:
    """Nothing has room for the scores of all queries and keys of a device, in however many
    heads."""
    for dtype, shape in shapes(text):
        tokens = sorted((n for n in shape if n % (LENGTH // 8) == 0), reverse=True)
        assert len(tokens) < 2 or tokens[0] * tokens[1] < LENGTH * queries, (dtype, shape)


@pytest.mark.parametrize(
    ("sizes", "kind", "packing", "calls"),
    [
        (MeshConfig(fsdp=8), "all_gather", True, 1),
        pytest.param(MeshConfig(fsdp=8), "all_gather", False, 1, marks=pytest.mark.slow),
        (MeshConfig(fsdp=2, tensor=4), "all_gather", True, 1),
        pytest.param(
            *(MeshConfig(sequence=4, tensor=2), "ulysses", True, 1), marks=pytest.mark.slow
        ),
        (MeshConfig(sequence=4, tensor=2), "ulysses", False, 1),
        # keys of the own part, and of the parts before
        pytest.param(MeshConfig(sequence=8), "all_gather", True, 2, marks=pytest.mark.slow),
        (MeshConfig(sequence=8), "all_gather", False, 2),
    ],
    ids=str,
)
def test_attention_is_fused(sizes, kind, packing, calls):
    config = make_config(sizes, kind, packing=packing)
    text = compile_step(config, sizes, "gpu")[0].as_text()
    assert fused_calls(text) == (calls, calls)
    check_no_scores(text, sizes, LENGTH // sizes.sequence if kind == "all_gather" else LENGTH)


@pytest.mark.parametrize("kind", ["all_gather", "ulysses"])
def test_collectives_are_those_of_xla(kind):
    sizes = MeshConfig(sequence=4, tensor=2)
    by_implementation = [
        sorted((c.kind, c.axes, c.dtype, c.bytes, c.count) for c in traffic(config, sizes))
        for config in (make_config(sizes, kind, implementation=name) for name in ("auto", "xla"))
    ]
    assert by_implementation[0] == by_implementation[1]
    assert by_implementation[0]


@pytest.mark.parametrize(
    ("remat", "forward"),
    [
        pytest.param("none", 1, marks=pytest.mark.slow),
        pytest.param("dots", 1, marks=pytest.mark.slow),
        ("attention", 1),
        ("full", 2),
    ],
)
@pytest.mark.parametrize("kind", ["all_gather", "ulysses"])
def test_attention_is_computed_again_only_by_full_remat(kind, remat, forward):
    """With its result the log-sum-exp is kept; only without them the forward call stands in the
    backward pass too."""
    sizes = MeshConfig(data=2, sequence=4)
    text = compile_step(make_config(sizes, kind, remat=remat), sizes, "gpu")[0].as_text()
    parts = 2 if kind == "all_gather" else 1
    assert fused_calls(text) == (forward * parts, parts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all_gather", "ulysses"])
def test_long_rows_without_cudnn_hold_the_scores_of_tiles(kind):
    sizes, length = MeshConfig(sequence=2), 4096
    config = make_config(sizes, kind, implementation="xla", remat="full", length=length)
    text = compile_step(config, sizes, "gpu")[0].as_text()
    assert fused_calls(text) == (0, 0)
    for dtype, shape in shapes(text):
        scores = sorted(
            n for n in shape if n >= 512 and n not in (MODEL["dim"], MODEL["vocab_size"])
        )
        assert len(scores) < 2 or scores[-2] * scores[-1] < length // 2 * length, (dtype, shape)


def a40s():
    return absent_gpus(hardware.find("a40").target, "1x1x2")


def test_the_devices_decide_and_not_the_machine():
    """Ampere's cuDNN cannot keep documents apart: XLA does; asked for cuDNN, the request is
    refused."""
    sizes = MeshConfig(data=2)
    mesh = make_mesh(sizes, a40s())
    calls = {
        packing: fused_calls(
            compile_train_step(make_config(sizes, packing=packing), mesh).as_text()
        )
        for packing in (True, False)
    }
    assert calls == {True: (0, 0), False: (1, 1)}
    asked = make_config(sizes, implementation="cudnn")
    with pytest.raises(ConfigError, match=r"these GPUs have 8.6; use data.packing=false"):
        check_attention(asked, mesh)
    check_attention(make_config(sizes, packing=False, implementation="cudnn"), mesh)


def test_the_log_sum_exp_is_what_attention_keeps_besides():
    """Per layer a float32 for each query and head, whatever the number of documents."""
    sizes = MeshConfig(fsdp=8)
    text = compile_step(make_config(sizes, remat="attention"), sizes, "gpu")[0].as_text()
    L, H, K = MODEL["layers"], MODEL["heads"], MODEL["head_dim"]
    stacked = {
        (dtype, math.prod(shape) // (L * LENGTH * 2))
        for dtype, shape in shapes(text)
        if shape[:1] == (L,)
    }
    assert ("f32", H) in stacked
    assert ("bf16", H * K) in stacked
    assert BF16 * H * K > 4 * H
