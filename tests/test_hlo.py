"""Compiled HLO text: collectives in loops and branches, device groups as mesh axes, FLOPs, sizes of
dtypes, source lines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxpar.report import hlo

HEAD = "HloModule jit_train_step, is_scheduled=true\n\n"


def mesh(**sizes: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(list(sizes.values())))])
    return Mesh(devices.reshape(*sizes.values()), tuple(sizes))


def module(*lines: str, before: str = "") -> str:
    """A module whose entry has these instructions."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"{HEAD}{before}ENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def one(line: str, *, axes: dict[str, int] | None = None) -> hlo.Collective:
    (found,) = hlo.collectives(module(line), mesh(**(axes or dict(data=2, tensor=2))))
    return found


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3}}", ("tensor",)),
        ("replica_groups={{0,2},{1,3}}", ("data",)),
        ("replica_groups={{0,1,2,3}}", ("data", "tensor")),
        ("replica_groups=[2,2]<=[4]", ("tensor",)),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ("data",)),
        ("replica_groups=[1,4]<=[4]", ("data", "tensor")),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}", ("data",)),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'}", ("tensor",)),
        ("replica_groups={{0},{1},{2},{3}}", ()),
        ("replica_groups={{0,3},{1,2}}", ("?",)),
    ],
)
def test_device_groups_are_mesh_axes(groups, axes):
    line = f"%a = f32[8]{{0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add"
    assert one(line).axes == axes


def test_a_permutation_runs_over_the_axis_that_its_pairs_connect():
    line = (
        "%c = bf16[4,2]{1,0} collective-permute(%p), source_target_pairs={{0,2},{2,0},{1,3},{3,1}}"
    )
    found = one(line)
    assert (found.kind, found.axes, found.bytes) == ("collective-permute", ("data",), 16)


LOOP = """\
%condition (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%taken (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%skipped (y: f32[8]) -> f32[8] {
  ROOT %y = f32[8]{0} parameter(0)
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %v = f32[8]{0} get-tuple-element(%t), index=1
  %whole = f32[16]{0} all-gather(%v), replica_groups={{0,2},{1,3}}, dimensions={0}
  %either = f32[8]{0} conditional(%i, %v, %v), branch_computations={%taken, %skipped}
  ROOT %next = (s32[], f32[8]{0}) tuple(%i, %either)
}

"""


def test_collectives_in_loops_and_branches_are_counted():
    text = module(
        "%p = f32[8]{0} parameter(0)",
        "%zero = s32[] constant(0)",
        "%begin = (s32[], f32[8]{0}) tuple(%zero, %p)",
        "%loop = (s32[], f32[8]{0}) while(%begin), condition=%condition, body=%body, "
        'backend_config={"known_trip_count":{"n":"5"}}',
        "ROOT %end = f32[8]{0} get-tuple-element(%loop), index=1",
        before=LOOP,
    )
    found = {one.kind: one for one in hlo.collectives(text, mesh(data=2, tensor=2))}
    assert {kind: one.count for kind, one in found.items()} == {"all-gather": 5, "all-reduce": 5}
    assert all(one.depth == 1 for one in found.values())
    assert (found["all-gather"].bytes, found["all-reduce"].bytes) == (64, 32)
    unknown = text.replace('"known_trip_count"', '"nothing"')
    with pytest.raises(AssertionError, match="loop of unknown length"):
        hlo.collectives(unknown, mesh(data=2, tensor=2))


