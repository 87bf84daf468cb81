"""Batches: a function of (seed, step) alone, loaded ahead by threads and placed on the devices of a
mesh.

    B: sequences of a batch   M: microbatches   b: B / M   S: sequence length
"""

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxpar.config import Config
from jaxpar.data.windows import IGNORED, Windows
from jaxpar.sharding import Rules

if TYPE_CHECKING:
    import grain


class Batch(NamedTuple):
    """A `Window` for each sequence of a step: int32 [M, b, S], of numpy or, after `place`, of jax,
    sharded as `batch_sharding` says. `targets` is -1 where there is no loss, `segments` 0
    in padding."""

    tokens: Any
    targets: Any
    positions: Any
    segments: Any


def batches(
    windows: Windows,
    *,
    seed: int,
    batch_size: int,
    microbatches: int = 1,
    start: int = 0,
    stop: int | None = None,
    rows: Sequence[int] | None = None,
    prefetch: int = 2,
    place: Callable[[Batch], Batch] | None = None,
) -> "grain.DatasetIterator[Batch]":
    """Batches `start`, `start`+1, ... up to `stop`-1 (without end if None), prepared ahead by
    threads.

    Batch n is a function of (seed, n): it holds samples n*B .. n*B+B-1 of an endless sequence that
    shows every window once an epoch and reshuffles each epoch. Microbatch m holds rows m*b ..
    m*b+b-1 of it.

    Args:
      rows: which of the rows 0 .. b-1 of each microbatch are loaded, by default all; see
        `local_rows`. The others are padding.
      prefetch: batches, and threads, ahead; 0 loads in the caller's thread.
      place: what else the threads do to a batch: `place`, so that it waits on the devices.

    Returns:
      An iterator of `Batch` (int32 [M, b, S], of numpy unless placed). Its `close()` ends the
      threads; an error of a thread is raised by `next`.
    """
    order = _order(windows, seed)
    shape = (microbatches, batch_size // microbatches)

    def load(step: int) -> Batch:
        return _assemble(windows, order, step * batch_size, shape, rows)

    return _ahead(load, start, stop, prefetch, place)


def batch_indices(windows: Windows, *, seed: int, batch_size: int, step: int) -> list[int]:
    """Indices of the windows in batch `step` of `batches`, in order."""
    return _order(windows, seed)(np.arange(step * batch_size, (step + 1) * batch_size))


def batch_tokens(config: Config, windows: Windows, number: int) -> int:
    """Tokens of text in batch `number` of a run, over all processes. Packed windows are full, but
    for the last of the text, which is not looked for."""
    train = config.train
    if config.data.packing:
        return train.batch_size * windows.sequence_length
    indices = batch_indices(windows, seed=train.seed, batch_size=train.batch_size, step=number)
    return int(windows.tokens(indices).sum())


def evaluation_batches(
    windows: Windows,
    *,
    batch_size: int,
    count: int = 0,
    microbatches: int = 1,
    rows: Sequence[int] | None = None,
    prefetch: int = 2,
    place: Callable[[Batch], Batch] | None = None,
) -> "grain.DatasetIterator[Batch]":
    """At most `count` batches (0: as many as cover the split), the same every time and evenly
    spread over the split.

    Returns:
      An iterator of `Batch` (int32 [M, b, S], M is 1 unless asked; of numpy unless placed, see
      `batches`). The last one is filled up with padding.
    """
    total = min(len(windows), count * batch_size) if count else len(windows)
    shape = (microbatches, batch_size // microbatches)

    def load(n: int) -> Batch:
        return _assemble(
            windows,
            lambda samples: (samples * len(windows) // total).tolist(),
            n * batch_size,
            shape,
            rows,
            total,
        )

    return _ahead(load, 0, math.ceil(total / batch_size), prefetch, place)


def _order(windows: Windows, seed: int) -> Callable[[np.ndarray], list[int]]:
    """Sample numbers -> window indices, in the order of grain's
    `MapDataset.shuffle(seed).repeat()`: the function behind it costs a third. The seed is hashed,
    for the epoch is added to it, and the second epoch of seed 0 should not be the first of seed
    1."""
    from grain.experimental import index_shuffle

    mixed, last = int(np.random.SeedSequence(seed).generate_state(1)[0]), len(windows) - 1

    def windows_of(samples: np.ndarray) -> list[int]:
        epochs, indices = np.divmod(samples, last + 1)
        seeds = ((mixed + epochs) % 2**32).tolist()
        return [index_shuffle(i, last, s, 4) for i, s in zip(indices.tolist(), seeds, strict=True)]

    return windows_of


def _assemble(
    windows: Windows,
    index_of: Callable[[np.ndarray], list[int]],
    first: int,
    shape: tuple[int, int],
    rows: Sequence[int] | None,
    total: int = sys.maxsize,
) -> Batch:
    """Loads samples `first` .. first + M*b - 1, in `shape` [M, b]; those from `total` on and those
    of rows that are not among `rows` are padding. `index_of`: sample numbers -> windows."""
    samples_Mb = np.arange(first, first + math.prod(shape)).reshape(shape)
    wanted_Mb = samples_Mb < total
    if rows is not None:
        wanted_Mb &= np.isin(np.arange(shape[1]), rows)
    loaded = windows.load(index_of(samples_Mb[wanted_Mb]))
    if wanted_Mb.all():
        return Batch(*(field.reshape(*shape, -1) for field in loaded))
    padding = {"tokens": 0, "targets": IGNORED, "positions": 0, "segments": 0}
    whole = (*shape, windows.sequence_length)
    batch = Batch(**{name: np.full(whole, value, np.int32) for name, value in padding.items()})
    for field, values in zip(batch, loaded, strict=True):
        field[wanted_Mb] = values
    return batch


def _ahead(
    load: Callable[[int], Batch],
    start: int,
    stop: int | None,
    prefetch: int,
    place: Callable[[Batch], Batch] | None,
) -> "grain.DatasetIterator[Batch]":
    import grain

    options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
    loaded = grain.MapDataset.range(start, sys.maxsize if stop is None else stop).map(load)
    return iter((loaded.map(place) if place else loaded).to_iter_dataset(options))


# The batches of a run, over its mesh.


def training_batches(
    config: Config, mesh: Mesh, windows: Windows, *, start: int, stop: int
) -> "grain.DatasetIterator[Batch]":
    """Batches `start` .. `stop`-1 of a run, placed on its devices ahead of time; see `batches`."""
    return batches(
        windows,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        start=start,
        stop=stop,
        prefetch=config.data.prefetch,
        **_on_mesh(config, mesh),
    )


def validation_batches(
    config: Config, mesh: Mesh, windows: Windows
) -> "grain.DatasetIterator[Batch]":
    """The batches of one evaluation, placed on the devices; see `evaluation_batches`."""
    return evaluation_batches(
        windows,
        batch_size=config.train.batch_size,
        count=config.train.eval_batches,
        **_on_mesh(config, mesh),
    )


def _on_mesh(config: Config, mesh: Mesh) -> dict[str, Any]:
    """How the loaders cut a batch, what of it this process has to load, and how it is placed."""
    return {
        "microbatches": config.train.microbatches,
        "rows": local_rows(batch_sharding(config, mesh), batch_shape(config)),
        "place": functools.partial(place, config=config, mesh=mesh),
    }


def load_batch(config: Config, windows: Windows, number: int = 0) -> Batch:
    """Batch `number` of a run, whole and in the order of the text; numpy int32 [M, b, S]."""
    train = config.train
    shape, first = batch_shape(config)[:2], number * train.batch_size
    return _assemble(windows, _order(windows, train.seed), first, shape, None)


def place(batch: Batch, config: Config, mesh: Mesh) -> Batch:
    """A batch as jax arrays over a mesh, cut into the microbatches of `config`; int32 [M, b, S].

    Each process hands in its own copy, of which only the rows of `local_rows` are read. With
    `parallel.zigzag`, the tokens of a row lie in that order over `sequence`. No communication.

    Args:
      batch: numpy int32 [m, B / m, S] for any m.
    """
    shape, sharding = batch_shape(config), batch_sharding(config, mesh)
    batch = Batch(*(field.reshape(shape) for field in batch))
    if config.parallel.zigzag:
        batch = zigzag_tokens(batch, mesh.shape["sequence"])

    def placed(field: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(field.shape, sharding, lambda index: field[index])

    return Batch(*(placed(field) for field in batch))


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
    """Shape, dtype and sharding of a batch of a run, for devices that may be absent."""
    sharding = batch_sharding(config, mesh)
    field = jax.ShapeDtypeStruct(batch_shape(config), jax.numpy.int32, sharding=sharding)
    return Batch(field, field, field, field)


def zigzag_tokens(batch: Batch, shards: int) -> Batch:
    """Every row in head-tail order: cut into 2 x shards pieces, pieces i and 2 x shards - 1 - i go
    to shard i.

    A token late in its row sees more keys than an early one, so this shares the causal work out
    evenly. Targets, positions and segments go with their tokens: nothing that reads them, and no
    sum over tokens, sees a difference. Only what is between a row and the devices is permuted:
    batches on disk, in `batches` and in losses are in the order of the text. One shard changes
    nothing.

    Args:
      batch: numpy int32 [M, b, S], S divisible by 2 x shards unless shards is 1.
      shards: size of the mesh axis `sequence`.
    """
    if shards == 1:
        return batch
    first = np.arange(shards)
    pieces = np.stack([first, 2 * shards - 1 - first], axis=1).ravel()
    order = np.arange(batch.tokens.shape[-1]).reshape(2 * shards, -1)[pieces].ravel()
    return Batch(*(field[..., order] for field in batch))


def local_rows(sharding: jax.sharding.Sharding, shape: tuple[int, int, int]) -> list[int]:
    """Rows (of dimension b in `shape` = [M, b, S]) that the devices of this process hold."""
    slices = {
        index[1].indices(shape[1])
        for index in sharding.addressable_devices_indices_map(shape).values()
        if index
    }
    return sorted(set(itertools.chain.from_iterable(range(*bounds) for bounds in slices)))


def batch_sharding(config: Config, mesh: Mesh) -> NamedSharding:
    """Where the arrays of a batch lie, [M, b, S]."""
    return NamedSharding(mesh, Rules.make(config.parallel).spec("microbatch", "batch", "seq"))


def batch_shape(config: Config) -> tuple[int, int, int]:
    """[M, b, S] of the batches of a run."""
    train = config.train
    return train.microbatches, train.batch_size // train.microbatches, config.data.sequence_length
