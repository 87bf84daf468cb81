"""Loss and gradients of a batch on one stage: microbatch after microbatch, layer after layer.

The model comes as a `Program`, which the pipeline runs too.

    M microbatches   x, y: residual of one microbatch at the entry and exit of the layers
    dx, dy: their gradients
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpar.parallel.layers import Added, Layer, Part, add, at, run, vjp


class Program(NamedTuple):
    """The model as functions of its weights, those of the layers and `ends`, those outside them.

    A microbatch is any pytree. In the manual region of a pipeline the functions are of local
    arrays, the same on every device, and `embed` and `finish` may communicate over `pipeline`.
    """

    embed: Callable[[Any, Any], jax.Array]
    """(ends, microbatch) -> x of the first layer."""
    shared: Callable[[Any], Any]
    """microbatch -> what all layers share."""
    layer: Layer
    finish: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]
    """(ends, y of the last layer, microbatch) -> the scaled objective, in a manual region this
    device's share of it; and sums to report."""
    scale: jax.Array
    """Of the objective. `finish` knows it; what layers add to the objective is scaled by it in
    their backward pass. float32 scalar."""
    depth: int
    """Layers of one loop: all, or of a pipeline those of a chunk."""
    unroll: int = 1
    """Layers in one turn of the loop."""

    def part(self, first: Any = 0) -> Part:
        return Part(self.depth, first, self.unroll)


class Totals(NamedTuple):
    """Of a whole batch: the sums of `finish`, and what the layers added, leaves [L, ...]."""

    sums: Any
    added: Added


def evaluate(program: Program, layers: Any, ends: Any, batch: Any) -> Totals:
    """The sums of a batch, without gradients.

    Args:
      program: the model.
      layers: its weights, leaves [L, ...].
      ends: its weights outside the layers.
      batch: leaves [M, ...].
    """

    def one(_: None, microbatch: Any) -> tuple[None, Totals]:
        x, shared = program.embed(ends, microbatch), program.shared(microbatch)
        y, added = run(program.layer, layers, x, shared, program.part())
        return None, Totals(program.finish(ends, y, microbatch)[1], added)

    return _over_microbatches(jax.lax.scan(one, None, batch)[1])


def loss_and_gradients(
    program: Program, layers: Any, ends: Any, batch: Any, zeros: tuple[Any, Any]
) -> tuple[Totals, Any, Any]:
    """The sums of a batch, and the gradients of its scaled objective.

    The gradients of layers are added where they arise: those of one microbatch are never there all
    at once, and a single microbatch writes its own into `zeros`.

    Args: as those of `evaluate`; zeros: of the shapes of `layers` and `ends`, in the dtype in which
      gradients are summed and with the layout of the gradients.

    Returns:
      The totals, and the gradients of `layers` and of `ends`.
    """

    def one(gradients: tuple[Any, Any], microbatch: Any, *, first: bool) -> tuple[Any, Totals]:
        dlayers, dends = gradients
        x, pull_embed = jax.vjp(lambda ends: program.embed(ends, microbatch), ends)
        shared = program.shared(microbatch)
        y, added, pull_layers = vjp(program.layer, layers, x, shared, program.part())
        objective, pull_finish, sums = jax.vjp(
            lambda ends, y: program.finish(ends, y, microbatch), ends, y, has_aux=True
        )
        dfinish, dy = pull_finish(jnp.ones_like(objective))
        dlayers, dx = pull_layers(dlayers, dy, program.scale, add=not first)
        (dembed,) = pull_embed(dx)
        more = jax.tree.map(jnp.add, dfinish, dembed)
        dends = cast(more, dends) if first else add(dends, more)
        return (dlayers, dends), Totals(sums, added)

    count = jax.tree.leaves(batch)[0].shape[0]
    if count == 1:
        gradients, totals = one(zeros, at(batch, 0), first=True)
        return totals, *gradients
    gradients, totals_M = jax.lax.scan(lambda c, m: one(c, m, first=False), zeros, batch)
    return _over_microbatches(totals_M), *gradients


def cast(tree: Any, like: Any) -> Any:
    """Every leaf in the dtype of its counterpart."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def _over_microbatches(totals_M: Totals) -> Totals:
    return jax.tree.map(lambda x_M: jnp.sum(x_M, axis=0), totals_M)