@pytest.mark.parametrize(
    ("start", "turns"), [("constant(2)", 5), ("copy(%zero)", 7), ("parameter(1)", None)]
)
def test_a_loop_of_which_turns_were_taken_out(start, turns):
    """It turns from the number that its counter starts with to the one that it stays below."""
    below = LOOP.replace(
        "ROOT %less = pred[] constant(true)",
        "%i = s32[] get-tuple-element(%s), index=0\n  %most = s32[] constant(7)\n"
        "  ROOT %less = pred[] compare(%i, %most), direction=LT",
    )
    text = module(
        "%p = f32[8]{0} parameter(0)",
        "%zero = s32[] constant(0)",
        f"%first = s32[] {start}",
        "%counter = s32[] copy(%first)",
        "%begin = (s32[], f32[8]{0}) tuple(%counter, %p)",
        "%loop = (s32[], f32[8]{0}) while(%begin), condition=%condition, body=%body, "
        'backend_config={"known_induction_variable":{"tuple_index":"0"}}',
        before=below,
    )
    if turns is None:
        with pytest.raises(AssertionError, match="loop of unknown length"):
            hlo.collectives(text, mesh(data=2, tensor=2))
    else:
        found = hlo.collectives(text, mesh(data=2, tensor=2))
        assert [one.count for one in found] == [turns, turns]


@pytest.mark.parametrize(
    ("line", "kind", "size", "asynchronous"),
    [
        (
            "%s = (f32[8]{0}, f32[16]{0}) all-gather-start(%p), replica_groups={{0,2},{1,3}}",
            "all-gather",
            64,
            True,
        ),
        (
            "%s = (f32[8]{0}, f32[16]{0}) all-gather-start(%p), replica_groups={{0,2},{1,3}}, "
            'backend_config={"collective_backend_config":{"is_sync":true}}',
            "all-gather",
            64,
            False,
        ),
        (
            "%s = ((f32[8]{0}, bf16[8]{0}), (f32[16]{0}, bf16[16]{0})) all-gather-start(%p, %q), "
            "replica_groups={{0,2},{1,3}}",
            "all-gather",
            96,
            True,
        ),
        (
            "%s = ((f32[8]{0}), f32[4]{0}) reduce-scatter-start(%p), replica_groups={{0,2},{1,3}}",
            "reduce-scatter",
            32,
            True,
        ),
        (
            "%s = f32[8]{0} all-reduce-start(%p), replica_groups={{0,2},{1,3}}",
            "all-reduce",
            32,
            True,
        ),
        (
            "%s = f32[4]{0} reduce-scatter(%p), replica_groups={{0,2},{1,3}}",
            "reduce-scatter",
            32,
            False,
        ),
        (
            "%s = (f8e4m3fn[8]{0}, f8e4m3fn[16]{0}) all-gather-start(%p), "
            "replica_groups={{0,2},{1,3}}",
            "all-gather",
            16,
            True,
        ),
    ],
)
def test_the_whole_of_an_asynchronous_collective_counts_once(line, kind, size, asynchronous):
    found = one(line)
    assert (found.kind, found.axes) == (kind, ("data",))
    assert (found.bytes, found.asynchronous) == (size, asynchronous)


@pytest.mark.parametrize(
    ("result", "size"),
    [
        ("f32[2,3]{1,0}", 24),
        ("f8e4m3fn[4,8]{1,0}", 32),
        ("f8e5m2[3]", 3),
        ("f8e8m0fnu[3]", 3),
        ("s4[7]{0}", 7),
        ("s4[7]{0:E(4)}", 4),
        ("u4[2,4]{1,0:T(8,128)E(4)}", 4),
        ("f4e2m1fn[6]{0:E(4)}", 3),
        ("pred[5]", 5),
        ("c64[2]", 16),
        ("f32[]", 4),
        ("f32[0]", 0),
        ("(bf16[2]{0}, (s32[], /*index=5*/u8[3]{0}), token[])", 11),
    ],
)
def test_bytes_of_dtypes(result, size):
    assert sum(array.bytes for array in hlo.arrays(result)) == size


def test_an_unknown_dtype_is_refused_by_name():
    with pytest.raises(ValueError, match="dtype f6e3m2fn is not known"):
        hlo.arrays("f6e3m2fn[8]{0}")
    with pytest.raises(ValueError, match="f6e3m2fn"):
        one("%a = f6e3m2fn[8]{0} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%add")


