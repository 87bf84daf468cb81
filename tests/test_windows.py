"""Windows: the masks of hand-built streams."""

import numpy as np
import pytest

from jaxpar.config import ConfigError, DataConfig
from jaxpar.data.corpus import open_corpus
from jaxpar.data.shards import Stream
from jaxpar.data.windows import SyntheticWindows, Windows

EOT = 9


def windows_of(tokens: list[int] | np.ndarray, length: int, *, packing: bool = True) -> Windows:
    stream = Stream([np.array(tokens, np.uint16)])
    return Windows(stream, sequence_length=length, eot=EOT, vocab_size=10, packing=packing)


def test_packed_windows() -> None:
    windows = windows_of([1, 2, EOT, 3, 4, 5, EOT, 6], 5)
    assert len(windows) == 2
    first, last = windows[0], windows[1]
    assert first.tokens.tolist() == [1, 2, EOT, 3, 4]
    assert first.targets.tolist() == [2, EOT, -1, 4, 5]
    assert first.positions.tolist() == [0, 1, 2, 0, 1]
    assert first.segments.tolist() == [1, 1, 1, 2, 2]
    assert last.tokens.tolist() == [5, EOT, 6, 0, 0]
    assert last.targets.tolist() == [EOT, -1, -1, -1, -1]
    assert last.positions.tolist() == [0, 1, 0, 0, 0]
    assert last.segments.tolist() == [1, 1, 2, 0, 0]
    assert {field.dtype for field in first} == {np.dtype(np.int32)}


def test_packed_windows_lose_no_target() -> None:
    stream = np.random.default_rng(0).integers(0, 10, 1000)
    for length in (1, 7, 16, 111, 999, 1000, 2000):
        windows = windows_of(stream, length)
        targets = np.concatenate([windows[i].targets for i in range(len(windows))])
        expected = stream[1:][stream[:-1] != EOT]
        assert targets[targets >= 0].tolist() == expected.tolist(), length


def test_unpacked_windows() -> None:
    windows = windows_of([1, 2, 3, 4, 5, 6, EOT, EOT, 7, EOT, 8, 8], 4, packing=False)
    assert [w.tokens.tolist() for w in map(windows.__getitem__, range(len(windows)))] == [
        [1, 2, 3, 4],
        [5, 6, EOT, 0],
        [7, EOT, 0, 0],
        [8, 8, 0, 0],
    ]
    assert windows[0].targets.tolist() == [2, 3, 4, 5]
    assert windows[1].targets.tolist() == [6, EOT, -1, -1]
    assert windows[1].segments.tolist() == [1, 1, 1, 0]
    assert windows[1].positions.tolist() == [0, 1, 2, 0]


def test_stream_reads_across_parts() -> None:
    parts = [np.arange(3), np.arange(0), np.arange(3, 4), np.arange(4, 10)]
    stream = Stream([part.astype(np.uint16) for part in parts]).cut(1, 9)
    row = np.empty(6, np.int32)
    stream.read_into(row, 1)
    assert row.tolist() == [2, 3, 4, 5, 6, 7]
    assert np.concatenate(list(stream.pieces(size=2))).tolist() == list(range(1, 9))
    assert np.concatenate(list(stream.pieces(limit=4))).tolist() == [1, 2, 3, 4]


def test_window_out_of_range() -> None:
    with pytest.raises(IndexError):
        windows_of([1, 2, 3], 2)[1]


def test_id_beyond_the_vocabulary_is_found_on_load() -> None:
    windows = windows_of([1, 2, 3, 4, 12, 5], 2)
    assert windows[0].tokens.tolist() == [1, 2]
    with pytest.raises(ConfigError, match=r"token id 12 is beyond model.vocab_size=10"):
        windows.load([2])


def test_synthetic_windows() -> None:
    config = DataConfig(source="synthetic", sequence_length=64)
    one, two = (open_corpus(config, vocab_size=7, seed=seed) for seed in (0, 1))
    window = one.train[5]
    assert set(window.tokens) == set(range(7))
    assert (
        window.targets[:-1].tolist() == window.tokens[1:].tolist() and (window.segments == 1).all()
    )
    assert window.positions.tolist() == list(range(64))
    for other in (one.train[6], two.train[5], one.validation[5]):
        assert (other.tokens != window.tokens).any()
    again = open_corpus(config, vocab_size=7, seed=0).train.load([9, 5])
    assert (again.tokens[1] == window.tokens).all() and isinstance(one.train, SyntheticWindows)
    assert one.tokenizer is None and one.unigram_entropy is None


def test_tokens_without_padding() -> None:
    """As many as have a segment, packed or not."""
    stream = Stream([np.array([5, 6, 9, 5, 6, 7, 8, 9, 5, 9])])  # 9 ends a document
    for packing in (True, False):
        windows = Windows(stream, sequence_length=3, eot=9, vocab_size=10, packing=packing)
        counts = windows.tokens(np.arange(len(windows)))
        loaded = windows.load(range(len(windows)))
        assert counts.tolist() == (loaded.segments > 0).sum(1).tolist()
        assert windows.padding == pytest.approx((loaded.segments == 0).mean())
    synthetic = SyntheticWindows(count=8, first=0, sequence_length=4, vocab_size=9, seed=0)
    assert synthetic.tokens([1, 5]).tolist() == [4, 4] and synthetic.padding == 0
