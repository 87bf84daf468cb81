"""Compiler options and the persistent cache."""

import json
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

ROOT = Path(__file__).parents[1]

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


MESHES = """
    data=3  fsdp=3  data=2,tensor=2  pipeline=2,fsdp=2  data=5
    data=3,tensor=2  data=2,tensor=3  fsdp=3,tensor=2  data=2,sequence=3  pipeline=3,data=2
    data=8  fsdp=4,tensor=2  fsdp=2,sequence=2,tensor=2  pipeline=2,data=2,tensor=2
    data=3,fsdp=3  data=5,tensor=2
    data=3,tensor=4  data=2,fsdp=3,tensor=2  pipeline=2,fsdp=3,sequence=2
    pipeline=3,data=2,tensor=2
""".split()

STRESS = """
import json, math, sys
import jax
from jaxpar import xla
mesh = json.loads(sys.argv[1])
xla.simulate_devices(math.prod(mesh.values()))

from jaxpar.compile import compile_train_step
from jaxpar.config import MeshConfig, configure
from jaxpar.data.batches import load_batch, place
from jaxpar.data.corpus import open_corpus
from jaxpar.sharding import make_mesh
from jaxpar.step import init_state
from jaxpar.validation import resolve, validate_mesh

sizes = MeshConfig(**mesh)
config = resolve(configure(
    model=dict(vocab_size=480, dim=120, layers=6, heads=12, head_dim=8, ffn_dim=240),
    data=dict(source="synthetic", tokenizer="bytes", sequence_length=96),
    train=dict(batch_size=4 * sizes.batch_shards, microbatches=2),
))
validate_mesh(config, sizes)
windows = open_corpus(config.data, vocab_size=480, seed=0).train
with jax.set_mesh(devices := make_mesh(sizes)):
    step = compile_train_step(config, devices)
    init = jax.jit(lambda: init_state(config))
    batches = [place(load_batch(config, windows, number), config, devices) for number in range(4)]
    for run in range(10):
        state = init()
        for batch in batches:
            state, values = step(state, batch)
        print(run, float(values["loss"]), flush=True)
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


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_simulated_devices_do_not_wait_for_each_other_for_ever(mesh):
    """Ten runs of four steps. With a thread a device XLA aborts some of these meshes."""
    sizes = {axis: int(size) for axis, size in (item.split("=") for item in mesh.split(","))}
    environment = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
    run = subprocess.run(
        [sys.executable, "-c", STRESS, json.dumps(sizes)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    losses = {line.split()[1] for line in run.stdout.splitlines()}
    assert len(run.stdout.splitlines()) == 10 and len(losses) == 1


def test_simulated_devices_have_threads_to_wait_in(monkeypatch):
    monkeypatch.setenv("PJRT_NPROC", "3")
    xla.simulate_devices(8, os.environ["JAX_PLATFORMS"])  # conftest.py's, so nothing changes
    assert os.environ["PJRT_NPROC"] == str(8 * xla.THREADS)
    monkeypatch.setenv("PJRT_NPROC", "1000")
    xla.simulate_devices(8, os.environ["JAX_PLATFORMS"])
    assert os.environ["PJRT_NPROC"] == "1000"  # what a user has more of stays
