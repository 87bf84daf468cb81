"""Tokenizes a corpus into shards under --workdir, once and in parallel; then train from them with
data.source=WORKDIR.

Interrupt it freely: the same command goes on after the last finished shard. The shards don't depend
on the number of workers, and a run that trains from them sees the tokens it would see from the text
itself.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxpar.config import Config, ConfigError, DataConfig
from jaxpar.data.corpus import fitting_tokenizer, held_out, in_order, tail, validation_files
from jaxpar.data.sources import (
    MANIFEST,
    Source,
    batched,
    documents,
    find_source,
    read_manifest,
)
from jaxpar.data.tokenizer import (
    Tokenizer,
    encode_documents,
    fingerprint,
    load_tokenizer,
    token_dtype,
)

Shard = dict[str, Any]
"""What the manifest says of a shard: file, split, group, documents, characters, tokens, max_id,
sha256."""

SHARD_CHARACTERS = 1 << 25
"""Text of a shard: the unit of parallel work and of what an interruption can lose; about 8 million
GPT-2 tokens."""


OF_A_RUN = ("config.json", "metrics.jsonl", "checkpoints")
"""What `jaxpar.train` writes into its workdir."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Consecutive documents, which become one training shard and, where some are held out, one
    validation shard.

    `held` marks them, bool [documents]. `tail_share` above 0 holds out the end of the last, where a
    corpus has few.
    """

    index: int
    texts: list[str]
    held: np.ndarray
    tail_share: float


def prepare(
    config: Config,
    output: Path,
    *,
    workers: int | None = None,
    shard_characters: int = SHARD_CHARACTERS,
) -> dict[str, Any]:
    """Writes `train_*.bin`, `validation_*.bin` and `manifest.json` to `output`, or what is still
    missing of them.

    Args:
      workers: processes, by default one a core; 1 works in this process.

    Returns:
      The manifest.

    Raises:
      ConfigError: a wrong source or tokenizer, or an `output` made from another source or with
        other settings.
    """
    data = config.data
    tokenizer, source, held = _open_text(config)
    request = {
        "source": [_identity(file) for file in source.files],
        "validation_source": [_identity(file) for file in held],
        "validation_fraction": data.validation_fraction,
        "text_field": data.text_field,
        "tokenizer": fingerprint(tokenizer),
        "shard_characters": shard_characters,
    }
    manifest = _resume(output, request)
    if manifest.get("complete"):
        return manifest
    groups = _groups(source, held, data, shard_characters)
    first = next(groups, None)
    if first is None:
        raise ConfigError(
            f"data.source={data.source!r} has no text but white space; write text to it"
        )
    output.mkdir(parents=True, exist_ok=True)
    manifest = {
        "tokenizer": data.tokenizer,
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "eot": tokenizer.eot,
        "dtype": str(token_dtype(tokenizer)),
        "request": request,
        "shards": manifest.get("shards", []),
    }
    _save(output, manifest, complete=False)
    done = {shard["group"] for shard in manifest["shards"]}
    todo = (group for group in itertools.chain([first], groups) if group.index not in done)
    write = functools.partial(write_group, tokenizer_name=data.tokenizer, output=output)
    results = _map(write, todo, workers, output)
    with _progress(source.files + held, manifest["shards"]) as report, contextlib.closing(results):
        for shards in results:
            manifest["shards"] += shards
            _save(output, manifest, complete=False)
            report(shards)
    for left in output.glob("*.partial"):  # by an interruption
        left.unlink()
    return _save(output, manifest, complete=True)


def write_group(group: Group, *, tokenizer_name: str, output: Path) -> list[Shard]:
    """Tokenizes a group and writes its shards. Returns their records in the manifest."""
    tokens, lengths = encode_documents(_tokenizer(tokenizer_name), group.texts)
    characters = np.array([len(text) for text in group.texts])
    of_held = np.repeat(group.held, lengths)
    if group.tail_share:
        of_held[max(0, len(tokens) - tail(int(lengths[-1]), group.tail_share)) :] = True
    shards = []
    for split, chosen, documents_of in (
        ("train", ~of_held, ~group.held),
        ("validation", of_held, group.held),
    ):
        part = tokens[chosen]
        if not len(part):
            continue
        content = part.astype(part.dtype.newbyteorder("<")).tobytes()
        shard = {
            "file": f"{split}_{group.index:05d}.bin",
            "split": split,
            "group": group.index,
            "documents": int(documents_of.sum()),
            "characters": int(characters[documents_of].sum()),
            "tokens": len(part),
            "max_id": int(part.max()),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        _write(output / shard["file"], content)
        shards.append(shard)
    return shards


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    from jaxpar import cli

    request = cli.parse(
        argv, __doc__ or "", workers=cli.Option(0, "processes; 0: one a core", least=0)
    )
    workdir, workers = request.workdir, request.options["workers"]
    cli.check_writable(workdir)
    if used := [name for name in OF_A_RUN if (workdir / name).exists()]:
        raise ConfigError(
            f"--workdir={workdir} is that of a run (it holds {', '.join(used)}); shards need a "
            "folder of their own, give another"
        )
    manifest = prepare(request.config, workdir, workers=workers or None)
    for split in ("train", "validation"):
        shards = [shard for shard in manifest["shards"] if shard["split"] == split]
        print(
            f"{split:<10} {sum(shard['tokens'] for shard in shards):>15,} tokens in {len(shards)} "
            "shards"
        )
    tokenizer = f"--config.data.tokenizer={manifest['tokenizer']}"
    print(
        f"next: python -m jaxpar.train --config={request.source} --config.data.source={workdir} "
        f"{tokenizer}"
    )
    return 0


def _open_text(config: Config) -> tuple[Tokenizer, Source, tuple[Path, ...]]:
    """The tokenizer, the source, and the files of a validation split that is given."""
    data = config.data
    if data.source == "synthetic":
        raise ConfigError("data.source='synthetic' has no text to prepare; train from it as it is")
    source = find_source(data.source)
    held = validation_files(data, source)
    if source.shards or any(file.suffix == ".bin" for file in held):
        raise ConfigError(
            f"data.source={data.source!r}: token shards need no preparation; train from them as "
            "they are"
        )
    return fitting_tokenizer(data, config.model.vocab_size), source, held


# Groups.


def _groups(
    source: Source, held: tuple[Path, ...], data: DataConfig, characters: int
) -> Iterator[Group]:
    """The corpus in order, split for validation as `open_corpus` splits text in memory."""
    fraction = 0.0 if held else data.validation_fraction
    seen, any_held, index = 0, False, 0
    texts_of = batched(documents(source.files, data.text_field), characters)
    texts = next(texts_of, None)
    while texts:
        following = next(texts_of, None)
        mask = held_out(seen, len(texts), fraction)
        any_held |= bool(mask.any())
        seen += len(texts)
        too_few = following is None and not any_held
        yield Group(index, texts, mask, fraction * seen if too_few else 0.0)
        texts, index = following, index + 1
    for texts in batched(documents(held, data.text_field), characters):
        yield Group(index, texts, np.ones(len(texts), bool), 0.0)
        index += 1


def _map(
    write: Callable[[Group], list[Shard]],
    groups: Iterable[Group],
    workers: int | None,
    output: Path,
) -> Generator[list[Shard], None, None]:
    """`write` of each group, in order. Groups reach their worker in files: a pipe that holds
    megabytes of text would block this process for ever when the worker dies before it has read
    them."""
    if workers == 1:
        yield from map(write, groups)
        return
    workers = workers or os.cpu_count() or 1
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        files = (_spool(group, output) for group in groups)
        yield from in_order(pool, functools.partial(_write_spooled, write), files, ahead=workers)
    except BaseException:
        for worker in multiprocessing.active_children():
            if worker not in others:
                worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _spool(group: Group, output: Path) -> Path:
    path = output / f"group_{group.index:05d}.partial"
    path.write_bytes(pickle.dumps(group))
    return path


def _write_spooled(write: Callable[[Group], list[Shard]], path: Path) -> list[Shard]:
    group = pickle.loads(path.read_bytes())
    path.unlink()
    return write(group)


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent, which ends its workers quietly, and ends the worker when the
    parent is killed."""

    def exit_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


