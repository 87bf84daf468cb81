"""Pipeline parallelism: the layers spread over stages, along the `pipeline` axis.

Runs a `timetable` inside a full-manual region. Every device walks through the same ticks and reads
from the table what its own stage does in each; a stage with nothing to do computes something and
drops it, because a branch that stages take differently would leave some of them waiting in a
collective. Ticks of forward passes alone, of both, and of backward passes alone are three loops, so
what no stage needs is not computed.

In a full-manual region jax differentiates the sum of what all devices return: the cotangent of a
value that several devices hold is the sum of their shares. `psum` is then its own transpose, and
gradients are sums that are open over every axis that does not shard the weight.

Order: XLA's CPU backend tells the collectives of a manual region apart by nothing but their order
on each device, and runs what does not depend on one another in any order. So the parts of a tick
are made to depend on one another, by `_after`: forward, loss, backward, then both shifts at once.

    p stages   v chunks of each   l layers of a chunk   M microbatches   T ticks
    n slots of the stash   x, y: residual of one microbatch at the entry and exit of a chunk,
    [b, s, D]; dx, dy: their gradients
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.parallel.layers import Added, add, at, run, vjp
from jaxpar.parallel.microbatches import Program, Totals
from jaxpar.parallel.timetable import Tick, Timetable, Work, in_all

AXIS = "pipeline"


def evaluate(program: Program, timetable: Timetable, layers: Any, ends: Any, batch: Any) -> Totals:
    """The sums of a batch, without gradients, by the forward passes of the timetable.

    Args:
      program: the model.
      timetable: `forward_only`.
      layers: weights of this stage, leaves [v l, ...] in the order [chunk, layer].
      ends: weights outside the layers.
      batch: leaves [M, ...].

    Communication over `pipeline`, a tick: one `ppermute` of x; what `program` does in ticks that
    need it; one all-reduce of y where a loss is due.
    """
    stage = _Stage(program, timetable, layers, ends, batch)

    def tick(c: _Evaluated, now: _Now, phase: _Now) -> tuple[_Evaluated, None]:
        mine = _mine(now.forward, stage.index)
        y, added = stage.run(stage.input(c.x, mine, now, phase), mine)
        totals = c.totals._replace(added=stage.count(c.totals.added, added, mine))

        def due() -> Any:
            _, sums = program.finish(ends, stage.last(y), stage.microbatch(now.loss))
            return _added(totals.sums, sums, now.loss)

        totals = totals._replace(sums=_when(phase.loss, now.loss, due, totals.sums))
        # The loss before the shift: see above.
        y = _after(y, jax.tree.leaves(totals.sums)[0])
        return _Evaluated(_shift(y, timetable.stages, +1), totals), None

    return stage.walk(tick, _Evaluated(*stage.nothing())).totals


class _Evaluated(NamedTuple):
    """What goes from tick to tick of an evaluation."""

    x: jax.Array
    totals: Totals


def loss_and_gradients(
    program: Program,
    timetable: Timetable,
    layers: Any,
    ends: Any,
    batch: Any,
    sum_dtype: jnp.dtype,
) -> tuple[Totals, Any, Any]:
    """The sums of a batch, and the gradients of its scaled objective with respect to `layers` and
    `ends`.

    The backward pass of a chunk computes it again from its input, and keeps meanwhile what
    `program.layer` says.

    Args: as those of `evaluate`; sum_dtype: in which gradients are added up.

    Returns:
      The totals, what the layers of this stage added among them, and gradients in `sum_dtype`: of
      the layers of this stage, and of `ends`; both are still to be summed over the axes that do not
      shard the weight.

    Communication over `pipeline`, a tick: one `ppermute` of x and one of dx; what `program` does in
    ticks that need it; where a loss is due one all-reduce of y and one of dy.
    """
    stage = _Stage(program, timetable, layers, ends, batch)
    x, totals = stage.nothing()
    dlayers, dends = jax.tree.map(lambda w: jnp.zeros(w.shape, sum_dtype), (layers, ends))
    stash, waiting = (
        jnp.zeros((slots, *x.shape), x.dtype) for slots in (timetable.slots, timetable.waiting)
    )
    start = _Carry(x, x, stash, waiting, totals, dlayers, dends)

    def tick(c: _Carry, now: _Now, phase: _Now) -> tuple[_Carry, None]:
        y, dy_last = c.x, c.dy
        if phase.forward.any():
            c, y, dy_last = stage.forward(c, now, phase)
        if phase.backward.any():
            c, dx = stage.backward(c, dy_last, now, phase)
            y = _after(y, dx)
            c = c._replace(dy=_shift(dx, timetable.stages, -1))
        if phase.forward.any():
            c = c._replace(x=_shift(y, timetable.stages, +1))
        return c, None

    c = stage.walk(tick, start)
    return c.totals, c.dlayers, c.dends


class _Carry(NamedTuple):
    """What goes from tick to tick: what the neighbours sent; the inputs of chunks, and the
    gradients of the last one's results, that wait for their backward pass [n, ...]; and the totals
    so far."""

    x: jax.Array
    dy: jax.Array
    stash: jax.Array
    waiting: jax.Array
    totals: Totals
    dlayers: Any
    dends: Any


class _Mine(NamedTuple):
    """One piece of work of this stage, int32 scalars; `active` is false where it has none."""

    active: jax.Array
    chunk: jax.Array
    microbatch: jax.Array
    slot: jax.Array


class _Now(NamedTuple):
    """One tick of the table as arrays: the work of all stages [p, 4] in each direction, and
    microbatches, or -1."""

    forward: Any
    backward: Any
    embedding: Any
    loss: Any
    embedding_gradient: Any

    @classmethod
    def phase(cls, ticks: tuple[Tick, ...], chunks: int) -> "_Now":
        """The same for T ticks: a leading dimension more."""

        def rows(works: tuple[Work | None, ...]) -> list[tuple[int, ...]]:
            return [(1, *work) if work else (0, 0, 0, 0) for work in works]

        columns = zip(
            *(
                (
                    rows(t.forward),
                    rows(t.backward),
                    t.embedding(),
                    t.loss(chunks),
                    t.embedding_gradient(),
                )
                for t in ticks
            ),
            strict=True,
        )
        return cls(*(np.array(column, np.int32) for column in columns))


@dataclasses.dataclass(frozen=True)
class _Stage:
    """The stage of this device: the model, its weights as those of `evaluate`, and the parts of a
    tick."""

    program: Program
    timetable: Timetable
    layers: Any
    ends: Any
    batch: Any

    @property
    def index(self) -> jax.Array:
        return jax.lax.axis_index(AXIS)

    def walk(self, tick: Callable, carry: Any) -> Any:
        """Runs `tick(carry, now, phase)` through the timetable, one loop a phase."""
        for ticks in self.timetable.phases:
            phase = _Now.phase(ticks, self.timetable.chunks)
            one = functools.partial(tick, phase=phase)
            carry, _ = jax.lax.scan(one, carry, jax.tree.map(jnp.asarray, phase))
        return carry

    def microbatch(self, number: jax.Array) -> Any:
        """That of the batch; of -1, which nobody asked for, any."""
        return at(self.batch, jnp.maximum(number, 0))

    def nothing(self) -> tuple[jax.Array, Totals]:
        """A residual and totals of zeros."""
        program, first = self.program, at(self.batch, 0)
        x = _zeros(jax.eval_shape(program.embed, self.ends, first))
        _, sums = jax.eval_shape(program.finish, self.ends, x, first)
        shared = program.shared(first)
        _, added = jax.eval_shape(program.layer, at(self.layers, 0), x, shared)
        depth = program.depth * self.timetable.chunks
        return x, Totals(_zeros(sums), _zeros(added, depth))

    def input(self, arrived: jax.Array, mine: "_Mine", now: "_Now", phase: "_Now") -> jax.Array:
        """The input of a chunk: what the stage before sent, or on the first stage a new
        microbatch."""

        def embed() -> jax.Array:
            return self.program.embed(self.ends, self.microbatch(now.embedding))

        x = _when(phase.embedding, now.embedding, embed, arrived)
        return jnp.where((self.index == 0) & (mine.chunk == 0), x, arrived)

    def run(self, x: jax.Array, mine: "_Mine") -> tuple[jax.Array, Added]:
        """The layers of a chunk."""
        shared = self.program.shared(at(self.batch, mine.microbatch))
        return run(self.program.layer, self.layers, x, shared, self.part(mine))

    def part(self, mine: "_Mine") -> Any:
        """The layers of a chunk among those of the stage."""
        return self.program.part(mine.chunk * self.program.depth)

    def last(self, y: jax.Array) -> jax.Array:
        """The result of the last stage, on all of them."""
        return jax.lax.psum(jnp.where(self.index == self.timetable.stages - 1, y, 0), AXIS)

    def count(self, totals: Added, added: Added, mine: "_Mine") -> Added:
        """Adds what the layers of a chunk added, if this was work of the stage."""
        first, depth = mine.chunk * self.program.depth, self.program.depth

        def put(total: jax.Array, more: jax.Array) -> jax.Array:
            here = jax.lax.dynamic_slice_in_dim(total, first, depth)
            here += jnp.where(mine.active, more, 0).astype(total.dtype)
            return jax.lax.dynamic_update_slice_in_dim(total, here, first, axis=0)

        return jax.tree.map(put, totals, added)

    def forward(self, c: _Carry, now: "_Now", phase: "_Now") -> tuple[_Carry, jax.Array, jax.Array]:
        """A chunk forward, and the loss of a microbatch where that is due: y of the chunk, and the
        gradient of the last stage's.

        What the layers add is counted in their backward pass, which computes it again.
        """
        mine = _mine(now.forward, self.index)
        x = self.input(c.x, mine, now, phase)
        kept = jnp.where(mine.active, x, c.stash[mine.slot])
        c = c._replace(stash=c.stash.at[mine.slot].set(kept))
        y, _ = self.run(x, mine)
        before = c.totals.sums, c.dends
        sums, dends, dy_last = _when(
            phase.loss, now.loss, lambda: self.loss(*before, y, now), (*before, c.dy)
        )
        c = c._replace(totals=c.totals._replace(sums=sums), dends=dends)
        if self.timetable.waiting:
            kept = jnp.where(now.loss >= 0, dy_last, c.waiting[now.loss])
            c = c._replace(waiting=c.waiting.at[now.loss].set(kept))
        return c, y, dy_last

    def loss(self, sums: Any, dends: Any, y: jax.Array, now: "_Now") -> tuple[Any, Any, jax.Array]:
        """The sums and the gradients of `ends` with those of the microbatch that is due, and dy of
        the last stage, on all of them."""
        microbatch, due = self.microbatch(now.loss), now.loss >= 0
        objective, pull, more = jax.vjp(
            lambda ends, y: self.program.finish(ends, y, microbatch),
            *(self.ends, self.last(y)),
            has_aux=True,
        )
        dfinish, dy = pull(jnp.where(due, 1, 0).astype(objective.dtype))
        return _added(sums, more, now.loss), add(dends, dfinish), jax.lax.psum(dy, AXIS)

    def backward(
        self, c: _Carry, dy_last: jax.Array, now: "_Now", phase: "_Now"
    ) -> tuple[_Carry, jax.Array]:
        """A chunk backward, from its input, and the gradient of the embedding where one is due."""
        program, table = self.program, self.timetable
        mine = _mine(now.backward, self.index)
        if table.waiting:
            dy_last = c.waiting[mine.microbatch]
        dy = jnp.where(
            (self.index == table.stages - 1) & (mine.chunk == table.chunks - 1), dy_last, c.dy
        )
        dy = jnp.where(mine.active, dy, 0)  # so every gradient is 0 where there is no work
        mine = jax.tree.map(lambda n: _after(n, dy_last), mine)
        shared = program.shared(at(self.batch, mine.microbatch))
        x = c.stash[mine.slot]
        _, added, pull = vjp(program.layer, self.layers, x, shared, self.part(mine))
        totals = c.totals._replace(added=self.count(c.totals.added, added, mine))
        dlayers, dx = pull(c.dlayers, dy, jnp.where(mine.active, program.scale, 0))
        first = jnp.where((self.index == 0) & (mine.chunk == 0), dx, 0)

        def embedding_gradient() -> Any:
            microbatch = self.microbatch(now.embedding_gradient)
            _, pull = jax.vjp(lambda ends: program.embed(ends, microbatch), self.ends)
            return add(c.dends, pull(first)[0])

        dends = _when(phase.embedding_gradient, now.embedding_gradient, embedding_gradient, c.dends)
        return c._replace(totals=totals, dlayers=dlayers, dends=dends), dx


def reorder(stack: jax.Array, chunks: int, *, to_stages: bool) -> jax.Array:
    """Moves the layers of a stack between the order of the network, [chunk, stage, layer], and that
    in which every stage holds its own, [stage, chunk, layer].

    Args:
      stack: local block, [v l, ...] of the [p v l, ...] that are sharded over `pipeline`.
      to_stages: from the order of the network to that of the stages, or back.

    Communication: `ppermute`s of l layers, in which a device receives at most its v l layers.
    """
    p, stage = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    blocks = stack.reshape(chunks, -1, *stack.shape[1:])
    moved = list(blocks)
    for k, c in itertools.product(range(chunks), repeat=2):
        # in the network, block k of stage s is chunk c of stage t where s v + k = c p + t
        pairs = [(s, s * chunks + k - c * p) for s in range(p) if 0 <= s * chunks + k - c * p < p]
        source, place = k, c
        if not to_stages:
            pairs, source, place = [(t, s) for s, t in pairs], c, k
        arrived = jax.lax.ppermute(blocks[source], AXIS, pairs)
        here = jnp.isin(stage, jnp.array([t for _, t in pairs], jnp.int32))
        moved[place] = jnp.where(here, arrived, moved[place])
    return jnp.stack(moved).reshape(stack.shape)


def _after(x: jax.Array, awaited: jax.Array) -> jax.Array:
    """`x`, once `awaited` is there; a true dependence, because XLA takes optimization barriers away
    before it runs."""
    never = awaited.ravel()[0] == jnp.finfo(awaited.dtype).max
    return jnp.where(never, jnp.zeros_like(x), x)


def _when(needed: np.ndarray, flag: jax.Array, run: Callable[[], Any], otherwise: Any) -> Any:
    """What `run` returns if this tick needs it (`flag` is not negative), else `otherwise`; the same
    on all devices.

    Where most ticks of a phase (`needed`, their flags) do, it runs in all, and the caller masks.
    """
    if not (needed >= 0).any():
        return otherwise
    if in_all((needed >= 0).sum(), len(needed)):
        return run()
    return jax.lax.cond(flag >= 0, run, lambda: otherwise)


def _zeros(shapes: Any, *stacked: int) -> Any:
    return jax.tree.map(lambda s: jnp.zeros((*stacked, *s.shape), s.dtype), shapes)


def _added(totals: Any, more: Any, flag: jax.Array) -> Any:
    """Adds what was asked for: `flag` is not negative."""
    return jax.tree.map(lambda total, m: total + jnp.where(flag >= 0, m, 0), totals, more)


def _mine(work: jax.Array, stage: jax.Array) -> _Mine:
    active, *rest = work[stage]
    return _Mine(active > 0, *rest)


def _shift(x: jax.Array, stages: int, by: int) -> jax.Array:
    """Sends x to the next stage, or the one before; the last and the first are neighbours."""
    return jax.lax.ppermute(x, AXIS, [(s, (s + by) % stages) for s in range(stages)])
