"""Llama 3 8B at its real size, compiled for eight H200s that are not there."""

import re
import runpy
from pathlib import Path

import pytest

from jaxpar.compile import absent_gpus, compile_train_step
from jaxpar.config import MeshConfig
from jaxpar.estimate import counts, memory
from jaxpar.estimate.hardware import find
from jaxpar.report.hlo import shapes
from jaxpar.sharding import make_mesh
from jaxpar.validation import resolve

SIZES = MeshConfig(fsdp=8)


@pytest.fixture(scope="module")
def compiled():
    raw = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "llama3_8b.py"))[
        "get_config"
    ]()
    raw.update(dict(train=dict(batch_size=8)))
    config = resolve(raw)
    assert (config.data.sequence_length, config.memory.remat) == (8192, "full")
    step = compile_train_step(config, make_mesh(SIZES, absent_gpus(find("h200").target, "1x1x8")))
    return config, step, step.as_text()


@pytest.mark.slow
def test_matmuls_take_bfloat16(compiled):
    _, _, text = compiled
    dtypes = {}
    products = []
    for name, dtype, operation, operands in re.findall(
        r"%([\w.\-]+) = (\w+)\[[^ ]* ([a-z\-]+)\(([^)]*)\)", text
    ):
        dtypes[name] = dtype
        if operation == "dot":
            products.append([dtypes[operand] for operand in re.findall(r"%([\w.\-]+)", operands)])
    assert len(products) > 20
    assert all(operands == ["bf16", "bf16"] for operands in products)


@pytest.mark.slow
def test_there_are_no_logits_of_the_batch_and_no_scores(compiled):
    config, _, text = compiled
    tokens, vocabulary = config.data.sequence_length, config.model.vocab_size
    held = [dims for _, dims in shapes(text)]
    assert any(vocabulary in dims and config.loss.chunk in dims for dims in held)
    assert not any(vocabulary in dims and tokens in dims for dims in held)
    assert not any(dims.count(tokens) > 1 for dims in held)
    assert text.count("__cudnn$fmha") >= 2


@pytest.mark.slow
def test_peak_is_near_what_must_be_held(compiled):
    """State, float32 gradients, one residual a layer, and of the head the weight and its float32
    gradient."""
    config, step, _ = compiled
    stats, state = step.memory_analysis(), memory.state_bytes(config, SIZES)
    residuals = config.model.layers * memory.activation_bytes(config, SIZES)["residual"]
    head = (2 + 4) * config.model.vocab_size * config.model.dim
    peak = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert counts.parameter_count(config.model) == 8_030_261_248
    assert peak + stats.temp_size_in_bytes <= 1.1 * (state["total"] + residuals + head)
