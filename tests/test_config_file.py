"""Config files are found by path or name, and may import what lies beside them."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxpar import config_file
from jaxpar.config import ConfigError

WITH_SIBLING = """
from common import WIDTH
from jaxpar.config import configure

def get_config():
    from common import LAYERS
    return configure(model=dict(dim=WIDTH, layers=LAYERS))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory is another than the config's."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def test_a_bundled_config_goes_by_its_name(folder):
    names = config_file.bundled()
    assert "tiny" in names and "llama3_70b" in names
    assert config_file.load("tiny").model.dim == 256
    Path("tiny").write_text("def get_config():\n    return None\n")
    with pytest.raises(ConfigError, match="get_config"):  # a file of that name comes first
        config_file.load("tiny")


def test_bundled_configs_are_in_the_package():
    root = Path(__file__).parents[1]
    assert config_file.BUNDLED.resolve() == root / "configs"
    packaged = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "configs/*.py" in packaged["package-data"]["jaxpar"]


def test_a_path_that_is_only_in_a_checkout_leads_to_the_bundled_config(folder):
    with pytest.raises(ConfigError, match=r"no such file. Did you mean --config=tiny, which comes"):
        config_file.load("configs/tiny.py")
    with pytest.raises(ConfigError, match=r"missing.*tiny"):
        config_file.load(None)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\N{SNOWMAN}.py", "gone/tiny_.py", " "])
def test_names_that_no_file_can_have(folder, name):
    with pytest.raises(ConfigError, match="no such file"):
        config_file.load(name)


def test_a_folder_is_no_config(folder):
    with pytest.raises(ConfigError, match="is a folder, not a file"):
        config_file.load("..")


def test_a_sibling_is_imported_anew_and_leaves_nothing(folder):
    (folder / "mine").mkdir()
    config = folder / "mine" / "run.py"
    config.write_text(WITH_SIBLING)
    path, bytecode = list(sys.path), sys.dont_write_bytecode
    for width in (64, 128):
        (folder / "mine" / "common.py").write_text(f"WIDTH, LAYERS = {width}, 2\n")
        assert config_file.load(str(config)).model.dim == width
    assert config_file.load("../mine/run.py").model.layers == 2
    assert (sys.path, sys.dont_write_bytecode) == (path, bytecode)
    assert "common" not in sys.modules
    assert sorted(file.name for file in (folder / "mine").iterdir()) == ["common.py", "run.py"]


def test_a_script_elsewhere_loads_it_too(folder):
    (folder / "run.py").write_text(WITH_SIBLING)
    (folder / "common.py").write_text("WIDTH, LAYERS = 64, 2\n")
    code = "from jaxpar import config_file; print(config_file.load('../run.py').model.dim)"
    root = str(Path(__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[0] = {root!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "64\n"


def test_an_error_in_a_sibling_is_told_with_the_line_of_the_config(folder):
    (folder / "run.py").write_text(WITH_SIBLING)
    (folder / "common.py").write_text("WIDTH, LAYERS = 1 / 0, 2\n")
    with pytest.raises(ConfigError, match=r"run.py, line 2: ZeroDivisionError: division by zero"):
        config_file.load("../run.py")


def test_a_file_that_is_no_text(folder):
    Path("cfg.py").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ConfigError, match=r"cfg\.py: UnicodeDecodeError"):
        config_file.load("cfg.py")
