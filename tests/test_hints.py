"""A name that other trainers use leads to the one that is meant."""

import pytest

from jaxpar.config import AXES, ConfigError, check_field, field_paths
from jaxpar.hints import ALIASES, meant_flag, nearest

FLAGS = ("workdir", "cpu_devices", "coordinator", "num_processes", "process_id", "config", "mesh")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("optimizer.lr", "Did you mean optimizer.learning_rate?"),
        ("train.lr", "Did you mean optimizer.learning_rate?"),
        ("lr", "Did you mean optimizer.learning_rate?"),
        ("train.learning_rate", "Did you mean optimizer.learning_rate?"),
        ("train.epochs", "Did you mean train.steps, which counts updates, not epochs?"),
        ("gradient_accumulation_steps", "Did you mean train.microbatches?"),
        ("train.batch_size_per_device", "train.batch_size, which is of all devices"),
        ("model.hidden_size", "Did you mean model.dim?"),
        ("model.num_layers", "Did you mean model.layers?"),
        ("model.max_position_embeddings", "Did you mean data.sequence_length?"),
        ("mesh.fsdp", "--mesh.fsdp=N"),
        ("parallel.tensor", "--mesh.tensor=N"),
        ("parallel.tp", "Did you mean --mesh.tensor?"),
        ("train.output_dir", "Did you mean --workdir?"),
        ("model.dimm", "Did you mean model.dim?"),
        ("modle.dimm", "Did you mean model?"),
    ],
)
def test_fields(path, hint):
    with pytest.raises(ConfigError) as error:
        check_field(path)
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("learning_rate", "Did you mean --config.optimizer.learning_rate?"),
        ("lr", "Did you mean --config.optimizer.learning_rate?"),
        ("steps", "Did you mean --config.train.steps?"),
        ("model.dim", "Did you mean --config.model.dim?"),
        ("model.dimm", "Did you mean --config.model.dim?"),
        ("every", "Did you mean --config.checkpoint.every or --config.log.every?"),
        ("tp", "Did you mean --mesh.tensor?"),
        ("fsdp", "Did you mean --mesh.fsdp?"),
        ("output_dir", "Did you mean --workdir?"),
        ("wrokdir", "Did you mean --workdir?"),
        ("cpu_device", "Did you mean --cpu_devices?"),
        ("frobnicate", "Known: --workdir, --cpu_devices"),
    ],
)
def test_flags(name, hint):
    assert hint in meant_flag(name, FLAGS, field_paths(), AXES)


def test_a_command_without_a_config_hints_at_no_field():
    assert "config" not in meant_flag("learning_rate", ("checkpoint", "seed"), (), AXES)
    assert meant_flag("output_dir", ("checkpoint",), (), AXES) == " Known: --checkpoint."


def test_every_alias_leads_to_something_that_exists_and_hides_nothing():
    fields = field_paths()
    names = {path.rpartition(".")[2] for path in fields}
    for alias, ours in ALIASES.items():
        target = ours.partition(",")[0]
        known = target in fields or target.removeprefix("--") in FLAGS
        assert known or target.removeprefix("--mesh.") in AXES, f"{alias} leads to {target}"
        assert alias not in names, f"{alias} is the name of a field"
        assert alias not in AXES, f"{alias} is an axis"


def test_the_nearest_name_or_all_of_them():
    assert nearest("dimm", ["dim", "heads"], prefix="model.") == " Did you mean model.dim?"
    assert nearest("xyz", ["dim", "heads"]) == " Known: dim, heads."
