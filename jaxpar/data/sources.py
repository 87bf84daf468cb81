"""Where documents come from: text files, JSON lines, Parquet, the bundled stories, TinyStories."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxpar.config import ConfigError

SEPARATOR = "<|endoftext|>"
"""A line that separates the documents of a .txt file."""

STORIES = Path(__file__).parents[1] / "assets" / "stories.txt"
TINYSTORIES = "roneneldan/TinyStories"
NAMED = ("stories", "tinystories", "synthetic")
"""Corpora that are known by their name."""

OFFLINE = (
    "data.source=stories (bundled), or the path of a local .txt, .jsonl, .parquet or .bin file"
)

MANIFEST = "manifest.json"
"""What `jaxpar.prepare` writes beside token shards."""

BLOCK, BLOCKS = 1 << 16, 1 << 10
"""Bytes that `content_mark` reads in one place of a corpus, and the number of places: 64 MiB."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Files to read in this order: all of them text, or all of them token shards. `validation`: the
    files of a source that brings its own validation split."""

    name: str
    files: tuple[Path, ...]
    validation: tuple[Path, ...] = ()

    @property
    def shards(self) -> bool:
        return self.files[0].suffix == ".bin"


def find_source(source: str, field: str = "data.source") -> Source:
    """The files behind `stories`, `tinystories` (downloaded the first time), a path, a glob, or a
    folder of shards.

    Raises:
      ConfigError: nothing is there, the files are empty or unreadable, their extension is unknown,
        or text and token shards are mixed.
    """
    if source == "stories":
        return Source(source, (STORIES,))
    if source == "tinystories":
        train, validation = (
            download(TINYSTORIES, f"TinyStories-{split}.txt", cache())
            for split in ("train", "valid")
        )
        return Source(source, (train,), (validation,))
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.bin"))
        if not files:
            raise ConfigError(
                f"{field}={source!r} is a folder without token shards (*.bin); name text files "
                "with a glob such as "
                f"{field}='{source.rstrip('/')}/*.txt', or make shards with python -m "
                "jaxpar.prepare"
            )
        splits = {
            shard.get("file"): shard.get("split") for shard in read_manifest(path).get("shards", ())
        }
        held = tuple(
            file
            for file in files
            if splits.get(file.name) == "validation"
            or (file.name not in splits and _names_validation(file))
        )
        opened = Source(source, tuple(file for file in files if file not in held), held)
        if not opened.files:
            raise ConfigError(
                f"{field}={source!r} holds only validation shards; add training shards to it"
            )
    elif path.exists() or not any(wildcard in source for wildcard in "*?["):
        opened = Source(source, (path,))
    else:
        root = Path(path.anchor)
        opened = Source(source, tuple(sorted(root.glob(str(path.relative_to(root))))))
        if not opened.files:
            raise ConfigError(
                f"{field}={source!r} matches no file; check the pattern, or use {OFFLINE}"
            )
    for file in opened.files + opened.validation:
        _check_file(file, field)
    if len({file.suffix == ".bin" for file in opened.files}) > 1:
        raise ConfigError(
            f"{field}={source!r} mixes text and token shards; name one kind, such as '*.bin'"
        )
    return opened


def _names_validation(file: Path) -> bool:
    """Whether one of the words in a file's name says so: `val_000.bin` does, `carnival.bin` does
    not."""
    return bool({"val", "valid", "validation"} & set(re.split("[^a-z]+", file.stem.lower())))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `jaxpar.prepare` wrote about the shards of a folder; empty where it did not write
    them."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is not JSON: {error}; delete it to read the shards as raw ids"
        ) from error
    return manifest if isinstance(manifest, dict) else {}


def content_mark(source: str, field: str = "data.source") -> str | None:
    """Tells a corpus from others, whatever path leads to it; None for those that go by a name, and
    for none.

    It is a sha256 of kind, size and content of the files in their order. Of more than 64 MiB the
    content is sampled, evenly over every file.

    Raises:
      ConfigError: as `find_source`.
    """
    if not source or source in NAMED:
        return None
    opened, digest = find_source(source, field), hashlib.sha256()
    beside = dict.fromkeys(file.with_name(MANIFEST) for file in opened.files if opened.shards)
    manifests = tuple(filter(Path.is_file, beside))
    for files in (opened.files, opened.validation, manifests):
        digest.update(f"{len(files)} files\n".encode())
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.suffix} {size}\n".encode())
            places = min(max(1, BLOCKS // len(files)), -(-size // BLOCK))
            with file.open("rb") as content:
                for place in range(places):
                    content.seek(max(0, size - BLOCK) * place // max(1, places - 1))
                    digest.update(content.read(BLOCK))
    return digest.hexdigest()


def documents(files: Iterable[Path], text_field: str) -> Iterator[str]:
    """The documents of text files, in order; those with nothing but white space are left out.

    Raises:
      ConfigError: a file that is not what its extension says, with the place.
    """
    for file in files:
        try:
            for text in READERS[file.suffix](file, text_field):
                if text and not text.isspace():
                    yield text
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{file} is not UTF-8 text ({error.reason}); convert it, or leave it out"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"{file} can't be read ({error.strerror or error}); check its permissions"
            ) from error


def batched(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Consecutive documents in groups, each closed by the one that brings it to `characters`."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def _check_file(file: Path, field: str) -> None:
    if file.suffix not in READERS and file.suffix != ".bin":
        known = ", ".join([*READERS, ".bin"])
        what = f"has the unknown extension {file.suffix!r}" if file.suffix else "has no extension"
        missing = "" if file.exists() else " and does not exist"
        raise ConfigError(
            f"{field}: {file} {what}{missing}; known: {known}, or stories, tinystories, synthetic"
        )
    if not file.exists():
        raise ConfigError(
            f"{field}: {file} does not exist (working directory: {Path.cwd()}); use {OFFLINE}"
        )
    if not file.is_file() or not os.access(file, os.R_OK):
        raise ConfigError(f"{field}: {file} is not a readable file; check its type and permissions")
    if not file.stat().st_size:
        raise ConfigError(f"{field}: {file} is empty; write text to it, or leave it out")


def _text_lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if "\0" in line:
                raise ConfigError(
                    f"{file}:{number}: a NUL byte: this is a binary file, not text; leave it out"
                )
            yield number, line


def _read_txt(file: Path, _: str) -> Iterator[str]:
    lines: list[str] = []
    for _number, line in _text_lines(file):
        if line.rstrip() == SEPARATOR:
            yield "".join(lines).removesuffix("\n")
            lines = []
        else:
            lines.append(line)
    yield "".join(lines).removesuffix("\n")


def _read_jsonl(file: Path, text_field: str) -> Iterator[str]:
    for number, line in _text_lines(file):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"{file}:{number}: not JSON ({error}); .jsonl holds one JSON object a line"
            ) from error
        if not isinstance(record, dict):
            raise ConfigError(
                f"{file}:{number}: a JSON {type(record).__name__}; .jsonl holds one JSON object a "
                "line"
            )
        text = record.get(text_field)
        if not isinstance(text, str):
            what = (
                f"field {text_field!r} is not a string"
                if text_field in record
                else f"no field {text_field!r}"
            )
            fields = (
                ", ".join(name for name, value in record.items() if isinstance(value, str))
                or "none"
            )
            raise ConfigError(
                f"{file}:{number}: {what}; set data.text_field to one of its text fields: {fields}"
            )
        yield text


def _read_parquet(file: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            f"{file} needs the package pyarrow, which is not installed: pip install pyarrow"
        ) from error
    try:
        with parquet.ParquetFile(file) as table:
            texts = [column.name for column in table.schema_arrow if _is_text(column.type)]
            if text_field not in texts:
                known = ", ".join(texts) or "none"
                raise ConfigError(
                    f"{file} has no text column {text_field!r}; set data.text_field to one of: "
                    f"{known}"
                )
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except arrow.ArrowException as error:
        raise ConfigError(f"{file} is not a Parquet file: {error}") from error


def _is_text(kind: object) -> bool:
    return str(kind) in ("string", "large_string", "string_view")


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


# Downloads.


def cache() -> Path:
    """`$XDG_CACHE_HOME/jaxpar`, by default `~/.cache/jaxpar`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxpar"


