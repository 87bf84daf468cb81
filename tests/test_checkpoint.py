"""Checkpoints: any mesh to any mesh, what is kept, what a kill leaves, and what is refused."""

import dataclasses
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxpar import checkpoint
from jaxpar.checkpoint import Checkpointer, Position, find_checkpoint, load_position, restore_state
from jaxpar.config import CheckpointConfig, Config, ConfigError, configure
from jaxpar.tree import named_leaves
from jaxpar.validation import resolve

DEFAULT = resolve(configure())

OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(),
    optax.scale_by_schedule(lambda count: 1.0 / (1 + count)),
)


class Attention(nnx.Module):
    def __init__(self):
        noise = jax.random.normal(
            jax.random.key(1), (2, 16, 8), out_sharding=jax.P(None, "fsdp", "tensor")
        )
        self.value = nnx.Param(
            noise
        )  # as noisy a name as there is: nnx itself calls an array `value`


class Model(nnx.Module):
    def __init__(self):
        self.attention = Attention()
        table = jax.random.normal(jax.random.key(0), (16, 8), out_sharding=jax.P("tensor", "fsdp"))
        self.embedding = nnx.Param(table)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    model: Model
    optimizer: optax.OptState
    step: jax.Array


def make_state() -> State:
    model = Model()
    moments = OPTIMIZER.init(model)
    _, moments = OPTIMIZER.update(jax.tree.map(jnp.cos, model), moments)
    return State(model, moments, jnp.asarray(7, jnp.int32))


def mesh_of(*, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    devices = np.array(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)


def config_of(**settings) -> Config:
    return dataclasses.replace(DEFAULT, checkpoint=CheckpointConfig(**settings))


def small(value: float = 1.0) -> dict[str, jax.Array]:
    return {"weight": jnp.full((8,), value)}


ABSTRACT = {"weight": jax.ShapeDtypeStruct((8,), jnp.float32)}


def at(step: int) -> Position:
    return Position(step, samples=32 * step, tokens=64 * step)


def newest(workdir: Path, abstract: Any = ABSTRACT) -> tuple[Any, Position]:
    """What a run would go on from."""
    found = find_checkpoint(workdir, DEFAULT)
    assert found is not None
    return restore_state(found, abstract), load_position(found)


def steps_in(workdir: Path) -> list[int]:
    return checkpoint.complete_steps(workdir / "checkpoints")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """A workdir with a checkpoint that a mesh of fsdp=4 x tensor=2 saved, and its leaves."""
    workdir = tmp_path_factory.mktemp("saved")
    with jax.set_mesh(mesh_of(fsdp=4, tensor=2)):
        state = jax.jit(make_state)()
        checkpointer = Checkpointer(workdir, DEFAULT)
        checkpointer.save(7, state, position=Position(7, 2**40, 2**50))
        checkpointer.close()
    return workdir, {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}


def test_leaf_names_are_clean(saved):
    assert list(saved[1]) == [
        "model.attention.value",
        "model.embedding",
        "optimizer.1.count",
        "optimizer.mu.attention.value",
        "optimizer.mu.embedding",
        "optimizer.nu.attention.value",
        "optimizer.nu.embedding",
        "optimizer.2.count",
        "step",
    ]
    assert list(named_leaves({"a": [1, 2], "b": (3,), "c": {"d": None}})) == ["a.0", "a.1", "b"]


@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 4}, {"fsdp": 8}, {}], ids=str)
def test_restores_onto_another_mesh_bit_for_bit(saved, axes):
    workdir, leaves = saved
    mesh = mesh_of(**axes)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(make_state)
        state, position = newest(workdir, abstract)
    assert position == Position(7, 2**40, 2**50)
    assert isinstance(state.model, Model)
    for name, leaf in named_leaves(state).items():
        assert leaf.dtype == leaves[name].dtype
        np.testing.assert_array_equal(
            np.asarray(leaf).view(np.uint32), leaves[name].view(np.uint32), err_msg=name
        )
    assert state.model.embedding[...].sharding == NamedSharding(mesh, jax.P("tensor", "fsdp"))


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    checkpointer = Checkpointer(tmp_path, DEFAULT)
    weight = jax.random.normal(jax.random.key(0), (512, 1024))
    before = np.array(weight)
    checkpointer.save(1, {"weight": weight}, position=at(1))
    jax.block_until_ready(overwrite(weight))
    checkpointer.close()
    restored, _ = newest(tmp_path, {"weight": jax.ShapeDtypeStruct((512, 1024), jnp.float32)})
    np.testing.assert_array_equal(np.asarray(restored["weight"]), before)