_tokenizer = functools.cache(load_tokenizer)  # once in each worker


# Files.


def _identity(file: Path) -> list[str | int]:
    status = file.stat()
    return [str(file.resolve()), status.st_size, status.st_mtime_ns]


def _resume(output: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The manifest of an earlier run with the same request, with the shards that are really there;
    or an empty one."""
    if not (output / MANIFEST).exists():
        if output.is_dir() and any(output.glob("*.bin")):
            raise ConfigError(
                f"--workdir={output} holds token shards that jaxpar.prepare did not make; use a "
                "new folder"
            )
        return {}
    manifest = read_manifest(output)
    before = manifest.get("request", {})
    changed = [name for name, value in request.items() if before.get(name) != value]
    if changed:
        raise ConfigError(
            f"--workdir={output} was prepared otherwise ({', '.join(changed)} changed since); use "
            "a new folder, or "
            "delete this one"
        )
    shards = manifest["shards"]
    size = np.dtype(manifest["dtype"]).itemsize
    lost = {
        shard["group"]
        for shard in shards
        if _size(output / shard["file"]) != shard["tokens"] * size
    }
    kept = [shard for shard in shards if shard["group"] not in lost]
    return manifest | {"shards": kept, "complete": manifest["complete"] and not lost}


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1


def _save(output: Path, manifest: dict[str, Any], *, complete: bool) -> dict[str, Any]:
    shards = sorted(manifest["shards"], key=lambda shard: (shard["split"], shard["group"]))
    totals = {
        "complete": complete,
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "max_id": max((shard["max_id"] for shard in shards), default=0),
    }
    manifest = manifest | totals | {"shards": shards}
    _write(output / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def _write(path: Path, content: bytes) -> None:
    """A file is there whole, or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


@contextlib.contextmanager
def _progress(
    files: tuple[Path, ...], shards: list[Shard]
) -> Iterator[Callable[[list[Shard]], None]]:
    """Reports finished shards: a bar on a terminal, a line each elsewhere. `shards`: those of an
    earlier run."""
    if not sys.stderr.isatty():
        yield lambda more: print(
            *(f"{s['file']}: {s['tokens']:,} tokens" for s in more), sep="\n", flush=True
        )
        return
    from rich.console import Console
    from rich.progress import Progress

    # Bytes stand for characters, close enough for a bar; a Parquet file is compressed and tells
    # nothing.
    known = all(file.suffix != ".parquet" for file in files)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(
            "tokenizing", total=sum(file.stat().st_size for file in files) if known else None
        )
        tokens = 0

        def report(more: list[Shard]) -> None:
            nonlocal tokens
            tokens += sum(shard["tokens"] for shard in more)
            bar.update(
                task,
                advance=sum(s["characters"] for s in more),
                description=f"{tokens / 1e6:,.1f}M tokens",
            )

        report(shards)
        yield report


if __name__ == "__main__":
    from jaxpar import cli

    cli.run(main)
