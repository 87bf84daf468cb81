"""The loop through the command itself: what it writes, and how it resumes, stops, skips and gives
up."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxpar import checkpoint, cli
from jaxpar import train as command
from jaxpar.config import AXES, Config, ConfigError, MeshConfig
from jaxpar.data import batches as loading
from jaxpar.data.corpus import open_corpus
from jaxpar.sharding import make_mesh
from jaxpar.step import init_state
from jaxpar.tree import named_leaves

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("compile_once")

CONFIG = """
from jaxpar.config import configure

def get_config():
    return configure(
        model=dict(vocab_size=320, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64),
        data=dict(
            source={source!r}, tokenizer="bytes", sequence_length=32, validation_fraction=0.1
        ),
        train=dict(steps=20, batch_size=8, eval_every=10, eval_batches=2, max_nonfinite_steps=3),
        optimizer=dict(learning_rate=3e-3, warmup_steps=4),
        precision=dict(compute="float32"),
        checkpoint=dict(every=10),
        log=dict(every=1),
    )
"""

MESH = ("--mesh.fsdp=2", "--mesh.tensor=2")  # and data=2
OTHER = ("--mesh.fsdp=2", "--mesh.expert=2", "--mesh.sequence=2", "--config.train.microbatches=2")
BATCH, LENGTH = 8, 32
POISON = 300  # an id that no text has
Fed = dict[int, np.ndarray]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    (text := folder / "text.txt").write_text(
        "".join(f"{n} plus {n} is {2 * n}, as ever.\n<|endoftext|>\n" for n in range(400))
    )
    path = folder / "cfg.py"
    path.write_text(CONFIG.format(source=str(text)))
    return path


@pytest.fixture(scope="module")
def train(config_file) -> Callable[..., int]:
    """`train(workdir, *flags)`: the exit code of the command."""

    def train(workdir: Path, *argv: str) -> int:
        return command.main([f"--config={config_file}", f"--workdir={workdir}", *argv])

    return train


@contextlib.contextmanager
def watched(
    before: Callable[[int], Any] | None = None, poison: Collection[int] = ()
) -> Iterator[Fed]:
    """The tokens [B, S] that training is fed, by number of the batch from 1.

    `before(number)` is called when the loop asks for a batch. Those of `poison` contain the token
    `POISON`.
    """
    fed: Fed = {}

    def batches(windows, *, place=lambda batch: batch, start: int = 0, **kwargs):
        for number, batch in enumerate(original(windows, start=start, **kwargs), start + 1):
            if before:
                before(number)
            if number in poison:
                batch.tokens[0, 0, 3] = POISON
            fed[number] = batch.tokens.reshape(-1, LENGTH).copy()
            yield place(batch)

    original = loading.batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "batches", batches)
        yield fed


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def all_rows(workdir: Path) -> list[dict[str, Any]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse_constant) for line in lines]


def rows(workdir: Path) -> dict[int, dict[str, Any]]:
    """The rows of training steps; one a step."""
    found = [row for row in all_rows(workdir) if "loss" in row]
    assert len({row["step"] for row in found}) == len(found), "a step has two rows"
    return {row["step"]: row for row in found}


def evaluations(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in all_rows(workdir) if "eval_loss" in row}


def losses(workdir: Path) -> list[float]:
    found = rows(workdir)
    assert list(found) == list(range(1, len(found) + 1))
    return [row["loss"] for row in found.values()]


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def files(workdir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def state_of(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """All leaves of a checkpoint, on one device."""
    directory = workdir / "checkpoints" / str(step)
    config = checkpoint.load_config(directory)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        state = checkpoint.restore_state(directory, jax.eval_shape(lambda: init_state(config)))
    return {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}


def equal_bits(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    assert left.keys() == right.keys()
    return all(left[name].tobytes() == right[name].tobytes() for name in left)


# One whole run, to which the others are compared.


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> SimpleNamespace:
    """20 steps without interruption: the workdir, what was fed, and the output."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with watched() as fed, contextlib.redirect_stdout(io.StringIO()) as output:
        assert train(workdir, *MESH, "--cpu_devices=8") == 0
    return SimpleNamespace(workdir=workdir, fed=fed, output=output.getvalue())


