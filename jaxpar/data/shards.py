"""Token shards: files of token ids, memory-mapped, laid end to end as one stream.

Three layouts are read: raw uint16 or uint32 (nanoGPT, and what `jaxpar.prepare` writes, with a
`manifest.json` beside), and the two of llm.c with their header of 256 int32.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxpar.config import ConfigError
from jaxpar.data.sources import MANIFEST, cache, read_manifest
from jaxpar.data.tokenizer import Tokenizer, fingerprint

HEADER_BYTES = 256 * 4
LLMC = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
"""Magic number of llm.c -> version, dtype."""

CHECKED_BYTES = 4 << 30
"""Bytes of shards whose sha256 is checked when a stream is opened."""

SCAN_TOKENS = 100_000_000
"""Ids looked at when a stream without a manifest is opened; the rest is checked window by
window."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """`length` ids of `dtype` from byte `offset` of a file. `modified` (ns) tells a file from the
    one it replaced."""

    path: Path
    dtype: str
    offset: int
    length: int
    modified: int

    def __len__(self) -> int:
        return self.length


class Stream:
    """Token ids laid end to end over arrays in memory and shards on disk. A read copies only what
    it asks for.

    `documents` is their number, or None where nobody counted.
    """

    def __init__(
        self,
        parts: Sequence[np.ndarray | Shard],
        *,
        documents: int | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))
        self._start = start
        self._stop = self._ends[-1] if stop is None else stop
        self.documents = documents

    def __len__(self) -> int:
        return self._stop - self._start

    def cut(self, start: int, stop: int) -> "Stream":
        """The stream of tokens `start` .. `stop`-1, without a copy."""
        return Stream(self._parts, start=self._start + start, stop=self._start + stop)

    def read_into(self, row: np.ndarray, start: int) -> None:
        """Fills `row` with the tokens from `start` on. The caller stays below `len(self)`."""
        at = self._start + start
        index = bisect.bisect_right(self._ends, at)
        filled = 0
        while filled < len(row):
            part = _array(self._parts[index])
            begin = at + filled - self._ends[index] + len(part)
            piece = part[begin : begin + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            index += 1

    def pieces(self, limit: int | None = None, size: int = 1 << 22) -> Iterator[np.ndarray]:
        """The first `limit` tokens in views of at most `size`, each within one part."""
        at, stop = (
            self._start,
            self._stop if limit is None else min(self._stop, self._start + limit),
        )
        while at < stop:
            index = bisect.bisect_right(self._ends, at)
            part = _array(self._parts[index])
            begin = at - self._ends[index] + len(part)
            piece = part[begin : begin + min(size, stop - at)]
            yield piece
            at += len(piece)


def open_shards(
    files: Sequence[Path], *, dtype: str, tokenizer: Tokenizer, vocab_size: int
) -> Stream:
    """The stream of token shards, in the order of `files`. Reads headers and a bounded sample of
    the ids.

    Args:
      dtype: of raw files without a manifest: `uint16`, `uint32`, or `auto` (uint16).

    Raises:
      ConfigError: a shard that is cut short, damaged, of an unknown version, made with another
        tokenizer, or with ids beyond `vocab_size`; a folder that `jaxpar.prepare` has not finished.
    """
    manifests = {folder: read_manifest(folder) for folder in {file.parent for file in files}}
    for folder, manifest in manifests.items():
        _check_manifest(folder, manifest, tokenizer)
    shards, documents, digests = [], [], {}
    budget = SCAN_TOKENS // len(files)
    for file in files:
        manifest = manifests[file.parent]
        record = next(
            (shard for shard in manifest.get("shards", ()) if shard["file"] == file.name), {}
        )
        shard = _open_shard(file, manifest.get("dtype", dtype))
        if record.get("tokens", len(shard)) != len(shard):
            raise ConfigError(
                f"{file} holds {len(shard):,} tokens, but its {MANIFEST} says "
                f"{record['tokens']:,}; run "
                "python -m jaxpar.prepare again to another folder"
            )
        shards.append(shard)
        digests |= {file: record["sha256"]} if "sha256" in record else {}
        documents.append(record.get("documents"))
        largest = record.get("max_id", None)
        if largest is None:
            largest = max((int(piece.max()) for piece in Stream([shard]).pieces(budget)), default=0)
        check_ids(largest, vocab_size, str(file))
    check_content(digests)
    return Stream(shards, documents=None if None in documents else sum(documents))


def read_as(files: Sequence[Path], dtype: str) -> str:
    """The types in which `open_shards` reads the ids of these files: `uint16`, `uint32`, or
    both."""
    manifests = {folder: read_manifest(folder) for folder in {file.parent for file in files}}
    return ", ".join(
        sorted({_layout(file, manifests[file.parent].get("dtype", dtype))[0] for file in files})
    )


def check_content(digests: Mapping[Path, str]) -> None:
    """Holds shards against the sha256 that `jaxpar.prepare` wrote of them.

    A machine reads a shard for this once: its size and time of change are remembered in the cache.
    Of a large corpus that it has not seen, every start checks the next 4 GiB, which takes seconds:
    a start should not wait for terabytes.

    Raises:
      ConfigError: a shard has another content.
    """
    memory = cache() / "checked_shards.json"
    try:
        checked = json.loads(memory.read_text())
    except (OSError, ValueError):  # none yet, or cut short: checks again
        checked = {}
    states, todo, budget = {}, [], CHECKED_BYTES
    for file, digest in digests.items():
        status = file.stat()
        states[str(file.resolve())] = state = [status.st_size, status.st_mtime_ns, digest]
        if checked.get(str(file.resolve())) != state and budget > 0:
            todo.append(file)
            budget -= status.st_size
    if not todo:
        return
    with ThreadPoolExecutor(8) as pool:
        for file, digest in zip(todo, pool.map(_sha256, todo), strict=True):
            if digest != digests[file]:
                raise ConfigError(
                    f"{file} has another sha256 than its {MANIFEST} says: it is damaged, or was "
                    "replaced; copy it again, or run python -m jaxpar.prepare to a new folder"
                )
            checked[str(file.resolve())] = states[str(file.resolve())]
    there = {name: state for name, state in checked.items() if Path(name).exists()}
    # A cache that can't be written costs no more than to check again.
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial = memory.with_name(f"{memory.name}.{os.getpid()}")
        partial.write_text(json.dumps(there))
        partial.replace(memory)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def check_ids(largest: int, vocab_size: int, where: str) -> None:
    """Raises ConfigError if `largest` is not an id of the model."""
    if largest >= vocab_size:
        raise ConfigError(
            f"{where}: token id {largest} is beyond model.vocab_size={vocab_size}; use "
            "model.vocab_size of at least "
            f"{legal_sizes(largest + 1)}; if the ids look random, the shards have another "
            "data.shard_dtype"
        )


def legal_sizes(smallest: int) -> str:
    """`50257 (or 50304, a multiple of 64 and 128)`: vocabulary sizes that hold `smallest` ids and
    that chips like."""
    by_64, by_128 = (math.ceil(smallest / n) * n for n in (64, 128))
    if smallest == by_128:
        return str(smallest)
    if by_64 == by_128:
        return f"{smallest} (or {by_64}, a multiple of 64 and 128)"
    return f"{smallest} (or {by_64}, a multiple of 64, or {by_128}, of 128)"


def _check_manifest(folder: Path, manifest: dict[str, Any], tokenizer: Tokenizer) -> None:
    if not manifest.get("complete", True):
        raise ConfigError(
            f"{folder} was not finished by jaxpar.prepare; run the same prepare command again to "
            "go on"
        )
    made_with = manifest.get("tokenizer_fingerprint")
    if made_with is not None and made_with != fingerprint(tokenizer):
        raise ConfigError(
            f"{folder} was prepared with data.tokenizer={manifest['tokenizer']!r}, which encodes "
            "otherwise than "
            f"data.tokenizer={tokenizer.name!r}; set data.tokenizer={manifest['tokenizer']!r}"
        )


def _layout(file: Path, dtype: str) -> tuple[str, int, int | None]:
    """Type of the ids, offset in bytes of the first, and their number where a header tells it."""
    if file.stat().st_size >= HEADER_BYTES:
        magic, version, tokens = (int(word) for word in np.fromfile(file, "<i4", count=3))
        if magic in LLMC:
            known, dtype = LLMC[magic]
            if version != known:
                raise ConfigError(
                    f"{file}: llm.c magic {magic} with version {version}; only version {known} is "
                    "known"
                )
            return dtype, HEADER_BYTES, tokens
    return "uint16" if dtype == "auto" else dtype, 0, None


def _open_shard(file: Path, dtype: str) -> Shard:
    status = file.stat()
    size = status.st_size
    dtype, offset, announced = _layout(file, dtype)
    length, rest = divmod(size - offset, np.dtype(dtype).itemsize)
    if rest or (announced is not None and announced != length):
        says = (
            f"its header says {announced:,} tokens"
            if announced is not None
            else f"{dtype} ids have that many each"
        )
        raise ConfigError(
            f"{file} has {size - offset:,} bytes of ids: cut short, or of another type ({says}); "
            "copy it again, or "
            "set data.shard_dtype to uint16 or uint32"
        )
    return Shard(file, dtype, offset, length, status.st_mtime_ns)


def _array(part: np.ndarray | Shard) -> np.ndarray:
    return _mapped(part) if isinstance(part, Shard) else part


# Bounded, for a map holds a file descriptor, and a corpus can have more shards than a process may
# open files.
@functools.lru_cache(maxsize=256)
def _mapped(shard: Shard) -> np.ndarray:
    if not shard.length:
        return np.zeros(0, shard.dtype)
    mapped = np.memmap(
        shard.path, np.dtype(shard.dtype).newbyteorder("<"), "r", shard.offset, (shard.length,)
    )
    return np.asarray(
        mapped
    )  # the same memory as a plain array: a slice of np.memmap costs five times as much