def test_keeps_the_newest_and_the_best(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: float("nan"), 6: 4.0}
    for steps in [(1, 2, 3), (4, 5, 6)]:  # a restart must remember the losses
        checkpointer = Checkpointer(tmp_path, config_of(keep=2, keep_best=2))
        for step in steps:
            metrics = None if losses[step] is None else {"eval_loss": losses[step]}
            checkpointer.save(step, small(step), position=at(step), metrics=metrics)
        checkpointer.close()
    assert steps_in(tmp_path) == [2, 4, 5, 6]
    second = tmp_path / "checkpoints" / "2"
    assert load_position(second) == at(2)
    assert float(restore_state(second, ABSTRACT)["weight"][0]) == 2.0


def test_saving_says_nothing_but_news(tmp_path, caplog):
    checkpointer = Checkpointer(tmp_path, DEFAULT)
    checkpointer.save(1, small(), position=at(1))
    checkpointer.close()
    absl = logging.getLogger("absl")
    absl.warning("Skipping merge of OCDBT checkpoints")
    assert "OCDBT" not in caplog.text
    absl.warning("something is wrong")
    assert "something is wrong" in caplog.text


@pytest.mark.parametrize("async_", [True, False])
def test_keeps_only_the_newest_without_keep_best(tmp_path, async_):
    checkpointer = Checkpointer(tmp_path, config_of(keep=1, async_=async_))
    for step in (1, 2, 3, 3):
        checkpointer.save(step, small(), position=at(step), metrics={"eval_loss": step})
    checkpointer.close()
    assert steps_in(tmp_path) == [3]


KILLED = """
import sys, time
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxpar.checkpoint import Checkpointer, Position
from jaxpar.config import configure
from jaxpar.validation import resolve
checkpointer = Checkpointer(sys.argv[1], resolve(configure()))
checkpointer.save(1, {"weight": jnp.full((8,), 1.0)}, position=Position(1, 32, 64))
checkpointer.wait()
# the disk hangs just before the commit
ocp.PyTreeCheckpointHandler.finalize = lambda *_: time.sleep(60)
checkpointer.save(2, {"weight": jnp.full((8,), 2.0)}, position=Position(2, 64, 128))
print("saving", flush=True)
time.sleep(60)
"""


