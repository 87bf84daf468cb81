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

    p stages   v chunks of each   l layers of a chunk   M microbatches   T ticks   n slots of the stash
    x, y: residual of one microbatch at the entry and exit of a chunk, [b, s, D]; dx, dy: their gradients
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.parallel.layers import Layer, add, at, vjp
from jaxpar.parallel.timetable import Tick, Timetable, Work, in_all

AXIS = "pipeline"


class Program(NamedTuple):
    """The model as the pipeline runs it: functions of local arrays, the same on every device.

    `ends` are the weights outside the layers. A microbatch is any pytree.
    """

    enter: Callable[[Any, Any], jax.Array]
    """(ends, microbatch) -> x of the first stage. May communicate over `pipeline`."""
    context: Callable[[Any], Any]
    """microbatch -> what all layers share."""
    layer: Layer
    finish: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]
    """(ends, y of the last stage, microbatch) -> this device's share of the objective, and sums to
    report. May communicate over `pipeline`, which shares the work."""
    unroll: int = 1
    """Layers in one turn of a loop over them."""


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
    entering: Any
    due: Any
    leaving: Any

    @classmethod
    def phase(cls, ticks: tuple[Tick, ...], chunks: int) -> "_Now":
        """The same for T ticks: a leading dimension more."""

        def rows(works: tuple[Work | None, ...]) -> list[tuple[int, ...]]:
            return [(1, *work) if work else (0, 0, 0, 0) for work in works]

        columns = zip(
            *(
                (rows(t.forward), rows(t.backward), t.entering(), t.due(chunks), t.leaving())
                for t in ticks
            ),
            strict=True,
        )
        return cls(*(np.array(column, np.int32) for column in columns))


def forward(
    program: Program, timetable: Timetable, layers: Any, ends: Any, batch: Any
) -> tuple[jax.Array, Any]:
    """This device's share of the objective, and the sums, of a whole batch; differentiable (GPipe).

    What a tick computes is computed again in its backward pass, all but the chunk's input.

    Args:
      program: the model.
      timetable: of which only forward passes may be left.
      layers: weights of this stage, leaves [v l, ...] in the order [chunk, layer].
      ends: weights outside the layers.
      batch: leaves [M, ...].

    Communication over `pipeline`, a tick: one `ppermute` of x; what `program` does in ticks that
    need it; one all-reduce of y where a loss is due.
    """
    stage, last = jax.lax.axis_index(AXIS), timetable.stages - 1
    shape = jax.eval_shape(program.enter, ends, at(batch, 0))

    def tick(x: jax.Array, now: _Now, phase: _Now) -> tuple[jax.Array, Any]:
        mine = _mine(now.forward, stage)
        x = _begin(program, ends, batch, x, now, phase, mine)
        y = _run(
            program, layers, timetable, x, mine.chunk, program.context(at(batch, mine.microbatch))
        )

        def loss() -> Any:
            y_last = jax.lax.psum(jnp.where(stage == last, y, 0), AXIS)
            return program.finish(ends, y_last, at(batch, jnp.maximum(now.due, 0)))

        result = _when(phase.due, now.due, loss)
        return jax.lax.optimization_barrier(
            (y, jax.tree.map(lambda r: jnp.where(now.due >= 0, r, 0), result))
        )

    x, results = jnp.zeros(shape.shape, shape.dtype), []
    for ticks in _split(timetable):
        phase = _Now.phase(ticks, timetable.chunks)
        # With `prevent_cse` nothing is computed again before the gradient that needs it has
        # arrived.
        compute = jax.checkpoint(lambda x, now, phase=phase: tick(x, now, phase), prevent_cse=True)

        def step(x: jax.Array, now: _Now, compute=compute) -> tuple[jax.Array, Any]:
            y, result = compute(x, now)
            return _shift(y, timetable.stages, +1), result

        x, result = jax.lax.scan(step, x, jax.tree.map(jnp.asarray, phase))
        results.append(jax.tree.map(lambda r: jnp.sum(r, axis=0), result))
    return jax.tree.map(lambda *parts: sum(parts), *results)


