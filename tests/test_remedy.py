"""What is said when memory runs out: by `train` when it happens, and the order of what would
help."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from jaxpar import train
from jaxpar.config import MeshConfig, configure
from jaxpar.estimate import remedy
from jaxpar.estimate.hardware import find
from jaxpar.estimate.memory import RESERVE, human, peak_memory
from jaxpar.estimate.ranking import Pins
from jaxpar.estimate.timing import step_time
from jaxpar.validation import resolve, validate_mesh

H100 = find("h100")
ROOM = H100.memory_bytes - RESERVE
LARGE = dict(vocab_size=128256, dim=4096, layers=32, heads=32, kv_heads=8, ffn_dim=14336)


def large(**groups):
    base = dict(model=LARGE, data=dict(sequence_length=8192), train=dict(batch_size=64))
    return resolve(configure(**(base | groups)))


def test_train_that_runs_out_of_memory_says_what_fills_it(tmp_path, monkeypatch, capsys):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes.\nmore"
        )

    monkeypatch.setattr(train, "train", exhausted)
    flags = ["--config=configs/tiny.py", "--config.train.batch_size=16", "--mesh.fsdp=8"]
    assert train.main([*flags, f"--workdir={tmp_path / 'run'}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: a device ran out of memory. By arithmetic, a step needs ")
    assert "most of it for " in said
    assert f"python -m jaxpar.explain {' '.join(flags)}\n" in said
    assert "what should fit, the fastest first:\n  --" in said
    assert (
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes.\n" in said
        and "more" not in said
    )


def test_other_failures_stay_what_they_are(tmp_path, monkeypatch):
    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(train, "train", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        train.main(["--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}"])


def test_changes_fit_are_legal_and_come_cheapest_first():
    run, mesh = large(), MeshConfig(fsdp=8)
    assert peak_memory(run, mesh).total > ROOM
    found = remedy.changes(run, mesh, H100, room=ROOM)
    assert len(found) > 5
    assert [change.seconds for change in found] == sorted(change.seconds for change in found)
    for change in found:
        validate_mesh(change.config, change.mesh)
        assert peak_memory(change.config, change.mesh).total <= ROOM and change.mesh.devices == 8
        assert change.seconds == step_time(change.config, change.mesh, H100).total
    assert any("memory.remat" in change.flags for change in found)
    assert any("microbatches" in change.flags and "mesh" not in change.flags for change in found)


def test_flags_make_the_change():
    run, mesh = large(memory=dict(remat="none")), MeshConfig(data=2, fsdp=4)
    for change in remedy.changes(run, mesh, H100, room=ROOM)[:20]:
        groups, sizes = dataclasses.asdict(run), dataclasses.asdict(mesh)
        for flag in change.flags.split():
            path, value = flag.removeprefix("--").split("=")
            kind, group, *name = path.split(".")
            if kind == "mesh":
                sizes[group] = int(value)
            else:
                groups[group][name[0]] = type(groups[group][name[0]])(value)
        assert groups == dataclasses.asdict(change.config) and MeshConfig(**sizes) == change.mesh


def test_a_compiled_peak_corrects_the_prediction():
    run, mesh = large(), MeshConfig(fsdp=8)
    plain = remedy.changes(run, mesh, H100, room=ROOM)
    corrected = remedy.changes(run, mesh, H100, room=ROOM, scale=1.5)
    for found, scale in ((plain, 1), (corrected, 1.5)):
        for change in found:
            assert change.predicted == int(scale * peak_memory(change.config, change.mesh).total)
    assert {change.flags for change in corrected} < {change.flags for change in plain}


@pytest.mark.parametrize("missing", [0.5, 1.25])
def test_a_peak_that_was_reached_corrects_the_prediction_upwards_alone(missing):
    """A device that ran out of more than was predicted needs more; one that is too small needs
    what was predicted."""
    run, mesh = large(), MeshConfig(fsdp=8)
    room = int(missing * peak_memory(run, mesh).total)
    device = SimpleNamespace(
        device_kind="NVIDIA H100 80GB HBM3", memory_stats=lambda: {"bytes_limit": room}
    )
    said = remedy.out_of_memory(run, mesh, device, [])
    first, *_ = remedy.changes(run, mesh, H100, room=room, scale=max(1.0, missing))
    assert (
        f"what should fit, the fastest first:\n  {first.flags}  ({human(first.predicted)})" in said
    )


def test_what_is_named_is_kept_where_that_fits():
    run, mesh = large(memory=dict(remat="none")), MeshConfig(fsdp=8)
    named = Pins({"fsdp": 8, "tensor": 1}, frozenset({"memory.remat"}))
    found = remedy.changes(run, mesh, H100, room=ROOM, pins=named)
    assert found and all(change.config.memory.remat == "none" for change in found)
    assert all((change.mesh.fsdp, change.mesh.tensor) == (8, 1) for change in found)
    # Nothing fits that keeps this; so something else is told.
    all_of_it = Pins({"fsdp": 8}, frozenset({"memory.remat", "train.microbatches"}))
    other = remedy.changes(run, mesh, H100, room=ROOM, pins=all_of_it)
    assert [c.flags for c in other] == [c.flags for c in remedy.changes(run, mesh, H100, room=ROOM)]
