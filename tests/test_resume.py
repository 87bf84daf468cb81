"""Where a run begins: what may differ from its checkpoint, what is refused, and what is told."""

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import checkpoint
from jaxpar.checkpoint import Checkpointer, Position
from jaxpar.config import Config, ConfigError, configure
from jaxpar.resume import Start, plan_start
from jaxpar.validation import resolve

STEP = 500


def config_of(**changes: Any) -> Config:
    """The config of the run, with `group__field=value`."""
    groups: dict[str, dict[str, Any]] = dict(
        train=dict(steps=1000, batch_size=8), optimizer=dict(warmup_steps=100)
    )
    for name, value in changes.items():
        group, _, field = name.partition("__")
        groups.setdefault(group, {})[field] = value
    return resolve(configure(**groups))


def save(workdir: Path, config: Config, step: int = STEP) -> Path:
    checkpointer = Checkpointer(workdir, config)
    position = Position(step, samples=8 * step, tokens=100 * step)
    checkpointer.save(step, {"weight": jnp.ones(8)}, position=position)
    checkpointer.close()
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("resume") / "run", config_of())


def test_a_fresh_start(tmp_path: Path) -> None:
    assert plan_start(tmp_path, config_of()) == Start(tokenizer="gpt2")


def test_the_same_run_goes_on(run: Path) -> None:
    start = plan_start(run, config_of())
    assert (start.step, start.samples, start.tokens) == (STEP, 8 * STEP, 100 * STEP)
    assert start.message == f"continuing from step {STEP} of {run}"
    assert start.checkpoint == run / "checkpoints" / str(STEP)


def test_what_only_decides_how_is_passed(run: Path) -> None:
    start = plan_start(
        run,
        config_of(
            data__prefetch=7,
            train__microbatches=4,
            train__eval_every=3,
            parallel__gather="per_step",
            memory__remat="full",
            log__every=1,
            checkpoint__every=7,
            loss__chunk=64,
        ),
    )
    assert "changed" not in start.message


def test_what_decides_what_is_learned_is_told(run: Path) -> None:
    start = plan_start(
        run,
        config_of(
            optimizer__learning_rate=5e-4,
            optimizer__weight_decay=0.0,
            train__steps=2000,
            train__eval_batches=1,
            precision__compute="float32",
        ),
    )
    assert start.message == (
        f"continuing from step {STEP} of {run}; changed since: train.steps 1000 -> 2000, "
        "train.eval_batches 20 -> 1, optimizer.learning_rate 0.0003 -> 0.0005, "
        "optimizer.weight_decay 0.1 -> 0.0, precision.compute bfloat16 -> float32"
    )


FIXED = dict(
    model__dim=256,
    model__tie_embeddings=True,
    optimizer__name="lion",
)


@pytest.mark.parametrize("name", FIXED)
def test_parameters_that_do_not_fit_are_refused(run: Path, tmp_path: Path, name: str) -> None:
    path = name.replace("__", ".")
    for workdir in (run, tmp_path / "new"):
        config = config_of(
            **{name: FIXED[name]},
            checkpoint__allow_changes=True,
            checkpoint__restore=str(run),
        )
        with pytest.raises(ConfigError, match=rf"belongs to another run:\n  {path}: checkpoint "):
            plan_start(workdir, config)


MEANT = dict(model__rope_theta=5e5, precision__params="bfloat16", data__tokenizer="bytes")


@pytest.mark.parametrize("name", MEANT)
def test_parameters_that_would_mean_something_else(run: Path, tmp_path: Path, name: str) -> None:
    path = name.replace("__", ".")
    change = {name: MEANT[name], "checkpoint__restore": str(run)}
    for workdir in (run, tmp_path / "new"):
        with pytest.raises(
            ConfigError, match=rf"(?s)mean something else:\n  {path}: .*allow_changes"
        ):
            plan_start(workdir, config_of(**change))
        start = plan_start(workdir, config_of(**change, checkpoint__allow_changes=True))
        assert f"changed since: {path} " in start.message


