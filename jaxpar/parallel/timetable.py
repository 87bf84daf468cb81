"""The timetable of a pipeline: which stage works on what at which tick, as data.

Notation: p stages, M microbatches, v chunks a stage. With v > 1 the layers go round the stages v
times (Narayanan et al., 2021): virtual stage c p + s is chunk c of stage s. A tick is a forward
pass of a chunk, a backward pass, or both, on all stages alike, so no device waits in a collective
that another never enters.

    1f1b   forward of the u-th piece of work of stage s at tick u + s; its backward passes begin at
           tick v p - 1, on the last stage. Ticks of forward alone, of both, and of backward alone
           follow one another.
    gpipe  all forward passes, then all backward passes in the opposite order (Huang et al., 2019);
           v is 1.

In either case v M + p - 1 ticks have a forward and as many a backward pass: time (M + (p - 1) / v)
(F + B), with F and B the times of a whole stage; the bubble, the share in which a stage has nothing
to do, is (p - 1) / (v M + p - 1).
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import NamedTuple

SCHEDULES = ("gpipe", "1f1b")


class Work(NamedTuple):
    """One chunk of one stage, forward or backward, on one microbatch. `slot` is the place in the
    stage's stash where the input waits between the two."""

    chunk: int
    microbatch: int
    slot: int


@dataclasses.dataclass(frozen=True)
class Tick:
    """What every stage does in one tick, one entry a stage, None where it has nothing to do. A tick
    with no forward work at all does not compute any forward pass, on no stage; so with backward."""

    forward: tuple[Work | None, ...]
    backward: tuple[Work | None, ...]

    @property
    def kind(self) -> tuple[bool, bool]:
        """Whether it has forward and backward passes."""
        return any(self.forward), any(self.backward)

    def embedding(self) -> int:
        """The microbatch that the first stage begins, or -1."""
        return _microbatch(self.forward[0], 0)

    def loss(self, chunks: int) -> int:
        """The microbatch whose loss the last stage needs, or -1."""
        return _microbatch(self.forward[-1], chunks - 1)

    def embedding_gradient(self) -> int:
        """The microbatch whose gradient reaches the embedding, or -1."""
        return _microbatch(self.backward[0], 0)


def _microbatch(work: Work | None, chunk: int) -> int:
    return work.microbatch if work and work.chunk == chunk else -1


@dataclasses.dataclass(frozen=True)
class Timetable:
    """All ticks of a step. `slots` is the size of the stash: the most inputs that a stage holds at
    a time. `waiting`: the losses whose gradients the last stage holds, if they are not used
    at once."""

    stages: int
    microbatches: int
    chunks: int
    ticks: tuple[Tick, ...]
    slots: int
    waiting: int = 0

    @property
    def bubble(self) -> float:
        """The share of the time in which a stage has nothing to do."""
        return (self.stages - 1) / (self.chunks * self.microbatches + self.stages - 1)

    @property
    def phases(self) -> list[tuple[Tick, ...]]:
        """Consecutive ticks of one kind. Where no tick has both passes, the forward ones are cut
        where the first loss is due, and the backward ones where the first gradient leaves."""
        together = any(tick.kind == (True, True) for tick in self.ticks)
        begun: set[str] = set()

        def key(tick: Tick) -> tuple:
            begun.update(
                ["loss"] * (tick.loss(self.chunks) >= 0),
                ["embedding gradient"] * (tick.embedding_gradient() >= 0),
            )
            return tick.kind, () if together else tuple(sorted(begun))

        return [tuple(phase) for _, phase in itertools.groupby(self.ticks, key)]