def download(repository: str, name: str, folder: Path, *, endpoint: str | None = None) -> Path:
    """Fetches a file of a Hugging Face data set once: resumes a broken transfer and checks its
    sha256 before the file gets its name. From then on no network is used.

    Args:
      endpoint: the server, by default `$HF_ENDPOINT` or https://huggingface.co.

    Raises:
      ConfigError: the server can't be reached, or what it sent has another sha256 than it
        announced.
    """
    path = folder / name
    if path.is_file():
        return path
    import huggingface_hub as hub
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock

    try:
        # hf_hub_download would retry for minutes where there is no network, and start again after
        # an interruption.
        url = hub.hf_hub_url(repository, name, repo_type="dataset", endpoint=endpoint)
        remote = hub.get_hf_file_metadata(url, timeout=10)
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / f"{name}.lock"):
            partial = folder / f"{name}.{remote.etag}.partial"
            if not path.is_file():
                with partial.open("ab") as content:
                    http_get(
                        remote.location,
                        content,
                        resume_size=content.tell(),
                        expected_size=remote.size,
                    )
                _accept(partial, path, remote.etag)
    except ConfigError:
        raise
    except (
        Exception
    ) as error:  # which HTTP library raises what depends on the version of huggingface_hub
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"{name} of {repository} can't be downloaded ({reason}); without a network use "
            f"{OFFLINE}"
        ) from error
    return path


def _accept(partial: Path, path: Path, announced: str | None) -> None:
    with partial.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != announced:
        partial.unlink()
        raise ConfigError(
            f"{path.name} arrived with sha256 {digest}, but {announced} was announced; run again"
        )
    partial.replace(path)
