"""A corpus opened and split in two.

A corpus is a stream of token ids in which each document ends with `eot`; `windows` cuts sequences
out of it.
"""

import dataclasses
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from jaxpar.config import ConfigError, DataConfig
from jaxpar.data.shards import Stream, legal_sizes, open_shards, read_as
from jaxpar.data.sources import NAMED, Source, batched, content_mark, documents, find_source
from jaxpar.data.tokenizer import Tokenizer, encode_documents, load_tokenizer, tokenizer_mark
from jaxpar.data.windows import SyntheticWindows, Windows

LARGE_TEXT = 16_000_000
"""Characters above which tokenizing at every start is worth a remark."""

SYNTHETIC_WINDOWS = 1 << 24
SYNTHETIC_VALIDATION_WINDOWS = 256
ENTROPY_TOKENS = 10_000_000

Item = TypeVar("Item")
Result = TypeVar("Result")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a run trains on. `validation` is None where none was asked for. `tokenizer` and
    `unigram_entropy` (nats a token of the training split) are None for synthetic data, `tokens` and
    `documents` where they are not known."""

    source: str
    train: Windows
    validation: Windows | None
    tokenizer: Tokenizer | None = None
    unigram_entropy: float | None = None
    tokens: int | None = None
    documents: int | None = None

    def __str__(self) -> str:
        known = {"documents": self.documents, "tokens": self.tokens}
        size = [f"{number:,} {what}" for what, number in known.items() if number is not None]
        tokenizer = f" ({self.tokenizer.name})" if self.tokenizer else ""
        validation = f" + {len(self.validation):,} validation" if self.validation else ""
        windows = (
            f"{len(self.train):,} training{validation} windows of {self.train.sequence_length}"
        )
        return ", ".join([self.source + tokenizer, *size, windows])


def open_corpus(config: DataConfig, *, vocab_size: int, seed: int) -> Corpus:
    """Opens what `config` names and holds it against every rule. Writes nothing, except that
    `tinystories` is kept in the cache. Text is tokenized in memory; token shards stay on disk.

    Args:
      vocab_size: of the model; may exceed that of the tokenizer.
      seed: of synthetic data. The split of a corpus does not depend on it.

    Raises:
      ConfigError: the source, the tokenizer, their fit to the model, or the split is wrong.
    """
    if config.source == "synthetic":
        return _open_synthetic(config, vocab_size, seed)
    tokenizer = fitting_tokenizer(config, vocab_size)
    source = find_source(config.source)
    held = validation_files(config, source)
    fraction = 0.0 if held else config.validation_fraction
    train, validation = _load(source.files, config, tokenizer, vocab_size, fraction)
    if held:
        validation, _ = _load(held, config, tokenizer, vocab_size, fraction)
    streams = [train] if validation is None else [train, validation]
    counts = [stream.documents for stream in streams]
    return Corpus(
        source=config.source,
        train=_windows("train on", train, config, tokenizer, vocab_size),
        validation=None
        if validation is None
        else _windows("validate on", validation, config, tokenizer, vocab_size),
        tokenizer=tokenizer,
        unigram_entropy=unigram_entropy(train),
        tokens=sum(len(stream) for stream in streams),
        documents=None if None in counts else sum(count for count in counts if count),
    )


def marks(config: DataConfig) -> dict[str, str | None]:
    """What the fields that name files stand for, by which it is known again where they have moved,
    and where another content lies in their place. None for what goes by a name.

    Raises:
      ConfigError: as `open_corpus`, for what is not there.
    """
    if config.source == "synthetic":
        return {}
    shards = "text"
    if config.source not in NAMED and (source := find_source(config.source)).shards:
        shards = read_as(source.files, config.shard_dtype)
    return {
        "data.source": content_mark(config.source),
        "data.validation_source": content_mark(config.validation_source, "data.validation_source"),
        "data.shard_dtype": shards,
        "data.tokenizer": tokenizer_mark(config.tokenizer),
    }


def unigram_entropy(stream: Stream) -> float:
    """Entropy in nats a token of the first 10 million tokens under their own frequencies: the loss
    of a model that has learned how often each token occurs, and nothing else."""
    counts = np.zeros(0, np.int64)
    for piece in stream.pieces(ENTROPY_TOKENS):
        more = np.bincount(piece, minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def _open_synthetic(config: DataConfig, vocab_size: int, seed: int) -> Corpus:
    def windows(first: int, count: int) -> SyntheticWindows:
        length = config.sequence_length
        return SyntheticWindows(
            count=count, first=first, sequence_length=length, vocab_size=vocab_size, seed=seed
        )

    held = (
        windows(SYNTHETIC_WINDOWS, SYNTHETIC_VALIDATION_WINDOWS)
        if config.validation_fraction
        else None
    )
    return Corpus(source="synthetic", train=windows(0, SYNTHETIC_WINDOWS), validation=held)


def fitting_tokenizer(config: DataConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer of `config`, whose ids all lie below `vocab_size`, or ConfigError."""
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.size > vocab_size:
        raise ConfigError(
            f"data.tokenizer={config.tokenizer!r} has {tokenizer.size} ids, more than "
            f"model.vocab_size={vocab_size}; "
            f"use model.vocab_size of at least {legal_sizes(tokenizer.size)}"
        )
    return tokenizer


