"""Documents out of files, and files out of a server on this machine."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxpar.config import ConfigError
from jaxpar.data import sources


def test_text_documents(tmp_path: Path) -> None:
    text = (
        "\ufeffone\r\ntwo\n<|endoftext|>\n \n<|endoftext|>\n\nthree<|endoftext|>x\n<|endoftext|>\n"
    )
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert list(sources.documents([path], "text")) == ["one\ntwo", "\nthree<|endoftext|>x"]


def test_content_mark_of_a_large_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled at the begin, the end and between of every file; whole where it is small; sizes
    always count."""
    monkeypatch.setattr(sources, "BLOCK", 4)
    monkeypatch.setattr(sources, "BLOCKS", 6)
    content = {"a.txt": b"0123456789" * 2, "b.txt": b"abcdefghij" * 2}

    def mark(**changes: bytes) -> str | None:
        for name, text in content.items():
            (tmp_path / name).write_bytes(changes.get(name[0], text))
        return sources.content_mark(str(tmp_path / "*.txt"))

    whole = mark()
    assert whole == mark() == sources.content_mark(f"{tmp_path}/[ab].txt")
    read = [whole != mark(a=_with(content["a.txt"], n)) for n in range(20)]
    assert read == [n < 4 or 8 <= n < 12 or n >= 16 for n in range(20)]
    assert whole != mark(b=content["b.txt"] + b"k")
    monkeypatch.setattr(sources, "BLOCKS", 10)
    whole = mark()
    assert all(whole != mark(b=_with(content["b.txt"], n)) for n in range(20))
    assert (
        sources.content_mark("stories")
        is sources.content_mark("tinystories")
        is sources.content_mark("")
        is None
    )


def _with(text: bytes, place: int) -> bytes:
    return text[:place] + b"!" + text[place + 1 :]


# TinyStories, from a server on this machine.


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, dict[str, bytes], list[str]]]:
    """A stand-in for huggingface.co: its address, its files (their announced hash is that of
    `truth`), its log."""
    files: dict[str, bytes] = {}
    log: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            name = self.path.rpartition("/")[2]
            content = files[name]
            start = int((self.headers["Range"] or "bytes=0-")[6:].partition("-")[0])
            log.append(f"{self.command} {name} {start}")
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{hashlib.sha256(files.get("truth", content)).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            if start:
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[start:])

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", files, log
    server.shutdown()
    server.server_close()
    thread.join()


def test_download_once_and_checked(hub, tmp_path: Path) -> None:
    endpoint, files, log = hub
    files["a.txt"] = b"once upon a time"
    path = sources.download("some/stories", "a.txt", tmp_path, endpoint=endpoint)
    assert path.read_bytes() == b"once upon a time" and any(line.startswith("GET") for line in log)
    log.clear()
    assert (
        sources.download("some/stories", "a.txt", tmp_path, endpoint=endpoint) == path and not log
    )


def test_download_resumes(hub, tmp_path: Path) -> None:
    endpoint, files, log = hub
    files["a.txt"] = b"once upon a time"
    digest = hashlib.sha256(files["a.txt"]).hexdigest()
    (tmp_path / f"a.txt.{digest}.partial").write_bytes(b"once upon")
    assert (
        sources.download("some/stories", "a.txt", tmp_path, endpoint=endpoint).read_bytes()
        == files["a.txt"]
    )
    assert log[-1] == "GET a.txt 9"


def test_download_refuses_another_content(hub, tmp_path: Path) -> None:
    endpoint, files, _ = hub
    files |= {"a.txt": b"tampered", "truth": b"original"}
    with pytest.raises(ConfigError, match="run again"):
        sources.download("some/stories", "a.txt", tmp_path, endpoint=endpoint)
    assert not list(tmp_path.glob("a.txt*[!k]"))


def test_download_without_network(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't be downloaded.*data.source=stories.*local"):
        sources.download("some/stories", "a.txt", tmp_path, endpoint="http://127.0.0.1:9")
    assert not list(tmp_path.iterdir())
