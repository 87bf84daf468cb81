"""Prepared shards: the same tokens as the text, whatever the workers and however often
interrupted."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxpar import prepare as prepare_module
from jaxpar.config import Config, ConfigError, DataConfig, ModelConfig
from jaxpar.data import shards
from jaxpar.data.corpus import open_corpus
from jaxpar.prepare import prepare

ROOT = Path(__file__).parents[1]


def config_of(source: Path, **changes: object) -> Config:
    data = DataConfig(
        source=str(source), tokenizer="bytes", sequence_length=8, validation_fraction=0.3
    )
    return Config(model=ModelConfig(vocab_size=257), data=replace(data, **changes))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "a.txt").write_text(
        "\n<|endoftext|>\n".join(f"this is document {i}" for i in range(20))
    )
    return config_of(tmp_path / "a.txt")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*"))}


def ids(config: Config, source: Path | str) -> list[list[int]]:
    data = open_corpus(replace(config.data, source=str(source)), vocab_size=257, seed=0)
    return [
        [int(t) for piece in windows.stream.pieces() for t in piece]
        for windows in (data.train, data.validation)
    ]


@pytest.mark.parametrize("fraction", [0.3, 0.01])
def test_trains_on_the_same_tokens_as_the_text(
    config: Config, tmp_path: Path, fraction: float
) -> None:
    config = replace(config, data=replace(config.data, validation_fraction=fraction))
    manifest = prepare(config, tmp_path / "out", workers=1, shard_characters=60)
    assert ids(config, tmp_path / "out") == ids(config, config.data.source)
    data = open_corpus(replace(config.data, source=str(tmp_path / "out")), vocab_size=257, seed=0)
    assert (data.documents, data.tokens) == (20, manifest["tokens"])


def test_manifest(config: Config, tmp_path: Path) -> None:
    manifest = prepare(config, tmp_path / "out", workers=1, shard_characters=100)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["tokenizer"], manifest["dtype"], manifest["eot"], manifest["max_id"]) == (
        "bytes",
        "uint16",
        256,
        256,
    )
    assert manifest["complete"] and manifest["documents"] == 20
    for shard in manifest["shards"]:
        content = (tmp_path / "out" / shard["file"]).read_bytes()
        assert (
            hashlib.sha256(content).hexdigest() == shard["sha256"]
            and len(content) == 2 * shard["tokens"]
        )
    names = [shard["file"] for shard in manifest["shards"]]
    assert names[:2] == ["train_00000.bin", "train_00001.bin"] and "validation_00000.bin" in names
    assert sorted([*names, "manifest.json"]) == list(contents(tmp_path / "out"))


def test_one_document_and_validation_source(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} single document of {name}")
    config = config_of(tmp_path / "a.txt")
    prepare(config, tmp_path / "tail", workers=1)
    assert ids(config, tmp_path / "tail") == ids(config, tmp_path / "a.txt")
    given = config_of(tmp_path / "a.txt", validation_source=str(tmp_path / "b.txt"))
    prepare(given, tmp_path / "given", workers=1)
    assert ids(config, tmp_path / "given") == ids(given, tmp_path / "a.txt")


def test_large_vocabulary_is_uint32(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxpar.data.tokenizer import Bytes

    monkeypatch.setattr(Bytes, "size", 70_000)
    monkeypatch.setattr(Bytes, "eot", 69_999)
    config = replace(config, model=ModelConfig(vocab_size=70_000))
    manifest = prepare(config, tmp_path / "out", workers=1)
    data = open_corpus(
        replace(config.data, source=str(tmp_path / "out")), vocab_size=70_000, seed=0
    )
    assert manifest["dtype"] == "uint32" and 69_999 in data.train[2].tokens


def test_interrupted_and_resumed(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare(config, whole, workers=1, shard_characters=60)
    write = prepare_module.write_group

    def interrupted(group, **options):
        if group.index == 2:
            (out / "train_00002.bin.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        return write(group, **options)

    monkeypatch.setattr(prepare_module, "write_group", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, out, workers=1, shard_characters=60)
    with pytest.raises(ConfigError, match="was not finished"):
        ids(config, out)

    resumed = []
    monkeypatch.setattr(
        prepare_module, "write_group", lambda g, **o: (resumed.append(g.index), write(g, **o))[1]
    )
    prepare(config, out, workers=1, shard_characters=60)
    assert resumed[0] == 2, "finished shards are kept"
    assert contents(out) == contents(whole)

    (out / "train_00001.bin").unlink()
    resumed.clear()
    prepare(config, out, workers=1, shard_characters=60)
    assert resumed == [1] and contents(out) == contents(whole), "a lost shard is made again"
    prepare(config, out, workers=1, shard_characters=60)
    assert resumed == [1], "nothing is left to do"


SCRIPT = """
import sys, dataclasses
from pathlib import Path
from jaxpar.config import Config, DataConfig, ModelConfig
from jaxpar.prepare import prepare

