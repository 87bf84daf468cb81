"""Eight simulated CPU devices for every test, whatever else the machine has."""

import os
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = (
    "false"  # what is compiled here is not what users would compile
)
# The tests spend their time in compiling, not in running: this halves it.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_num_cpu_devices", 8)


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
