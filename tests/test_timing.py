"""Step times of small cases, worked out by hand on hardware of round numbers; and that the guidance
of the field comes out of the same arithmetic."""

import dataclasses
import re
from pathlib import Path

import pytest

from jaxpar import config_file
from jaxpar.config import Config, MeshConfig, configure
from jaxpar.estimate import ranking
from jaxpar.estimate.hardware import Hardware, Rates, find
from jaxpar.estimate.timing import (
    HIDDEN,
    bubble_fraction,
    collective_seconds,
    members_near,
    overlap_room,
    recomputed,
    step_time,
)
from jaxpar.report.apart import Target, compile_report
from jaxpar.validation import resolve

H100 = find("h100")
CONFIGS = Path(__file__).parents[1] / "configs"

# 1 GFLOP/s and 1 GB/s, of which matmuls, copies and links reach half, attention a quarter.
ROUND = Hardware(
    "round", "round", "", 2**40, 1e9, {"bfloat16": 1e9}, 1e9, 1e8, 4, 4,
    Rates(matmul_share=0.5, matmul_half=0.0, attention_share=0.25, copy_share=0.5, link_share=0.5),
)  # fmt: skip


def small(**groups) -> Config:
    """Of a layer 400 + 200 + 200 + 400 + 3 x 800 = 3,600 weights, two layers; 2,000 of the head;
    32 tokens a step."""
    base = dict(
        model=dict(vocab_size=100, dim=20, layers=2, heads=2, kv_heads=1, head_dim=10, ffn_dim=40),
        data=dict(sequence_length=8),
        train=dict(batch_size=4, microbatches=1),
        memory=dict(remat="none"),
    )
    for group, fields in groups.items():
        base[group] = base.get(group, {}) | fields
    return resolve(configure(**base))


ONE = MeshConfig()
ATTENTION = 6 * 2 * 20 * 8  # operations a token: 2 layers x heads x head_dim x 8 tokens, causal


def test_matmuls_and_attention():
    time = step_time(small(), ONE, ROUND)
    assert time.matmul == pytest.approx(6 * (2 * 3600 + 2000) * 32 / 0.5e9)
    assert time.attention == pytest.approx(ATTENTION * 32 / 0.25e9)
    assert (time.bubble, time.exposed, time.hidden, time.again) == (0.0, {}, {}, 0.0)
    assert time.total == pytest.approx(time.matmul + time.attention + time.memory)


def test_narrow_matrices_are_slower():
    """At the width `matmul_half` half of the rate is reached, at half of it a third. All are 20
    wide but key and value, 10."""
    rates = dataclasses.replace(ROUND.rates, matmul_half=20.0)
    gpu = dataclasses.replace(ROUND, rates=rates)
    operations = 2 * (2000 + 2 * 3200) + 3 * 2 * 400
    assert step_time(small(), ONE, gpu).matmul == pytest.approx(6 * operations * 32 / 0.5e9)
    # Over tensor=2 heads are 10 wide, while ffn and vocabulary are no narrower than the model.
    run = small(model=dict(kv_heads=2))  # key and value as wide as the query
    halved = 2 * 2000 + 3 * 2 * 1600 + 2 * 2 * 2400
    two = step_time(run, MeshConfig(tensor=2), gpu).matmul
    assert two == pytest.approx(6 * halved * 32 / 0.5e9 / 2)
    # A microbatch of 16 tokens is narrower than the model.
    rows = (1 + 20 / 16) * (2000 + 2 * 3200) + 3 * 2 * 400
    halves = step_time(small(train=dict(microbatches=2)), ONE, gpu).matmul
    assert halves == pytest.approx(6 * rows * 32 / 0.5e9)


@pytest.mark.parametrize(
    ("remat", "again", "attention"),
    [
        ("none", 0, 0),
        ("dots", 0, 0),
        ("attention", 2 * 2 * 1600, 0),  # gate and up
        ("full", 2 * 2 * 2800, 2 * 2 * 20 * 8),  # all but down
        ("query,attention,gate", 2 * 2 * 1600, 0),  # key, value, output, up
    ],
)
def test_what_remat_computes_again(remat, again, attention):
    run, plain = small(memory=dict(remat=remat)), step_time(small(), ONE, ROUND)
    found = recomputed(run)
    assert found.pop("attention", 0) == attention and sum(found.values()) == again
    time = step_time(run, ONE, ROUND)
    assert time.matmul - plain.matmul == pytest.approx(again * 32 / 0.5e9)
    assert time.attention - plain.attention == pytest.approx(attention * 32 / 0.25e9)
    assert time.again == pytest.approx(again * 32 / 0.5e9 + attention * 32 / 0.25e9)
    assert (time.memory, time.total - time.compute) == (plain.memory, 0.0)


