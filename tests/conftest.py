"""Eight simulated CPU devices for every test, whatever else the machine has."""

import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = (
    "false"  # what is compiled here is not what users would compile
)
# The tests spend their time in compiling, not in running: this halves it. Steps compiled for absent
# GPUs are read, never run: without the assembler they take two thirds of the time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        f"--xla_gpu_cuda_data_dir={Path(__file__).parent / 'no_assembler'}"
        if os.environ["JAX_PLATFORMS"] == "cpu"
        else "",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxpar import xla

xla.simulate_devices(8, os.environ["JAX_PLATFORMS"])

PART = pytest.StashKey[tuple[int, int]]()
BEGIN = pytest.StashKey[float]()


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory) -> Iterator[None]:
    """Keeps compiled programs on disk, for modules whose runs differ in few of them."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: jax.config.values[name] for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", folder)  # where the commands leave it
        for values in (settings, before):
            for name, value in values.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            if values is settings:
                yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help="only this part of the tests, such as 3/12")
    parser.addoption(
        "--minutes", type=float, default=0.0, help="begin no test later; skip and name the rest"
    )


def pytest_configure(config: pytest.Config) -> None:
    number, _, parts = config.getoption("--part").partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise pytest.UsageError(f"--part={number}/{parts} must be N/M, such as 3/12, N from 1 to M")
    config.stash[PART] = int(number), int(parts)
    config.stash[BEGIN] = time.monotonic()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests of one part: which one a test is in depends on its name alone."""
    number, parts = config.stash[PART]
    here = [item for item in items if zlib.crc32(item.nodeid.encode()) % parts == number - 1]
    config.hook.pytest_deselected(items=[item for item in items if item not in here])
    items[:] = here


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes and time.monotonic() - item.config.stash[BEGIN] > 60 * minutes:
        pytest.skip(f"not run: {minutes:g} minutes are over")