def test_what_a_run_writes(whole, config_file):
    assert {path.name for path in whole.workdir.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
    }
    assert saved_steps(whole.workdir) == [10, 20]
    config = cli.parse([f"--config={config_file}"], "").config
    written = json.loads(
        (whole.workdir / "config.json").read_text(), parse_constant=refuse_constant
    )
    for group, fields in dataclasses.asdict(config).items():
        assert written.pop(group) == fields
    assert written.pop("mesh") == dict.fromkeys(AXES, 1) | {"data": 2, "fsdp": 2, "tensor": 2}
    assert written.pop("versions").keys() >= {"jax", "jaxpar"}
    assert written.pop("devices") == {"kind": "cpu", "count": 8, "processes": 1}
    assert written == {}


def test_the_rows_of_metrics(whole):
    expected = set(
        "step loss grad_norm learning_rate tokens".split()
        + "tokens_per_second step_seconds mfu peak_bytes".split()
    )
    found = rows(whole.workdir)
    for step, row in found.items():
        assert row.keys() >= expected
        assert row["tokens"] == step * BATCH * LENGTH
        assert row["mfu"] is None and row["peak_bytes"] is None  # a CPU can't tell
        assert row["skipped"] == 0 and row["grad_norm"] > 0
        assert 0 < row["valid_tokens"] <= BATCH * LENGTH
        if step > 2:
            assert row["tokens_per_second"] == pytest.approx(BATCH * LENGTH / row["step_seconds"])
    assert found[1]["loss"] == pytest.approx(math.log(320), rel=0.02)  # it knows nothing yet
    assert found[20]["loss"] < found[1]["loss"] - 0.5
    warmup = [found[step]["learning_rate"] for step in (1, 2, 3, 4)]
    assert warmup == pytest.approx([0.75e-3, 1.5e-3, 2.25e-3, 3e-3])
    assert found[13]["learning_rate"] == pytest.approx(1.5e-3)  # half of a cosine over 16 steps


def test_the_rows_of_evaluation(whole):
    first, second = (row for row in all_rows(whole.workdir) if "loss" not in row)
    assert (first["step"], second["step"]) == (10, 20)
    assert first.keys() == second.keys() == {"step", "time", "eval_loss", "eval_perplexity"}
    assert second["eval_perplexity"] == pytest.approx(math.exp(second["eval_loss"]))
    assert second["eval_loss"] < first["eval_loss"] < math.log(320)


def test_what_a_run_says(whole):
    for words in (
        *(
            "8 x cpu",
            "mesh data=2 x fsdp=2 x tensor=2",
            "39,072 parameters",
            "8 sequences x 32 tokens = 256 tokens a step",
        ),
        *(
            "unigram entropy",
            "step 20/20  loss",
            "step 10/20  eval_loss",
            "compiling the training step took",
            f"step 10/20  checkpoint {whole.workdir}/checkpoints/10",
            "final validation loss",
            str(whole.workdir),
        ),
    ):
        assert words in whole.output


# Resuming.

STOPPED = """
import time
from jaxpar import train

def stopping(self, batches):
    for number, batch in enumerate(watch(self, batches), 1):
        if number == 14:
            print("thirteen steps", flush=True)
            time.sleep(600)
        yield batch

watch, train.Metrics.watch = train.Metrics.watch, stopping
train.main()
"""


def python(
    config_file: Path, workdir: Path, *argv: str, run: tuple[str, ...] = ("-m", "jaxpar.train")
):
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *run, f"--config={config_file}", f"--workdir={workdir}", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        },
    )