def test_a_pipeline_runs_every_stage_forward_once_more():
    """And then what remat asks for. Over two stages, half of it on each."""
    everything, head = 2 * 2 * 3600, 6 * 2000
    run = small(train=dict(microbatches=4), memory=dict(remat="full"))
    found = recomputed(run, 2)
    assert found.pop("attention") == 2 * 640
    assert sum(found.values()) == everything + 2 * 2 * 2800
    time = step_time(run, MeshConfig(pipeline=2), ROUND)
    layers = 6 * 2 * 3600 + everything + 2 * 2 * 2800
    assert time.matmul == pytest.approx((layers + head) * 32 / 0.5e9 / 2)
    assert time.attention == pytest.approx((ATTENTION + 2 * 640) * 32 / 0.25e9 / 2)


@pytest.mark.parametrize(("microbatches", "chunks"), [(2, 1), (4, 1), (4, 2)])
def test_stages_idle_for_a_microbatch_less_than_there_are_stages(microbatches, chunks):
    run = small(
        model=dict(layers=4), train=dict(microbatches=microbatches), parallel=dict(chunks=chunks)
    )
    time = step_time(run, MeshConfig(pipeline=2), ROUND)
    busy = time.matmul + time.attention
    assert time.bubble == pytest.approx(busy / (microbatches * chunks))
    share = bubble_fraction(microbatches, 2, chunks)
    assert time.bubble / (busy + time.bubble) == pytest.approx(share)


def test_bubble_by_hand():
    assert bubble_fraction(8, 4) == pytest.approx(3 / 11)
    assert bubble_fraction(8, 4, 2) == pytest.approx(3 / 19)
    assert bubble_fraction(8, 1) == 0.0


def test_memory_traffic():
    """Elementwise work of a layer, three times: 10 D, 4 F and 4 heads x head_dim a token, in
    bfloat16; and AdamW's seven float32 a parameter, of which norm scales are on every device."""
    layers = 3 * 2 * (10 * 20 + 4 * 40 + 4 * 20) * 2 * 32
    matrices, norms = 2 * 2000 + 2 * 3600, 5 * 20
    one = step_time(small(), ONE, ROUND).memory
    assert one == pytest.approx((layers + 28 * (matrices + norms)) / 0.5e9)
    four = step_time(small(), MeshConfig(data=2, fsdp=2), ROUND).memory
    assert four == pytest.approx((layers / 4 + 28 * (matrices / 2 + norms)) / 0.5e9)
    spread = small(parallel=dict(optimizer_sharding="data"))
    zero = step_time(spread, MeshConfig(data=2), ROUND).memory
    assert zero == pytest.approx((layers / 2 + 28 * (matrices / 2 + norms)) / 0.5e9)
    # Without sequence parallelism the residual is whole on every device of tensor.
    whole = small(parallel=dict(sequence_parallel=False), model=dict(kv_heads=2))
    tensor = step_time(whole, MeshConfig(tensor=2), ROUND).memory
    more = 3 * 2 * (10 * 20 + (4 * 40 + 4 * 20) / 2) * 2 * 32
    assert tensor == pytest.approx((more + 28 * ((matrices + 800) / 2 + norms)) / 0.5e9)


# Over fsdp=2 each layer's 3,600 weights are gathered twice in bfloat16 and their gradients reduced
# in float32, the 2,000 of embedding and head the same once each: ten collectives of 11 us and half
# of their bytes at half of 1 GB/s. The sums of 100 norm scales are waited for.
FSDP = 10 * 11e-6 + (4 * 7200 + 2 * 14400 + 2 * 4000 + 2 * 8000) * 1e-9
SCALES = 12e-6 + 2 * 400 * 1e-9


def test_gathers_run_beside_the_computation():
    time = step_time(small(), MeshConfig(fsdp=2), ROUND)
    assert time.hidden == {"fsdp": pytest.approx(FSDP)}
    assert time.exposed == {"fsdp": pytest.approx(SCALES)}
    assert time.total == pytest.approx(time.compute + SCALES)


