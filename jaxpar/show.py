"""Shardings for people, in notebooks and terminals: of an array of any rank, of a model, of the
activations of a step.

`jax.debug.visualize_array_sharding` refuses arrays of more than two dimensions, and stacked weights
have three or four.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from jaxpar.tree import named_leaves

_COLORS = (
    "dark_blue",
    "dark_green",
    "dark_magenta",
    "dark_cyan",
    "dark_red",
    "purple4",
    "grey35",
    "orange4",
)


def show_array(
    x: jax.Array | jax.ShapeDtypeStruct, name: str = "", console: Console | None = None
) -> None:
    """Prints which devices hold which part of an array.

    The last two sharded dimensions are the columns and rows of a grid; every combination of parts
    of the others has a grid of its own. Devices in one cell hold the same part.

    Args:
      x: an array, or its shape with a sharding; any rank and any number of sharded dimensions.
      name: a heading.
      console: where to print.
    """
    console = console or Console()
    assert x.sharding is not None, "an array without a sharding"
    holders: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for device, index in x.sharding.devices_indices_map(x.shape).items():
        part = tuple(s.indices(n)[:2] for s, n in zip(index, x.shape, strict=True))
        holders.setdefault(part, []).append(device.id)
    parts = [sorted({part[dim] for part in holders}) for dim in range(len(x.shape))]
    split = [dim for dim, ranges in enumerate(parts) if len(ranges) > 1]
    spec = getattr(x.sharding, "spec", x.sharding)
    console.print(f"{name} {x.dtype}{list(x.shape)} {spec}".strip(), style="bold", highlight=False)
    shard = [end - start for start, end in next(iter(holders))]
    size = math.prod(shard) * x.dtype.itemsize
    console.print(
        f"a device holds {shard}, {size / 2**20:,.2f} MiB; {len(holders)} different parts",
        highlight=False,
    )
    *outer, row, column = [None, None, *split]
    outer = [dim for dim in outer if dim is not None]
    colors = {part: _COLORS[n % len(_COLORS)] for n, part in enumerate(sorted(holders))}
    for fixed in itertools.product(*(parts[dim] for dim in outer)):
        table = Table(
            title=", ".join(f"dim {dim}: {_range(r)}" for dim, r in zip(outer, fixed, strict=True))
            or None
        )
        table.add_column("" if row is None else f"dim {row}")
        for across in parts[column] if column is not None else [(0, 0)]:
            table.add_column("" if column is None else f"dim {column}: {_range(across)}")
        for down in parts[row] if row is not None else [(0, 0)]:
            cells = []
            for across in parts[column] if column is not None else [(0, 0)]:
                chosen = dict(zip(outer, fixed, strict=True)) | {row: down, column: across}
                part = tuple(chosen.get(dim, parts[dim][0]) for dim in range(len(x.shape)))
                cells.append(Text(_devices(holders[part]), style=f"white on {colors[part]}"))
            table.add_row("" if row is None else _range(down), *cells)
        console.print(table)


def show_model(tree: Any, console: Console | None = None) -> None:
    """Prints every leaf of a model (or of any pytree of arrays): shape, sharding, what a device
    holds of it, and how many devices hold the same.

    Args:
      tree: arrays, or shapes with shardings, as of `jax.eval_shape`d state placed on a mesh.
      console: where to print.
    """
    console = console or Console()
    table = Table(
        "leaf",
        "shape",
        "dtype",
        "sharding",
        "on a device",
        Column("MiB", justify="right"),
        "copies",
    )
    total = 0
    for name, leaf in named_leaves(tree).items():
        shard = leaf.sharding.shard_shape(leaf.shape)
        size = math.prod(shard) * leaf.dtype.itemsize
        total += size
        copies = leaf.sharding.num_devices * math.prod(shard) // max(1, math.prod(leaf.shape))
        spec = str(getattr(leaf.sharding, "spec", leaf.sharding))
        table.add_row(
            name,
            str(list(leaf.shape)),
            str(leaf.dtype),
            spec,
            str(list(shard)),
            f"{size / 2**20:,.2f}",
            str(copies),
        )
    console.print(table)
    console.print(f"{total / 2**20:,.2f} MiB on a device", highlight=False)


def show_activations(
    function: Any, *arguments: Any, console: Console | None = None
) -> dict[str, str]:
    """Prints the types of the activations that a function names (`checkpoint_name`), as
    `jax.typeof` prints them: `bfloat16[8@data,4096@sequence,512@tensor]`. Of a scanned layer there
    is one type, for all layers have the same.

    Args:
      function: as `make_train_step(config)`; it is traced, not run, under the mesh of
        `jax.set_mesh`.
      *arguments: arrays or shapes with shardings.
      console: where to print.

    Returns:
      The types by name, in the order of the computation.
    """
    types: dict[str, str] = {}
    for name, kind in _named(jax.make_jaxpr(function)(*arguments).jaxpr):
        types.setdefault(name, kind)
    table = Table("activation", "type")
    for name, kind in types.items():
        table.add_row(name, kind)
    (console or Console()).print(table)
    return types


def _named(jaxpr: Any) -> Iterator[tuple[str, str]]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name":
            yield equation.params["name"], str(equation.outvars[0].aval)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _named(inner)


def _range(part: tuple[int, int]) -> str:
    return f"{part[0]}:{part[1]}"


def _devices(ids: Sequence[int], most: int = 8) -> str:
    ids = sorted(ids)
    return ",".join(map(str, ids[:most])) + (f" +{len(ids) - most}" if len(ids) > most else "")
