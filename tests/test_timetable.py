"""The timetable: everything once, in an order that can be, in the time that the formulas say."""

import itertools
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from jaxpar.parallel.timetable import (
    Tick,
    Work,
    forward_only,
    in_all,
    stack_order,
    timetable,
    turns,
)
from jaxpar.report.gantt import picture, svg

CASES = [
    *(("1f1b", p, M, 1) for p in (1, 2, 4, 8) for M in (1, 3, p, 4 * p)),
    *(("gpipe", p, M, 1) for p in (2, 4, 8) for M in (1, 3, p, 4 * p)),
    *(("1f1b", p, M, v) for p in (2, 4, 8) for M in (p, 4 * p) for v in (2, 4)),
]


def ticks_of(table, direction: str) -> dict[tuple[int, int], int]:
    """(virtual stage, microbatch) -> tick."""
    found = {}
    for t, tick in enumerate(table.ticks):
        for stage, work in enumerate(getattr(tick, direction)):
            if work:
                key = (work.chunk * table.stages + stage, work.microbatch)
                assert key not in found, "done twice"
                found[key] = t
    return found


@pytest.mark.parametrize(("schedule", "p", "M", "v"), CASES)
def test_every_piece_of_work_once_and_after_what_it_needs(schedule, p, M, v):
    table = timetable(schedule, p, M, v)
    forward, backward = ticks_of(table, "forward"), ticks_of(table, "backward")
    everything = set(itertools.product(range(p * v), range(M)))
    assert forward.keys() == backward.keys() == everything
    for stage, m in everything:
        if stage:  # what a neighbour sends arrives in the very next tick, and is not kept
            assert forward[stage, m] == forward[stage - 1, m] + 1
            assert backward[stage - 1, m] == backward[stage, m] + 1
        assert backward[stage, m] >= forward[stage, m]


@pytest.mark.parametrize(("schedule", "p", "M", "v"), CASES)
def test_number_of_ticks_and_bubble(schedule, p, M, v):
    table = timetable(schedule, p, M, v)
    forwards, backwards = (
        sum(tick.kind[direction] for tick in table.ticks) for direction in (0, 1)
    )
    assert forwards == backwards == v * M + p - 1
    # in stage times: v ticks make one F or B of a whole stage
    assert forwards / v == pytest.approx(M + (p - 1) / v)
    for stage in range(p):
        busy = sum(tick.forward[stage] is not None for tick in table.ticks)
        assert busy == v * M and 1 - busy / forwards == pytest.approx(table.bubble)
    assert table.bubble == pytest.approx((p - 1) / (v * M + p - 1))


@pytest.mark.parametrize(("schedule", "p", "M", "v"), CASES)
def test_inputs_wait_in_a_bounded_stash(schedule, p, M, v):
    table = timetable(schedule, p, M, v)
    if schedule == "1f1b":
        assert table.slots == min((v + 1) * p - 1, M * v)
    for stage in range(p):
        stash: dict[int, Work] = {}
        for tick in table.ticks:
            if work := tick.forward[stage]:
                assert work.slot not in stash and work.slot < table.slots
                stash[work.slot] = work
            if work := tick.backward[stage]:
                assert stash.pop(work.slot) == work
        assert not stash


@pytest.mark.parametrize(("p", "v"), [(2, 1), (4, 1), (4, 2), (8, 4)])
def test_the_stash_does_not_grow_with_microbatches(p, v):
    assert timetable("1f1b", p, 16 * p, v).slots == timetable("1f1b", p, 4 * p, v).slots


@pytest.mark.parametrize(
    ("schedule", "p", "M", "v"), [case for case in CASES if case[0] == "1f1b" and case[1] > 1]
)
def test_three_phases(schedule, p, M, v):
    phases = timetable(schedule, p, M, v).phases
    assert [phase[0].kind for phase in phases] == [(True, False), (True, True), (False, True)]
    assert [len(phase) for phase in phases] == [v * p - 1, v * M - v * p + p, v * p - 1]


def test_losses_and_ends_come_once_each():
    table = timetable("1f1b", 4, 8, 2)
    for flags in (
        [tick.embedding() for tick in table.ticks],
        [tick.loss(2) for tick in table.ticks],
        [tick.embedding_gradient() for tick in table.ticks],
    ):
        assert sorted(m for m in flags if m >= 0) == list(range(8))
    assert all(not any(tick.backward) for tick in forward_only(table).ticks)
    assert len(forward_only(table).ticks) == 2 * 8 + 3


@pytest.mark.parametrize(("layers", "p", "v"), [(8, 4, 2), (12, 2, 3), (16, 4, 4), (4, 4, 1)])
def test_a_stage_holds_the_layers_of_its_chunks(layers, p, v):
    order = stack_order(layers, p, v)
    assert sorted(order) == list(range(layers))
    each = layers // (p * v)
    for stage in range(p):
        held = order[stage * v * each : (stage + 1) * v * each]
        assert held == [layer for layer in range(layers) if layer // each % p == stage]


@pytest.mark.parametrize(
    "arguments",
    [
        ("1f1b", 4, 6, 2),
        ("gpipe", 4, 8, 2),
        ("zero", 4, 8, 1),
        ("1f1b", 4, 0, 1),
        ("1f1b", 0, 4, 1),
    ],
)
def test_what_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match="="):
        timetable(*arguments)


def test_the_picture_shows_every_piece_of_work():
    table = timetable("1f1b", 4, 8, 2)
    root = ET.fromstring(svg(table, "1f1b"))
    tag = "{http://www.w3.org/2000/svg}"
    boxes = [
        (r.get("x"), r.get("y"), r.get("width")) for r in root.iter(f"{tag}rect") if r.get("stroke")
    ]
    assert len(boxes) == len(set(boxes)) == 2 * 4 * 8 * 2
    assert any(
        "bubble (p - 1) / (v M + p - 1) = 15.8%" in (text.text or "")
        for text in root.iter(f"{tag}text")
    )
    picture = Path(__file__).parents[1] / "docs" / "images" / "pipeline.svg"
    assert picture.read_text() == svg(table, "1f1b, 2 chunks a stage"), (
        "the picture in the README is out of date"
    )


def test_a_picture_of_many_microbatches_shows_the_first():
    root = ET.fromstring(picture("1f1b", 4, 1000, 2))
    told = " ".join(text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "drawn with 64 of 1000 microbatches; with all: bubble 0.1%" in told
    assert picture("gpipe", 4, 8) == svg(timetable("gpipe", 4, 8), "gpipe")


@pytest.mark.parametrize(("schedule", "p", "M", "v"), [case for case in CASES if case[1] > 1])
def test_how_often_things_run(schedule, p, M, v):
    """`turns` counts without a timetable what `pipeline` runs by one."""
    table = timetable(schedule, p, M, v)
    forward = [tick for tick in table.ticks if any(tick.forward)]
    begins = [phase for phase in table.phases if phase[0].kind[0]]
    ends = [phase for phase in table.phases if phase[0].kind[1]]

    def runs(phases, flag):
        found = [(len(phase), sum(flag(tick) >= 0 for tick in phase)) for phase in phases]
        ran = sum((length if in_all(n, length) else n) if n else 0 for length, n in found)
        return ran, sum(length for length, n in found if n)

    enter, finish = runs(begins, Tick.embedding), runs(begins, lambda tick: tick.loss(v))
    leave = runs(ends, Tick.embedding_gradient)
    listed = enter[1], finish[1], leave[1]
    assert turns(schedule, p, M, v) == (len(forward), enter[0], finish[0], leave[0], listed)