def test_what_does_not_fit_beside_the_computation_is_waited_for():
    slow = dataclasses.replace(ROUND, link=1e6)
    time = step_time(small(), MeshConfig(fsdp=2), slow)
    cover = HIDDEN * (time.matmul + time.attention)
    whole = 10 * 11e-6 + (FSDP - 10 * 11e-6) * 1e3 + 12e-6 + (SCALES - 12e-6) * 1e3
    assert time.hidden["fsdp"] == pytest.approx(cover)
    assert time.exposed["fsdp"] == pytest.approx(whole - cover)


def test_gathered_once_a_step_nothing_is_beside_it():
    time = step_time(small(parallel=dict(gather="per_step")), MeshConfig(fsdp=2), ROUND)
    gathers = 2 * 11e-6 + (2 + 4) * (2 * 3600 + 2 * 2000) * 1e-9
    assert time.hidden == {} and time.exposed == {"fsdp": pytest.approx(gathers + SCALES)}


@pytest.mark.parametrize(
    ("synchronous", "waited"),
    [
        (1.0, FSDP + SCALES),
        ({"fsdp": 1.0}, FSDP + SCALES),
        ({"fsdp": 0.5}, (FSDP + SCALES) / 2),
        ({"fsdp": 0.01}, SCALES),  # less than what is waited for in any case
        ({"data": 1.0}, SCALES),
        (0.0, SCALES),
    ],
)
def test_collectives_that_are_not_asynchronous_are_waited_for(synchronous, waited):
    time = step_time(small(), MeshConfig(fsdp=2), ROUND, synchronous=synchronous)
    assert time.exposed["fsdp"] == pytest.approx(waited)
    assert time.hidden["fsdp"] == pytest.approx(FSDP + SCALES - waited, abs=1e-12)
    assert time.total == pytest.approx(time.compute + waited)


def test_tensor_waits_and_stages_do_not():
    """Two gathers and two scatters of a layer's residual there, and as many back; head and
    embedding; neither has anything to run beside. What stages send has."""
    run = small(model=dict(kv_heads=2), train=dict(microbatches=4))
    tensor = step_time(run, MeshConfig(tensor=2), ROUND)
    assert set(tensor.exposed) == {"tensor"} and tensor.hidden == {}
    assert tensor.exposed["tensor"] > 8 * 2 * 4 * 11e-6
    assert "pipeline" in step_time(run, MeshConfig(pipeline=2), ROUND).hidden


def test_collectives_by_hand():
    near, far = (collective_seconds("all-gather", 8e9, 8, n, H100) for n in (8, 1))
    assert near == pytest.approx(7 / 8 * 8e9 / (0.8 * 450e9), rel=0.01)
    assert far == pytest.approx(7 / 8 * 8e9 / (0.8 * 50e9), rel=0.01)
    assert collective_seconds("all-reduce", 8e9, 8, 8, H100) == pytest.approx(2 * near, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "devices", "near", "seconds"),
    [
        ("all-gather", 4, 4, 10e-6 + 3 * 1e-6 + 3 / 4 * 1e6 / 0.5e9),
        ("reduce-scatter", 4, 4, 10e-6 + 3 * 1e-6 + 3 / 4 * 1e6 / 0.5e9),
        ("all-to-all", 4, 4, 10e-6 + 3 * 1e-6 + 3 / 4 * 1e6 / 0.5e9),
        ("all-reduce", 4, 4, 10e-6 + 6 * 1e-6 + 6 / 4 * 1e6 / 0.5e9),
        ("collective-permute", 4, 4, 10e-6 + 1e-6 + 1e6 / 0.5e9),
        # Out of the domain through the network cards of the two that sit in it.
        ("all-gather", 4, 2, 10e-6 + 3 * 4e-6 + 3 / 4 * 1e6 / (0.5 * 2e8)),
        ("collective-permute", 2, 1, 10e-6 + 4e-6 + 1e6 / (0.5 * 1e8)),
        # Twenty cards would be faster than the links that lead to them.
        ("all-gather", 40, 20, 10e-6 + 39 * 4e-6 + 39 / 40 * 1e6 / 0.5e9),
    ],
)
def test_collectives_of_a_megabyte(kind, devices, near, seconds):
    assert collective_seconds(kind, 1e6, devices, near, ROUND) == pytest.approx(seconds)


