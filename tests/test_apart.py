"""The process in which a step is compiled: how it is started, and what becomes of what it says."""

import sys
from pathlib import Path

import pytest

from jaxpar.config import Config, ConfigError, MeshConfig
from jaxpar.estimate.hardware import find
from jaxpar.report import apart
from jaxpar.report.apart import CompileFailed, Target, plain_warnings, run_apart

NOWHERE = Target()


def answer(code: str, timeout: float = 60.0, target: Target = NOWHERE):
    return run_apart(["-c", f"import json, os, sys\n{code}"], {"n": 2}, target, timeout)


def test_the_answer_is_the_last_line():
    found, said = answer(
        "n = json.load(sys.stdin)['n']\nprint('more', n)\n"
        "print(json.dumps({'n': n, 'python': sys.executable}))\nprint('told', file=sys.stderr)"
    )
    assert found == {"n": 2, "python": sys.executable} and said == "told\n"


def test_a_refusal_is_passed_on():
    with pytest.raises(ConfigError, match=r"^mesh\.fsdp=3 is too many$"):
        answer("print('error: mesh.fsdp=3 is too many', file=sys.stderr); sys.exit(2)")


def test_a_crash_says_what_was_said_last():
    words = "for n in range(20): print(n, file=sys.stderr)\n"
    words += "print('W0 cuda drivers', file=sys.stderr)\n"
    with pytest.raises(CompileFailed) as caught:
        answer(words + "sys.exit(2)")  # 2, but no refusal
    told = str(caught.value).splitlines()
    assert told[0] == "the compiler's process failed with code 2; it said last:"
    assert [line.strip() for line in told[1:]] == [str(n) for n in range(12, 20)]
    with pytest.raises(CompileFailed, match="was ended by signal 6"):
        answer("os.abort()")


def test_what_takes_too_long_is_stopped():
    with pytest.raises(CompileFailed, match=r"longer than --timeout=0\.2 s"):
        answer("import time; time.sleep(60)", timeout=0.2)


@pytest.mark.parametrize(
    ("target", "platforms"),
    [
        (Target(find("h100"), "1x1x8"), "cpu"),
        (Target(cpu_devices=8), "cpu"),
        (NOWHERE, "elsewhere"),
    ],
)
def test_what_the_process_is_given(target, platforms, monkeypatch):
    """A platform without devices where they are absent or simulated; flags, a dump, no cache; and
    the GPU compiler only where it is asked for, because jax finds it wherever it can."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_before=1")
    monkeypatch.setenv("JAX_PLATFORMS", "elsewhere")
    found = apart._environment(target, "/dump", ["xla_more=2"])
    assert found["JAX_PLATFORMS"] == platforms and found["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    assert found["XLA_FLAGS"].startswith("--xla_before=1 --xla_more=2 --xla_dump_to=/dump ")
    compiler = str(Path(sys.prefix) / "gpu-compiler")
    assert found["PYTHONPATH"].endswith(compiler) == bool(target.hardware)


def test_devices_are_known_before_jax_starts():
    assert Target(find("h100"), "2x4x8").devices == 64
    assert Target.absent("h100", 16).devices == 16
    assert Target(cpu_devices=6).devices == 6 and NOWHERE.devices is None


def test_hardware_without_a_description_is_refused():
    import dataclasses

    bare = Target(dataclasses.replace(find("h100"), target=""), "1x1x1")
    with pytest.raises(ConfigError, match="h100 has no target description"):
        apart.compile_report(Config(), MeshConfig(), bare)


def test_warnings_in_plain_words_each_once():
    said = """\
E0101 12:00:00.000000 1 cudart_stub.cc:31] Could not find cuda drivers on your machine.
W0101 12:00:00.000000 1 hlo_rematerialization.cc:3] Can't reduce memory use below 60.50 GiB \
(64961379328 bytes) by rematerialization; only reduced to 75.2GiB (1 bytes), down from 76GiB
E0101 12:00:00.000000 1 spmd_partitioner.cc:6] [SPMD] Involuntary full rematerialization. The \
compiler cannot go from sharding {devices=[2,1]<=[2]} to {devices=[1,2]<=[2]} efficiently.
W0101 12:00:00.000000 1 some.cc:1] an unknown warning
W0101 12:00:00.000000 1 some.cc:1] an unknown warning
I0101 12:00:00.000000 1 some.cc:1] nothing to warn of
"""
    below, moved, unknown = plain_warnings(said)
    assert "aims to stay below 60.50 GiB" in below and "get below 75.2GiB" in below
    assert "from sharding {devices=[2,1]<=[2]} to {devices=[1,2]<=[2]}" in moved
    assert unknown == "an unknown warning"
