"""Pages of reports written by hand: what is shown, what is left out. Those of compiled steps are in
test_explain.py, those of real plans in test_plan.py."""

import re

import pytest

from jaxpar.config import AXES, MeshConfig, configure
from jaxpar.report.page import explain_page, plan_page, subject
from jaxpar.validation import resolve

ASKED = subject("jaxpar.plan", ["--config=tiny", "--devices=8"], resolve(configure()))
GIB = 2**30
MATMUL = dict(matmul=6.0, attention=1.0, memory=1.0, exposed={}, bubble=0.0)


def candidate(*, fits: bool = True, seconds: float = 10.0, **time) -> dict:
    return {
        "mesh": dict.fromkeys(AXES, 1) | {"fsdp": 8},
        "flags": "--mesh.fsdp=8",
        "microbatches": 2,
        "remat": "dots",
        "schedule": None,
        "chunks": 1,
        "verified": False,
        "fits": fits,
        "memory": {"params": GIB, "optimizer": 2 * GIB, "total": 3 * GIB},
        "step_seconds": seconds,
        "tokens_per_second": 8000.0,
        "mfu": 0.5,
        "reason": "because",
        "time": MATMUL | time,
    }


def plan_of(*candidates: dict, timetable: str = "") -> str:
    report = dict(
        candidates=candidates, request=ASKED, devices=8, hardware="h100", pipelined="pipeline=2"
    )
    return plan_page(report, timetable)


def legends(page: str) -> list[list[str]]:
    """The names in each legend, in the order of the page."""
    found = re.findall(r'<ul class="legend">(.*?)</ul>', page)
    return [re.findall(r"</i>([^<]*?)(?: <b>|</li>)", items) for items in found]


def test_the_legend_has_the_times_that_are_to_be_seen():
    """0.3% of a step is a bar of less than a pixel."""
    seen = candidate(exposed={"fsdp": 1.9, "data": 0.02})
    _, times = legends(plan_of(seen, candidate(seconds=20.0, bubble=0.5)))
    assert times == ["matmuls", "attention", "memory traffic", "waiting for fsdp", "idle stages"]


def test_bars_are_parts_of_the_longest_step():
    page = plan_of(candidate(), candidate(seconds=20.0, matmul=16.0))
    assert [float(n) for n in re.findall(r'width:([\d.]+)%[^>]*title="matmuls', page)] == [30, 80]


def test_a_plan_of_nothing_that_fits():
    page = plan_of(candidate(fits=False))
    assert "None of 1</b> legal meshes fits" in page and "The smallest first" in page
    assert "The best" not in page and "1 of 1</b> legal meshes fit<" in plan_of(candidate())


def test_a_timetable_is_drawn_where_there_is_one():
    title = "Timetable of pipeline=2"
    assert title not in plan_of(candidate())
    page = plan_of(candidate(), timetable="<svg></svg>")
    assert page.index(title) < page.index("<svg></svg>")


def collective(seconds: float | None, **fields) -> dict:
    row = dict(
        op="all-gather", axes=["data", "fsdp"], dtype="bf16", size=4096, bytes=3 * 2**19, count=1500
    )
    made = dict(source="", phase="forward", asynchronous=True)
    return row | made | {"seconds": seconds} | fields


@pytest.mark.parametrize(("seconds", "milliseconds"), [(0.0125, "12.50"), (None, "")])
def test_a_collective_in_figures(seconds, milliseconds):
    """Without hardware, nothing is known of its time."""
    report = dict(
        request=ASKED,
        devices=8,
        backend="cpu",
        mesh=dict(vars(MeshConfig(data=2, fsdp=4))),
        attention="xla",
        memory=dict(peak=GIB, parts={"params": GIB}),
        room=None,
        remedies=[],
        warnings=[],
        compile_seconds=1.0,
        flops=1e12,
        collectives=[collective(seconds)],
        by_parameter=[],
        temporaries=[],
    )
    page = explain_page(report)
    cells = dict(re.findall(r'data-name="([^"]*)">(.*?)</td>', page.split("Every collective")[1]))
    assert cells == {
        "collective": "all-gather",
        "axes": "data+fsdp",
        "dtype": "bf16",
        "times": "1,500",
        "bytes in all": "1.50 MiB",
        "ms": milliseconds,
        "async": "yes",
        "made by": "the compiler (forward)",
    }
    assert ("ms at link speed" in page) == bool(milliseconds)
