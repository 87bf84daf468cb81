"""`plan`: what it says of the candidates, what it prints and writes, and what it compiles."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
from test_timing import H100, bundled

from jaxpar import cli, plan
from jaxpar.config import ConfigError, MeshConfig
from jaxpar.estimate import ranking
from jaxpar.estimate.memory import PART_NAMES
from jaxpar.estimate.ranking import ANY, Candidate, Pins
from jaxpar.parallel.timetable import timetable
from jaxpar.report.apart import CompileFailed
from jaxpar.report.gantt import svg
from jaxpar.validation import resolve_mesh


def best(name: str, devices: int, pins: Pins = ANY, **groups) -> list[Candidate]:
    return ranking.best_of_each_mesh(ranking.rank(bundled(name, **groups), H100, devices, pins))


def test_reasons():
    ranked = best("llama3_70b", 64)
    told = {c.mesh: plan.reason(c, ranked[0], H100) for c in ranked}
    assert "of the step is computation" in told[ranked[0].mesh]
    assert "waits for tensor=8" in told[MeshConfig(data=8, tensor=8)]
    rejected = next(c for c in ranked if not c.fits)
    assert told[rejected.mesh].startswith(f"needs {plan.gib(rejected.peak.total)} of 77.1 GiB: ")
    assert all(text and "\n" not in text for text in told.values())


def test_reasons_say_what_the_times_say():
    """Of one candidate and others that differ from it in one thing."""
    first = best("llama3_8b", 8, Pins({"fsdp": 8}))[0]
    assert "GiB to spare" in plan.reason(first, first, H100)
    assert "beside it" in plan.reason(first, first, H100)

    def told(overlaps: bool = True, **times) -> str:
        time = dataclasses.replace(first.time, **times)
        other = dataclasses.replace(first, overlaps=overlaps)
        vars(other)["time"] = time
        return plan.reason(other, first, H100)

    second, tenth = first.seconds, first.seconds / 10
    matmul = first.time.matmul
    assert told(exposed={"fsdp": tenth}).endswith(f"waits for fsdp=8 (+{plan.duration(tenth)})")
    assert "multiplies narrower matrices (+" in told(matmul=matmul + tenth)
    again = told(matmul=matmul + tenth, again=first.time.again + tenth)
    assert "computes more a second time (+" in again and "narrower" not in again
    assert "stages idle (+" in told(bubble=second) and told(bubble=second).startswith("100.0% slow")
    assert "memory is too full for the compiler" in told(overlaps=False, exposed={"fsdp": tenth})


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
    assert all(flag in report["page"] for flag in first["flags"].split())
    assert "MFU" in report["page"]


# A compiled step in place of the compiler.


def parts(total: int) -> dict[str, int]:
    """Parts of memory that add up, some of them gaps."""
    return dict.fromkeys(PART_NAMES, 0) | {"params": total - 3, "gaps": 3}


def row(axes: str, size: int, seconds: float, *, asynchronous: bool = True) -> dict:
    return dict(
        axes=axes.split("+"),
        bytes=size,
        seconds=seconds,
        asynchronous=asynchronous,
        op="all-gather",
    )


@pytest.fixture
def compiler(monkeypatch):
    """Answers with what is in the list, and notes what was asked."""
    answers, asked = [], []

    def answer(config, mesh, *_):
        asked.append((config, mesh))
        if isinstance(answers[0], Exception):
            raise answers.pop(0)
        total, sent = answers.pop(0)
        return dict(memory=dict(peak=total, parts=parts(total)), collectives=sent)

    monkeypatch.setattr(plan, "compile_report", answer)
    return answers, asked


def test_verified_figures_replace_predicted_ones(compiler):
    ranked, (answers, asked) = best("llama3_8b", 8), compiler
    sent = [row("fsdp", 5, 1.0), row("fsdp", 6, 3.0, asynchronous=False), row("data+fsdp", 7, 1.0)]
    answers += [(90 * 2**30, []), (50 * 2**30, sent)] + 2 * [(40 * 2**30, [])]
    found, told = plan.verify(ranked, H100, 2, 60)
    # The first does not fit and the second waits, so two more were compiled.
    assert [mesh for _, mesh in asked] == [c.mesh for c in ranked[:4]]
    assert found == sorted(found, key=ranking.order)
    first, second, third = (next(c for c in found if c.mesh == r.mesh) for r in ranked[:3])
    assert not first.fits and first.peak.total == 90 * 2**30 and first.peak.gaps == 3
    assert told[first.mesh]["predicted_total"] == ranked[0].peak.total
    assert second.fits and third.fits and found.index(third) < found.index(second)
    assert told[second.mesh]["communication"] == {"fsdp": 11, "data+fsdp": 7}
    assert told[second.mesh]["synchronous"] == {"fsdp": 0.75}
    rows = [plan.as_json(c, found[0], H100) | told.get(c.mesh, {}) for c in found]
    assert [r["verified"] for r in rows[:2]] == [True, True]
    verified = next(r for r in rows if r["mesh"] == dataclasses.asdict(first.mesh))
    assert verified["reason"].startswith("needs 90.0 of 77.1 GiB: parameters 90.0")


def test_what_the_compiler_does_not_overlap_is_waited_for(compiler):
    """Time, order and reason are renewed."""
    ranked, (answers, _) = best("llama3_8b", 8, Pins({"fsdp": 8})), compiler
    before = ranked[0]
    assert before.time.hidden["fsdp"] > 0.1 * before.seconds
    answers.append((40 * 2**30, [row("fsdp", 5, 2.0, asynchronous=False)]))
    (found,), told = plan.verify(ranked, H100, 1, 60)
    assert found.time.hidden["fsdp"] == 0.0 and told[found.mesh]["synchronous"] == {"fsdp": 1.0}
    waited = before.time.hidden["fsdp"]
    assert found.seconds == pytest.approx(before.seconds + waited)
    assert told[found.mesh]["predicted_seconds"] == before.seconds
    said = plan.reason(found, found, H100)
    assert f"{plan.duration(sum(found.time.exposed.values()))} of traffic are waited for" in said
    assert "beside it" not in said and "37.1 GiB to spare" in said


def test_what_cannot_be_compiled_says_so(compiler):
    ranked, (answers, asked) = best("llama3_8b", 8), compiler
    answers += [CompileFailed("it crashed"), (2**30, [])]
    found, told = plan.verify(ranked, H100, 2, 60)
    assert found[1].mesh == ranked[0].mesh or found[0].mesh == ranked[0].mesh
    assert told[ranked[0].mesh] == {"reason": "could not be compiled: it crashed"}
    assert len(asked) == 2 and told[ranked[1].mesh]["verified"]


def test_a_candidate_with_a_pipeline_is_compiled_as_it_is_predicted(compiler):
    answers, asked = compiler
    ranked = best("llama3_8b", 8, Pins({"pipeline": 4}))
    answers += [(2**30, []), (2**30, [])]
    plan.verify(ranked, H100, 2, 60)
    assert asked == [(c.config, c.mesh) for c in ranked[:2]]
    assert all(mesh.pipeline == 4 for _, mesh in asked)


# The command.


def test_timetable(tmp_path, capsys):
    run = ["--config=configs/llama3_8b.py", "--hardware=h100", "--devices=8", "--top=1"]
    output = tmp_path / "out.svg"
    own = ["--mesh.pipeline=4", "--config.train.microbatches=8", "--config.parallel.chunks=2"]
    own += ["--config.train.batch_size=32"]
    assert plan.main([*run, *own, f"--timetable={output}", f"--html={tmp_path / 'own.html'}"]) == 0
    assert output.read_text() == svg(timetable("1f1b", 4, 8, 2), "1f1b")
    said = capsys.readouterr().out
    assert "timetable of the best pipelined mesh, number 1: pipeline=4" in said
    assert "with 8 microbatches" in said and "--config.parallel.chunks=2" in said
    assert output.read_text() in (tmp_path / "own.html").read_text()
    with pytest.raises(ConfigError, match="no legal mesh of these devices has a pipeline"):
        plan.main([*run[:2], "--devices=1", f"--timetable={output}"])
    with pytest.raises(
        ConfigError, match=r"train.microbatches=2 is not divisible by mesh.pipeline=4"
    ):
        plan.main([*run, *own, "--config.train.microbatches=2"])


@pytest.mark.parametrize("columns", [60, 80])
def test_what_is_printed_fits_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    for name, gpu, devices in (("llama3_8b", "h100", 8), ("tiny", "a40", 2)):
        plan.main([f"--config=configs/{name}.py", f"--hardware={gpu}", f"--devices={devices}"])
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= columns and "…" not in out
        assert "0.00 s" not in out
        assert "start the first with:\n  python -m jaxpar.train" in out


def test_what_is_named_is_kept_and_printed(capsys):
    """With the batch that is recommended for it, and an axis of 1."""
    run = ["--config=configs/llama3_8b.py", "--hardware=h100", "--devices=8", "--mesh.fsdp=8"]
    own = ["--mesh.tensor=1", "--config.train.batch_size=64", "--config.train.microbatches=8"]
    assert plan.main([*run, *own]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 legal meshes fit" in out
    command = out.partition("start the first with:\n  python -m jaxpar.train \\\n")[2]
    flags = command.replace("\\\n", " ").split()
    assert set(flags) > {*own, run[0], "--mesh.fsdp=8"}
    request = cli.parse(flags, "")
    assert request.config.train.batch_size == 64 and request.config.train.microbatches == 8
    assert resolve_mesh(request.mesh, 8) == MeshConfig(fsdp=8)


def test_fields_of_the_file_that_are_searched_contradict_nothing(tmp_path, capsys):
    """train.microbatches=8 of the file, and a batch of 4 on the command line."""
    file = tmp_path / "own.py"
    file.write_text(
        "from jaxpar.config import configure\n\n\ndef get_config():\n"
        "    return configure(train=dict(batch_size=64, microbatches=8), parallel=dict(chunks=3))\n"
    )
    run = [f"--config={file}", "--hardware=h100", "--devices=2", "--config.train.batch_size=4"]
    assert plan.main(run) == 0 and "--config.train.batch_size=4" in capsys.readouterr().out


def test_how_many_devices_are_enough(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    run = ["--config=configs/llama3_70b.py", "--hardware=h100", "--devices=8", "--top=1"]
    assert plan.main([*run, "--mesh.tensor=1"]) == 1
    out = capsys.readouterr().out
    assert "no mesh fits and keeps what is named;\nuse more devices" in out
    assert "--devices=16 is enough, with " in out and "    --mesh.tensor=1 " in out


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
