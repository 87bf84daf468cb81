"""The candidates: in which order, that they are legal, that what is named is kept, and that the
advice is accepted by `train`."""

import dataclasses
import math
import random
import time
from pathlib import Path

import pytest
from test_timing import H100, bundled

from jaxpar import cli
from jaxpar.config import AXES, ConfigError, MeshConfig
from jaxpar.estimate import ranking
from jaxpar.estimate.counts import parameter_count
from jaxpar.estimate.memory import RESERVE, peak_memory, state_bytes
from jaxpar.estimate.ranking import ANY, SEARCHED, Pins, rank
from jaxpar.estimate.timing import overlap_room, step_time
from jaxpar.validation import resolve_mesh, validate_mesh

CONFIGS = Path(__file__).parents[1] / "configs"


def held(peak) -> int:
    return peak.params + peak.optimizer + peak.batch


def test_nothing_is_pinned_by_default():
    assert ANY.flags(bundled("tiny")) == [] and ANY.sizes == {}
    assert Pins({"data": -1, "fsdp": None, "tensor": 2}).sizes == {"tensor": 2}


# --- Order.


@pytest.mark.parametrize(
    ("name", "devices"), [("llama3_8b", 8), ("llama3_70b", 64), ("llama3_405b", 1024)]
)
def test_the_best_is_legal_fits_and_beats_the_others(name, devices):
    ranked = rank(bundled(name), H100, devices)
    best = ranked[0]
    assert best.fits and best.peak.total + RESERVE <= H100.memory_bytes
    assert best.mesh.devices == devices
    assert best.seconds <= 1.003 * min(c.seconds for c in ranked if c.fits)
    assert 0.2 < best.mfu(H100) < 0.8
    fits = [c.fits for c in ranked]
    assert fits == sorted(fits, reverse=True)
    smallest = [c.peak.total for c in ranked if not c.fits]
    assert smallest == sorted(smallest)


def test_of_equal_times_the_smaller_comes_first():
    best = rank(bundled("llama3_8b"), H100, 8)[0]
    unit = math.exp(ranking.ALIKE * round(math.log(best.seconds) / ranking.ALIKE))

    def like(seconds: float, stash: int, *, fits: bool = True):
        waits = {"fsdp": seconds - dataclasses.replace(best.time, exposed={}).total}
        time = dataclasses.replace(best.time, exposed=waits)
        peak = dataclasses.replace(best.peak, stash=stash)
        found = dataclasses.replace(best, peak=peak, fits=fits)
        vars(found)["time"] = time
        return found

    quick, small, slow = like(unit, 9), like(1.001 * unit, 5), like(1.01 * unit, 1)
    large, none = like(unit, 2, fits=False), like(2 * unit, 1, fits=False)
    assert sorted([large, slow, quick, none, small], key=ranking.order) == [
        small, quick, slow, none, large,
    ]  # fmt: skip


def test_no_overlap_is_counted_on_where_the_memory_is_too_full_for_it():
    """The candidate that recomputes least and fits is passed over where its traffic would wait, and
    every one that stays is timed so."""
    run = bundled("llama3_70b")
    full = 0
    flat = Pins({"pipeline": 1, "sequence": 1})
    for found in ranking.best_of_each_mesh(rank(run, H100, 64, flat)):
        room = overlap_room(H100.memory_bytes, held(found.peak))
        assert found.overlaps == (found.peak.total <= room)
        if not found.overlaps:
            full += 1
            assert sum(found.time.hidden.values()) == pytest.approx(0, abs=1e-9)
        waits = step_time(found.config, found.mesh, H100, synchronous=float(not found.overlaps))
        assert found.time == waits
    assert full
    best = rank(run, H100, 64, Pins({"fsdp": 32, "tensor": 2}))[0]
    pinned = Pins({"fsdp": 32, "tensor": 2}, frozenset({"memory.remat", "train.microbatches"}))
    chosen = dataclasses.replace(run, train=best.config.train)
    fuller = rank(dataclasses.replace(chosen, memory=dataclasses.replace(run.memory, remat="dots")),
                  H100, 64, pinned)[0]  # fmt: skip
    assert best.overlaps and not fuller.overlaps and fuller.fits
    assert fuller.peak.total > best.peak.total and fuller.time.compute < best.time.compute
    assert fuller.seconds > best.seconds