if __name__ == "__main__":
    source, output = sys.argv[1:]
    data = DataConfig(source=source, tokenizer="bytes", validation_fraction=0.3)
    config = Config(model=ModelConfig(vocab_size=257), data=data)
    prepare(config, Path(output), workers=2, shard_characters=60)
"""


def test_killed_with_workers_and_resumed(config: Config, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    source = tmp_path / "many.txt"
    source.write_text("\n<|endoftext|>\n".join(f"this is document {i}" for i in range(800)))
    config = config_of(source)
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare(config, whole, workers=1, shard_characters=60)

    command = [sys.executable, str(script), str(source), str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    manifest = out / "manifest.json"
    while killed.poll() is None and not (
        manifest.exists() and "train_00000" in manifest.read_text()
    ):
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    deadline = time.monotonic() + 10
    with contextlib.suppress(
        ProcessLookupError
    ):  # raised when the last worker has followed its parent
        while time.monotonic() < deadline:
            os.killpg(killed.pid, 0)
            time.sleep(0.02)
        os.killpg(killed.pid, signal.SIGKILL)
        pytest.fail("workers outlived the command")

    before = json.loads(manifest.read_text())
    assert not before["complete"] and before["shards"]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    assert contents(out) == contents(whole)


def test_refuses(config: Config, tmp_path: Path) -> None:
    def refused(message: str, config: Config, output: Path = tmp_path / "new") -> None:
        with pytest.raises(ConfigError, match=message):
            prepare(config, output, workers=1)
        assert not (tmp_path / "new").exists(), "a refused request writes nothing"

    out = tmp_path / "out"
    prepare(config, out, workers=1)
    before = contents(out)
    text = Path(config.data.source)
    refused("validation_fraction changed", config_of(text, validation_fraction=0.5), out)
    gpt2 = replace(config_of(text, tokenizer="gpt2"), model=ModelConfig())
    refused("tokenizer changed", gpt2, out)
    refused("need no preparation", config_of(out))
    refused("no text to prepare", config_of(Path("synthetic")))
    refused("does not exist", config_of(tmp_path / "b.txt"))
    refused("more than model.vocab_size=257", config_of(text, tokenizer="gpt2"))
    (tmp_path / "blank.txt").write_text(" \n")
    refused("no text but white space", config_of(tmp_path / "blank.txt"))
    (tmp_path / "foreign").mkdir()
    np.zeros(4, np.uint16).tofile(tmp_path / "foreign" / "x.bin")
    refused("jaxpar.prepare did not make", config, tmp_path / "foreign")
    text.write_text(text.read_text() + "!")
    refused("source changed", config, out)
    assert contents(out) == before


def test_shards_of_another_tokenizer_are_refused(config: Config, tmp_path: Path) -> None:
    prepare(config, tmp_path / "out", workers=1)
    with pytest.raises(ConfigError, match=r"set data.tokenizer='bytes'"):
        open_corpus(DataConfig(source=str(tmp_path / "out")), vocab_size=50304, seed=0)


def test_a_shard_cut_short_is_refused(config: Config, tmp_path: Path) -> None:
    prepare(config, tmp_path / "out", workers=1)
    shard = tmp_path / "out" / "train_00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ConfigError, match=r"its manifest.json says"):
        open_corpus(replace(config.data, source=str(tmp_path / "out")), vocab_size=257, seed=0)


def test_a_damaged_shard_is_refused(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every shard is held against its sha256 once, and again when it has changed; a large corpus
    over several starts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepare(config, tmp_path / "out", workers=1, shard_characters=60)
    read: list[str] = []
    digest = shards._sha256
    monkeypatch.setattr(shards, "_sha256", lambda file: read.append(file.name) or digest(file))

    def start() -> list[str]:
        read.clear()
        open_corpus(replace(config.data, source=str(tmp_path / "out")), vocab_size=257, seed=0)
        return sorted(read)

    names = sorted(file.name for file in (tmp_path / "out").glob("*.bin"))
    monkeypatch.setattr(shards, "CHECKED_BYTES", 1)
    assert len(start()) == 2 and len(start()) == 2  # one of each split
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "_sha256", lambda file: read.append(file.name) or digest(file))
    assert len(start()) == len(names) - 4
    assert start() == []
    shard = tmp_path / "out" / names[0]
    content = shard.read_bytes()
    shard.write_bytes(content)
    assert start() == [names[0]]
    shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(ConfigError, match=rf"{names[0]} has another sha256 .*copy it again"):
        start()
