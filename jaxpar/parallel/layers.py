"""The loop over the layers, and its gradient added in place.

l layers of a loop   L layers of a stack, of which a loop may be a part
x, y: residual; dx, dy: their gradients
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Added(NamedTuple):
    """What a layer adds besides its result. `objective`: a pytree of float32 arrays, all of whose
    elements are added to the objective of the step, and differentiated; `sums`: a pytree of arrays
    to report. Both are partial sums of any shape, added up over microbatches and, in a manual
    region, over devices: what several devices hold alike, only one of them may add."""

    objective: Any = ()
    sums: Any = ()


Layer = Callable[[Any, jax.Array, Any], tuple[jax.Array, Added]]
"""(weights of one layer, x, shared) -> y, and what the layer adds. Its residuals are what remat
keeps of a layer."""
Pull = Callable[..., tuple[Any, jax.Array]]
"""(totals, dy, gradient of the added objectives, add=True) -> totals with the gradients of the
layers, and dx."""


@dataclasses.dataclass(frozen=True)
class Part:
    """The layers of a loop: `depth` of a stack, from its layer `first` on (an int or an int32
    scalar), `unroll` of them in one turn."""

    depth: int
    first: Any = 0
    unroll: int = 1


def run(
    layer: Layer, weights: Any, x: jax.Array, shared: Any, part: Part
) -> tuple[jax.Array, Added]:
    """The layers, forward. Arguments as of `vjp`; y, and what each layer adds, leaves [l, ...]."""
    y, added = _loop(lambda x, i: layer(at(weights, part.first + i), x, shared), x, part)
    return y, _stacked(added)


def vjp(
    layer: Layer, weights: Any, x: jax.Array, shared: Any, part: Part
) -> tuple[jax.Array, Added, Pull]:
    """Runs layers, and returns how to go back.

    Spelt out, because jax's transpose of a scan makes the gradients of all its layers first,
    another copy of them.

    Args:
      layer: one layer.
      weights: leaves [L, ...].
      x: input of the first layer.
      shared: what all layers share; it has no gradient.
      part: which layers.

    Returns:
      y of the last layer; what each layer adds, leaves [l, ...]; and the function that goes back.
      Its totals have the shapes of `weights`, the dtype in which gradients are summed, and the
      layout of the gradients, partial sums (`unreduced`) where these are. It adds to them, or with
      `add=False` writes over them.
    """

    def forward(x: jax.Array, i: Any) -> tuple[jax.Array, tuple[Added, _Residuals]]:
        here = at(weights, part.first + i)

        def one(weights: Any, x: jax.Array) -> tuple[tuple[jax.Array, Any], Any]:
            y, added = layer(weights, x, shared)
            return (y, added.objective), added.sums

        (y, objective), pull, sums = jax.vjp(one, here, x, has_aux=True)
        residuals = _Residuals.of(pull, jax.tree.leaves((here, shared)))
        return y, (Added(objective, sums), residuals)

    y, kept = _loop(forward, x, part)
    added = _stacked(_Outs(*(tuple(added for added, _ in pairs) for pairs in kept)))

    def back(
        totals: Any, dy: jax.Array, dobjective: jax.Array, *, add: bool = True
    ) -> tuple[Any, jax.Array]:
        put = functools.partial(_put_at, add=add)

        def backward(
            carry: tuple[jax.Array, Any], i: Any, kept: tuple[Added, _Residuals]
        ) -> tuple[tuple[jax.Array, Any], None]:
            (dy, totals), (added, residuals) = carry, kept
            pull = residuals.pull(jax.tree.leaves((at(weights, part.first + i), shared)))
            dadded = jax.tree.map(lambda x: jnp.zeros_like(x) + dobjective, added.objective)
            more, dx = pull((dy, dadded))
            return (dx, jax.tree.map(lambda t, d: put(t, part.first + i, d), totals, more)), None

        (dx, totals), _ = _loop(backward, (dy, totals), part, kept, reverse=True)
        return totals, dx

    return y, added, back


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Residuals:
    """What the backward pass of a layer needs: `kept`, and what is here for it anyway, its weights
    and the shared, of which only the places are noted, one a leaf of the pull, None for `kept`."""

    kept: list[jax.Array]
    places: tuple[int | None, ...] = dataclasses.field(metadata=dict(static=True))
    structure: Any = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def of(cls, pull: Any, here: list[jax.Array]) -> "_Residuals":
        leaves, structure = jax.tree.flatten(pull)
        places = [next((n for n, x in enumerate(here) if x is leaf), None) for leaf in leaves]
        kept = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
        return cls(kept, tuple(places), structure)

    def pull(self, here: list[jax.Array]) -> Any:
        """The pull again, from its own residuals and what is here."""
        kept = iter(self.kept)
        leaves = [next(kept) if place is None else here[place] for place in self.places]
        return jax.tree.unflatten(self.structure, leaves)


def at(tree_n: Any, i: Any) -> Any:
    """Entry `i` of every leaf [n, ...]."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), tree_n)