def test_sixteen_bytes_a_parameter_for_mixed_precision_adam():
    """In float32 weights, two moments and gradient sums, where nothing is sharded and the batch is
    next to nothing."""
    run = bundled(
        "llama2_7b", train=dict(batch_size=2, microbatches=2), data=dict(sequence_length=128)
    )
    count = parameter_count(run.model)
    assert state_bytes(run, MeshConfig())["total"] == pytest.approx(16 * count, rel=0.001)
    assert peak_memory(run, MeshConfig()).total == pytest.approx(16 * count, rel=0.02)


# --- Choices.


def test_pipelines_are_tried_with_chunks_and_both_ways_to_gather():
    run = bundled("llama3_8b", train=dict(batch_size=32))
    found = list(ranking.legal(run, MeshConfig(pipeline=4, fsdp=2)))
    assert {c.parallel.chunks for c in found} == {1, 2, 4}
    assert {c.parallel.gather for c in found} == {"per_layer", "per_step"}
    assert {c.parallel.schedule for c in found} == {"1f1b"}
    assert all(c.train.microbatches % 4 == 0 for c in found if c.parallel.chunks > 1)


def test_gpipe_is_never_better():
    """At the bubble of 1f1b it holds more and takes as long; which is why it is not tried."""
    mesh = MeshConfig(pipeline=4, fsdp=2)
    for count in (2, 4, 16, 64):
        run = bundled("llama3_8b", train=dict(batch_size=2 * count, microbatches=count))
        parallel = dataclasses.replace(run.parallel, schedule="gpipe")
        gpipe = dataclasses.replace(run, parallel=parallel)
        assert peak_memory(gpipe, mesh).total > peak_memory(run, mesh).total
        assert step_time(gpipe, mesh, H100).total > 0.999 * step_time(run, mesh, H100).total


def test_what_is_illegal():
    rules = ranking.illegal(bundled("llama3_70b"), 64)
    assert any("kv_heads=8" in rule and "use mesh.tensor in {1, 2, 4, 8}" in rule for rule in rules)
    refused = {mesh for meshes in rules.values() for mesh in meshes}
    for mesh in set(ranking.meshes(64)) - refused:
        validate_mesh(next(ranking.legal(bundled("llama3_70b"), mesh)), mesh)
    for mesh in list(refused)[:8]:
        for choice in ranking.choices(bundled("llama3_70b"), mesh):
            with pytest.raises(ConfigError):
                validate_mesh(choice, mesh)


def test_zero_1_of_the_file_does_not_narrow_the_choice():
    """dim=4096 is not divisible by 3 x ..., but only ZeRO-1 over data asks for that."""
    run = bundled("llama3_8b", train=dict(batch_size=48), parallel=dict(optimizer_sharding="data"))
    found = rank(run, H100, 3, Pins({"data": 3}))
    assert {c.config.parallel.optimizer_sharding for c in found} == {"none"}


# --- What is named.

PINNED = [
    (dict(tensor=1), {}),
    (dict(fsdp=4), {}),
    (dict(data=-1, pipeline=2), {}),
    ({}, {"train.microbatches": 4}),
    ({}, {"memory.remat": "full"}),
    ({}, {"memory.remat": "query,attention"}),
    ({}, {"parallel.gather": "per_step"}),
    ({}, {"parallel.optimizer_sharding": "data"}),
    (dict(pipeline=4), {"parallel.schedule": "gpipe"}),
    (dict(pipeline=4), {"parallel.chunks": 2}),
    (dict(fsdp=8, tensor=1), {"train.microbatches": 2, "memory.remat": "dots"}),
    ({}, {"loss.chunk": 512, "optimizer.weight_decay": 0.0, "data.packing": False}),
]


def pin(name: str, axes: dict[str, int], fields: dict) -> tuple:
    groups: dict[str, dict] = {}
    for path, value in fields.items():
        group, field = path.split(".")
        groups.setdefault(group, {})[field] = value
    return bundled(name, **groups), Pins(axes, frozenset(fields))