def test_a_kill_during_a_save_leaves_the_previous_checkpoint(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == b"saving\n"
        deadline = time.monotonic() + 20
        while (
            not list((tmp_path / "checkpoints").glob("2.*tmp*/state*"))
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert [path.name for path in (tmp_path / "checkpoints").glob("2*")] == [
        "2.orbax-checkpoint-tmp"
    ]
    checkpointer = Checkpointer(tmp_path, DEFAULT)
    state, position = newest(tmp_path)
    assert (position, float(state["weight"][0])) == (at(1), 1.0)
    checkpointer.save(2, small(3.0), position=at(2))
    checkpointer.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


@pytest.fixture
def used(tmp_path) -> Path:
    """A workdir with checkpoints of steps 1 and 2."""
    checkpointer = Checkpointer(tmp_path / "used", DEFAULT)
    for step in (1, 2):
        checkpointer.save(step, small(step), position=at(step))
    checkpointer.close()
    return tmp_path / "used"


def test_a_checkpoint_knows_its_run(used):
    directory = used / "checkpoints" / "2"
    assert checkpoint.load_config(directory) == DEFAULT
    assert checkpoint.load_position(directory) == at(2)
    assert checkpoint.of_workdir(directory, used) and checkpoint.run_of(directory) == used
    (directory / "data" / "metadata").write_text('{"samples": 16}')  # by an older version
    assert checkpoint.load_position(directory) == Position(2, 16, None)
    (directory / "config" / "metadata").write_text('{"model": {"width": 1}}')
    with pytest.raises(ConfigError, match=r"2/config: unknown config field 'model.width'"):
        checkpoint.load_config(directory)
    (directory / "config" / "metadata").write_text("")
    with pytest.raises(ConfigError, match="config/metadata"):
        checkpoint.load_config(directory)


@pytest.mark.parametrize("name", ["tokenizer.json", "words.model"])
def test_a_checkpoint_carries_its_tokenizer(tmp_path, name):
    (tmp_path / name).write_bytes(b"any content: it is not read")
    config = dataclasses.replace(
        DEFAULT, data=dataclasses.replace(DEFAULT.data, tokenizer=str(tmp_path / name))
    )
    checkpointer = Checkpointer(tmp_path / "run", config)
    (tmp_path / name).unlink()
    checkpointer.save(1, small(), position=at(1))
    checkpointer.close()
    copy = checkpoint.carried_tokenizer(tmp_path / "run" / "checkpoints" / "1")
    assert copy is not None and copy.name == "tokenizer" + Path(name).suffix
    assert copy.read_bytes() == b"any content: it is not read"
    second = Checkpointer(tmp_path / "other", config, str(copy))
    shutil.rmtree(tmp_path / "run")
    second.save(1, small(), position=at(1))
    second.close()
    copy = checkpoint.carried_tokenizer(tmp_path / "other" / "checkpoints" / "1")
    assert copy is not None and copy.read_bytes() == b"any content: it is not read"


def test_restore_none_and_paths(used, tmp_path):
    fresh = tmp_path / "fresh"
    assert find_checkpoint(fresh, config_of(restore="none")) is None
    with pytest.raises(ConfigError, match=r"steps 1, 2 and checkpoint\.restore=none"):
        find_checkpoint(used, config_of(restore="none"))
    for path in (used, used / "checkpoints", used / "checkpoints" / "2"):
        config = config_of(restore=str(path))
        assert find_checkpoint(fresh, config) == used / "checkpoints" / "2"
        assert find_checkpoint(used, config) == used / "checkpoints" / "2"  # and so goes on
    with pytest.raises(ConfigError, match=f"{tmp_path}/nothing holds no checkpoints"):
        find_checkpoint(fresh, config_of(restore=f"{tmp_path}/nothing"))


def test_a_path_to_restore_is_not_ignored_in_a_used_workdir(used, tmp_path):
    """A run that began from it goes on, also when that is gone; another is refused."""
    fresh, restoring = tmp_path / "fresh", config_of(restore=str(used))
    checkpointer = Checkpointer(fresh, restoring)
    checkpointer.save(9, small(9.0), position=at(9))
    checkpointer.close()
    assert find_checkpoint(fresh, restoring) == fresh / "checkpoints" / "9"
    first = config_of(restore=str(used / "checkpoints" / "1"))
    for workdir, steps in ((used, "1, 2"), (fresh, "9")):
        with pytest.raises(
            ConfigError, match=rf"of steps {steps}, which did not begin from .*another --workdir"
        ):
            find_checkpoint(workdir, first)
    shutil.rmtree(used)
    assert find_checkpoint(fresh, restoring) == fresh / "checkpoints" / "9"


def test_damaged_checkpoints_are_named(used):
    newest_one = used / "checkpoints" / "2"

    def refuses(text: str, abstract: Any = ABSTRACT):
        with pytest.raises(ConfigError, match=text):
            newest(used, abstract)

    four = {"weight": jax.ShapeDtypeStruct((4,), jnp.float32)}
    refuses(r"weight: checkpoint \(8,\), wanted \(4,\)", four)
    other = {"bias": ABSTRACT["weight"]}
    refuses(r"(?s)weight: only in the checkpoint.*bias: not in the checkpoint", other)
    chunk = newest_one / "state" / "weight" / "0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:5])
    refuses(rf"cannot restore {newest_one}: (?s:.*)complete steps: 1, 2; delete this one")
    chunk.unlink()
    refuses(f"cannot restore {newest_one}")
    (newest_one / "state" / "_METADATA").write_text("{")
    refuses(f"cannot restore {newest_one}")
    shutil.rmtree(newest_one / "state")
    refuses(f"{newest_one} is incomplete; complete steps: 1; delete it to use 1")
    assert restore_state(used / "checkpoints" / "1", ABSTRACT)["weight"][0] == 1.0


FULL = "INTERNAL: RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (jax.errors.JaxRuntimeError(FULL), jax.errors.JaxRuntimeError),
        (MemoryError(), MemoryError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (PermissionError(13, "Permission denied", "state/weight/0"), ConfigError),
        (ValueError("PERMISSION_DENIED: Error opening state/weight/0"), ConfigError),
        (ValueError("RESOURCE_EXHAUSTED: memory pool"), ConfigError),
        (OSError(5, "Input/output error"), ConfigError),
        (OSError(28, "No space left on device"), ConfigError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_other_troubles_are_not_put_down_to_the_checkpoint(used, monkeypatch, error, told):
    """Deleting it would mend none of them."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
    with pytest.raises(told) as caught:
        newest(used)
    assert "delete" not in str(caught.value)
    assert told is not ConfigError or str(error) in str(caught.value)


def test_a_checkpoint_that_may_not_be_read(used):
    chunk = used / "checkpoints" / "2" / "state" / "weight" / "0"
    chunk.chmod(0)
    if os.access(chunk, os.R_OK):
        pytest.skip("root may read everything")
    with pytest.raises(ConfigError, match="can't be read"):
        newest(used)


def test_judging_a_workdir_imports_no_jax(used):
    code = (
        "import sys, pathlib; from jaxpar import config, resume, validation; "
        f"resume.plan_start(pathlib.Path({str(used)!r}), "
        "validation.resolve(config.configure())); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