def test_groups_inside_hosts():
    mesh = MeshConfig(data=4, fsdp=4, tensor=4)
    assert members_near(("tensor",), mesh, 8) == 4
    assert members_near(("fsdp",), mesh, 8) == 2
    assert members_near(("data",), mesh, 8) == 1
    assert members_near(("fsdp", "tensor"), mesh, 8) == 8


# --- The room in which the compiler lets collectives run beside the computation.


def test_the_room_for_overlap():
    """What XLA said of llama3_8b over fsdp=8, whose arguments are 11.22 GiB, with other memories:
    "Can't reduce memory use below 26.40GiB"."""
    for memory, said in ((34.0, 26.40), (79.1, 60.68), (107.7, 82.41), (138.9, 106.12)):
        room = overlap_room(int(memory * 2**30), int(11.22 * 2**30))
        assert room / 2**30 == pytest.approx(said, abs=0.02)


@pytest.mark.slow
def test_the_compiler_overlaps_where_the_room_is_and_not_beyond():
    """A model of 8 layers whose backward pass is what fills the memory, with more and with less
    memory than its peak asks for."""
    run = resolve(
        configure(
            model=dict(vocab_size=512, dim=1024, layers=8, heads=8, ffn_dim=4096),
            data=dict(sequence_length=1024),
            train=dict(batch_size=64, microbatches=1),
            memory=dict(remat="dots"),
        )
    )

    def compiled(memory: int) -> tuple[dict, float]:
        size = f"device_memory_size: {memory}"
        target = re.sub(r"device_memory_size: \d+", size, H100.target)
        gpu = dataclasses.replace(H100, target=target, memory_bytes=memory)
        report = compile_report(run, MeshConfig(fsdp=8), Target(gpu, "1x1x8"))
        over_fsdp = [row for row in report["collectives"] if row["axes"] == ["fsdp"]]
        waited = sum(row["seconds"] for row in over_fsdp if not row["asynchronous"])
        return report, waited / sum(row["seconds"] for row in over_fsdp)

    report, share = compiled(H100.memory_bytes)
    peak, held = report["memory"]["peak"], report["memory"]["arguments"]
    assert share < 0.1 and peak < overlap_room(H100.memory_bytes, held)
    crowded, shut = compiled(peak)  # all that it needs, and no room
    assert shut > 0.5, (share, shut)
    said = " ".join(crowded["warnings"])
    room = overlap_room(peak, held) / 2**20
    limit, unit = re.search(r"stay below ([\d.]+)(\w+)", said).groups()  # type: ignore[union-attr]
    assert float(limit) * {"GiB": 1024, "MiB": 1}[unit] == pytest.approx(room, rel=0.01)


# --- The guidance of the field.


def bundled(name: str, **groups) -> Config:
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
    run = bundled(name, train=dict(batch_size=8))
    by_axis = [seconds(run, data=8), seconds(run, tensor=8), seconds(run, pipeline=8)]
    assert by_axis == sorted(by_axis)
    assert seconds(run, fsdp=8) < seconds(run, tensor=8)


def test_many_microbatches_put_pipeline_before_tensor():
    """Where that guidance ends: the bubble shrinks with the microbatches, the traffic of tensor
    does not."""
    few, many = (bundled("llama3_8b", train=dict(batch_size=n)) for n in (8, 128))
    assert seconds(few, tensor=8) < seconds(few, pipeline=8)
    assert seconds(many, data=8) < seconds(many, pipeline=8) < seconds(many, tensor=8)


def test_pipeline_before_tensor_across_hosts():
    """Between hosts the order of the two turns around: tensor stays inside a host."""
    run = bundled("llama3_70b", train=dict(batch_size=256))
    inside = seconds(run, pipeline=2, fsdp=4, tensor=8)
    assert inside < seconds(run, fsdp=4, tensor=16)


def test_tensor_stays_inside_a_host():
    run = bundled("llama3_70b", train=dict(batch_size=64))
    free = dataclasses.replace(run, model=dataclasses.replace(run.model, kv_heads=64))
    ranked = ranking.best_of_each_mesh(ranking.rank(free, H100, 64))
    assert all(c.mesh.tensor <= 8 for c in ranked[:10])
    assert (
        seconds(free, fsdp=8, tensor=8)
        < seconds(free, fsdp=4, tensor=16)
        < seconds(free, fsdp=2, tensor=32)
    )
