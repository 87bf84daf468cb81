"""Compiler options and the persistent cache."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxpar import xla
from jaxpar.compile import compile_train_step
from jaxpar.config import CompileConfig, MeshConfig, configure
from jaxpar.estimate import counts
from jaxpar.sharding import make_mesh
from jaxpar.validation import resolve

COMPILE = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from jaxpar import xla
from jaxpar.config import CompileConfig
xla.keep_compiled(CompileConfig(cache=sys.argv[1]), Path(sys.argv[2]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((8, 8))).sum())
"""


class Gpu:
    platform = "gpu"


def test_options_are_those_of_the_platform(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # conftest.py's
    config, cpus = CompileConfig(), jax.devices()
    assert xla.options(config, cpus) == xla.PRESET["cpu"] != {}
    assert (
        xla.options(config, cpus, once=True)
        == xla.PRESET["cpu"] | xla.ONCE["cpu"]
        != xla.PRESET["cpu"]
    )
    assert (
        xla.options(config, [Gpu(), Gpu()])
        == xla.options(config, [Gpu()], once=True)
        == xla.PRESET["gpu"]
        != {}
    )
    assert (
        xla.options(CompileConfig(preset=False), [Gpu()])
        == xla.options(CompileConfig(preset=False), cpus)
        == {}
    )
    assert xla.options(config, [Gpu(), cpus[0]]) == {}


def test_the_users_flags_win(monkeypatch):
    monkeypatch.setenv(
        "XLA_FLAGS", "--xla_dump_to=/x --xla_gpu_enable_latency_hiding_scheduler=false"
    )
    options = xla.options(CompileConfig(), [Gpu()])
    assert options.keys() == xla.PRESET["gpu"].keys() - {"xla_gpu_enable_latency_hiding_scheduler"}


def test_the_optimizer_state_is_updated_where_it_lies():
    """On CPUs only the preset's option sees to that; a state that is not updated in place is copied
    whole."""
    model = dict(dim=64, layers=2, heads=4, ffn_dim=128, vocab_size=256)
    temporary = {}
    for preset in (True, False):
        config = resolve(
            configure(
                model=model,
                data=dict(sequence_length=16),
                train=dict(batch_size=1),
                compile=dict(preset=preset),
            )
        )
        step = compile_train_step(config, make_mesh(MeshConfig(), jax.devices()[:1]))
        copies = re.findall(
            r"%copy[.\d]* = f32\[\d[^ ]* copy\(%state_(?:optimizer|model)", step.as_text()
        )
        assert bool(copies) != preset
        temporary[preset] = step.memory_analysis().temp_size_in_bytes
    moments = 2 * 4 * counts.parameter_count(config.model)
    assert temporary[False] - temporary[True] > moments / 2


@pytest.mark.parametrize(
    "cache, set_by_user, written",
    [
        ("auto", "", "home/compiled"),
        ("auto", "theirs", "theirs"),
        ("mine", "theirs", "mine"),
        ("none", "", ""),
    ],
)
def test_compiled_programs_are_kept(
    tmp_path: Path, cache: str, set_by_user: str, written: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(xla.__file__).parents[1])}
    if set_by_user:
        environment["JAX_COMPILATION_CACHE_DIR"] = set_by_user
    command = [sys.executable, "-c", COMPILE, cache, "home"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    folders = {str(file.parent.relative_to(tmp_path)) for file in tmp_path.rglob("*-cache")}
    assert folders == ({written} if written else set())
