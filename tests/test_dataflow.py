"""Values followed through loops, fusions and collectives: what made them, what they copy, how
stacks are read."""

import pytest

from jaxpar.report.dataflow import Graph

TEXT = """\
HloModule jit_train_step

%cond (c: (s32[], f32[2], f32[3,2], f32[3,2], f32[3,2])) -> pred[] {
  %c = (s32[], f32[2], f32[3,2], f32[3,2], f32[3,2]) parameter(0)
  ROOT %true = pred[] constant(true)
}

%add_at (a0: f32[3,2], a1: f32[2], a2: s32[]) -> f32[3,2] {
  %a0 = f32[3,2] parameter(0)
  %a1 = f32[2] parameter(1)
  %a2 = s32[] parameter(2)
  %old = f32[1,2] dynamic-slice(%a0, %a2)
  %more = f32[1,2] reshape(%a1)
  %total = f32[1,2] add(%old, %more)
  ROOT %put = f32[3,2] dynamic-update-slice(%a0, %total, %a2)
}

%forward (s: (s32[], f32[2], f32[3,2], f32[3,2], f32[3,2])) -> (s32[], f32[2]) {
  %s = (s32[], f32[2], f32[3,2], f32[3,2], f32[3,2]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[2] get-tuple-element(%s), index=1
  %kept = f32[3,2] get-tuple-element(%s), index=2
  %queue = f32[3,2] get-tuple-element(%s), index=3
  %w = f32[3,2] get-tuple-element(%s), index=4
  %w_i = f32[1,2] dynamic-slice(%w, %i)
  %w_all = f32[2,2] all-gather(%w_i), dimensions={0}
  %y = f32[2] custom-call(%x, %w_all)
  %entry = f32[1,2] reshape(%y)
  %keep = f32[3,2] dynamic-update-slice(%kept, %entry, %i)
  %first = f32[1,2] dynamic-slice(%queue, %i)
  %next = f32[1,2] custom-call(%first)
  %push = f32[3,2] dynamic-update-slice(%queue, %next, %i)
  ROOT %r = (s32[], f32[2], f32[3,2], f32[3,2], f32[3,2]) tuple(%i, %y, %keep, %push, %w)
}

%backward (t: (s32[], f32[3,2], f32[3,2], f32[3,2])) -> (s32[], f32[3,2]) {
  %t = (s32[], f32[3,2], f32[3,2], f32[3,2]) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %stack = f32[3,2] get-tuple-element(%t), index=1
  %sums = f32[3,2] get-tuple-element(%t), index=2
  %results = f32[3,2] get-tuple-element(%t), index=3
  %residual = f32[1,2] dynamic-slice(%stack, %j)
  %d = f32[2] custom-call(%residual)
  %added = f32[3,2] fusion(%sums, %d, %j), kind=kLoop, calls=%add_at
  %d_1 = f32[1,2] reshape(%d)
  %listed = f32[3,2] dynamic-update-slice(%results, %d_1, %j)
  ROOT %u = (s32[], f32[3,2], f32[3,2], f32[3,2]) tuple(%j, %stack, %added, %listed)
}

ENTRY %main (w0: bf16[3,2], x0: f32[2]) -> f32[3,2] {
  %w0 = bf16[3,2] parameter(0), metadata={op_name="state.model.layers.mlp.gate"}
  %x0 = f32[2] parameter(1), metadata={op_name="batch.tokens"}
  %wide = f32[3,2] convert(%w0)
  %zero = s32[] constant(0)
  %none = f32[] constant(0)
  %zeros = f32[3,2] broadcast(%none), dimensions={}
  %begin = (s32[], f32[2], f32[3,2], f32[3,2], f32[3,2]) tuple(%zero, %x0, %zeros, %zeros, %wide)
  %run = (s32[], f32[2], f32[3,2], f32[3,2], f32[3,2]) while(%begin), condition=%cond, body=%forward
  %all = f32[3,2] get-tuple-element(%run), index=2
  %turned = f32[3,2] transpose(%all), dimensions={0,1}
  %start = (s32[], f32[3,2], f32[3,2], f32[3,2]) tuple(%zero, %turned, %zeros, %zeros)
  %back = (s32[], f32[3,2], f32[3,2], f32[3,2]) while(%start), condition=%cond, body=%backward
  %sent = (f32[3,2], f32[6,2]) all-gather-start(%wide), dimensions={0}
  %came = f32[6,2] all-gather-done(%sent)
  %gradient = f32[3,2] get-tuple-element(%back), index=2
  ROOT %update = f32[3,2] multiply(%gradient, %wide)
}
"""


@pytest.fixture(scope="module")
def graph() -> Graph:
    return Graph(TEXT)


@pytest.mark.parametrize(
    ("value", "maker"),
    [
        (("all", ()), "keep"),  # through the loop's result
        (("run", (2,)), "keep"),
        (("kept", ()), "keep"),  # through what it carries
        (("s", (4,)), "wide"),  # goes round unchanged
        (("w", ()), "wide"),
        (("gradient", ()), "added"),
        (("update", ()), "update"),
        (("elsewhere", ()), None),
    ],
)
def test_what_made_a_value(graph, value, maker):
    found = graph.maker(value)
    assert (found and found[0]) == maker


@pytest.mark.parametrize(
    ("value", "leaves"),
    [
        (("w_all", ()), {"state.model.layers.mlp.gate"}),
        (("came", ()), {"state.model.layers.mlp.gate"}),
        (("sent", (1,)), {"state.model.layers.mlp.gate"}),
        (("x0", ()), {"batch.tokens"}),
        (("zeros", ()), None),
        (("keep", ()), None),
        (("update", ()), None),
    ],
)
def test_of_which_arguments_it_is_a_copy(graph, value, leaves):
    assert graph.copied(value) == leaves


@pytest.mark.parametrize(
    ("value", "use"),
    [
        ("keep", "kept"),  # another loop reads it, turned round
        ("push", "queue"),
        ("added", "sum"),  # in a fusion
        ("listed", "result"),
        ("y", ""),
        ("update", ""),
    ],
)
def test_what_a_stack_is_for(graph, value, use):
    assert graph.stack((value, ())) == use


def test_an_entry_that_is_put_back_is_not_read():
    """XLA writes what jax sets at an index only where that is inside, and else what was there."""
    put = "%keep = f32[3,2] dynamic-update-slice(%kept, "
    chosen = (
        "%was = f32[1,2] dynamic-slice(%kept, %i)\n"
        "  %either = f32[1,2] select(%inside, %entry, %was)\n"
        f"  {put}%either"
    )
    inside = "  %inside = pred[1,2] constant({{true,true}})\n"
    text = TEXT.replace(f"{put}%entry", chosen).replace("  %first =", f"{inside}  %first =")
    assert text.count("%either") == 2
    assert Graph(text).stack(("keep", ())) == "kept"


def test_history_goes_back_through_what_moves(graph):
    assert [name for name, _ in graph.history(("turned", ()))] == ["turned", "keep"]
    assert [name for name, _ in graph.history(("update", ()))] == ["update"]


def test_zeros_are_of_the_stack_that_they_become(graph):
    assert graph.stack(("zeros", ())) == "kept"