class _Carry(NamedTuple):
    """What goes from tick to tick: what the neighbours sent, the inputs that wait for their
    backward pass [n, ...], and the totals so far."""

    x: jax.Array
    dy: jax.Array
    stash: jax.Array
    sums: Any
    dlayers: Any
    dends: Any


def loss_and_gradients(
    program: Program, timetable: Timetable, layers: Any, ends: Any, batch: Any, sum_dtype: jnp.dtype
) -> tuple[Any, Any, Any]:
    """Sums, and the gradients of the objective of a whole batch with respect to `layers` and `ends`
    (1F1B).

    The backward pass of a chunk computes it again from its input, and keeps meanwhile what
    `program.layer` says.

    Args: as those of `forward`; sum_dtype: in which gradients are added up.

    Returns:
      The sums of `program.finish`, and gradients in `sum_dtype`: of the layers of this stage, and
      of `ends`; both are still to be summed over the axes that do not shard the weight.

    Communication over `pipeline`, a tick: one `ppermute` of x and one of dx; what `program` does in
    ticks that need it; where a loss is due one all-reduce of y and one of dy.
    """
    stage, last, v = jax.lax.axis_index(AXIS), timetable.stages - 1, timetable.chunks
    shape = jax.eval_shape(program.enter, ends, at(batch, 0))
    x = jnp.zeros(shape.shape, shape.dtype)

    def loss(c: _Carry, y: jax.Array, now: _Now) -> tuple[_Carry, jax.Array]:
        microbatch = at(batch, jnp.maximum(now.due, 0))
        y_last = jax.lax.psum(jnp.where(stage == last, y, 0), AXIS)
        objective, pull, sums = jax.vjp(
            lambda e, y: program.finish(e, y, microbatch), ends, y_last, has_aux=True
        )
        dends, dy = pull(jnp.where(now.due >= 0, 1, 0).astype(objective.dtype))
        sums = jax.tree.map(
            lambda total, s: total + jnp.where(now.due >= 0, s, 0), c.sums, (objective, sums)
        )
        return c._replace(sums=sums, dends=add(c.dends, dends)), jax.lax.psum(dy, AXIS)

    def leave(dends: Any, dx: jax.Array, now: _Now) -> Any:
        microbatch = at(batch, jnp.maximum(now.leaving, 0))
        (more,) = jax.vjp(lambda e: program.enter(e, microbatch), ends)[1](dx)
        return add(dends, more)

    def tick(c: _Carry, now: _Now, phase: _Now) -> tuple[_Carry, None]:
        forwards, backwards = phase.forward.any(), phase.backward.any()
        x, y, dy_last = c.x, c.x, c.dy
        if forwards:
            mine = _mine(now.forward, stage)
            x = _begin(program, ends, batch, c.x, now, phase, mine)
            kept = jnp.where(mine.active, x, c.stash[mine.slot])
            c = c._replace(stash=c.stash.at[mine.slot].set(kept))
            y = _run(
                program,
                layers,
                timetable,
                x,
                mine.chunk,
                program.context(at(batch, mine.microbatch)),
            )
            c, dy_last = _when(phase.due, now.due, lambda: loss(c, y, now), (c, c.dy))
        if backwards:
            mine = _mine(now.backward, stage)
            dy = jnp.where((stage == last) & (mine.chunk == v - 1), dy_last, c.dy)
            dy = jnp.where(mine.active, dy, 0)  # so every gradient is 0 where there is no work
            mine = jax.tree.map(lambda n: _after(n, dy_last), mine) if forwards else mine
            context = program.context(at(batch, mine.microbatch))
            x = c.stash[mine.slot]
            dlayers, dx = _run_backward(
                program, layers, c.dlayers, timetable, x, dy, mine.chunk, context
            )
            first = jnp.where((stage == 0) & (mine.chunk == 0), dx, 0)
            dends = _when(phase.leaving, now.leaving, lambda: leave(c.dends, first, now), c.dends)
            c = c._replace(dlayers=dlayers, dends=dends)
            y = _after(y, dx)
            c = c._replace(dy=_shift(dx, timetable.stages, -1))
        if forwards:
            c = c._replace(x=_shift(y, timetable.stages, +1))
        return c, None

    sums = jax.eval_shape(program.finish, ends, x, at(batch, 0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums)
    dlayers, dends = jax.tree.map(lambda w: jnp.zeros(w.shape, sum_dtype), (layers, ends))
    carry = _Carry(x, x, jnp.zeros((timetable.slots, *x.shape), x.dtype), zeros, dlayers, dends)
    for ticks in timetable.phases:
        phase = _Now.phase(ticks, v)
        carry, _ = jax.lax.scan(
            lambda c, now, phase=phase: tick(c, now, phase), carry, jax.tree.map(jnp.asarray, phase)
        )
    return carry.sums, carry.dlayers, carry.dends


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


def _begin(
    program: Program, ends: Any, batch: Any, arrived: jax.Array, now: _Now, phase: _Now, mine: _Mine
) -> jax.Array:
    """The input of a chunk: what the stage before sent, or on the first stage a new microbatch."""
    x = _when(
        phase.entering,
        now.entering,
        lambda: program.enter(ends, at(batch, jnp.maximum(now.entering, 0))),
        arrived,
    )
    return jnp.where((jax.lax.axis_index(AXIS) == 0) & (mine.chunk == 0), x, arrived)


def _run(
    program: Program,
    layers: Any,
    timetable: Timetable,
    x: jax.Array,
    chunk: jax.Array,
    context: Any,
) -> jax.Array:
    """The layers of one chunk."""
    if timetable.chunks == 1:
        return jax.lax.scan(
            lambda x, weights: (program.layer(weights, x, context), None),
            x,
            layers,
            unroll=program.unroll,
        )[0]
    depth = _depth(layers) // timetable.chunks
    return jax.lax.scan(
        lambda x, i: (program.layer(at(layers, chunk * depth + i), x, context), None),
        x,
        jnp.arange(depth),
        unroll=program.unroll,
    )[0]


def _run_backward(
    program: Program,
    layers: Any,
    dlayers: Any,
    timetable: Timetable,
    x: jax.Array,
    dy: jax.Array,
    chunk: jax.Array,
    context: Any,
) -> tuple[Any, jax.Array]:
    """Adds the gradient of one chunk to `dlayers`, in place, and returns it with dx."""
    depth = _depth(layers) // timetable.chunks
    _, pull = vjp(
        program.layer, layers, x, context, first=chunk * depth, depth=depth, unroll=program.unroll
    )
    return pull(dlayers, dy)


def _after(x: jax.Array, awaited: jax.Array) -> jax.Array:
    """`x`, once `awaited` is there; a true dependence, because XLA takes optimization barriers away
    before it runs."""
    never = awaited.ravel()[0] == jnp.finfo(awaited.dtype).max
    return jnp.where(never, jnp.zeros_like(x), x)


def _when(
    needed: np.ndarray, flag: jax.Array, run: Callable[[], Any], otherwise: Any = None
) -> Any:
    """What `run` returns if this tick needs it (`flag` is not negative), the same on all devices.

    Where most ticks of a phase (`needed`, their flags) do, it runs in all, and the caller masks.
    """
    if not (needed >= 0).any():
        return otherwise if otherwise is not None else _zeros(run)
    if in_all((needed >= 0).sum(), len(needed)):
        return run()
    return jax.lax.cond(flag >= 0, run, lambda: otherwise if otherwise is not None else _zeros(run))


def _zeros(run: Callable[[], Any]) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(run))


def _split(timetable: Timetable) -> list[tuple[Tick, ...]]:
    """The forward ticks, cut where the first loss is due."""
    ticks = [tick for tick in timetable.ticks if any(tick.forward)]
    first = next(n for n, tick in enumerate(ticks) if tick.due(timetable.chunks) >= 0)
    return [part for part in (tuple(ticks[:first]), tuple(ticks[first:])) if part]


def _mine(work: jax.Array, stage: jax.Array) -> _Mine:
    active, *rest = work[stage]
    return _Mine(active > 0, *rest)


def _shift(x: jax.Array, stages: int, by: int) -> jax.Array:
    """Sends x to the next stage, or the one before; the last and the first are neighbours."""
    return jax.lax.ppermute(x, AXIS, [(s, (s + by) % stages) for s in range(stages)])


def _depth(layers: Any) -> int:
    return jax.tree.leaves(layers)[0].shape[0]