@pytest.mark.parametrize(("axes", "fields"), PINNED, ids=str)
def test_what_is_named_is_kept_and_printed(axes, fields):
    run, pins = pin("llama3_8b", axes, fields)
    ranked = rank(run, H100, 8, pins)
    for found in ranked:
        assert all(getattr(found.mesh, axis) == n for axis, n in axes.items() if n > 0)
        assert all(ranking.value_of(found.config, path) == n for path, n in fields.items())
        asked = found.flags(pins)
        assert set(pins.flags(found.config)) <= set(asked) and len(asked) == len(set(asked))
    free = {*SEARCHED} - {*fields, "parallel.schedule", "memory.remat"}
    if not axes:  # the rest is still chosen
        for path in free:
            assert len({ranking.value_of(found.config, path) for found in ranked}) > 1, path


@pytest.mark.parametrize("devices", [1, 3, 5, 6, 12, 48])
@pytest.mark.parametrize("name", ["tiny", "seed_246m", "llama3_8b", "llama3_70b"])
def test_train_accepts_the_advice(name, devices):
    """The flags, read back by the command line, are the candidate and pass every rule: of choices
    and pins drawn at random."""
    file, draw = str(CONFIGS / f"{name}.py"), random.Random(f"{name} {devices}")
    for axes, fields in draw.sample(PINNED, 4):
        # So that odd numbers of devices divide it; ZeRO-1 asks for more of the model.
        run, pins = pin(name, axes, fields | {"train.batch_size": 240})
        meshes = list(ranking.meshes(devices, pins))
        for mesh in draw.sample(meshes, min(4, len(meshes))):
            try:
                choice = draw.choice(list(ranking.legal(run, mesh, pins)))
            except ConfigError:
                continue
            found = ranking.weigh(choice, mesh, H100, peak_memory(choice, mesh))
            request = cli.parse([f"--config={file}", *found.flags(pins)], "")
            assert resolve_mesh(request.mesh, devices) == mesh and request.config == choice
            validate_mesh(request.config, mesh)


@pytest.mark.parametrize(
    ("devices", "axes", "fields", "message"),
    [
        (12, dict(fsdp=8), {}, r"^mesh fsdp=8 = 8 does not divide 12 .*--devices=8 or 16"),
        (4, dict(fsdp=8), {}, r"^mesh fsdp=8 = 8 does not divide 4 devices; use --devices=8,"),
        (
            8,
            dict.fromkeys(("pipeline", "data", "fsdp", "sequence", "tensor"), 1),
            {},
            r"sequence=1 x tensor=1 = 1 does not use 8 devices; use --devices=1,",
        ),
        (7, {}, {}, r"^no mesh of 7 devices is legal for this config: .*Legal: --devices=\d+ or"),
        (
            8,
            dict(fsdp=8),
            {"train.microbatches": 256},
            r"with --mesh.fsdp=8 --config.train.microbatches=256: train.batch_size=1024 is not",
        ),
        (
            8,
            dict(pipeline=4),
            {"train.microbatches": 2, "parallel.chunks": 2},
            r"microbatches=2 --config.parallel.chunks=2: train.microbatches=2 is not divisible by",
        ),
        (
            8,
            dict(pipeline=4),
            {"parallel.schedule": "gpipe", "parallel.chunks": 2},
            r"parallel.chunks=2 needs parallel.schedule=1f1b",
        ),
        (16, dict(tensor=16), {}, r"with --mesh.tensor=16: model.kv_heads=8 is not divisible by"),
    ],
)
def test_what_contradicts_itself_gets_one_message(devices, axes, fields, message):
    run, pins = pin("llama3_8b", axes, fields)
    with pytest.raises(ConfigError, match=message) as caught:
        rank(run, H100, devices, pins)
    assert "None" not in str(caught.value) and "\n" not in str(caught.value)


def test_more_devices_keep_what_is_named():
    run, pins = pin("llama3_70b", dict(tensor=1), {"memory.remat": "full"})
    enough = ranking.fewest_that_fit(run, H100, 8, pins)
    assert enough and enough.fits and enough.mesh.tensor == 1
    assert enough.config.memory.remat == "full" and "--mesh.tensor=1" in enough.flags(pins)
    assert ranking.fewest_that_fit(run, H100, 8, Pins(dict.fromkeys(AXES, 1))) is None


def test_4096_devices_in_ten_seconds():
    seconds = []
    # The better of two: what else runs on a core slows it, in processor time too.
    for _ in range(2):
        begin = time.process_time()
        assert rank(bundled("llama3_70b", train=dict(batch_size=4096)), H100, 4096)
        seconds.append(time.process_time() - begin)
        if seconds[-1] < 10:
            break
    assert min(seconds) < 10
