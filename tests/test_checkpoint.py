"""Checkpoints: any mesh to any mesh, what is kept, what a kill leaves, and what is refused."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxpar import checkpoint
from jaxpar.checkpoint import Checkpointer
from jaxpar.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from jaxpar.tree import named_leaves

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
    return Config(checkpoint=CheckpointConfig(**settings))


def small(value: float = 1.0) -> dict[str, jax.Array]:
    return {"weight": jnp.full((8,), value)}


ABSTRACT = {"weight": jax.ShapeDtypeStruct((8,), jnp.float32)}


def steps_in(workdir: Path) -> list[int]:
    return checkpoint.complete_steps(workdir / "checkpoints")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """A workdir with a checkpoint that a mesh of fsdp=4 x tensor=2 saved, and its leaves."""
    workdir = tmp_path_factory.mktemp("saved")
    with jax.set_mesh(mesh_of(fsdp=4, tensor=2)):
        state = jax.jit(make_state)()
        checkpointer = Checkpointer(workdir, Config())
        checkpointer.save(7, state, data={"epoch": 1, "index": 2**40})
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
        checkpointer = Checkpointer(workdir, Config())
        state, data = checkpointer.restore(abstract)
        checkpointer.close()
    assert data == {"epoch": 1, "index": 2**40}
    assert isinstance(state.model, Model)
    for name, leaf in named_leaves(state).items():
        assert leaf.dtype == leaves[name].dtype
        np.testing.assert_array_equal(
            np.asarray(leaf).view(np.uint32), leaves[name].view(np.uint32), err_msg=name
        )
    assert state.model.embedding[...].sharding == NamedSharding(mesh, jax.P("tensor", "fsdp"))


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    checkpointer = Checkpointer(tmp_path, Config())
    weight = jax.random.normal(jax.random.key(0), (512, 1024))
    before = np.array(weight)
    checkpointer.save(1, {"weight": weight}, data={})
    jax.block_until_ready(overwrite(weight))
    restored, _ = checkpointer.restore({"weight": jax.ShapeDtypeStruct((512, 1024), jnp.float32)})
    checkpointer.close()
    np.testing.assert_array_equal(np.asarray(restored["weight"]), before)


def test_keeps_the_newest_and_the_best(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: float("nan"), 6: 4.0}
    for steps in [(1, 2, 3), (4, 5, 6)]:  # a restart must remember the losses
        checkpointer = Checkpointer(tmp_path, config_of(keep=2, keep_best=2))
        for step in steps:
            metrics = None if losses[step] is None else {"eval_loss": losses[step]}
            checkpointer.save(step, small(step), data={"step": step}, metrics=metrics)
        checkpointer.close()
    assert steps_in(tmp_path) == [2, 4, 5, 6]
    checkpointer = Checkpointer(tmp_path, Config())
    assert checkpointer.latest_step() == 6
    state, data = checkpointer.restore(ABSTRACT, step=2)
    assert (data, float(state["weight"][0])) == ({"step": 2}, 2.0)
    checkpointer.close()


@pytest.mark.parametrize("async_", [True, False])
def test_keeps_only_the_newest_without_keep_best(tmp_path, async_):
    checkpointer = Checkpointer(tmp_path, config_of(keep=1, async_=async_))
    assert checkpointer.latest_step() is None
    for step in (1, 2, 3, 3):
        checkpointer.save(step, small(), data={}, metrics={"eval_loss": step})
    assert checkpointer.latest_step() == 3
    checkpointer.close()
    assert steps_in(tmp_path) == [3]


KILLED = """
import sys, time
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxpar.checkpoint import Checkpointer
from jaxpar.config import Config
checkpointer = Checkpointer(sys.argv[1], Config())
checkpointer.save(1, {"weight": jnp.full((8,), 1.0)}, data={"step": 1})
checkpointer.wait()
# the disk hangs just before the commit
ocp.PyTreeCheckpointHandler.finalize = lambda *_: time.sleep(60)
checkpointer.save(2, {"weight": jnp.full((8,), 2.0)}, data={"step": 2})
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
    checkpoint.check_resume(tmp_path, Config())
    checkpointer = Checkpointer(tmp_path, Config())
    assert checkpointer.latest_step() == 1
    state, data = checkpointer.restore(ABSTRACT)
    assert (data, float(state["weight"][0])) == ({"step": 1}, 1.0)
    checkpointer.save(2, small(3.0), data={"step": 2})
    checkpointer.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