# Step 500: of a run of 1000 steps, 100 of them warmup, that decays in the last 200 if it is `wsd`.
CURVES = {
    "batch": ("cosine", dict(train__batch_size=16), "train.batch_size"),
    "schedule": ("cosine", dict(optimizer__schedule="constant"), "optimizer.schedule"),
    "cosine shorter": ("cosine", dict(train__steps=900), "train.steps"),
    "cosine longer": ("cosine", dict(train__steps=1100), None),
    "linear shorter": ("linear", dict(train__steps=900), "train.steps"),
    "below the step": ("constant", dict(train__steps=400), "train.steps"),
    "constant shorter": ("constant", dict(train__steps=600), None),
    "constant, warmup over": ("constant", dict(optimizer__warmup_steps=50), None),
    "constant, warming again": (
        "constant",
        dict(optimizer__warmup_steps=600),
        "optimizer.warmup_steps",
    ),
    "cosine, warmup over": ("cosine", dict(optimizer__warmup_steps=50), "optimizer.warmup_steps"),
    "wsd shorter": ("wsd", dict(train__steps=700), None),
    "wsd, decay would be under way": ("wsd", dict(train__steps=600), "train.steps"),
    "wsd, a longer decay to come": ("wsd", dict(optimizer__decay_fraction=0.4), None),
    "wsd, decay long begun": (
        "wsd",
        dict(optimizer__decay_fraction=0.6),
        "optimizer.decay_fraction",
    ),
    "peak": ("cosine", dict(optimizer__learning_rate=1e-3), None),
}


@pytest.mark.parametrize("case", CURVES)
def test_a_run_keeps_its_curve(tmp_path: Path, case: str) -> None:
    schedule, changes, refused = CURVES[case]
    run = save(tmp_path / "run", config_of(optimizer__schedule=schedule))
    settings = dict(optimizer__schedule=schedule) | changes
    (path,) = (name.replace("__", ".") for name in changes)
    if refused:
        with pytest.raises(ConfigError, match=rf"another curve:\n  {path}: checkpoint ") as error:
            plan_start(run, config_of(**settings))
        assert f"checkpoint.restore={run}; or go on all the same" in str(error.value)
    allowed = plan_start(run, config_of(**settings, checkpoint__allow_changes=bool(refused)))
    assert f"changed since: {path} " in allowed.message
    # A new run has a curve of its own.
    new = plan_start(tmp_path / "new", config_of(**settings, checkpoint__restore=str(run)))
    assert new.message.startswith(f"starting from step {STEP} of {run}; changed since: {path} ")
    assert new.samples == 8 * STEP


def test_a_batch_size_that_cannot_go_on(run: Path, tmp_path: Path) -> None:
    for workdir in (run, tmp_path / "new"):
        config = config_of(
            train__batch_size=24, checkpoint__allow_changes=True, checkpoint__restore=str(run)
        )
        with pytest.raises(
            ConfigError, match=r"batch_size=24 does not divide the 4000 samples .*16, 20, 25, 32"
        ):
            plan_start(workdir, config)


OTHER_DATA = dict(
    source="tinystories",
    text_field="story",
    sequence_length=128,
    packing=False,
    validation_fraction=0.1,
    shard_dtype="uint32",
    seed=1,
)


@pytest.mark.parametrize("field", [*OTHER_DATA, "validation_source"])
def test_a_run_keeps_its_data(run: Path, tmp_path: Path, field: str) -> None:
    """Or begins it at its start, where that is asked for."""
    (held := tmp_path / "held.txt").write_text("held out")
    value = str(held) if field == "validation_source" else OTHER_DATA[field]
    name = f"train__{field}" if field == "seed" else f"data__{field}"
    path = name.replace("__", ".")
    if field == "shard_dtype":  # there are no shards to read in another way
        assert "changed" not in plan_start(run, config_of(**{name: value})).message
        return
    with pytest.raises(ConfigError, match=rf"another curve:\n  {path}: checkpoint .*, config "):
        plan_start(run, config_of(**{name: value}))
    here = plan_start(run, config_of(**{name: value}, checkpoint__allow_changes=True))
    there = plan_start(tmp_path / "new", config_of(**{name: value}, checkpoint__restore=str(run)))
    for start in (here, there):
        assert (start.step, start.samples, start.tokens) == (STEP, 0, 0)
        assert start.message.endswith("; the data is other than it was, so it begins at its start")


def write_text(folder: Path, text: str) -> Path:
    folder.mkdir()
    for n, part in enumerate(text.split("|")):
        (folder / f"{n}.txt").write_text(part)
    return folder / "*.txt"


