"""Config files: Python with a `get_config()`, found by path or, those that come along, by name."""

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from jaxpar.config import ConfigError
from jaxpar.hints import nearest

BUNDLED = Path(__file__).with_name("configs")
"""Those that come along. In a checkout a link to configs/, in a wheel the files."""


def load(name: str | None) -> config_dict.ConfigDict:
    """What `get_config()` of a config file returns.

    Args:
      name: a path, or the name of a bundled config such as `tiny`.

    Raises:
      ConfigError: whatever goes wrong in it, in one line.
    """
    path = find(name)
    content: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        with _siblings(path.absolute().parent):
            exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), content)
            config = content["get_config"]() if "get_config" in content else None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        message = " ".join(str(error).split())
        raise ConfigError(f"{where}: {type(error).__name__}: {message}") from error
    if not isinstance(config, config_dict.ConfigDict):
        found = (
            f"get_config() gives {type(config).__name__}"
            if "get_config" in content
            else "there is no get_config()"
        )
        raise ConfigError(
            f"{path}: {found}; a config file has a get_config() that returns configure(...)"
        )
    return config


def find(name: str | None) -> Path:
    """The file that `--config` names.

    Raises:
      ConfigError: there is none, with the nearest.
    """
    if not name:
        raise ConfigError(f"--config=FILE is missing; known by name: {', '.join(bundled())}")
    path = Path(name)
    # os.path: Path.is_file raises where a name is too long or a folder may not be looked into.
    if os.path.isfile(path):  # noqa: PTH113
        return path
    if name in bundled():
        return BUNDLED / f"{name}.py"
    if os.path.isdir(path):  # noqa: PTH112
        raise ConfigError(f"--config={name} is a folder, not a file.{_known(name)}")
    raise ConfigError(f"--config={name}: no such file.{_known(name)}")


def _known(name: str) -> str:
    """The nearest config there is, beside the file asked for or bundled."""
    folder = Path(name).parent
    files = sorted(str(file) for file in folder.glob("*.py")) if os.access(folder, os.R_OK) else []
    stem = Path(name).stem
    if stem in bundled() and not any(stem in file for file in files):
        return f" Did you mean --config={stem}, which comes with jaxpar?"
    return nearest(name, [*files, *bundled()])


def bundled() -> list[str]:
    """The names of the configs that come along."""
    return sorted(file.stem for file in BUNDLED.glob("*.py"))


@contextlib.contextmanager
def _siblings(folder: Path) -> Iterator[None]:
    """Within, modules of `folder` can be imported, afresh each time; their bytecode is not kept."""
    before, keeps_no_bytecode = set(sys.modules), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = keeps_no_bytecode
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "").parent == folder:
                del sys.modules[name]