def add(totals: Any, more: Any) -> Any:
    """Adds leaf by leaf, in the dtype of the totals."""
    return jax.tree.map(lambda total, m: total + m.astype(total.dtype), totals, more)


class _Outs(NamedTuple):
    """What the steps of a loop return. `turns`: of each of the `unroll` places in a turn, stacked
    over the turns; `rest`: of the steps that are left over. Not one stack, which would be a copy
    where `unroll` is not 1."""

    turns: tuple[Any, ...]
    rest: tuple[Any, ...]


def _loop(
    step: Callable[..., tuple[Any, Any]],
    carry: Any,
    part: Part,
    given: _Outs | None = None,
    *,
    reverse: bool = False,
) -> tuple[Any, _Outs]:
    """`step(carry, i)`, or `step(carry, i, given of i)`, for i from 0 to l - 1, or back.

    jax's own `unroll` reshapes what it scans, which it cannot do to arrays of type `reduced`.
    """
    size = part.unroll if part.unroll < part.depth else part.depth
    turns = part.depth // size if size < part.depth else 0
    inside = range(size)[:: -1 if reverse else 1]
    left = range(turns * size, part.depth)[:: -1 if reverse else 1]
    outs: list[Any] = [None] * part.depth

    def one(carry: Any, i: Any, place: int, given: tuple[Any, ...] | None) -> tuple[Any, Any]:
        return step(carry, i) if given is None else step(carry, i, given[place])

    def turn(carry: Any, scanned: tuple[jax.Array, Any]) -> tuple[Any, tuple[Any, ...]]:
        t, given_here = scanned
        here: list[Any] = [None] * size
        for k in inside:
            carry, here[k] = one(carry, t * size + k, k, given_here)
        return carry, tuple(here)

    def tail(carry: Any) -> Any:
        for i in left:
            carry, outs[i] = one(carry, i, i - turns * size, given and given.rest)
        return carry

    carry = tail(carry) if reverse else carry
    stacks: tuple[Any, ...] = ()
    if turns:
        scanned = jnp.arange(turns), given and given.turns
        carry, stacks = jax.lax.scan(turn, carry, scanned, reverse=reverse)
    carry = carry if reverse else tail(carry)
    return carry, _Outs(stacks, tuple(outs[turns * size :]))


def _stacked(outs: _Outs) -> Any:
    """What the steps of a loop return, in their order: leaves [l, ...]."""

    def stacked(*leaves: jax.Array) -> jax.Array:
        turns, rest = leaves[: len(outs.turns)], leaves[len(outs.turns) :]
        whole = jnp.stack(turns, 1) if turns else jnp.stack(rest)
        if turns:
            whole = whole.reshape(-1, *whole.shape[2:])
            whole = jnp.concatenate([whole, jnp.stack(rest)]) if rest else whole
        return whole

    return jax.tree.map(stacked, *outs.turns, *outs.rest)


def _put_at(total_n: jax.Array, i: Any, new: jax.Array, *, add: bool) -> jax.Array:
    """Adds to entry `i` of the totals, or writes it."""

    def put(total_n: jax.Array, i: Any, new: jax.Array) -> jax.Array:
        new = new.astype(total_n.dtype)
        if add:
            return total_n.at[i].add(new)
        return jax.lax.dynamic_update_index_in_dim(total_n, new, i, axis=0)

    spec, spec_new = (jax.typeof(x).sharding.spec for x in (total_n, new))
    if not spec.unreduced:
        return put(total_n, i, new)
    in_specs = (spec, jax.P(), spec_new)
    local = jax.shard_map(put, in_specs=in_specs, out_specs=spec, check_vma=False)  # partial sums
    return local(total_n, jnp.asarray(i, jnp.int32), new)