def test_flops_of_dots():
    """Of [B, M, K] x [B, K, N], once alone and seven times in a loop, and of cuBLAS and cuDNN
    calls."""
    dot = (
        "dot({0}, {1}), lhs_batch_dims={{0}}, lhs_contracting_dims={{2}}, "
        "rhs_contracting_dims={{1}}"
    )
    body = f"""\
%body (t: (s32[], f32[2,3,5])) -> (s32[], f32[2,3,5]) {{
  %t = (s32[], f32[2,3,5]{{2,1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[2,3,5]{{2,1,0}} get-tuple-element(%t), index=1
  %w = f32[2,5,5]{{2,1,0}} constant({{...}})
  %y = f32[2,3,5]{{2,1,0}} {dot.format("%x", "%w")}
  ROOT %n = (s32[], f32[2,3,5]{{2,1,0}}) tuple(%i, %y)
}}

"""
    text = module(
        "%p = f32[2,3,5]{2,1,0} parameter(0)",
        "%q = f32[2,5,7]{2,1,0} parameter(1)",
        f"%r = f32[2,3,7]{{2,1,0}} {dot.format('%p', '%q')}",
        "%z = s32[] constant(0)",
        "%b = (s32[], f32[2,3,5]{2,1,0}) tuple(%z, %p)",
        "%l = (s32[], f32[2,3,5]{2,1,0}) while(%b), condition=%c, body=%body, "
        'backend_config={"known_trip_count":{"n":"7"}}',
        "%g = (f32[2,3,7]{2,1,0}, s8[16]{0}) custom-call(%p, %q), "
        'custom_call_target="__cublas$gemm", '
        'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]}}',
        "%k = bf16[1,8,4,16]{3,2,1,0} parameter(2)",
        "%f = (bf16[1,8,4,16]{3,2,1,0}, u8[0]{0}) custom-call(%k, %k, %k), "
        'custom_call_target="__cudnn$fmhaSoftmax"',
        before=body,
    )
    once = 2 * 2 * 3 * 5 * 7
    assert hlo.flops(text) == 2 * once + 7 * (2 * 2 * 3 * 5 * 5) + 2 * 2 * 8 * 8 * 4 * 16


def test_flops_of_a_compiled_scan():
    def run(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    shapes = jax.ShapeDtypeStruct((4, 8), "float32"), jax.ShapeDtypeStruct((3, 8, 8), "float32")
    text = jax.jit(run).lower(*shapes).compile().as_text()
    assert hlo.flops(text) == 3 * 2 * 4 * 8 * 8
    assert ("float32", (4, 8)) not in hlo.shapes(text) and ("f32", (4, 8)) in hlo.shapes(text)


TABLES = """\
FileNames
1 "/elsewhere/model.py"
2 "{here}/model.py"
3 "{here}/loss.py"

FunctionNames
1 "main"
2 "Block.__call__"
3 "cross_entropy"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}}
2 {{file_name_id=2 function_name_id=2 line=20 end_line=20 column=1 end_column=2}}
3 {{file_name_id=3 function_name_id=3 line=30 end_line=30 column=1 end_column=2}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=2}}
3 {{file_location_id=3 parent_frame_id=3}}

"""


def test_source_lines_and_phases():
    text = TABLES.format(here=hlo.__file__.rpartition("/report/")[0])
    sources = hlo.Sources(text)
    assert sources.of("metadata={stack_frame_id=2}") == "model.py:20 Block.__call__"
    assert sources.of("metadata={stack_frame_id=1}") == "elsewhere/model.py:7 main"
    assert sources.of("metadata={}") == "" and sources.files("metadata={}") == set()
    assert sources.files("metadata={stack_frame_id=3}") == {"model.py", "loss.py"}
    for name, phase in (
        ("jit(train_step)/jvp()/while", "forward"),
        ("jit(train_step)/transpose(jvp())/while", "backward"),
        ("jit(train_step)/add", "update"),
    ):
        metadata = f'metadata={{op_name="{name}" stack_frame_id=1}}'
        line = f"%a = f32[8]{{0}} all-reduce(%p), replica_groups={{{{0,1}},{{2,3}}}}, {metadata}"
        assert one(line).phase == phase