def validation_files(config: DataConfig, source: Source) -> tuple[Path, ...]:
    """The files of a validation split that is given, not held out; often none."""
    if config.validation_source:
        return find_source(config.validation_source, "data.validation_source").files
    return source.validation if config.validation_fraction else ()


def _load(
    files: Sequence[Path],
    config: DataConfig,
    tokenizer: Tokenizer,
    vocab_size: int,
    fraction: float,
) -> tuple[Stream, Stream | None]:
    """The streams to train on and, where `fraction` is above 0, to validate on."""
    if files[0].suffix == ".bin":
        stream = open_shards(
            files, dtype=config.shard_dtype, tokenizer=tokenizer, vocab_size=vocab_size
        )
        return _split_shards(stream, config, fraction) if fraction else (stream, None)
    encoded = list(_encode_in_threads(tokenizer, documents(files, config.text_field)))
    if not encoded:
        names = ", ".join(map(str, files[:3]))
        raise ConfigError(
            f"{names}: no text but white space; write text to it, or use data.source=stories"
        )
    tokens, lengths = (np.concatenate(arrays) for arrays in zip(*encoded, strict=True))
    if not fraction:
        return Stream([tokens], documents=len(lengths)), None
    held = held_out(0, len(lengths), fraction)
    if not held.any():
        cut = max(0, len(tokens) - tail(int(lengths[-1]), fraction * len(lengths)))
        return Stream([tokens[:cut]], documents=len(lengths)), Stream([tokens[cut:]], documents=0)
    of_held = np.repeat(held, lengths)
    return (
        Stream([tokens[~of_held]], documents=int((~held).sum())),
        Stream([tokens[of_held]], documents=int(held.sum())),
    )


def held_out(first: int, count: int, fraction: float) -> np.ndarray:
    """Which of the documents `first` .. `first+count`-1 of a corpus are for validation; bool
    [count]. Evenly spaced and independent of any seed. Who knows that a corpus has too few
    documents for one holds out the `tail` of its last."""
    steps = np.floor(np.arange(first, first + count + 1) * fraction)
    return steps[1:] > steps[:-1]


def tail(tokens: int, share: float) -> int:
    """Tokens that a corpus with too few documents to hold one out holds out at the end of its last,
    which has `tokens`: a `share` of it, the fraction times the number of documents, but enough for
    one prediction."""
    return max(2, int(tokens * share))


def _split_shards(stream: Stream, config: DataConfig, fraction: float) -> tuple[Stream, Stream]:
    """Holds out the last windows: shards have no table of documents."""
    windows = math.ceil((len(stream) - 1) / config.sequence_length)
    if windows < 2:
        raise ConfigError(
            f"data.source={config.source!r} has {len(stream):,} tokens, fewer than two windows of "
            f"data.sequence_length={config.sequence_length}: data.validation_fraction={fraction} "
            "leaves nothing to "
            f"train on; use data.sequence_length of at most {max(1, (len(stream) - 1) // 2)}, or "
            "data.validation_fraction=0"
        )
    cut = (windows - max(1, int(windows * fraction))) * config.sequence_length
    return stream.cut(0, cut), stream.cut(cut, len(stream))


def _windows(
    what: str, stream: Stream, config: DataConfig, tokenizer: Tokenizer, vocab_size: int
) -> Windows:
    length, packing = config.sequence_length, config.packing
    windows = Windows(
        stream, sequence_length=length, eot=tokenizer.eot, vocab_size=vocab_size, packing=packing
    )
    if not len(windows):
        raise ConfigError(
            f"data.source={config.source!r} leaves nothing to {what} with data.validation_fraction="
            f"{config.validation_fraction} ({len(stream)} tokens); use data.validation_fraction=0, "
            "or more text"
        )
    if what == "train on" and packing and len(stream) < length:
        raise ConfigError(
            f"data.source={config.source!r} has {len(stream):,} tokens to train on "
            "(data.validation_fraction="
            f"{config.validation_fraction}), fewer than one data.sequence_length={length}; use "
            "data.sequence_length of "
            f"at most {len(stream)}, or more text"
        )
    return windows


def _encode_in_threads(
    tokenizer: Tokenizer, texts: Iterable[str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        groups = _remark_on_size(batched(texts, 1 << 20))
        yield from in_order(
            pool, lambda group: encode_documents(tokenizer, group), groups, ahead=2 * threads
        )


def in_order(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """`map` over a pool that takes items no faster than their results are used."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _remark_on_size(groups: Iterable[list[str]]) -> Iterator[list[str]]:
    characters = 0
    for group in groups:
        if characters <= LARGE_TEXT < (characters := characters + sum(map(len, group))):
            _log.warning(
                "more than %d MB of text, tokenized in memory at every start; python -m "
                "jaxpar.prepare does it once",
                LARGE_TEXT // 1_000_000,
            )
        yield group
