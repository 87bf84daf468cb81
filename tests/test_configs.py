"""Every file of configs/ resolves, says what it is, and has the published size."""

import ast
import runpy
from pathlib import Path

import pytest

from jaxpar.config import Config, MeshConfig
from jaxpar.estimate.counts import parameter_count
from jaxpar.validation import resolve, validate_mesh

FOLDER = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))

PUBLISHED = {
    "seed_246m": 245_566_464,
    "seed_7b": 7_257_206_784,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
}


def load(name: str) -> Config:
    return resolve(runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"]())


@pytest.mark.parametrize("name", NAMES)
def test_resolves_and_runs_on_one_device(name):
    validate_mesh(load(name), MeshConfig())


@pytest.mark.parametrize("name", NAMES)
def test_first_line_says_what_it_is(name):
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    assert text and text.splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_size(name):
    assert parameter_count(load(name).model) == PUBLISHED[name]


def test_stories_is_about_25m():
    assert 24e6 < parameter_count(load("stories").model) < 27e6


@pytest.mark.parametrize("axis", ["data", "fsdp", "sequence", "tensor"])
@pytest.mark.parametrize(
    "name", ["tiny", "stories", "llama2_7b", "llama3_8b", "llama3_70b", "llama3_405b"]
)
def test_eight_devices_on_any_axis(name, axis):
    validate_mesh(load(name), MeshConfig(**{axis: 8}))


@pytest.mark.parametrize("name", ["tiny", "stories"])
def test_small_ones_need_no_download(name):
    data = load(name).data
    assert data.source == "stories" and data.tokenizer in ("bytes", "gpt2")


def test_llama_3_rope():
    assert load("llama3_8b").model.rope_scaling.factor == 1
    scaling = load("llama3_405b").model.rope_scaling
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (8, 1, 4)
    assert scaling.original_sequence_length == 8192