def timetable(schedule: str, stages: int, microbatches: int, chunks: int = 1) -> Timetable:
    """The timetable of `1f1b` or `gpipe`.

    Raises:
      ValueError: an unknown schedule, gpipe with chunks, or chunks with microbatches that stages do
        not divide.
    """
    p, M, v = stages, microbatches, chunks
    if schedule not in SCHEDULES or min(p, M, v) < 1:
        raise ValueError(
            f"schedule={schedule!r}, stages={p}, microbatches={M}, chunks={v}: not one of "
            f"{SCHEDULES}"
        )
    if v > 1 and (M % p or schedule == "gpipe"):
        raise ValueError(
            f"chunks={v} needs 1f1b, and microbatches={M} to be a multiple of stages={p}"
        )
    order = [
        (u % (v * p) // p, u // (v * p) * p + u % p) for u in range(v * M)
    ]  # (chunk, microbatch), v > 1
    if v == 1:
        order = [(0, m) for m in range(M)]
    n = v * M + p - 1
    starts = [{u + s: piece for u, piece in enumerate(order)} for s in range(p)]
    if schedule == "gpipe":
        ends = [{2 * n - 1 - t: piece for t, piece in start.items()} for start in starts]
    else:
        mirrored = [(v - 1 - c, m) for c, m in order]
        ends = [
            {v * p - 1 + p - 1 - s + u: piece for u, piece in enumerate(mirrored)} for s in range(p)
        ]
    forward, backward, slots = zip(
        *(_with_slots(*pair) for pair in zip(starts, ends, strict=True)), strict=True
    )
    length = 1 + max(max(end) for end in ends)
    ticks = (
        Tick(tuple(f.get(t) for f in forward), tuple(b.get(t) for b in backward))
        for t in range(length)
    )
    return Timetable(p, M, v, tuple(ticks), max(slots), M if schedule == "gpipe" else 0)


def in_all(needed: int, ticks: int) -> bool:
    """Whether what only some ticks of a phase need runs in all of them, to be masked: where most
    need it. Elsewhere it stands in a branch."""
    return 2 * needed >= ticks


class Turns(NamedTuple):
    """How often a device runs the parts of a step, idle ticks included. `chunks`: the layers of a
    chunk, forward and as often backward; `embeddings`, `losses`, `gradients`: embedding, head with
    loss, and the embedding's gradient. `listed` are the same three as the program lists them, where
    a branch counts in every tick."""

    chunks: int
    embeddings: int
    losses: int
    gradients: int
    listed: tuple[int, int, int]


@functools.cache
def turns(schedule: str, stages: int, microbatches: int, chunks: int = 1) -> Turns:
    """Those of a timetable, without making it: plans ask for thousands."""
    p, M, v = stages, microbatches, chunks
    ticks = v * M + p - 1
    if schedule == "gpipe":
        first = min(p - 1, M)
        entered = _run([(p - 1, first), (M, M - first)])
        return Turns(ticks, entered[0], M, M, (entered[1], M, M))
    own = v * p - 1, v * M - v * p + p, v * p - 1  # of forward passes, of both, of backward passes
    begun = (
        min(p, own[0]) if v > 1 else min(p - 1, M)
    )  # in the ticks of forward passes; as many end in the last ones
    around = _run([(own[0], begun), (own[1], M - begun)])
    due = _run([(own[1], M)])
    return Turns(ticks, around[0], due[0], around[0], (around[1], due[1], around[1]))


def _run(phases: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Ticks that run a part that so many of a phase's ticks need, and as the program lists them."""
    runs = listed = 0
    for length, needed in phases:
        runs += (length if in_all(needed, length) else needed) if needed else 0
        listed += length if needed else 0
    return runs, listed


def forward_only(timetable: Timetable) -> Timetable:
    """The same without backward passes, for evaluation."""
    none = (None,) * timetable.stages
    ticks = tuple(Tick(tick.forward, none) for tick in timetable.ticks if any(tick.forward))
    return dataclasses.replace(timetable, ticks=ticks, slots=1, waiting=0)


def _with_slots(
    starts: dict[int, tuple[int, int]], ends: dict[int, tuple[int, int]]
) -> tuple[dict[int, Work], dict[int, Work], int]:
    """Gives every input of one stage the lowest free place of its stash, from its forward to its
    backward pass."""
    free: list[int] = []
    slots, held = 0, {}
    forward, backward = {}, {}
    for tick in range(1 + max(ends)):
        if piece := starts.get(tick):
            if not free:
                free.append(slots)
                slots += 1
            held[piece] = min(free)
            free.remove(held[piece])
            forward[tick] = Work(*piece, held[piece])
        if piece := ends.get(tick):
            backward[tick] = Work(*piece, held[piece])
            free.append(held.pop(piece))
    return forward, backward, slots


def stack_order(layers: int, stages: int, chunks: int) -> list[int]:
    """The layer of the network that stands at each place of the stack as the devices hold it.

    A stage holds one contiguous part of the stack, so with chunks that is [stage, chunk, layer],
    where the network, and a checkpoint, has [chunk, stage, layer].
    """
    each = layers // (stages * chunks)
    return [
        (c * stages + s) * each + i
        for s in range(stages)
        for c in range(chunks)
        for i in range(each)
    ]


def describe(timetable: Timetable) -> str:
    """One line for people."""
    p, M, v = timetable.stages, timetable.microbatches, timetable.chunks
    chunks = f" x {v} chunks" if v > 1 else ""
    return (
        f"{p} stages{chunks}, {M} microbatches: {len(timetable.ticks)} ticks, at most "
        f"{timetable.slots} stage inputs "
        f"held, bubble (p - 1) / (v M + p - 1) = {timetable.bubble:.1%}"
    )
