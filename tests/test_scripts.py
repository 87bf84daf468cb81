"""The scripts, from the command line: flags, and the benchmark of a step, whose figures are in
docs/benchmarks.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpar.estimate import hardware

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(
    path.name for path in (ROOT / "scripts").glob("*.py") if "__main__" in path.read_text()
)


def run_script(name: str, *flags: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Without jaxpar installed, from a folder of its own, and where importing jax is an error."""
    code = (
        "import sys; sys.modules['jax'] = None; "
        "sys.path[:] = [p for p in sys.path if 'jaxpar' not in p]; "
        f"sys.path[0] = {str(ROOT / 'scripts')!r}; sys.argv = {[name, *flags]!r}; "
        f"import runpy; runpy.run_path({str(ROOT / 'scripts' / name)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_jax(name, tmp_path):
    found = run_script(name, "--help", folder=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "usage: " in found.stdout or "Flags:" in found.stdout  # jaxpar's own, with the config's
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_flag_is_refused(name, tmp_path):
    needed = {"calibrate.py": f"--output={tmp_path / 'here.toml'}"}
    needed |= dict.fromkeys(("bench_step.py", "breakdown.py"), "--config=configs/tiny.py")
    found = run_script(name, needed.get(name, "--nonsense"), "--nonsense=1")
    assert found.returncode == 2 and "nonsense" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_part_of_a_page_does_not_take_its_place(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import pages

    flags = pages.page_parser("A page.", "memory.md", "some words")
    whole, part = (flags.parse_args(argv) for argv in ([], ["--only=8B"]))
    whole.page = part.page = tmp_path / "page.md"
    pages.write("all of it", whole)
    pages.write("a part", part)
    assert whole.page.read_text() == "all of it"
    assert capsys.readouterr().out == "all of it\na part\n"
    pages.write("a part", flags.parse_args(["--only=8B", f"--output={tmp_path / 'part.md'}"]))
    assert (tmp_path / "part.md").read_text() == "a part"
    assert pages.table("a | b", [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"


def test_a_word_that_no_case_has_is_refused():
    found = run_script("prediction_table.py", "--only=llama9")
    assert found.returncode == 2 and "--only=llama9 is in none of 1.3B, 124M" in found.stderr


@pytest.mark.slow
def test_a_step_is_measured_and_taken_apart(tmp_path):
    sizes = dict(vocab_size=64, dim=32, layers=2, heads=2, kv_heads=2, ffn_dim=48)
    flags = [f"--config.model.{name}={size}" for name, size in sizes.items()]
    command = [sys.executable, "scripts/bench_step.py", "--config=configs/cpu_bench.py", *flags]
    command += [
        "--config.data.sequence_length=32",
        "--contenders=jaxpar,eager",
        "--rounds=1",
        "--steps=2",
    ]
    run = subprocess.run(
        [*command, "--breakdown", f"--json={tmp_path}/out.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    ours, theirs = (result["contenders"][name] for name in ("jaxpar", "eager"))
    assert ours["ratio"] == pytest.approx(theirs["seconds"] / ours["seconds"])
    assert ours["loss"][0] == pytest.approx(
        theirs["loss"][0], rel=0.05
    )  # fresh models of one shape: near log 64
    parts = {name: seconds for name, seconds, _ in result["breakdown"]["rows"]}
    assert {"attention", "matmuls of the layers", "head and loss", "optimizer"} < parts.keys()
    assert all(
        parts[name] > 0
        for name in ("attention", "matmuls of the layers", "head and loss", "optimizer")
    )
    for text in ("jaxpar, jax ", "PyTorch, eager, torch ", "the rest", "Roofline: "):
        assert text in run.stdout


def test_mutants_change_code_and_not_what_people_read(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from mutants import mutants

    source = '''
def price(count: int, each: float = 2.5) -> float:
    """At least 1."""
    if not count:
        raise ValueError(f"count={count + 1} is below {1 + 1}")
    total = count * each if count < 10 else 0
    print("more than 1", 1 + count)
    return total
'''
    changes = [mutant.change for mutant in mutants("data/price", source)]
    assert changes == [
        "2.5  ->  5.0",
        "not count  ->  (count)",
        "count * each  ->  (count // each)",
        "count < 10  ->  (count >= 10)",
        "10  ->  20",
        "0  ->  1",
        "total  ->  None",
    ]
    for mutant in mutants("data/price", source):
        assert source.encode()[mutant.start : mutant.stop].decode() == mutant.before


def test_the_sample_of_mutants_is_spread_and_stays(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from mutants import TESTS, sample, tests_of

    chosen = sample(60, 0, "")
    assert len(chosen) == 60 and chosen == sample(60, 0, "") != sample(60, 1, "")
    assert {mutant.module for mutant in chosen} == set(TESTS)
    assert all(tests_of(module) for module in TESTS), "every module has a test file"
    assert {mutant.module for mutant in sample(5, 0, "optim")} == {"optimizer"}


@pytest.mark.slow
def test_what_calibrate_writes_is_hardware(tmp_path):
    """Its one peak is that of the dtype it measured, its attention that of runs here."""
    file = tmp_path / "here.toml"
    sizes = ["--rows=128", "--length=64", "--heads=4", "--kv_heads=2", "--head_dim=16", "--mib=1"]
    flags = [*sizes, "--document=16", "--repeats=1", "--dtype=float32", f"--output={file}"]
    command = [sys.executable, str(ROOT / "scripts" / "calibrate.py"), *flags]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "attention by XLA: it needs NVIDIA GPUs" in said and "documents of 16 tokens" in said
    found = hardware.find(str(file))
    assert list(found.peaks) == ["float32"] and found.rates.measured.startswith("20")
