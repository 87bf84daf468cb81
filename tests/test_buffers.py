"""What is in memory at the peak: from XLA's dumps, without overlap, at the moment of the most."""

from jaxpar.report.buffers import at_peak

TEXT = """\
HloModule jit_train_step

ENTRY %main (w: f32[256], x: f32[256]) -> f32[256] {
  %w = f32[256]{0} parameter(0), metadata={op_name="state.model.norm.scale"}
  %x = f32[256]{0} parameter(1), metadata={op_name="batch.tokens"}
  %cast = bf16[256]{0} convert(%w)
  %a = f32[256]{0} custom-call(%x)
  %b = (f32[256]{0}, f32[128]{0}) custom-call(%a, %cast)
  %b0 = f32[256]{0} get-tuple-element(%b), index=0
  ROOT %new = f32[256]{0} add(%w, %b0)
}
"""
ASSIGNMENT = """\
BufferAssignment:
allocation 0: size 1024, parameter 0, shape |f32[256]| at ShapeIndex {}, maybe-live-out:
 value: <1 w @0> (size=1024,offset=0): f32[256]{0}
 value: <9 new @0> (size=1024,offset=0): f32[256]{0}
allocation 1: size 1024, parameter 1, shape |f32[256]| at ShapeIndex {}:
 value: <2 x @0> (size=1024,offset=0): f32[256]{0}
allocation 2: size 4096, preallocated-temp:
 value: <3 cast @0> (size=512,offset=0): bf16[256]{0}
 value: <4 a @0> (size=1024,offset=512): f32[256]{0}
 value: <5 b{} @0> (size=16,offset=4080): (f32[256]{0}, f32[128]{0})
 value: <6 b{0} @0> (size=1024,offset=512): f32[256]{0}
 value: <7 b{1} @0> (size=512,offset=2048): f32[128]{0}
 value: <8 insides @0> (size=256,offset=3000): f32[64]{0}
allocation 3: size 512, color 5, preallocated-temp:
 value: <10 hosted @0> (size=512,offset=0): f32[128]{0}

Total bytes used: 1
"""
RANGES = """\
HloLiveRange (max 6):
  InstructionSequence:
    0:w
    1:x
    2:cast
    3:a
    4:b
    5:new
  BufferLiveRange:
    w{}:0-6
    x{}:0-3
    cast{}:2-4
    a{}:3-4
    b{}:4-5
    b{0}:4-5
    b{1}:4-4
    new{}:5-6
    hosted{}:0-6
  Live ranges at 5 (peak):
    w{}: 1024 bytes (cumulative: 1024 bytes)
    new{}: 1024 bytes (cumulative: 2048 bytes)
"""


def test_buffers_at_the_fullest_moment_do_not_overlap():
    """`a` and `b{0}` share memory; `new` lies in the donated `w`, where XLA's own peak counts it
    again; `hosted` is not on the device."""
    found = at_peak(ASSIGNMENT, RANGES, TEXT)
    assert [(buffer.shape, buffer.bytes) for buffer in found] == [
        ("f32[256]", 1024),
        ("f32[128]", 512),
        ("bf16[256]", 512),
        ("", 16),
    ]
    assert [buffer.part for buffer in found] == ["working", "working", "weights", "working"]


def test_partly_shared_memory_is_counted_once():
    shifted = ASSIGNMENT.replace(
        "<7 b{1} @0> (size=512,offset=2048)", "<7 b{1} @0> (size=512,offset=1280)"
    )
    found = at_peak(shifted, RANGES, TEXT)
    assert [buffer.bytes for buffer in found] == [1024, 512, 256, 16]
