"""Tokenizers: ids that others agree on, round trips, and text that must stay text."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxpar.config import ConfigError
from jaxpar.data.tokenizer import (
    GPT2,
    Bytes,
    Tokenizer,
    encode_documents,
    fingerprint,
    load_tokenizer,
    token_dtype,
)

TEXTS = [
    "hello world",
    "It's  1,234.5\n\n\ttabs \u00a0 and   spaces  ",
    "naïve 你好 🙂 мир",
    "<|endoftext|>",
    "",
]


def hugging_face(path: Path, *, eot: str = "</s>") -> Path:
    """A byte-level tokenizer.json with an end token, whose id leaves a gap after the merges."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(
        vocab={token: i for i, token in enumerate([*alphabet, "he"])}, merges=[("h", "e")]
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", eot])
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path))
    return path


@pytest.fixture(params=["gpt2", "bytes", "tokenizer.json"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    name = request.param
    return load_tokenizer(str(hugging_face(tmp_path / name)) if name.endswith(".json") else name)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.eot not in ids, "text must not forge the end of a document"
    assert not len(ids) or ids.max() < tokenizer.size
    assert tokenizer.decode(ids) == text


def test_ids_without_text_decode_to_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello")
    assert tokenizer.decode([tokenizer.eot, *ids, tokenizer.eot, tokenizer.size, 10**6]) == "hello"


def test_lone_surrogate_is_replaced(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_gpt2_ids() -> None:
    gpt2 = load_tokenizer("gpt2")
    assert gpt2.encode("hello world").tolist() == [31373, 995]
    assert gpt2.encode("Hello, world! It's 2024.\n\n").tolist() == [
        15496,
        11,
        995,
        0,
        632,
        338,
        48609,
        13,
        628,
    ]
    assert (gpt2.size, gpt2.eot) == (50257, 50256)


@pytest.mark.parametrize("character", ["a", " ", "!", "🙂"])
def test_gpt2_does_not_run_away(character: str) -> None:
    start = time.monotonic()
    gpt2 = GPT2()
    ids = gpt2.encode(character * 200_000)
    assert gpt2.decode(ids) == character * 200_000
    assert time.monotonic() - start < 10, "quadratic in the length of a piece"


def test_bytes_ids() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("é!").tolist() == [0xC3, 0xA9, 0x21]
    assert (tokenizer.size, tokenizer.eot) == (257, 256)
    assert tokenizer.decode([0xC3, 256, 0x21]) == "\ufffd!"


def test_hugging_face_ids(tmp_path: Path) -> None:
    path = hugging_face(tmp_path / "tokenizer.json")
    for name in (path, tmp_path):
        tokenizer = load_tokenizer(str(name))
        assert (tokenizer.size, tokenizer.eot) == (259, 258)
        assert len(tokenizer.encode("hello hello")) == 9, "two merges, and no truncation"


def test_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    prefix = tmp_path / "model"
    sentences = iter(["the quick brown fox jumps over the lazy dog", "hello world"] * 20)
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(
        sentence_iterator=sentences, model_prefix=str(prefix), vocab_size=40, hard_vocab_limit=False
    )
    tokenizer = load_tokenizer(f"{prefix}.model")
    ids = tokenizer.encode("hello world</s>")
    assert (
        tokenizer.eot not in ids
        and tokenizer.decode(tokenizer.encode("hello world")) == "hello world"
    )
    assert tokenizer.decode([*tokenizer.encode("hello"), tokenizer.eot, 10**6]) == "hello"


def test_sentencepiece_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "x.model").write_bytes(b"?")
    with pytest.raises(ConfigError, match=r"pip install 'jaxpar\[sentencepiece\]'"):
        load_tokenizer(str(tmp_path / "x.model"))


def test_documents_end_with_eot() -> None:
    tokens, lengths = encode_documents(Bytes(), ["ab", "c"])
    assert tokens.tolist() == [97, 98, 256, 99, 256] and lengths.tolist() == [3, 2]
    assert tokens.dtype == token_dtype(Bytes()) == np.uint16


def test_fingerprint_tells_tokenizers_apart(tmp_path: Path) -> None:
    one, other = hugging_face(tmp_path / "a.json"), hugging_face(tmp_path / "b.json", eot="<eos>")
    prints = {fingerprint(load_tokenizer(name)) for name in ("gpt2", "bytes", str(one))}
    assert len(prints) == 3
    assert fingerprint(load_tokenizer(str(other))) in prints, "the same ids under another path"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gpt3", None, "neither a known tokenizer nor a file; use gpt2, bytes"),
        ("x.txt", "hello", "extension '.txt'; use gpt2, bytes"),
        ("x.json", "{}", "not a tokenizer.json"),
        (".", None, "folder without tokenizer.json"),
    ],
)
def test_wrong_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(name)


def test_hugging_face_without_end(tmp_path: Path) -> None:
    path = hugging_face(tmp_path / "tokenizer.json", eot="<something>")
    with pytest.raises(ConfigError, match="no token that ends a document"):
        load_tokenizer(str(path))
