"""The mesh, and the sharding of an array by the names of its dimensions.

All six axes are always there (size 1 is allowed) and all are `AxisType.Explicit`: the type of every
array carries its sharding, so `jax.typeof(x)` prints `bfloat16[8@data,4096@sequence,512@tensor]`
and an ambiguous contraction is an error at trace time instead of a surprise all-gather.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxpar.config import AXES, MeshConfig, ParallelConfig
from jaxpar.dimensions import Dimensions
from jaxpar.hints import nearest


class Rules(Dimensions):
    """Which mesh axes each logical dimension lies on, and the sharding that follows."""

    @classmethod
    def make(cls, parallel: ParallelConfig) -> Self:
        """The table for a run on the current mesh."""
        return cls.of(parallel, jax.sharding.get_abstract_mesh().shape.get("pipeline", 1))

    def spec(
        self, *names: str | None, reduced: Iterable[str] = (), unreduced: Iterable[str] = ()
    ) -> jax.sharding.PartitionSpec:
        """The `jax.P` of an array whose dimensions bear these names; None is a dimension that is
        never sharded.

        Axes that are manual where this is called (inside a `shard_map`) are left out, so the
        model's text is the same inside and outside such a region; `reduced` and `unreduced` are
        left out there too, because XLA cannot partition them in a partly manual region.

        Args:
          *names: one logical name per dimension.
          reduced: axes over which the array is replicated and its cotangent will be an unreduced
            sum.
          unreduced: axes over which the array is a sum that is still to be taken.

        Raises:
          ValueError: an unknown name, or two dimensions on one mesh axis.
        """
        manual = set(jax.sharding.get_abstract_mesh().manual_axes)
        table = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        owner: dict[str, str] = {}
        entries = []
        for name in names:
            if name is not None and name not in table:
                raise ValueError(
                    f"unknown dimension {name!r} in spec{names}.{nearest(name, table)}"
                )
            axes = table[name] if name is not None else ()
            for axis in axes:
                if axis in owner:
                    raise ValueError(
                        f"spec{names}: {owner[axis]!r} and {name!r} both lie on mesh axis {axis!r}"
                    )
                owner[axis] = str(name)
            left = tuple(axis for axis in axes if axis not in manual)
            entries.append(left if len(left) > 1 else (left[0] if left else None))
        if manual:
            return jax.P(*entries)
        return jax.P(*entries, reduced=frozenset(reduced), unreduced=frozenset(unreduced))


def all_manual() -> bool:
    """Whether this is called inside a full-manual region (that of the pipeline), on local blocks of
    arrays."""
    return jax.sharding.get_abstract_mesh().are_all_axes_manual


def make_mesh(mesh: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh: six Explicit axes, laid out by `arrange` over `devices` (default: all)."""
    array = arrange(mesh, jax.devices() if devices is None else devices)
    return Mesh(array, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def arrange(mesh: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """Devices in the shape of the mesh, inner axes inside a host wherever the sizes allow it.

    They are ordered by host and then by their number in it, so the innermost axes (`tensor`,
    `sequence`) get neighbours with the fastest links.
    """
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return np.array(ordered[: mesh.devices], dtype=object).reshape(mesh.shape)


def axes_across_hosts(devices: np.ndarray) -> list[str]:
    """The axes of an arrangement along which neighbours sit in different hosts, and so talk over
    the network."""
    hosts = np.vectorize(lambda device: device.process_index, otypes=[int])(devices)
    return [axis for dim, axis in enumerate(AXES) if np.any(hosts != np.take(hosts, [0], axis=dim))]