@pytest.fixture
def used(tmp_path) -> Path:
    """A workdir with checkpoints of steps 1 and 2."""
    checkpointer = Checkpointer(tmp_path / "used", Config())
    for step in (1, 2):
        checkpointer.save(step, small(step), data={"step": step})
    checkpointer.close()
    return tmp_path / "used"


def test_a_checkpoint_of_another_model_is_refused(used):
    saved = checkpoint.saved_config(used)
    assert saved == json.loads(json.dumps(dataclasses.asdict(Config())))
    checkpoint.check_resume(
        used, dataclasses.replace(Config(), train=dataclasses.replace(Config().train, steps=1))
    )
    other = Config(model=ModelConfig(dim=256, rope_theta=5e5), data=DataConfig(tokenizer="bytes"))
    with pytest.raises(ConfigError) as error:
        checkpoint.check_resume(used, other)
    for text in (
        "model.dim: checkpoint 512, config 256",
        "model.rope_theta: checkpoint 10000.0, config 500000.0",
        "data.tokenizer: checkpoint gpt2, config bytes",
        "--workdir",
    ):
        assert text in str(error.value)


OTHER_DATA = dict(
    source="tinystories",
    text_field="story",
    sequence_length=128,
    packing=False,
    validation_fraction=0.1,
    validation_source="val.txt",
)


@pytest.mark.parametrize("field", [*OTHER_DATA, "seed"])
def test_a_run_goes_on_with_its_own_data_only(used, tmp_path, field):
    config = Config()
    if field == "seed":
        config, change = (
            dataclasses.replace(config, train=TrainConfig(seed=1)),
            "train.seed: checkpoint 0, config 1",
        )
    else:
        value = OTHER_DATA[field]
        config = dataclasses.replace(config, data=DataConfig(**{field: value}))
        change = f"data.{field}: checkpoint {getattr(DataConfig(), field)}, config {value}"
    with pytest.raises(ConfigError, match=rf"{change}\nuse the same .*checkpoint.restore={used}"):
        checkpoint.check_resume(used, config)
    elsewhere = dataclasses.replace(config, checkpoint=CheckpointConfig(restore=str(used)))
    checkpoint.check_resume(tmp_path / "fresh", elsewhere)
    assert checkpoint.other_data(used / "checkpoints" / "2", elsewhere) == [change]


def write_text(folder: Path, text: str) -> Path:
    folder.mkdir()
    for n, part in enumerate(text.split("|")):
        (folder / f"{n}.txt").write_text(part)
    return folder / "*.txt"


def write_shards(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text('{"dtype": "uint16"}')
    for name, part in zip(("train_0", "train_1", "val_0"), text.split("|"), strict=True):
        np.array(list(part.encode()), np.uint16).tofile(folder / f"{name}.bin")
    return folder


@pytest.mark.parametrize("write", [write_text, write_shards])
def test_a_corpus_that_has_moved_is_the_same(tmp_path, write):
    """Its content decides; of a name there is no content to compare, and older checkpoints do not
    know theirs."""
    text = "one|two|three"

    def config(source: Path | str, validation: str = "") -> Config:
        return Config(data=DataConfig(source=str(source), validation_source=str(validation)))

    here, held = write(tmp_path / "here", text), tmp_path / "held.txt"
    held.write_text("held out")
    checkpointer = Checkpointer(tmp_path / "run", config(here, held))
    checkpointer.save(1, small(1), data={})
    checkpointer.close()
    there = write(tmp_path / "there", text)
    held_there = held.rename(tmp_path / "moved.txt")
    checkpoint.check_resume(tmp_path / "run", config(there, held_there))
    others = {
        "edited": config(write(tmp_path / "edited", "one|twO|three"), held_there),
        "in another order": config(write(tmp_path / "ordered", "two|one|three"), held_there),
        "a name": config("stories", held_there),
        "no longer given": config(there),
    }
    if write is write_shards:
        (there / "manifest.json").unlink()
        others["without its manifest"] = config(there, held_there)
    for why, other in others.items():
        with pytest.raises(
            ConfigError, match=r"is in the middle of other data:\n  data\.(validation_)?source: "
        ):
            checkpoint.check_resume(tmp_path / "run", other)
            pytest.fail(why)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "1" / "corpus")
    with pytest.raises(ConfigError, match=r"data.source: checkpoint"):
        checkpoint.check_resume(
            tmp_path / "run", config(write(tmp_path / "older", text), held_there)
        )