@pytest.fixture(scope="module")
def killed(config_file, whole, tmp_path_factory) -> Path:
    """The workdir of the same run, killed in step 14; `whole` has compiled for it."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    with python(config_file, workdir, "--cpu_devices=8", *MESH, run=("-c", STOPPED)) as process:
        assert process.stdout
        assert any(line == "thirteen steps\n" for line in process.stdout)
        deadline = time.monotonic() + 30
        while (
            checkpoint.complete_steps(workdir / "checkpoints") != [10]
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert saved_steps(workdir) == [10]
    assert max(rows(workdir)) >= 12, (
        "steps beyond the checkpoint must be lost for this to test something"
    )
    return workdir


@pytest.mark.parametrize("flags", [MESH, OTHER], ids=["same mesh", "other mesh"])
def test_resuming_a_killed_run(train, whole, killed, tmp_path, flags):
    """The same batches on any mesh and in any microbatches; the same bits on the same mesh."""
    shutil.copytree(killed, tmp_path / "run")
    with watched() as fed:
        assert train(tmp_path / "run", *flags) == 0
    assert list(fed) == list(range(11, 21))
    assert all((tokens == whole.fed[step]).all() for step, tokens in fed.items())
    for values in (losses, lambda run: list(evaluations(run).values())):
        np.testing.assert_allclose(
            values(tmp_path / "run"), values(whole.workdir), rtol=0 if flags == MESH else 1e-5
        )
    assert flags == OTHER or equal_bits(state_of(tmp_path / "run", 20), state_of(whole.workdir, 20))
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (written["mesh"]["sequence"], written["train"]["microbatches"]) == (
        (1, 1) if flags == MESH else (2, 2)
    )


def test_steps_already_reached(train, whole, capsys, tmp_path):
    before = files(shutil.copytree(whole.workdir, tmp_path / "run"))
    with watched() as fed:
        assert train(tmp_path / "run", *MESH) == 0
    assert "is at step 20 already" in capsys.readouterr().out
    assert (fed, files(tmp_path / "run")) == ({}, before)
    assert train(tmp_path / "run", *MESH, "--config.log.every=2") == 0
    assert files(tmp_path / "run") == before, "config.json is of the run that did something"


def test_another_batch_size_goes_on_with_the_next_sample(train, whole, tmp_path):
    shutil.copytree(whole.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    allow = "--config.checkpoint.allow_changes=true"
    flags = (*MESH, "--config.train.eval_every=0", "--config.train.batch_size=16")
    steps = "--config.train.steps=15"
    before = files(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"(?s)batch_size: checkpoint 8.*allow_changes"):
        train(tmp_path / "run", *flags, steps)
    assert files(tmp_path / "run") == before, "a refused start has written"
    with watched() as fed:
        assert train(tmp_path / "run", *flags, steps, allow) == 0
    expected = np.concatenate([whole.fed[number] for number in range(11, 21)])
    np.testing.assert_array_equal(np.concatenate(list(fed.values())), expected)
    found = rows(tmp_path / "run")
    assert list(found) == list(range(1, 16))
    assert [found[step]["tokens"] for step in (10, 11, 15)] == [10 * 256, 12 * 256, 20 * 256]
    with pytest.raises(
        ConfigError, match=r"train.batch_size=24 .*160 samples.*use one of 10, 16, 20, 32"
    ):
        train(
            tmp_path / "run",
            "--mesh.data=8",
            "--config.train.batch_size=24",
            "--config.train.steps=16",
            allow,
        )


def test_a_resumed_run_says_what_has_changed(train, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole.workdir, run)
    changes = ("--config.train.steps=21", "--config.optimizer.learning_rate=6e-3")
    assert train(run, *MESH, *changes, "--config.data.validation_fraction=0.1") == 0
    assert (
        f"continuing from step 20 of {run}; changed since: train.steps 20 -> 21, "
        "optimizer.learning_rate 0.003 -> 0.006\n"
        "learning rate of the next step 5.11e-05 (without these changes 0)\n"
    ) in capsys.readouterr().out


def test_padding_is_not_counted(train, tmp_path, config_file, capsys):
    flags = ("--config.data.packing=false", "--config.train.eval_every=0", "--config.log.every=2")
    steps = ("--config.train.steps=4", "--config.checkpoint.every=2")
    config = cli.parse([f"--config={config_file}", flags[0]], "").config
    windows = open_corpus(config.data, vocab_size=320, seed=0).train
    assert train(tmp_path, *MESH, *flags, *steps) == 0
    assert f"{windows.padding:.0%} of them are padding" in capsys.readouterr().out
    expected = [
        sum(int((loading.load_batch(config, windows, n).segments > 0).sum()) for n in range(step))
        for step in (2, 4, 6)
    ]
    assert [row["tokens"] for row in rows(tmp_path).values()] == expected[:2]
    assert train(tmp_path, *MESH, *flags, "--config.train.steps=6") == 0
    assert rows(tmp_path)[6]["tokens"] == expected[2]


FLOAT16 = ("--config.precision.compute=float16", "--config.precision.loss_scale=65536")


@pytest.mark.slow
def test_the_loss_scale_after_a_change_of_precision(train, whole, tmp_path):
    """It begins where the checkpoint searched for none, and is nothing where none is wanted."""
    shutil.copytree(whole.workdir, tmp_path / "run")
    for number, (flags, scale) in enumerate([(FLOAT16, 65536), ((), 1)], 21):
        steps = f"--config.train.steps={number}"
        assert train(tmp_path / "run", *MESH, *flags, steps) == 0
        assert rows(tmp_path / "run")[number].get("loss_scale", 1) == scale
        assert state_of(tmp_path / "run", number)["loss_scale"] in (scale, scale / 2)


def test_restoring_from_another_run(train, killed, whole, tmp_path):
    before, restore = files(killed), f"--config.checkpoint.restore={killed}"
    with pytest.raises(ConfigError, match=r"train.batch_size=24 does not divide the 80 samples"):
        train(tmp_path / "run", restore, "--config.train.batch_size=24")
    assert not (tmp_path / "run").exists(), "a refused start has written"
    assert train(tmp_path / "run", *MESH, restore) == 0
    assert (list(rows(tmp_path / "run")), saved_steps(tmp_path / "run")) == (
        list(range(11, 21)),
        [20],
    )
    assert rows(tmp_path / "run")[20]["loss"] == rows(whole.workdir)[20]["loss"]
    assert files(killed) == before


def test_other_data_is_refused_or_begun_afresh(train, killed, tmp_path):
    """The position in the data of a run means nothing in another order of it."""
    before, seed, fresh = files(killed), "--config.train.seed=3", tmp_path / "fresh"
    with pytest.raises(
        ConfigError, match=rf"train.seed: checkpoint 0, config 3\n.*restore={killed}"
    ):
        train(killed, *MESH, seed)
    assert files(killed) == before, "a refused start has written"
    flags = (*MESH, seed, f"--config.checkpoint.restore={killed}")
    with watched() as fed:
        assert train(fresh, *flags, "--config.train.steps=15") == train(fresh, *flags) == 0
    assert list(fed) == [*range(1, 11)], "batches from the first, then on from there"
    assert [rows(fresh)[step]["tokens"] for step in (11, 20)] == [
        BATCH * LENGTH,
        10 * BATCH * LENGTH,
    ]


# Signals.


def sending(number: int, at: int) -> Callable[[int], Any]:
    return lambda step: step == at and os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_continues(train, whole, tmp_path, capsys, number):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with watched(sending(number, at=7)):
        assert train(tmp_path / "run", *MESH) == 128 + number
    assert f"stopped by signal {int(number)} after step 7, saved" in capsys.readouterr().out
    assert saved_steps(tmp_path / "run") == [7]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert len(losses(tmp_path / "run")) == 7
    if number == signal.SIGINT:
        return
    assert train(tmp_path / "run", *MESH) == 0
    assert losses(tmp_path / "run") == losses(whole.workdir)
    assert equal_bits(state_of(tmp_path / "run", 20), state_of(whole.workdir, 20))


def test_a_second_ctrl_c_does_not_wait(train, tmp_path, capsys):
    with (
        watched(sending(signal.SIGINT, at=3)),
        watched(sending(signal.SIGINT, at=3)),
        pytest.raises(SystemExit) as exit,
    ):
        cli.run(lambda _: train(tmp_path / "run", *MESH))
    assert exit.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert saved_steps(tmp_path / "run") == []


def test_a_signal_during_an_evaluation(train, tmp_path, monkeypatch):
    evaluate = command.evaluate
    monkeypatch.setattr(
        command, "evaluate", lambda *args: signal.raise_signal(signal.SIGTERM) or evaluate(*args)
    )
    assert train(tmp_path / "run", *MESH, "--config.train.eval_every=5") == 143
    assert evaluations(tmp_path / "run") == {}
    assert saved_steps(tmp_path / "run") == [5]


def test_a_signal_while_the_last_checkpoint_is_written(train, tmp_path, monkeypatch):
    """It must not cut the checkpoint short: the run is done, and says so."""

    def close(self):
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        signal.raise_signal(signal.SIGINT)
        closed(self)

    closed = command.Checkpointer.close
    monkeypatch.setattr(command.Checkpointer, "close", close)
    train(tmp_path / "run", *MESH, "--config.data.validation_fraction=0")
    assert saved_steps(tmp_path / "run") == [10, 20]


# Numbers that are not finite.


@pytest.fixture
def infinite(monkeypatch) -> None:
    """The embedding of `POISON` is infinite."""

    def infinite(config: Config):
        state = init_state(config)
        table = state.model.embedding
        ids = jax.lax.broadcasted_iota(
            np.int32, table.shape, 0, out_sharding=jax.typeof(table[...]).sharding
        )
        table[...] = jax.numpy.where(ids == POISON, np.inf, table[...])
        return state

    monkeypatch.setattr(command, "init_state", infinite)


def test_a_batch_that_is_not_finite_is_skipped_and_training_goes_on(train, infinite, tmp_path):
    flags = (
        "--config.checkpoint.every=1",
        "--config.checkpoint.keep=20",
        "--config.data.validation_fraction=0",
    )
    with watched(poison=(6, 7, 9)):
        assert train(tmp_path, *MESH, *flags) == 0
    found = rows(tmp_path)
    assert [found[step]["skipped"] for step in (5, 6, 7, 8, 9, 10, 20)] == [0, 1, 2, 2, 3, 3, 3]
    assert [step for step, row in found.items() if row["loss"] is None] == [6, 7, 9]
    assert [step for step, row in found.items() if row["grad_norm"] is None] == [6, 7, 9]
    rates = {step: row["learning_rate"] for step, row in found.items()}
    assert rates[6] == rates[7] == rates[8] > rates[10]  # the schedule counts updates
    states = {step: state_of(tmp_path, step) for step in (5, 6, 7, 8)}
    for step, state in states.items():
        assert (state.pop("step"), state.pop("skipped")) == (step, found[step]["skipped"])
    assert equal_bits(states[5], states[6]) and equal_bits(states[6], states[7])
    assert not any(
        states[7][name].tobytes() == states[8][name].tobytes()
        for name in states[7]
        if "model." in name
    )
    assert found[20]["loss"] < found[10]["loss"] < found[5]["loss"]


def test_too_many_in_a_row_stop_the_run(train, infinite, tmp_path, capsys, config_file):
    with watched(poison=range(3, 20)) as fed:
        assert train(tmp_path, *MESH, "--config.checkpoint.every=2") == 1
    assert [rows(tmp_path)[step]["skipped"] for step in (2, 3, 4, 5)] == [0, 1, 2, 3]
    assert max(fed) <= 6, "the run went on after the third"
    report = capsys.readouterr().err
    assert report.startswith(
        "error: step 5: loss nan, gradient norm nan; the last 3 updates were not finite"
    )

    listed = re.search(r"windows of the training data in its batch: ([\d, ]+)\n", report)
    config = cli.parse([f"--config={config_file}"], "").config
    windows = open_corpus(config.data, vocab_size=320, seed=0).train
    expected = np.stack([windows[int(index)].tokens for index in listed[1].split(",")])
    expected[0, 3] = POISON
    np.testing.assert_array_equal(fed[5], expected)

    assert re.search(r"largest gradients \(\d+ of 21 not finite\)", report)
    named = re.findall(r"^  ([\w.]+)(?:\[[01]\])?: (\S+)$", report, re.MULTILINE)
    assert len(named) == 8 and {norm for _, norm in named} == {"nan"}
    state = state_of(tmp_path, saved_steps(tmp_path)[-1])
    assert {f"model.{name}" for name, _ in named} <= state.keys()
    assert all(np.isfinite(leaf).all() for name, leaf in state.items() if name != "model.embedding")


def test_the_best_and_the_newest_are_kept(train, tmp_path, monkeypatch):
    scripted = {4: 3.0, 8: 1.0, 12: math.nan, 16: 2.0, 20: 2.5}
    monkeypatch.setattr(command, "evaluate", lambda *_: next(values))
    values = iter(scripted.values())
    flags = "train.eval_every=4 checkpoint.every=0 checkpoint.keep=1 checkpoint.keep_best=1".split()
    assert train(tmp_path, *MESH, *(f"--config.{flag}" for flag in flags)) == 0
    assert saved_steps(tmp_path) == [8, 20]
    assert evaluations(tmp_path) == {**scripted, 12: None}


def test_evaluation_only_at_the_end(train, tmp_path):
    flags = ("--config.train.eval_every=0", "--config.log.every=7")
    assert train(tmp_path, *MESH, *flags, "--config.checkpoint.every=0") == 0
    assert (list(evaluations(tmp_path)), list(rows(tmp_path))) == ([20], [7, 14, 20])
    assert saved_steps(tmp_path) == [20]


def test_no_evaluation_without_a_validation_split(train, tmp_path, capsys):
    assert (
        train(tmp_path, *MESH, "--config.data.validation_fraction=0", "--config.train.eval_every=5")
        == 0
    )
    assert evaluations(tmp_path) == {} and len(losses(tmp_path)) == 20
    assert not re.search("validation|eval_loss", capsys.readouterr().out)


def processes(config_file: Path, workdir: Path, *argv: str) -> list[subprocess.Popen[str]]:
    """Two processes of two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    launch = ("--cpu_devices=2", f"--coordinator={address}", "--num_processes=2")
    return [
        python(config_file, workdir, *launch, f"--process_id={index}", *argv) for index in range(2)
    ]


