"""The benchmark of a step, from the command line; what it measures is in docs/benchmarks.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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


def test_mutants_change_code_and_not_what_people_read():
    from scripts.mutants import mutants

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


def test_the_sample_of_mutants_is_spread_and_stays():
    from scripts.mutants import TESTS, sample, tests_of

    chosen = sample(60, 0, "")
    assert len(chosen) == 60 and chosen == sample(60, 0, "") != sample(60, 1, "")
    assert {mutant.module for mutant in chosen} == set(TESTS)
    assert all(tests_of(module) for module in TESTS), "every module has a test file"
    assert {mutant.module for mutant in sample(5, 0, "optim")} == {"optimizer"}
