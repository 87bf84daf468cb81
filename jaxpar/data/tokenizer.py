"""Text to token ids and back: GPT-2 (bundled), UTF-8 bytes, Hugging Face `tokenizer.json`,
SentencePiece.

Text is only ever text: `<|endoftext|>` inside a document is encoded as thirteen ordinary
characters, so no document can forge the id that ends one.
"""

import base64
import hashlib
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxpar.config import ConfigError

KNOWN = (
    "gpt2, bytes, a path to a Hugging Face tokenizer.json (or its folder), or a path to a "
    "SentencePiece .model"
)

FILES = ("tokenizer.json", "tokenizer.model")
"""Names of the file in the folder of a tokenizer."""

GPT2_RANKS = Path(__file__).parents[1] / "assets" / "gpt2.tiktoken"
GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)

END_OF_TEXT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eot_id|>",
    "<|im_end|>",
    "[EOS]",
)
"""Names under which tokenizers of Hugging Face keep the id that ends a document, most specific
first."""

_PROBE = (
    "Hello, world!  It's 1,234.5 naïve cafés — 你好, мир; 🙂\n\tdef f(x):\n  return x**2 "
    "# antidisestablishment "
)


class Tokenizer(Protocol):
    """Ids are 0 .. `size`-1; `eot` ends a document."""

    name: str
    size: int
    eot: int

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 [tokens], without `eot`."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`. Ids that stand for no text (`eot`, the padding of a vocabulary) decode to
        nothing."""
        ...


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`, or stored in the file or folder `name`.

    Raises:
      ConfigError: no such tokenizer, a broken file, a tokenizer without an id that ends a document,
        or a package that is not installed.
    """
    path = tokenizer_file(name)
    if path is None:
        return GPT2() if name == "gpt2" else Bytes()
    return HuggingFace(path) if path.suffix == ".json" else SentencePiece(path)


def tokenizer_file(name: str) -> Path | None:
    """The file behind the tokenizer `name`; None for one that goes by its name.

    Raises:
      ConfigError: no such tokenizer, or a file of an unknown kind.
    """
    if name in ("gpt2", "bytes"):
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        inside = [path / file for file in FILES if (path / file).is_file()]
        if not inside:
            raise ConfigError(
                f"data.tokenizer={name!r} is a folder without tokenizer.json; use {KNOWN}"
            )
        path = inside[0]
    if not path.is_file():
        raise ConfigError(
            f"data.tokenizer={name!r} is neither a known tokenizer nor a file; use {KNOWN}"
        )
    if path.suffix not in (".json", ".model"):
        raise ConfigError(
            f"data.tokenizer={name!r} has extension {path.suffix or '(none)'!r}; use {KNOWN}"
        )
    return path


def tokenizer_mark(name: str) -> str | None:
    """A sha256 of the file of a tokenizer, which tells it from others wherever it lies; None for
    one that goes by its name."""
    path = tokenizer_file(name)
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of the ids of a fixed text: tells whether two tokenizers agree, wherever their files
    lie."""
    ids = np.append(tokenizer.encode(_PROBE), [tokenizer.size, tokenizer.eot]).astype("<i8")
    return hashlib.sha256(ids.tobytes()).hexdigest()[:16]


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Documents end to end, each closed by `eot`, in `token_dtype`; and the length of each, int64
    [documents]."""
    pieces, lengths = [], []
    for text in texts:
        ids = tokenizer.encode(text)
        pieces += [ids, [tokenizer.eot]]
        lengths.append(len(ids) + 1)
    return np.concatenate(pieces).astype(token_dtype(tokenizer)), np.array(lengths, np.int64)


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest type that holds the ids on disk: uint16 or uint32."""
    return np.dtype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32)


class GPT2:
    """The byte-pair encoding of GPT-2: ids equal to `tiktoken.get_encoding("gpt2")`, without a
    download."""

    name, size, eot = "gpt2", 50257, 50256

    def __init__(self) -> None:
        import tiktoken

        lines = (line.split() for line in GPT2_RANKS.read_bytes().splitlines())
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
            special_tokens={"<|endoftext|>": self.eot},
            explicit_n_vocab=self.size,
        )

    def encode(self, text: str) -> np.ndarray:
        ids = self._encoding.encode_to_numpy(
            _unicode(text), allowed_special=set(), disallowed_special=()
        )
        return ids.astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._encoding.decode(_below(ids, self.eot))


class Bytes:
    """UTF-8 bytes are ids 0..255."""

    name, size, eot = "bytes", 257, 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_unicode(text).encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(_below(ids, self.eot)).decode(errors="replace")


class HuggingFace:
    """A `tokenizer.json`."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises plain Exception
            raise ConfigError(
                f"data.tokenizer='{path}' is not a tokenizer.json: {error}; use {KNOWN}"
            ) from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        ends = [token for token in END_OF_TEXT if token in vocabulary]
        if not ends:
            raise ConfigError(
                f"data.tokenizer='{path}' has no token that ends a document; add one of "
                f"{', '.join(END_OF_TEXT)} to it"
            )
        self.name, self.size, self.eot = (
            str(path),
            max(vocabulary.values()) + 1,
            vocabulary[ends[0]],
        )

    def encode(self, text: str) -> np.ndarray:
        return np.array(
            self._tokenizer.encode(_unicode(text), add_special_tokens=False).ids, np.int32
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(_below(ids, self.size), skip_special_tokens=True)


class SentencePiece:
    """A SentencePiece `.model`."""

    def __init__(self, path: Path) -> None:
        try:
            sentencepiece = importlib.import_module("sentencepiece")
        except ImportError as error:
            raise ConfigError(
                f"data.tokenizer='{path}' needs sentencepiece, which is not installed: "
                "pip install 'jaxpar[sentencepiece]'"
            ) from error
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # the C++ side raises RuntimeError, OSError or TypeError
            raise ConfigError(
                f"data.tokenizer='{path}' is not a SentencePiece model: {error}; use {KNOWN}"
            ) from error
        self.name, self.size, self.eot = (
            str(path),
            self._processor.vocab_size(),
            self._processor.eos_id(),
        )
        if self.eot < 0:
            raise ConfigError(
                f"data.tokenizer='{path}' has no </s> to end a document; train it with --eos_id"
            )

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._processor.encode(_unicode(text)), np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._processor.decode(_below(ids, self.size))


def _below(ids: Sequence[int] | np.ndarray, end: int) -> list[int]:
    return [int(i) for i in ids if 0 <= i < end]


def _unicode(text: str) -> str:
    """`text` with lone surrogates, which JSON can hold and UTF-8 can't, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
