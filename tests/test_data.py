"""Data: batches as a function of (seed, step), splits, sources, and refusals."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxpar.config import ConfigError, DataConfig, MeshConfig, configure
from jaxpar.data import corpus as corpus_module
from jaxpar.data import sources
from jaxpar.data.batches import (
    Batch,
    abstract_batch,
    batch_indices,
    batch_shape,
    batch_sharding,
    batches,
    evaluation_batches,
    load_batch,
    local_rows,
    place,
    zigzag_tokens,
)
from jaxpar.data.corpus import Corpus, held_out, marks, open_corpus, unigram_entropy
from jaxpar.data.shards import Stream
from jaxpar.data.windows import Windows
from jaxpar.sharding import make_mesh
from jaxpar.validation import resolve

BYTES = DataConfig(source="", tokenizer="bytes", sequence_length=4, validation_fraction=0.0)


def numbered(count: int) -> Windows:
    """Windows of two tokens, both their index."""
    stream = Stream([np.arange(2 * count + 1) // 2])
    return Windows(stream, sequence_length=2, eot=count + 1, vocab_size=count + 2, packing=True)


def open_bytes(source: Path | str, **changes: object) -> Corpus:
    return open_corpus(replace(BYTES, source=str(source), **changes), vocab_size=257, seed=0)


def text_of(windows: Windows) -> str:
    """What the windows of a byte stream say, `|` for the end of a document; and that they overlap
    by one token."""
    stream = np.empty(len(windows.stream), np.int32)
    windows.stream.read_into(stream, 0)
    return "".join("|" if token == 256 else chr(token) for token in stream)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# Batches.


def test_batch_is_a_function_of_seed_and_step() -> None:
    windows = numbered(10)
    take = {"seed": 3, "batch_size": 4}
    straight = list(batches(windows, **take, stop=12))
    for start, prefetch in ((0, 0), (5, 1), (7, 4)):
        for n, batch in enumerate(
            batches(windows, **take, start=start, stop=12, prefetch=prefetch), start
        ):
            assert all((a == b).all() for a, b in zip(batch, straight[n], strict=True))
    other = batches(windows, seed=4, batch_size=4, stop=12)
    assert any((a.tokens != b.tokens).any() for a, b in zip(straight, other, strict=True))
    for n, batch in enumerate(straight):
        assert batch.tokens[0, :, 0].tolist() == batch_indices(windows, **take, step=n)
        assert batch.tokens.shape == (1, 4, 2) and batch.tokens.dtype == np.int32


def test_every_window_once_an_epoch_in_another_order() -> None:
    windows = numbered(10)
    seen = np.array(
        [batch_indices(windows, seed=0, batch_size=5, step=n) for n in range(8)]
    ).reshape(4, 10)
    assert (np.sort(seen) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in seen}) == 4
    next_seed = np.array(
        [batch_indices(windows, seed=1, batch_size=5, step=n) for n in range(8)]
    ).reshape(4, 10)
    assert not {tuple(epoch) for epoch in seen} & {tuple(epoch) for epoch in next_seed}


def test_microbatches_only_regroup() -> None:
    whole = next(batches(numbered(20), seed=0, batch_size=6))
    split = next(batches(numbered(20), seed=0, batch_size=6, microbatches=3))
    assert split.tokens.shape == (3, 2, 2)
    assert all((a.reshape(b.shape) == b).all() for a, b in zip(split, whole, strict=True))


def test_rows_load_only_those_rows() -> None:
    windows = numbered(20)
    loaded: list[int] = []
    load = windows.load

    def listed(indices):
        loaded.extend(map(int, indices))
        return load(indices)

    windows.load = listed  # type: ignore[method-assign]
    some = next(batches(windows, seed=0, batch_size=8, microbatches=2, rows=[1, 2], stop=1))
    assert len(loaded) == 4
    whole = next(batches(numbered(20), seed=0, batch_size=8, microbatches=2))
    for part, field in zip(some, whole, strict=True):
        assert (part[:, 1:3] == field[:, 1:3]).all()
    assert (some.targets[:, [0, 3]] == -1).all() and (some.tokens[:, [0, 3]] == 0).all()


def test_closing_ends_the_threads() -> None:
    def running() -> list[str]:
        return [thread.name for thread in threading.enumerate() if "grain" in thread.name]

    iterator = batches(numbered(20), seed=0, batch_size=4, prefetch=3)
    next(iterator)
    assert running()
    threads = [thread for thread in threading.enumerate() if "grain" in thread.name]
    iterator.close()
    for thread in threads:
        thread.join(5)
    assert not running()


def test_an_error_of_a_thread_surfaces() -> None:
    stream = Stream([np.array([1, 2, 3, 4, 12, 5])])
    windows = Windows(stream, sequence_length=2, eot=9, vocab_size=10, packing=True)
    with pytest.raises(ConfigError, match="token id 12"):
        list(batches(windows, seed=0, batch_size=3, stop=1))


def test_evaluation_covers_the_split() -> None:
    found = list(evaluation_batches(numbered(10), batch_size=4))
    assert [batch.tokens.shape for batch in found] == [(1, 4, 2)] * 3
    tokens = np.concatenate([batch.tokens[0, :, 0] for batch in found])
    assert tokens.tolist() == [*range(10), 0, 0]
    assert (found[-1].targets[0, 2:] == -1).all() and (found[-1].segments[0, 2:] == 0).all()
    assert (found[-1].targets[0, :2] >= 0).all()


def test_evaluation_is_spread_over_the_split() -> None:
    found = list(evaluation_batches(numbered(100), batch_size=5, count=2, rows=[0, 1, 2, 3, 4]))
    assert np.concatenate([batch.tokens[0, :, 0] for batch in found]).tolist() == list(
        range(0, 100, 10)
    )
    assert len(list(evaluation_batches(numbered(7), batch_size=4, count=50))) == 2
    by_two = next(evaluation_batches(numbered(100), batch_size=4, count=1, microbatches=2))
    assert by_two.tokens[..., 0].tolist() == [[0, 25], [50, 75]]


def test_a_batch_over_a_mesh() -> None:
    """Each device holds its rows and tokens, in the microbatches of the run whatever was handed
    in."""
    import jax

    train, data = dict(batch_size=8, microbatches=2), dict(sequence_length=2)
    config = resolve(configure(train=train, data=data, parallel=dict(sequence_parallel=False)))
    mesh = make_mesh(MeshConfig(data=2, sequence=2), jax.devices()[:4])
    sharding = batch_sharding(config, mesh)
    assert sharding.shard_shape(batch_shape(config)) == (2, 2, 1)
    batch = load_batch(config, numbered(20))
    whole = Batch(*(field.reshape(1, 8, 2) for field in batch))
    for given in (batch, whole):
        for array, field in zip(place(given, config, mesh), batch, strict=True):
            assert array.sharding == sharding and (np.asarray(array) == field).all()
    assert abstract_batch(config, mesh).tokens.sharding == sharding
    assert local_rows(sharding, batch.tokens.shape) == [0, 1, 2, 3]
    for number in (0, 5):
        loaded = load_batch(config, numbered(20), number)
        streamed = next(batches(numbered(20), seed=0, batch_size=8, microbatches=2, start=number))
        assert all((a == b).all() for a, b in zip(loaded, streamed, strict=True))


def test_zigzag_deals_out_heads_and_tails() -> None:
    field = np.arange(24).reshape(1, 2, 12)
    batch = Batch(field, field + 1, field % 12, field // 12)
    dealt = zigzag_tokens(batch, 3)
    assert dealt.positions[0, 1].tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert (dealt.targets == dealt.tokens + 1).all() and (
        dealt.positions == dealt.tokens % 12
    ).all()
    assert (dealt.segments == batch.segments).all()
    causal_work = (dealt.positions[0, 0].reshape(3, -1) + 1).sum(1)
    assert (causal_work == causal_work[0]).all()
    assert zigzag_tokens(batch, 1) is batch


def test_local_rows_of_one_process() -> None:
    class Half:  # of the devices of a mesh are this process's own
        def addressable_devices_indices_map(
            self, shape: tuple[int, ...]
        ) -> dict[int, tuple[slice, ...]]:
            return {
                d: (slice(None), slice(4 * d // 2, 4 * d // 2 + 2), slice(None)) for d in (1, 2)
            }

    assert local_rows(Half(), (1, 8, 4)) == [2, 3, 4, 5]  # type: ignore[arg-type]


# Splits.


def test_held_out_is_even_and_known_in_pieces() -> None:
    assert held_out(0, 10, 0.3).nonzero()[0].tolist() == [3, 6, 9]
    assert held_out(4, 6, 0.3).nonzero()[0].tolist() == [2, 5]
    assert not held_out(0, 100, 0.0).any()


def test_split_by_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\n<|endoftext|>\n".join(f"doc{i}" for i in range(9)))
    data = open_bytes(path, validation_fraction=0.25)
    assert text_of(data.validation) == "doc3|doc7|"
    assert text_of(data.train) == "doc0|doc1|doc2|doc4|doc5|doc6|doc8|"
    assert (data.documents, data.tokens) == (9, 45)
    assert "9 documents, 45 tokens, 9 training + 3 validation windows of 4" in str(data)


def test_split_of_few_documents(tmp_path: Path) -> None:
    """A share of the last, so that two documents do not lose one of them."""
    path = write(tmp_path / "a.txt", f"{'a' * 99}\n<|endoftext|>\n{'b' * 99}")
    data = open_bytes(path, validation_fraction=0.05)
    assert text_of(data.validation) == "b" * 9 + "|", "10 of 200 tokens"
    assert text_of(data.train) == "a" * 99 + "|" + "b" * 90
    assert data.documents == 2
    assert text_of(open_bytes(path, validation_fraction=0.5).validation) == "b" * 99 + "|", (
        "enough for a whole one"
    )
    least = open_bytes(path, validation_fraction=0.001)
    assert text_of(least.validation) == "b|", "one prediction at least"


def test_split_of_one_document(tmp_path: Path) -> None:
    data = open_bytes(write(tmp_path / "a.txt", "abcdefghijklmnopqrs"), validation_fraction=0.25)
    assert (text_of(data.train), text_of(data.validation)) == ("abcdefghijklmno", "pqrs|")
    assert data.documents == 1


def test_no_split(tmp_path: Path) -> None:
    assert open_bytes(write(tmp_path / "a.txt", "abcdef")).validation is None


def test_validation_source(tmp_path: Path) -> None:
    path, other = write(tmp_path / "a.txt", "abcdef"), write(tmp_path / "b.txt", "ghi")
    data = open_bytes(path, validation_source=str(other), validation_fraction=0.5)
    assert (text_of(data.train), text_of(data.validation)) == ("abcdef|", "ghi|")


def test_stories() -> None:
    data = open_corpus(DataConfig(), vocab_size=50304, seed=0)
    assert (data.documents, data.tokens) == (98, 270_004)
    assert len(data.train) == 1007 and len(data.validation) == 49
    assert 6.0 < data.unigram_entropy < 7.0
    assert data.tokenizer.decode(data.train[0].tokens).startswith("P R E F A C E")


def test_unigram_entropy() -> None:
    assert unigram_entropy(
        Stream([np.array([5, 1, 1, 5, 0, 0, 3, 3], np.uint16)])
    ) == pytest.approx(np.log(4))


# Sources.


def test_jsonl_parquet_and_globs(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    write(tmp_path / "b.jsonl", '{"story": "two", "id": 1}\n\n{"story": "thr\\u00e9e", "id": 2}\n')
    table = arrow.table({"id": [1, 2], "story": ["four", None]})
    parquet.write_table(table, tmp_path / "c.parquet")
    write(tmp_path / "a.txt", "one")
    data = open_bytes(tmp_path / "[abc].*", text_field="story")
    assert text_of(data.train) == "one|two|thr\u00c3\u00a9e|four|"


def test_parallel_tokenizing_keeps_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    path = write(tmp_path / "a.txt", "\n<|endoftext|>\n".join(f"{i:03}" for i in range(300)))
    monkeypatch.setattr(corpus_module, "batched", lambda texts, _: sources.batched(texts, 10))
    monkeypatch.setattr(corpus_module, "LARGE_TEXT", 100)
    assert text_of(open_bytes(path).train) == "".join(f"{i:03}|" for i in range(300))
    assert sum("jaxpar.prepare" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_raw_shards(tmp_path: Path, dtype: str) -> None:
    for i in range(3):
        np.arange(10 * i, 10 * i + 10).astype(dtype).tofile(tmp_path / f"{i}.bin")
    shard_dtype = "auto" if dtype == "uint16" else dtype
    data = open_bytes(
        tmp_path / "*.bin", shard_dtype=shard_dtype, validation_fraction=0.3, sequence_length=5
    )
    assert (data.train[3].tokens == np.arange(15, 20)).all(), "across shards"
    assert (len(data.train), len(data.validation)) == (5, 1)
    assert data.validation[0].tokens.tolist() == [25, 26, 27, 28, 29], "whole windows at the end"
    assert data.documents is None and data.tokens == 30


@pytest.mark.parametrize(
    ("magic", "version", "dtype"), [(20240520, 1, "uint16"), (20240801, 7, "uint32")]
)
def test_llmc_shards(tmp_path: Path, magic: int, version: int, dtype: str) -> None:
    def shard(name: str, version: int, tokens: int) -> Path:
        header = np.zeros(256, "<i4")
        header[:3] = magic, version, tokens
        (tmp_path / name).write_bytes(header.tobytes() + np.arange(20).astype(dtype).tobytes())
        return tmp_path / name

    data = open_bytes(shard("good.bin", version, 20))
    assert data.train[1].tokens.tolist() == [4, 5, 6, 7] and data.tokens == 20
    with pytest.raises(ConfigError, match="only version"):
        open_bytes(shard("new.bin", version + 1, 20))
    with pytest.raises(ConfigError, match="its header says 21 tokens"):
        open_bytes(shard("cut.bin", version, 21))


def test_dtype_from_manifest(tmp_path: Path) -> None:
    np.arange(8, dtype=np.uint32).tofile(tmp_path / "train.bin")
    np.arange(8, dtype=np.uint32).tofile(tmp_path / "val.bin")
    write(tmp_path / "manifest.json", '{"dtype": "uint32"}')
    data = open_bytes(tmp_path, validation_fraction=0.1)
    assert data.train[0].targets.tolist() == [1, 2, 3, 4] and data.validation[
        1
    ].tokens.tolist() == [4, 5, 6, 7]


def test_what_is_for_validation_in_a_folder(tmp_path: Path) -> None:
    """A word of the name says it, or the manifest."""
    names = "carnival interval value_1 train_000 val fineweb_val_0 Valid-2 x.validation.7".split()
    for number, name in enumerate(names):
        np.full(8, number, np.uint16).tofile(tmp_path / f"{name}.bin")
    held = {file.stem for file in sources.find_source(str(tmp_path)).validation}
    assert held == {"val", "fineweb_val_0", "Valid-2", "x.validation.7"}
    shards = [{"file": "val.bin", "split": "train"}, {"file": "value_1.bin", "split": "validation"}]
    write(tmp_path / "manifest.json", json.dumps({"shards": shards}))
    held = {file.stem for file in sources.find_source(str(tmp_path)).validation}
    assert held == {"value_1", "fineweb_val_0", "Valid-2", "x.validation.7"}


def test_marks_of_a_corpus(tmp_path: Path) -> None:
    """Content, and the type in which ids are read, whether a field, a header or a manifest says
    it."""
    shard, other = tmp_path / "a.bin", tmp_path / "b.bin"
    np.arange(8, dtype=np.uint16).tofile(shard)
    shutil.copy(shard, other)

    def of(source: object, **changes: object) -> dict[str, str | None]:
        return marks(replace(BYTES, source=str(source), **changes))

    plain = of(shard)
    assert plain == of(other) == of(shard, shard_dtype="uint16")
    assert of(shard, shard_dtype="uint32") == plain | {"data.shard_dtype": "uint32"}
    write(tmp_path / "manifest.json", '{"dtype": "uint32"}')
    assert of(shard)["data.shard_dtype"] == of(shard, shard_dtype="uint16")["data.shard_dtype"]
    text = write(tmp_path / "a.txt", "one")
    first = of(text)
    assert first == of(text, shard_dtype="uint32")
    write(text, "two")
    assert of(text)["data.source"] != first["data.source"]
    assert of("synthetic") == {}


def test_shards_stay_on_disk(tmp_path: Path) -> None:
    np.zeros(64, np.uint16).tofile(tmp_path / "a.bin")
    stream = open_bytes(tmp_path / "a.bin").train.stream
    (piece,) = stream.pieces()
    base = piece
    while base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


# Refusals.


def refused(*parts: str, source: Path | str, **changes: object) -> None:
    with pytest.raises(ConfigError) as caught:
        open_bytes(source, **changes)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_refuses_files(tmp_path: Path) -> None:
    refused("does not exist", "stories", source=tmp_path / "a.txt")
    refused("matches no file", "stories", source=tmp_path / "*.txt")
    refused(
        "unknown extension '.csv'",
        ".txt, .jsonl, .parquet, .bin",
        source=write(tmp_path / "a.csv", "x"),
    )
    refused("no extension and does not exist", "tinystories", source="storeis")
    refused("is empty", source=write(tmp_path / "empty.txt", ""))
    refused("no text but white space", source=write(tmp_path / "blank.txt", " \n\n"))
    (tmp_path / "folder.txt").mkdir()
    refused("without token shards", "*.txt", source=tmp_path / "folder.txt")
    refused("not a readable file", source=str(tmp_path / "folder.*"))
    np.zeros(8, np.uint16).tofile(tmp_path / "mix.bin")
    write(tmp_path / "mix.txt", "x")
    refused("mixes text and token shards", source=tmp_path / "mix.*")
    refused(
        "data.validation_source",
        "does not exist",
        source=tmp_path / "mix.txt",
        validation_source="no.txt",
    )


def test_refuses_content(tmp_path: Path) -> None:
    for name, content, message in (
        ("nul.txt", b"abc\n\0\1", "nul.txt:2: a NUL byte"),
        ("latin.txt", b"caf\xe9 au lait", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{oops\n', "a.jsonl:2: not JSON"),
        ("b.jsonl", b'{"body": "x", "id": 1}\n', "b.jsonl:1: no field 'text'; set data.text_field"),
        ("c.jsonl", b'{"text": 3}\n', "field 'text' is not a string"),
        ("d.jsonl", b"[1]\n", "a JSON list"),
        ("e.parquet", b"not parquet", "not a Parquet file"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(message, source=tmp_path / name)


def test_refuses_parquet_without_the_column(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    parquet.write_table(arrow.table({"text": [1], "body": ["x"]}), tmp_path / "a.parquet")
    refused("no text column 'text'", "one of: body", source=tmp_path / "a.parquet")


def test_refuses_what_does_not_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "abcdefg")
    refused("8 tokens to train on", "at most 8", source=path, sequence_length=9)
    assert len(open_bytes(path, sequence_length=8).train) == 1
    assert len(open_bytes(path, sequence_length=9, packing=False).train) == 1, (
        "padding is what unpacked windows have"
    )
    refused("data.validation_fraction=0.9", "leaves nothing", source=path, validation_fraction=0.9)
    with pytest.raises(
        ConfigError, match=r"257 ids, more than model.vocab_size=256.*257 \(or 320.*384"
    ):
        open_corpus(replace(BYTES, source=str(path)), vocab_size=256, seed=0)
    with pytest.raises(ConfigError, match=r"at least 50257 \(or 50304, a multiple of 64 and 128\)"):
        open_corpus(DataConfig(), vocab_size=50000, seed=0)


def test_refuses_shards(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    np.array([1, 2, 3, 300, 5, 6], np.uint16).tofile(path)
    refused(
        "token id 300 is beyond model.vocab_size=257",
        "301 (or 320",
        "data.shard_dtype",
        source=path,
    )
    np.arange(6, dtype=np.uint16).tofile(path)
    refused(
        "fewer than two windows",
        "sequence_length of at most 2",
        source=path,
        validation_fraction=0.1,
        sequence_length=5,
    )
    assert len(open_bytes(path, validation_fraction=0.1, sequence_length=2).train) == 2
    path.write_bytes(b"abc")
    refused("cut short", "uint16", source=path)


def test_tinystories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "jaxpar"
    folder.mkdir()
    for split in ("train", "valid"):
        write(
            folder / f"TinyStories-{split}.txt",
            f"{split} one\n<|endoftext|>\n{split} two\n<|endoftext|>\n",
        )
    data = open_bytes("tinystories", validation_fraction=0.05)
    assert (
        text_of(data.train) == "train one|train two|"
        and text_of(data.validation) == "valid one|valid two|"
    )
    assert open_bytes("tinystories").validation is None


def test_manifest_of_another_kind_is_an_error(tmp_path: Path) -> None:
    np.zeros(8, np.uint16).tofile(tmp_path / "a.bin")
    write(tmp_path / "manifest.json", "{")
    refused("manifest.json is not JSON", source=tmp_path)
    write(tmp_path / "manifest.json", json.dumps({"complete": False}))
    refused("was not finished", "same prepare command", source=tmp_path)