@pytest.mark.slow
def test_two_processes_are_one_run(train, config_file, tmp_path):
    flags = (
        "--mesh.fsdp=4",
        "--config.train.steps=8",
        "--config.checkpoint.every=4",
        "--config.train.eval_every=4",
    )
    one = python(config_file, tmp_path / "one", "--cpu_devices=4", *flags)
    one.communicate()
    pair = processes(config_file, tmp_path / "two", *flags)
    outputs = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in (one, *pair)] == [0, 0, 0], outputs
    assert "4 x cpu, 2 processes; mesh fsdp=4" in outputs[0][0]
    assert all(line.startswith("[Gloo]") for line in outputs[1][0].splitlines()), (
        "process 1 must be silent"
    )

    for values in (losses, lambda run: list(evaluations(run).values())):
        np.testing.assert_allclose(values(tmp_path / "two"), values(tmp_path / "one"), rtol=1e-5)
    assert saved_steps(tmp_path / "two") == [4, 8]
    assert (
        train(tmp_path / "two", *MESH, "--config.train.steps=10") == 0
    )  # in one process, on another mesh
    assert len(losses(tmp_path / "two")) == 10


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(config_file, tmp_path):
    pair = processes(config_file, tmp_path, "--mesh.fsdp=4", "--config.train.steps=100000")
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    pair[1].send_signal(signal.SIGTERM)  # one process is enough
    outputs = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [143, 143], outputs
    assert "stopped by signal 15" in outputs[0][0]
    assert checkpoint.complete_steps(tmp_path / "checkpoints")[-1] == max(rows(tmp_path))