def test_what_a_run_may_change(used):
    """Everything but the model, the data and the order of both."""
    config = Config(
        data=DataConfig(prefetch=7),
        train=TrainConfig(
            steps=7, batch_size=64, microbatches=4, eval_every=3, eval_batches=1, z_loss=1e-4
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        parallel=ParallelConfig(gather="per_step"),
        memory=MemoryConfig(remat="full"),
    )
    checkpoint.check_resume(used, config)


def test_restore_none_and_paths(used, tmp_path):
    fresh = tmp_path / "fresh"
    assert checkpoint.saved_config(fresh) is None
    assert checkpoint.find_checkpoint(fresh, config_of(restore="none")) is None
    with pytest.raises(ConfigError, match=r"steps 1, 2 and checkpoint\.restore=none"):
        checkpoint.check_resume(used, config_of(restore="none"))
    for path in (used, used / "checkpoints", used / "checkpoints" / "2"):
        assert (
            checkpoint.find_checkpoint(fresh, config_of(restore=str(path)))
            == used / "checkpoints" / "2"
        )
    with pytest.raises(ConfigError, match=f"{tmp_path}/nothing holds no checkpoints"):
        checkpoint.check_resume(fresh, config_of(restore=f"{tmp_path}/nothing"))
    checkpointer = Checkpointer(fresh, config_of(restore=str(used)))
    assert float(checkpointer.restore(ABSTRACT)[0]["weight"][0]) == 2.0
    checkpointer.save(9, small(9.0), data={})  # once it has its own, a restart continues from those
    assert float(checkpointer.restore(ABSTRACT)[0]["weight"][0]) == 9.0
    checkpointer.close()


def test_damaged_checkpoints_are_named(used):
    newest = used / "checkpoints" / "2"
    checkpointer = Checkpointer(used, Config())
    with pytest.raises(
        ConfigError, match="checkpoints/5 holds no complete checkpoint; complete steps: 1, 2"
    ):
        checkpointer.restore(ABSTRACT, step=5)
    with pytest.raises(ConfigError, match=r"weight: checkpoint \(8,\), wanted \(4,\)"):
        checkpointer.restore({"weight": jax.ShapeDtypeStruct((4,), jnp.float32)})
    with pytest.raises(
        ConfigError, match=r"(?s)weight: only in the checkpoint.*bias: not in the checkpoint"
    ):
        checkpointer.restore({"bias": ABSTRACT["weight"]})

    def refuses(text: str):
        with pytest.raises(ConfigError, match=text):
            checkpointer.restore(ABSTRACT)

    chunk = newest / "state" / "weight" / "0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:5])
    refuses(rf"cannot restore {newest}: (?s:.*)complete steps: 1, 2")
    chunk.unlink()
    refuses(f"cannot restore {newest}")
    (newest / "state" / "_METADATA").write_text("{")
    refuses(f"cannot restore {newest}")
    shutil.rmtree(newest / "state")
    refuses(f"{newest} is incomplete; complete steps: 1; delete it to use 1")
    assert float(checkpointer.restore(ABSTRACT, step=1)[0]["weight"][0]) == 1.0
    checkpointer.close()
    (used / "checkpoints" / "1" / "config" / "metadata").write_text("")
    with pytest.raises(ConfigError, match="config/metadata"):
        checkpoint.saved_config(used)


def test_judging_a_workdir_imports_no_jax(used):
    code = (
        "import sys; from jaxpar import checkpoint, config; "
        f"checkpoint.check_resume({str(used)!r}, config.Config()); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
