"""Windows: sequences of S tokens read out of a stream, with what a model needs to keep their
documents apart.

N: windows   S: sequence length   T: S + 1
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxpar.data.shards import Stream, check_ids

IGNORED = -1
"""A target that no loss counts: the token after a document's end, and padding."""


class Window(NamedTuple):
    """One sequence, or a stack of them; int32 [..., S].

    `targets` is the next token of the same document, else -1. `positions` counts from 0 in each
    document. `segments` is 1 for the first document of the window, 2 for the next, and 0 for
    padding.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segments: np.ndarray


class Windows:
    """Windows over a stream, by index. Safe to read from several threads.

    With `packing`, window i covers tokens i*S .. i*S+S of the stream: the last token of one is the
    first of the next, so that none is predicted twice and none is lost; only the last window is
    padded. Without it a window holds tokens of one document: a long one is cut in the same way, the
    rest is padded, and building the table reads the stream.
    """

    def __init__(
        self, stream: Stream, *, sequence_length: int, eot: int, vocab_size: int, packing: bool
    ) -> None:
        self.stream = stream
        self.sequence_length = sequence_length
        self._eot = eot
        self._vocab_size = vocab_size
        self._spans = None if packing else _document_spans(stream, sequence_length, eot)
        self._packed = max(0, math.ceil((len(stream) - 1) / sequence_length))

    def __len__(self) -> int:
        return self._packed if self._spans is None else len(self._spans)

    def __getitem__(self, index: int) -> Window:
        """Window `index`; each field int32 [S]."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return Window(*(field[0] for field in self.load([index])))

    def load(self, indices: Sequence[int] | np.ndarray) -> Window:
        """Several windows at once; each field int32 [N, S].

        Raises:
          ConfigError: a token id beyond the vocabulary, in a part of a shard that was not looked at
            when it was opened.
        """
        raw_NT = np.empty((len(indices), self.sequence_length + 1), np.int32)
        starts_N, stops_N = self._spans_of(np.asarray(indices, np.int64))
        for row_T, start, length in zip(
            raw_NT, starts_N.tolist(), (stops_N - starts_N).tolist(), strict=True
        ):
            self.stream.read_into(row_T[:length], start)
            row_T[length:] = IGNORED
        check_ids(int(raw_NT.max(initial=0)), self._vocab_size, f"windows {list(indices)[:8]}")
        return _fields(raw_NT, self._eot)

    def tokens(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokens in windows, without padding; int64 [N]."""
        starts_N, stops_N = self._spans_of(np.asarray(indices, np.int64))
        return np.minimum(stops_N - starts_N, self.sequence_length)

    @property
    def padding(self) -> float:
        """The share of padding in all windows."""
        tokens = self.tokens(np.arange(len(self))).sum()
        return 1 - float(tokens) / (len(self) * self.sequence_length)

    def _spans_of(self, index_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last+1 token of windows; int64 [N] each."""
        if self._spans is not None:
            return self._spans[index_N, 0], self._spans[index_N, 1]
        starts_N = index_N * self.sequence_length
        return starts_N, np.minimum(starts_N + self.sequence_length + 1, len(self.stream))


class SyntheticWindows(Windows):
    """Uniformly random ids, a function of (seed, index). No document ends."""

    def __init__(
        self, *, count: int, first: int, sequence_length: int, vocab_size: int, seed: int
    ) -> None:
        self.sequence_length = sequence_length
        self._count, self._first, self._vocab_size, self._seed = count, first, vocab_size, seed

    def __len__(self) -> int:
        return self._count

    def _spans_of(self, index_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return index_N * 0, index_N * 0 + self.sequence_length + 1

    def load(self, indices: Sequence[int] | np.ndarray) -> Window:
        raw_NT = np.empty((len(indices), self.sequence_length + 1), np.int32)
        for row_T, index in zip(raw_NT, indices, strict=True):
            random = np.random.default_rng((self._seed, self._first + int(index)))
            row_T[:] = random.integers(self._vocab_size, size=len(row_T), dtype=np.int32)
        return _fields(raw_NT, IGNORED)


def _fields(raw_NT: np.ndarray, eot: int) -> Window:
    """Inputs and masks from S+1 consecutive tokens a row, with -1 for padding at its end."""
    tokens_NS = np.ascontiguousarray(raw_NT[:, :-1])
    ends_NS = tokens_NS == eot
    targets_NS = np.where(ends_NS, np.int32(IGNORED), raw_NT[:, 1:])
    begins_NS = np.ones_like(ends_NS)
    begins_NS[:, 1:] = ends_NS[:, :-1]
    segments_NS = np.cumsum(begins_NS, axis=1, dtype=np.int32)
    # As one long row, of which every document of every row is a piece: no pass along a row is as
    # fast.
    begins = np.flatnonzero(begins_NS).astype(np.int32)
    lengths = np.diff(begins, append=np.int32(begins_NS.size))
    positions_NS = (np.arange(begins_NS.size, dtype=np.int32) - np.repeat(begins, lengths)).reshape(
        begins_NS.shape
    )
    padding_NS = tokens_NS < 0
    if padding_NS.any():
        for field_NS in (tokens_NS, positions_NS, segments_NS):
            field_NS[padding_NS] = 0
    return Window(tokens_NS, targets_NS, positions_NS, segments_NS)


def _document_spans(stream: Stream, sequence_length: int, eot: int) -> np.ndarray:
    """First and last+1 token of each window when a window holds one document; int64 [windows,
    2]."""
    ends, at = [np.zeros(0, np.int64)], 0
    for piece in stream.pieces():
        ends.append(np.flatnonzero(piece == eot) + at + 1)
        at += len(piece)
    stops = np.concatenate(ends)
    if at and (not len(stops) or stops[-1] != at):
        stops = np.append(stops, at)
    starts = np.concatenate([[0], stops[:-1]]).astype(np.int64)[: len(stops)]
    counts = -(-(stops - starts - 1) // sequence_length)
    index_in_document = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = np.repeat(starts, counts) + index_in_document * sequence_length
    return np.stack(
        [begin, np.minimum(begin + sequence_length + 1, np.repeat(stops, counts))], axis=1
    )
