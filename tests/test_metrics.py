"""Rows, their clock, what a resume drops, and the lines that people read."""

import dataclasses
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxpar import metrics
from jaxpar.config import Config, LogConfig, MeshConfig, TrainConfig
from jaxpar.estimate import counts
from jaxpar.metrics import Metrics

ONE = MeshConfig()
TOKENS = 8 * 256  # of a step


def config_of(steps: int = 6, **log) -> Config:
    return Config(train=TrainConfig(steps=steps, batch_size=8), log=LogConfig(**log))


def values_of(loss: float, skipped: int = 0) -> dict:
    return {
        "loss": jnp.float32(loss),
        "grad_norm": jnp.float32(0.5),
        "learning_rate": jnp.float32(3e-4),
        "skipped": jnp.int32(skipped),
        "gradient_norms": {"head": jnp.ones((4,))},
    }


def rows_of(workdir: Path) -> list[dict]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


class FakeTime:
    """Stands in for the `time` module; time passes when a test says so."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return 1e9 + self.now

    def strftime(self, _: str) -> str:
        return "12:00:00"


@pytest.fixture
def clock(monkeypatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(metrics, "time", fake)
    return fake


@pytest.fixture
def h100(monkeypatch):
    """A device of a known kind that counts its memory."""

    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

        def memory_stats(self):
            return {"peak_bytes_in_use": 7 * 2**30}

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(), Device()])


def test_rows_hold_every_field_and_are_read_one_step_late(tmp_path, clock):
    with Metrics(tmp_path, config_of(steps=5, every=2), ONE) as writer:
        for step in range(1, 6):
            finished = writer.step(step, values_of(loss=step))
            assert (finished is None) == (step == 1)
            if finished:
                assert (finished["loss"], finished["gradient_norms"]["head"].shape) == (
                    step - 1,
                    (4,),
                )
            clock.now += 2.0
            assert [row["step"] for row in rows_of(tmp_path)] == [s for s in (2, 4) if s < step]
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 5]  # the last step of the run always has one
    assert rows[1] == {
        "step": 4,
        "time": 1e9 + 108.0,
        "loss": 4.0,
        "grad_norm": 0.5,
        "learning_rate": pytest.approx(3e-4),
        "skipped": 0,
        "epoch": None,
        "tokens": 4 * TOKENS,
        "tokens_per_second": TOKENS / 2,
        "step_seconds": 2.0,
        "data_wait_seconds": 0.0,
        "mfu": None,
        "peak_bytes": None,
    }


def test_compilation_evaluation_and_checkpoints_are_not_timed(tmp_path, clock):
    def batches():
        for _ in range(6):
            clock.now += 0.25
            yield None

    with Metrics(tmp_path, config_of(every=3), ONE) as writer:
        with writer.untimed():
            # an evaluation before the first step must not put its compilation on the clock
            clock.now += 1000.0
        for step, _ in enumerate(writer.watch(batches()), start=1):
            clock.now += 500.0 if step == 1 else 0.75
            writer.step(step, values_of(1.0))
            if step == 4:
                with writer.untimed():
                    clock.now += 100.0
                    writer.evaluation(step, jnp.float32(2.0))
    train = [row for row in rows_of(tmp_path) if "loss" in row]
    assert [row["step_seconds"] for row in train] == [
        1.0,
        pytest.approx(2 / 3),
    ]  # 4 dispatched in no time, 5, 6
    assert train[0]["data_wait_seconds"] == 0.25


def test_an_evaluation_has_its_own_row(tmp_path):
    with Metrics(tmp_path, config_of(), ONE) as writer:
        writer.evaluation(3, 2.0)
        writer.evaluation(4, 1000.0)
    rows = rows_of(tmp_path)
    assert all(abs(row.pop("time") - time.time()) < 60 for row in rows)
    assert rows == [
        {"step": 3, "eval_loss": 2.0, "eval_perplexity": pytest.approx(math.exp(2))},
        {"step": 4, "eval_loss": 1000.0, "eval_perplexity": None},
    ]


def test_padding_is_not_counted(tmp_path, clock, h100):
    """Of batches with 100, 300, 200 and 400 tokens, after a run that saw 1000 in 4 batches of 8."""
    config = config_of(steps=8, every=2)
    position = dict(start_step=4, start_samples=32, start_tokens=1000)
    with Metrics(tmp_path, config, ONE, **position, windows=64) as writer:
        for step, tokens in ((5, 100), (6, 300), (7, 200), (8, 400)):
            writer.step(step, values_of(1.0), tokens)
            assert writer.tokens == {5: 1100, 6: 1400, 7: 1600, 8: 2000}[step]
            clock.now += 0.5
    first, second = rows_of(tmp_path)
    assert (first["tokens"], second["tokens"]) == (1400, 2000)
    assert (first["epoch"], second["epoch"]) == (48 / 64, 1.0)
    assert (first["tokens_per_second"], second["tokens_per_second"]) == (600, 600)
    flops = counts.step_flops(config).per_step / TOKENS
    assert second["mfu"] == pytest.approx(flops * 600 / 989.4e12)


def test_what_is_not_finite_is_null(tmp_path):
    with Metrics(tmp_path, config_of(every=1), ONE) as writer:
        writer.step(1, values_of(float("nan"), skipped=1))
        writer.step(2, values_of(float("inf"), skipped=2))
    assert [(row["loss"], row["skipped"]) for row in rows_of(tmp_path)] == [(None, 1), (None, 2)]


def test_mfu_and_memory_where_the_hardware_tells(tmp_path, clock, h100):
    config, mesh = config_of(steps=2, every=1), MeshConfig(data=4)
    with Metrics(tmp_path, config, mesh) as writer:
        for step in (1, 2):
            writer.step(step, values_of(1.0))
            writer.flush()
            clock.now += 0.1
        writer.step(3, values_of(1.0))
    row = rows_of(tmp_path)[1]
    assert row["mfu"] == pytest.approx(counts.step_flops(config).per_step / (0.1 * 4 * 989.4e12))
    assert row["peak_bytes"] == 7 * 2**30


def test_a_resume_drops_the_rows_of_the_lost_attempt(tmp_path):
    with Metrics(tmp_path, config_of(every=1), ONE) as writer:
        for step in (1, 2, 3, 4):
            writer.step(step, values_of(step))
        writer.flush()
        writer.evaluation(2, 1.0)
        writer.evaluation(4, 1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')  # a kill in the middle of a line
    with Metrics(tmp_path, config_of(every=1), ONE, start_step=2) as writer:
        assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 2]
        writer.step(3, values_of(33))
    assert [row.get("loss") for row in rows_of(tmp_path)] == [1, 2, None, 33]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    Metrics(tmp_path, config_of(), ONE).close()
    assert rows_of(tmp_path) == []


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    metrics.write_config(tmp_path, Config(), ONE)
    with Metrics(tmp_path, config_of(every=1, tensorboard=True), ONE) as writer:
        writer.step(1, values_of(1.0))
        assert writer.step(2, values_of(2.0)) is not None
        writer.evaluation(2, 1.0)
        writer.line("hello")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_plain_lines(tmp_path, clock, capsys, h100):
    with Metrics(tmp_path, config_of(steps=600, every=2), ONE, windows=16, began=40.0) as writer:
        for step in range(1, 5):
            writer.step(step, values_of(math.pi, skipped=step // 4))
            clock.now += 0.5
        writer.flush()
        writer.evaluation(4, 2.0)
        writer.checkpoint(4, Path("run/checkpoints/4"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "12:00:00  step 2/600  loss 3.1416  grad_norm 0.50  lr 3.0e-04  epoch 1.00  4,096 tokens/s"
        "  mfu "
    )
    assert lines[0].endswith("%  elapsed 1:01  eta 4:59")
    assert "  skipped 1  elapsed 1:02  eta 4:58" in lines[1]
    assert lines[2:] == [
        "12:00:00  step 4/600  eval_loss 2.0000  ppl 7.39",
        "12:00:00  step 4/600  checkpoint run/checkpoints/4  (written in the background)",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_what_takes_its_time_is_announced(clock, capsys, monkeypatch, terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    with metrics.announced("compiling"):
        if not terminal:
            assert capsys.readouterr().out == "12:00:00  compiling ...\n"
        clock.now += 12.5
    assert "12:00:00  compiling took 12.5 s\n" in capsys.readouterr().out
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with metrics.announced("compiling"):
        pass
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "0:05"), (83.4, "1:23"), (7283, "2:01:23"), (266483, "3 d 2:01:23")]
)
def test_durations(seconds, text):
    assert metrics._duration(seconds) == text


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_on_a_terminal_unless_it_is_switched_off(
    tmp_path, clock, capsys, monkeypatch, progress
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with Metrics(
        tmp_path, config_of(steps=4, every=1, progress=progress), ONE, start_step=1
    ) as writer:
        for step in (2, 3, 4):
            writer.step(step, values_of(1.5))
            clock.now += 1.0
        writer.evaluation(4, 2.0)
    out = capsys.readouterr().out
    assert ("step 3/4  loss" in out) != progress
    assert ("4/4" in out) and "eval_loss 2.0000" in out and "2,048 tokens/s" in out


def test_tensorboard(tmp_path):
    with Metrics(tmp_path, config_of(every=1, tensorboard=True), ONE) as writer:
        writer.step(1, values_of(1.0))
        writer.flush()
        writer.evaluation(1, 2.0)
    (events,) = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes()
    assert b"train/loss" in written and b"eval/loss" in written


def test_config_json(tmp_path):
    mesh = MeshConfig(data=2, tensor=4)
    metrics.write_config(tmp_path / "new", Config(), mesh)
    content = json.loads((tmp_path / "new" / "config.json").read_text())
    assert content["mesh"] == {
        "pipeline": 1,
        "data": 2,
        "fsdp": 1,
        "expert": 1,
        "sequence": 1,
        "tensor": 4,
    }
    assert set(content["versions"]) == {
        "jaxpar",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax",
        "python",
    }
    assert content["versions"]["jax"] == jax.__version__
    assert content["devices"] == {"kind": "cpu", "count": 8, "processes": 1}
    assert {group: content[group] for group in dataclasses.asdict(Config())} == dataclasses.asdict(
        Config()
    )
