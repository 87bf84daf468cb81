"""`plan`: what it ranks, why, and that the guidance of the field comes out of its arithmetic."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxpar import config_file, plan
from jaxpar.config import Config, ConfigError, MeshConfig
from jaxpar.estimate import ranking
from jaxpar.estimate.counts import parameter_count
from jaxpar.estimate.hardware import find
from jaxpar.estimate.memory import RESERVE, peak_memory, state_bytes
from jaxpar.estimate.timing import bubble_fraction, collective_seconds, members_near, step_time
from jaxpar.parallel.timetable import timetable
from jaxpar.report.gantt import svg
from jaxpar.validation import resolve

H100 = find("h100")
CONFIGS = Path(__file__).parents[1] / "configs"


def config(name: str, **groups) -> Config:
    raw = config_file.load(str(CONFIGS / f"{name}.py"))
    for group, fields in groups.items():
        raw[group].update(fields)
    return resolve(raw)


def seconds(run: Config, **mesh: int) -> float:
    """With the best number of microbatches."""
    sizes = MeshConfig(**mesh)
    counts = ranking.divisors(run.train.batch_size // sizes.batch_shards)
    runs = [
        dataclasses.replace(run, train=dataclasses.replace(run.train, microbatches=n))
        for n in counts
    ]
    return min(step_time(run, sizes, H100).total for run in runs)


@pytest.mark.parametrize("name", ["llama2_7b", "llama3_8b", "llama3_70b"])
def test_data_before_tensor_before_pipeline(name):
    """On eight GPUs of a host, one sequence a GPU."""
    run = config(name, train=dict(batch_size=8))
    by_axis = [seconds(run, data=8), seconds(run, tensor=8), seconds(run, pipeline=8)]
    assert by_axis == sorted(by_axis)
    assert seconds(run, fsdp=8) < seconds(run, tensor=8)


def test_many_microbatches_put_pipeline_before_tensor():
    """Where that guidance ends: the bubble shrinks with the microbatches, the traffic of tensor
    does not."""
    few, many = (config("llama3_8b", train=dict(batch_size=n)) for n in (8, 128))
    assert seconds(few, tensor=8) < seconds(few, pipeline=8)
    assert seconds(many, data=8) < seconds(many, pipeline=8) < seconds(many, tensor=8)


def test_pipeline_before_tensor_across_hosts():
    """Between hosts the order of the two turns around: tensor stays inside a host."""
    run = config("llama3_70b", train=dict(batch_size=256))
    inside = seconds(run, pipeline=2, fsdp=4, tensor=8)
    assert inside < seconds(run, fsdp=4, tensor=16)
    assert members_near(("tensor",), MeshConfig(fsdp=4, tensor=16), 8) == 8


def test_tensor_stays_inside_a_host():
    run = dataclasses.replace(config("llama3_70b", train=dict(batch_size=64)))
    free = dataclasses.replace(run, model=dataclasses.replace(run.model, kv_heads=64))
    ranked = ranking.best_of_each_mesh(ranking.rank(free, H100, 64))
    assert all(c.mesh.tensor <= 8 for c in ranked[:10])
    assert (
        seconds(free, fsdp=8, tensor=8)
        < seconds(free, fsdp=4, tensor=16)
        < seconds(free, fsdp=2, tensor=32)
    )


def test_sixteen_bytes_a_parameter_for_mixed_precision_adam():
    """In float32 weights, two moments and gradient sums, where nothing is sharded and the batch is
    next to nothing."""
    run = config(
        "llama2_7b", train=dict(batch_size=2, microbatches=2), data=dict(sequence_length=128)
    )
    count = parameter_count(run.model)
    assert state_bytes(run, MeshConfig())["total"] == pytest.approx(16 * count, rel=0.001)
    assert peak_memory(run, MeshConfig()).total == pytest.approx(16 * count, rel=0.02)


@pytest.mark.parametrize(
    ("name", "devices"), [("llama3_8b", 8), ("llama3_70b", 64), ("llama3_405b", 1024)]
)
def test_the_best_is_legal_fits_and_beats_the_others(name, devices):
    ranked = ranking.rank(config(name), H100, devices)
    best = ranked[0]
    assert best.fits and best.peak.total + RESERVE <= H100.memory_bytes
    assert best.mesh.devices == devices
    assert best.seconds <= 1.003 * min(c.seconds for c in ranked if c.fits)
    assert 0.2 < best.mfu(H100) < 0.8
    fits = [c.fits for c in ranked]
    assert fits == sorted(fits, reverse=True)


def test_4096_devices_in_ten_seconds():
    seconds = []
    for _ in range(
        2
    ):  # the better of two: what else runs on a core slows it, in processor time too
        begin = time.process_time()
        assert ranking.rank(config("llama3_70b", train=dict(batch_size=4096)), H100, 4096)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 10


def test_given_sizes_are_kept():
    ranked = ranking.rank(config("llama3_8b"), H100, 16, {"tensor": 4, "data": None})
    assert {c.mesh.tensor for c in ranked} == {4}
    with pytest.raises(ConfigError, match="no mesh of 7 devices is legal"):
        ranking.rank(config("llama3_8b"), H100, 7)


def test_reasons():
    ranked = ranking.best_of_each_mesh(ranking.rank(config("llama3_70b"), H100, 64))
    told = {c.mesh: plan.reason(c, ranked[0], H100) for c in ranked}
    assert "of the step is computation" in told[ranked[0].mesh]
    assert "waits for tensor=8" in told[MeshConfig(data=8, tensor=8)]
    rejected = next(c for c in ranked if not c.fits)
    assert told[rejected.mesh].startswith(f"needs {plan.gib(rejected.peak.total)} of 77.1 GiB: ")
    assert all(text and "\n" not in text for text in told.values())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    outputs = [f"--json={folder / 'plan.json'}", f"--html={folder / 'plan.html'}"]
    run = ["--config=configs/llama3_8b.py", "--hardware=h100", "--devices=8"]
    assert plan.main([*run, *outputs]) == 0
    return json.loads((folder / "plan.json").read_text()) | {
        "page": (folder / "plan.html").read_text()
    }


def test_json_has_what_the_interface_promises(report):
    first = report["candidates"][0]
    assert {
        "mesh",
        "microbatches",
        "schedule",
        "remat",
        "fits",
        "memory",
        "step_seconds",
        "mfu",
    } <= first.keys()
    assert {"bubble_fraction", "communication", "reason"} <= first.keys()
    assert {"params", "gradients", "optimizer", "activations", "logits", "total"} <= first[
        "memory"
    ].keys()
    parts = {
        name: size for name, size in first["memory"].items() if name not in ("total", "reserve")
    }
    assert sum(parts.values()) == first["memory"]["total"]
    assert len({json.dumps(row["mesh"]) for row in report["candidates"]}) == len(
        report["candidates"]
    )
    assert first["flags"] in report["page"] and "MFU" in report["page"]


def test_verified_figures_replace_predicted_ones(monkeypatch):
    ranked = ranking.best_of_each_mesh(ranking.rank(config("llama3_8b"), H100, 8))
    rows = [plan.as_json(c, ranked[0], H100) for c in ranked[:2]]
    sent = [
        dict(axes=["fsdp"], bytes=5),
        dict(axes=["fsdp"], bytes=6),
        dict(axes=["data", "sequence"], bytes=7),
    ]
    compiled = iter([90 * 2**30, 50 * 2**30])
    monkeypatch.setattr(
        plan,
        "compile_report",
        lambda *_: dict(memory=dict(peak=next(compiled), parts=dict(gaps=3)), collectives=sent),
    )
    before = rows[0]["memory"]["total"]
    plan.verify(rows, ranked, H100, 60)
    assert [row["fits"] for row in rows] == [False, True] and all(row["verified"] for row in rows)
    assert rows[0]["memory"]["total"] == 90 * 2**30 and rows[0]["predicted_total"] == before
    assert rows[0]["memory"]["gaps"] == 3
    assert rows[0]["communication"] == {"fsdp": 11, "data+sequence": 7}


def test_a_candidate_with_a_pipeline_is_compiled_as_it_is_predicted(monkeypatch):
    asked = []
    monkeypatch.setattr(
        plan, "compile_report", lambda config, mesh, *_: asked.append((config, mesh)) or dict(
            memory=dict(peak=2**30, parts={}), collectives=[]
        )
    )  # fmt: skip
    ranked = ranking.best_of_each_mesh(ranking.rank(config("llama3_8b"), H100, 8, {"pipeline": 4}))
    rows = [plan.as_json(c, ranked[0], H100) for c in ranked[:2]]
    plan.verify(rows, ranked, H100, 60)
    for (run, mesh), row in zip(asked, rows, strict=True):
        assert mesh["pipeline"] == row["mesh"]["pipeline"] == 4 and row["verified"]
        assert (run.parallel.schedule, run.parallel.chunks) == (row["schedule"], row["chunks"])
        assert (run.parallel.gather, run.train.microbatches) == (row["gather"], row["microbatches"])


def test_pipelines_are_tried_with_chunks_and_both_ways_to_gather():
    found = list(
        ranking.choices(
            config("llama3_8b", train=dict(batch_size=32)), MeshConfig(pipeline=4, fsdp=2)
        )
    )
    assert {c.parallel.chunks for c in found} == {1, 2, 4}
    assert {c.parallel.gather for c in found} == {"per_layer", "per_step"}
    assert {c.parallel.schedule for c in found} == {"1f1b"}
    assert all(c.train.microbatches % 4 == 0 for c in found if c.parallel.chunks > 1)


def test_gpipe_is_never_better():
    """At the bubble of 1f1b it holds more and sends more; which is why it is not tried."""
    mesh = MeshConfig(pipeline=4, fsdp=2)
    for count in (2, 4, 16, 64):
        run = config("llama3_8b", train=dict(batch_size=2 * count, microbatches=count))
        gpipe = dataclasses.replace(
            run, parallel=dataclasses.replace(run.parallel, schedule="gpipe")
        )
        assert peak_memory(gpipe, mesh).total > peak_memory(run, mesh).total
        assert step_time(gpipe, mesh, H100).total >= step_time(run, mesh, H100).total


def test_timetable(tmp_path, capsys):
    run = ["--config=configs/llama3_8b.py", "--hardware=h100", "--devices=8", "--top=1"]
    output = tmp_path / "out.svg"
    own = ["--mesh.pipeline=4", "--config.train.microbatches=8", "--config.parallel.chunks=2"]
    assert plan.main([*run, *own, f"--timetable={output}", f"--html={tmp_path / 'own.html'}"]) == 0
    assert output.read_text() == svg(timetable("1f1b", 4, 8, 2), "1f1b")
    assert "timetable of the config's own pipeline=4 with 8 microbatches" in capsys.readouterr().out
    assert output.read_text() in (tmp_path / "own.html").read_text()
    assert plan.main([*run, f"--timetable={output}"]) == 0
    assert "timetable of the best pipelined mesh, number" in capsys.readouterr().out
    assert "<svg" in output.read_text() and "bubble" in output.read_text()
    with pytest.raises(ConfigError, match="no legal mesh of these devices has a pipeline"):
        plan.main([*run[:2], "--devices=1", f"--timetable={output}"])
    with pytest.raises(
        ConfigError, match=r"train.microbatches=2 is not divisible by mesh.pipeline=4"
    ):
        plan.main(
            [
                *run,
                "--mesh.pipeline=4",
                "--config.train.microbatches=2",
                own[2],
                f"--timetable={output}",
            ]
        )


def test_the_table_fits_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for name, gpu, devices in (("llama3_70b", "h100", 64), ("tiny", "a40", 2)):
        plan.main([f"--config=configs/{name}.py", f"--hardware={gpu}", f"--devices={devices}"])
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80 and "…" not in out
        assert "0.00 s" not in out and "start the first with:" in out


def test_what_is_illegal_and_how_many_devices_are_enough(monkeypatch, capsys):
    rules = ranking.illegal(config("llama3_70b"), 64, {})
    assert any("kv_heads=8" in rule and "use mesh.tensor in {1, 2, 4, 8}" in rule for rule in rules)
    legal = {c.mesh for c in ranking.rank(config("llama3_70b"), H100, 64)}
    assert sum(map(len, rules.values())) + len(legal) == len(list(ranking.meshes(64, {})))
    monkeypatch.setenv("COLUMNS", "200")
    assert (
        plan.main(["--config=configs/llama3_70b.py", "--hardware=h100", "--devices=8", "--top=1"])
        == 1
    )
    out = capsys.readouterr().out
    assert "no mesh fits" in out and "--devices=16 is enough, with " in out


def test_help_comes_at_once_and_without_jax():
    begin = time.perf_counter()
    code = "import sys; from jaxpar import plan\ntry: plan.main(['--help'])\n"
    code += "finally: assert 'jax' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "--verify_top" in run.stdout, run.stderr
    assert time.perf_counter() - begin < 3  # a third of a second, where the machine is not busy


def test_bad_requests():
    run = ["--config=configs/llama3_8b.py", "--devices=8"]
    with pytest.raises(ConfigError, match=r"--hardware is missing"):
        plan.main(run)
    with pytest.raises(ConfigError, match=r"--hardware=v100 is neither known .* Known: a40"):
        plan.main([*run, "--hardware=v100"])
    with pytest.raises(ConfigError, match=r"--devices=0 must be at least 1"):
        plan.main([*run[:1], "--devices=0", "--hardware=h100"])


def test_bubble_and_collectives_by_hand():
    assert bubble_fraction(8, 4) == pytest.approx(3 / 11)
    assert bubble_fraction(8, 4, 2) == pytest.approx(3 / 19)
    near, far = (collective_seconds("all-gather", 8e9, 8, n, H100) for n in (8, 1))
    assert near == pytest.approx(7 / 8 * 8e9 / (0.8 * 450e9), rel=0.01)
    assert far == pytest.approx(7 / 8 * 8e9 / (0.8 * 50e9), rel=0.01)
    assert collective_seconds("all-reduce", 8e9, 8, 8, H100) == pytest.approx(2 * near, rel=0.01)


def test_groups_inside_hosts():
    mesh = MeshConfig(data=4, fsdp=4, tensor=4)
    assert members_near(("tensor",), mesh, 8) == 4
    assert members_near(("fsdp",), mesh, 8) == 2
    assert members_near(("data",), mesh, 8) == 1
    assert members_near(("fsdp", "tensor"), mesh, 8) == 8
