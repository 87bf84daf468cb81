"""Compiler options and the persistent cache."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxpar import xla
from jaxpar.config import CompileConfig

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


def test_options_are_for_gpus(monkeypatch):
    config = CompileConfig()
    assert xla.options(config, jax.devices()) == {}
    assert xla.options(config, [Gpu(), Gpu()]) == xla.GPU_OPTIONS != {}
    assert xla.options(CompileConfig(gpu_preset=False), [Gpu()]) == {}
    assert xla.options(config, [Gpu(), jax.devices()[0]]) == {}


def test_the_users_flags_win(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/x --xla_gpu_enable_latency_hiding_scheduler=false")
    options = xla.options(CompileConfig(), [Gpu()])
    assert options.keys() == xla.GPU_OPTIONS.keys() - {"xla_gpu_enable_latency_hiding_scheduler"}


@pytest.mark.parametrize(
    "cache, set_by_user, written",
    [("auto", "", "home/compiled"), ("auto", "theirs", "theirs"), ("mine", "theirs", "mine"), ("none", "", "")],
)
def test_compiled_programs_are_kept(tmp_path: Path, cache: str, set_by_user: str, written: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(xla.__file__).parents[1])}
    if set_by_user:
        environment["JAX_COMPILATION_CACHE_DIR"] = set_by_user
    command = [sys.executable, "-c", COMPILE, cache, "home"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    folders = {str(file.parent.relative_to(tmp_path)) for file in tmp_path.rglob("*-cache")}
    assert folders == ({written} if written else set())
