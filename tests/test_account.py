"""The account of a compiled step: alike collectives added up, and memory by parts. Whole accounts
are in test_explain.py and test_memory.py."""

from types import SimpleNamespace

import pytest
from test_buffers import ASSIGNMENT, RANGES, TEXT
from test_hlo import mesh, module

from jaxpar.config import Config, MemoryConfig
from jaxpar.estimate.hardware import find
from jaxpar.estimate.timing import collective_seconds
from jaxpar.report import account
from jaxpar.report.buffers import at_peak

GROUPS = "replica_groups={{0,1},{2,3}}, to_apply=%add"
SMALL = f"%a = f32[8]{{0}} all-reduce(%p), channel_id=1, {GROUPS}"
AGAIN = f"%b = f32[8]{{0}} all-reduce(%a), channel_id=2, {GROUPS}"
LARGE = f"%c = f32[4194304]{{0}} all-reduce(%q), channel_id=3, {GROUPS}"
ALONE = "%d = f32[8]{0} all-reduce(%p), channel_id=4, replica_groups={{0},{1},{2},{3}}"


def test_alike_collectives_are_added_up_and_the_longest_comes_first():
    h100, devices = find("h100"), mesh(data=2, tensor=2)
    large, small = account.collectives_of(module(SMALL, AGAIN, LARGE, ALONE), devices, h100)
    assert (large["size"], large["count"], large["bytes"]) == (2**24, 1, 2**24)
    assert (small["size"], small["count"], small["bytes"]) == (32, 2, 64)
    assert small["axes"] == ["tensor"] and small["op"] == "all-reduce"
    once = collective_seconds("all-reduce", 32, 2, 2, h100)
    assert small["seconds"] == pytest.approx(2 * once)


def test_no_seconds_without_hardware():
    rows = account.collectives_of(module(SMALL, LARGE), mesh(data=2, tensor=2), None)
    assert [row["seconds"] for row in rows] == [None, None]
    assert [row["bytes"] for row in rows] == [2**24, 32], "then by bytes"


def leaf(name: str, size: int, memory: str = "device") -> dict:
    return {"name": name, "bytes_per_device": size, "memory": memory}


def test_parts_add_up_to_the_peak():
    report = {
        "memory": {"arguments": 170, "peak": 300},
        "by_parameter": [
            leaf("model.embedding", 50),
            leaf("optimizer.mu.embedding", 100),
            leaf("optimizer.nu.embedding", 70, "pinned_host"),
        ],
    }
    buffers = [SimpleNamespace(part="gradients", bytes=n) for n in (60, 40)]
    found = account.parts(report, buffers)
    assert {name: size for name, size in found.items() if size} == dict(
        params=50, optimizer=100, batch=20, gradients=100, gaps=30
    )


def test_buffers_are_read_from_what_was_dumped(tmp_path):
    assert account._buffers(tmp_path, TEXT) == []
    step = "module_0.jit_train_step"
    (tmp_path / f"{step}.buffer-assignment.txt").write_text(ASSIGNMENT)
    assert account._buffers(tmp_path, TEXT) == [], "without live ranges"
    (tmp_path / f"{step}.live-range.txt").write_text(RANGES)
    assert account._buffers(tmp_path, TEXT) == at_peak(ASSIGNMENT, RANGES, TEXT) != []


def test_optimizer_state_in_host_memory_is_not_on_the_device():
    host = Config(memory=MemoryConfig(offload="optimizer,residual"))
    assert account.memory_of("optimizer.mu.embedding", host) == "pinned_host"
    assert account.memory_of("model.embedding", host) == "device"
    kept = Config(memory=MemoryConfig(offload="residual"))
    assert account.memory_of("optimizer.mu.embedding", kept) == "device"