def write_shards(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text('{"dtype": "uint16"}')
    for name, part in zip(("train_0", "train_1", "val_0"), text.split("|"), strict=True):
        np.array(list(part.encode()), np.uint16).tofile(folder / f"{name}.bin")
    return folder


def of_data(source: Path | str, **data: Any) -> Config:
    return config_of(data__source=str(source), **{f"data__{k}": str(v) for k, v in data.items()})


@pytest.mark.parametrize("write", [write_text, write_shards])
def test_a_corpus_is_known_by_its_content(tmp_path: Path, write: Any) -> None:
    """Wherever it lies; of a name there is no content to compare, and older checkpoints do not
    know theirs."""
    text, held = "one|two|three", tmp_path / "held.txt"
    held.write_text("held out")
    here = write(tmp_path / "here", text)
    run = save(tmp_path / "run", of_data(here, validation_source=held))
    there = write(tmp_path / "there", text)
    held = held.rename(tmp_path / "moved.txt")
    moved = plan_start(run, of_data(there, validation_source=held)).message
    assert f"data.source {here} -> {there} (the same content)" in moved
    others = {
        "edited": of_data(write(tmp_path / "edited", "one|twO|three"), validation_source=held),
        "in another order": of_data(
            write(tmp_path / "by", "two|one|three"), validation_source=held
        ),
        "a name": of_data("stories", validation_source=held),
        "no longer given": of_data(there),
    }
    for why, other in others.items():
        with pytest.raises(ConfigError, match=r"another curve:\n  data\.(validation_)?source: "):
            plan_start(run, other)
            pytest.fail(why)
    shutil.rmtree(run / "checkpoints" / str(STEP) / "corpus")
    with pytest.raises(ConfigError, match=r"data.source: checkpoint"):
        plan_start(run, of_data(write(tmp_path / "older", text), validation_source=held))


def test_a_corpus_rewritten_in_its_place(tmp_path: Path) -> None:
    (text := tmp_path / "a.txt").write_text("one")
    run = save(tmp_path / "run", of_data(text))
    text.write_text("two")
    with pytest.raises(ConfigError, match=r"data.source: .*\(rewritten since: its content is"):
        plan_start(run, of_data(text))


def test_ids_read_in_another_type(tmp_path: Path) -> None:
    """By the field, or by a manifest that came or went."""
    np.arange(64, dtype=np.uint16).tofile(tmp_path / "a.bin")
    run = save(tmp_path / "run", of_data(tmp_path / "a.bin"))
    assert (
        "changed" not in plan_start(run, of_data(tmp_path / "a.bin", shard_dtype="uint16")).message
    )
    with pytest.raises(ConfigError, match=r"shard_dtype: checkpoint auto, config uint32 .*uint16"):
        plan_start(run, of_data(tmp_path / "a.bin", shard_dtype="uint32"))
    (tmp_path / "manifest.json").write_text('{"dtype": "uint32"}')
    with pytest.raises(ConfigError, match=r"data.shard_dtype: .*\(ids were read as uint16, and"):
        plan_start(run, of_data(tmp_path / "a.bin"))


def test_the_tokenizer_of_the_checkpoint(tmp_path: Path) -> None:
    """It stands in for the file that is gone; a moved one is the same, another is refused."""
    (file := tmp_path / "tokenizer.json").write_text("its content")
    run = save(tmp_path / "run", of_data("stories", tokenizer=file))
    assert plan_start(run, of_data("stories", tokenizer=file)).tokenizer == str(file)
    moved = file.rename(tmp_path / "moved.json")
    start = plan_start(run, of_data("stories", tokenizer=file))
    assert f"{file} is gone, its copy in the checkpoint is used" in start.message
    assert Path(start.tokenizer).read_text() == "its content"
    start = plan_start(run, of_data("stories", tokenizer=moved))
    assert start.tokenizer == str(moved) and "(the same content)" in start.message
    file.write_text("another")
    with pytest.raises(
        ConfigError, match=r"data.tokenizer: .*the checkpoint's own is .*tokenizer.json"
    ):
        plan_start(run, of_data("stories", tokenizer=file))
    with pytest.raises(ConfigError, match="neither a known tokenizer nor a file"):
        plan_start(run, of_data("stories", tokenizer=tmp_path / "typo.json"))


def test_an_older_checkpoint_tells_no_tokens(tmp_path: Path) -> None:
    run = save(tmp_path / "run", config_of())
    (run / "checkpoints" / str(STEP) / "data" / "metadata").write_text('{"samples": 4000}')
    assert checkpoint.load_position(run / "checkpoints" / str(STEP)).step == STEP
    assert plan_start(run, config_of()).tokens == 4000 * 256
