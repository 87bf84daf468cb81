"""The door: a wrong request is one message, exit code 2 and nothing written; `--help` tells what
there is."""

import os
import signal
import subprocess
import sys
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import __main__, cli, explain, generate, plan, prepare, train, verify
from jaxpar.checkpoint import Checkpointer, Position
from jaxpar.config import field_paths
from jaxpar.validation import CHOICES

ROOT = Path(__file__).parents[1]

CONFIG = """
from jaxpar.config import configure

def get_config():
    return configure(
        model=dict(vocab_size=320, dim=32, layers=1, heads=4, kv_heads=2, ffn_dim=64),
        data=dict(source="text.txt", tokenizer="bytes", sequence_length=32),
        train=dict(steps=1, batch_size=8),
    )
"""

EIGHT = "--cpu_devices=8"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test works in an empty folder with a config and a text, and no module of an earlier
    config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    (tmp_path / "cfg.py").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("It is what it is.\n" * 300)
    return tmp_path


def contents() -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


@pytest.fixture
def refused(capsys):
    """`refused(*argv)`: the message with which the command refuses, having checked all that is the
    same for all.

    `late`: only the devices and the data tell, so the head of the log may be out.
    """

    def refused(
        *argv: str, main=train.main, config: str | None = "cfg.py", late: bool = False
    ) -> str:
        before = contents()
        arguments = ([f"--config={config}"] if config else []) + list(argv)
        with pytest.raises(SystemExit) as exit:
            cli.run(lambda _: main(arguments))
        captured = capsys.readouterr()
        assert exit.value.code == 2
        assert captured.out == "" or late
        assert captured.err.startswith("error: ") and captured.err.count("error: ") == 1
        assert "Traceback" not in captured.err and "  File " not in captured.err
        assert contents() == before, "a refused request has written"
        return captured.err.removeprefix("error: ").removesuffix("\n")

    return refused


def has(message: str, *words: str) -> None:
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


# The mesh.


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            (EIGHT, "--mesh.fsdp=3"),
            ("fsdp=3", "does not divide 8 devices", "{1, 2, 4, 8}", "--cpu_devices=3"),
        ),
        (
            (EIGHT, "--mesh.data=4"),
            ("data=4", "does not use 8 devices", "leave mesh.data out", "--cpu_devices=4"),
        ),
        (("--mesh.data=4",), ("data=4", "does not use 8 devices", "Found 8", "cpu")),
        (
            (EIGHT, "--mesh.data=-1", "--mesh.fsdp=-1"),
            ("mesh.data=-1 and mesh.fsdp=-1", "only one axis"),
        ),
        (("--mesh.fsdp=0",), ("mesh.fsdp=0", "at least 1", "-1")),
        (("--mesh.fsdp=-2",), ("mesh.fsdp=-2", "at least 1", "-1")),
        (("--mesh.tensro=2",), ("'tensro'", "Did you mean tensor?")),
        (("--mesh.fsdp=two",), ("--mesh.fsdp=two must be an int",)),
        (("--mesh.fsdp=2.5",), ("--mesh.fsdp=2.5 must be an int",)),
        (("--mesh.fsdp=",), ("--mesh.fsdp= must be an int",)),
        (("--mesh.tp=2",), ("'tp'", "Did you mean --mesh.tensor?")),
        (("--mesh.=2",), ("mesh axis", "fsdp")),
        (
            (EIGHT, "--mesh.pipeline=2"),
            ("model.layers=1", "mesh.pipeline=2", "model.layers in {2}"),
        ),
        (("--cpu_devices=0",), ("--cpu_devices=0", "at least 1")),
        (("--cpu_devices=-1",), ("--cpu_devices=-1", "at least 1")),
        (("--cpu_devices=many",), ("--cpu_devices=many", "int")),
        (("--num_processes=2", "--process_id=0"), ("--coordinator", "all three")),
    ],
)
def test_mesh(refused, argv, words):
    has(refused(*argv), *words)


# Sizes that must divide: the value, the rule and the legal values.


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            (
                "--config.model.heads=3",
                "--config.model.kv_heads=3",
                "--config.model.head_dim=8",
                "--mesh.tensor=2",
            ),
            (
                "model.heads=3 is not divisible by mesh.tensor=2",
                "mesh.tensor in {1}",
                "model.heads in {2, 4}",
            ),
        ),
        (
            (
                "--config.model.heads=6",
                "--config.model.kv_heads=3",
                "--config.model.head_dim=8",
                "--mesh.tensor=2",
            ),
            (
                "model.kv_heads=3 is not divisible by mesh.tensor=2",
                "mesh.tensor in {1}",
                "model.kv_heads in {2, 4}",
            ),
        ),
        (
            ("--config.model.ffn_dim=62", "--config.model.kv_heads=4", "--mesh.tensor=4"),
            (
                "model.ffn_dim=62 is not divisible by mesh.tensor=4",
                "mesh.tensor in {1, 2}",
                "model.ffn_dim in {60, 64}",
            ),
        ),
        (
            ("--config.model.vocab_size=321", "--mesh.tensor=2"),
            (
                "model.vocab_size=321 is not divisible by mesh.tensor=2",
                "model.vocab_size in {320, 322}",
            ),
        ),
        (
            ("--config.model.dim=36", "--config.model.head_dim=8", "--mesh.fsdp=8"),
            (
                "model.dim=36 is not divisible by mesh.fsdp=8",
                "mesh.fsdp in {3, 4, 6, 9, 12, 18}",
                "model.dim in {32, 40}",
            ),
        ),
        (
            ("--config.data.sequence_length=30", "--mesh.sequence=4"),
            (
                "data.sequence_length=30 is not divisible by mesh.sequence=4",
                "data.sequence_length in {28, 32}",
            ),
        ),
        (
            ("--config.data.sequence_length=12", "--mesh.sequence=4", "--mesh.tensor=2"),
            (
                "data.sequence_length=12",
                "mesh.sequence x mesh.tensor = 8",
                "{8, 16}",
                "sequence_parallel=false",
            ),
        ),
        (
            ("--config.train.batch_size=12", "--mesh.data=8"),
            (
                "train.batch_size=12",
                "data=8 x fsdp=1 x expert=1 = 8",
                "train.batch_size in {8, 16}",
                "{1, 2, 3, 4, 6, 12}",
            ),
        ),
        (
            ("--config.train.microbatches=2", "--mesh.data=2", "--mesh.fsdp=2", "--mesh.expert=2"),
            (
                "train.batch_size=8",
                "microbatches=2 x data=2 x fsdp=2 x expert=2 = 16",
                "train.batch_size in {16}",
            ),
        ),
        (
            ("--config.train.microbatches=3",),
            ("train.batch_size=8", "train.microbatches=3", "{6, 9}"),
        ),
        (
            ("--config.model.kv_heads=3",),
            ("model.heads=4 is not divisible by model.kv_heads=3", "{1, 2, 4}"),
        ),
        (
            ("--config.model.dim=30",),
            ("model.dim=30 is not divisible by model.heads=4", "model.head_dim"),
        ),
        (("--config.model.head_dim=7",), ("model.head_dim=7 must be even", "{6, 8}")),
    ],
)
def test_sizes_that_must_divide(refused, argv, words):
    has(refused(EIGHT, *argv), *words)


def test_the_largest_mesh_that_divides_is_accepted(refused):
    """The rules above refuse only what they must: this request gets as far as its data."""
    argv = (
        "--mesh.data=2",
        "--mesh.sequence=2",
        "--mesh.tensor=2",
        "--config.data.source=none.txt",
    )
    has(refused(EIGHT, *argv), "none.txt does not exist")


# Fields, one by one.

MAY_BE_0 = {
    "data.validation_fraction",
    "train.seed",
    "train.eval_every",
    "train.eval_batches",
    "train.z_loss",
    "optimizer.warmup_steps",
    "optimizer.min_learning_rate",
    "optimizer.weight_decay",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.clip_norm",
    "precision.loss_scale",
    "checkpoint.every",
    "checkpoint.keep_best",
}
NUMBERS = {path: kind for path, kind in field_paths().items() if kind in (int, float)}


@pytest.mark.parametrize("path", NUMBERS)
def test_no_number_is_negative_or_zero_where_it_must_not(refused, path):
    bad = (
        ["-1"] + ["0"] * (path not in MAY_BE_0) + ["nan", "inf", "-inf"] * (NUMBERS[path] is float)
    )
    for value in bad:
        message = refused(f"--config.{path}={value}")
        shown = value if NUMBERS[path] is int or not value.lstrip("-").isdigit() else f"{value}.0"
        has(message, f"{path}={shown} must")


@pytest.mark.parametrize("path", field_paths())
def test_a_value_of_the_wrong_type_is_named(refused, path):
    if field_paths()[path] is str:
        return
    message = refused(f"--config.{path}=abc")
    has(message, f"--config.{path}=abc")
    assert message.count("'") % 2 == 0, f"a quote is cut off: {message}"


@pytest.mark.parametrize("path", CHOICES)
def test_choices_are_listed(refused, path):
    has(refused(f"--config.{path}=abc"), f"{path}='abc'", *CHOICES[path])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--config.model.dimm=3",), ("'model.dimm'", "Did you mean model.dim?")),
        (("--config.modle.dim=3",), ("'modle.dim'", "Did you mean model.dim?")),
        (
            ("--config.model.batch_size=3",),
            ("'model.batch_size'", "Did you mean train.batch_size?"),
        ),
        (("--config.steps=3",), ("'steps'", "train.steps")),
        (("--config.=3",), ("config field",)),
        (("--noconfig.log.progres",), ("'log.progres'", "Did you mean log.progress?")),
        (("--config.model=3",), ("--config.model=3",)),
        (("--config.train.steps",), ("--config.train.steps",)),
        (("--cpu_device=8",), ("--cpu_device", "Did you mean --cpu_devices?")),
        (("--wrokdir=x",), ("--wrokdir", "Did you mean --workdir?")),
        (("--frobnicate",), ("--frobnicate", "Known: --workdir, --cpu_devices")),
        (("train",), ("'train'", "--NAME=VALUE")),
        (("--workdir=",), ("--workdir= has no value",)),
        (("--config.data.source=",), ("data.source is empty", "stories")),
        (("--config.data.tokenizer= ",), ("data.tokenizer is empty", "gpt2")),
        (("--config.mesh.fsdp=2",), ("'mesh.fsdp'", "--mesh.fsdp=N")),
        (("--lr=1",), ("--lr", "Did you mean --config.optimizer.learning_rate?")),
        (("--config.model.layers", "3", "--mesh.pipeline", "2"), ("layers=3", "pipeline=2")),
        (("--config.optimizer.learning_rate=",), ("learning_rate= must be a float",)),
        (("--config.optimizer.name=adam",), ("'adam'", "adamw, lion", "Did you mean adamw?")),
        (
            ("--config.optimizer.min_learning_rate=1",),
            ("optimizer.min_learning_rate=1", "learning_rate=0.0003"),
        ),
        (("--config.data.validation_fraction=1",), ("data.validation_fraction=1", "below 1")),
        (("--config.train.seed=99999999999999999999",), ("train.seed=99999999999999999999",)),
    ],
)
def test_flags_and_fields(refused, argv, words):
    has(refused(*argv), *words)


# The config file.


def test_a_missing_config_file_names_the_nearest(refused):
    Path("tiny.py").write_text(CONFIG)
    for name in ("llama3_8b", "llama3_70b"):
        Path(f"{name}.py").write_text(CONFIG)
    message = refused(config="llama3_7b.py")
    has(message, "--config=llama3_7b.py: no such file", "Did you mean llama3_70b.py?")
    assert "tiny" not in message
    has(refused(config=None), "--config=FILE is missing")
    has(refused(config="."), "--config=. is a folder, not a file")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(:\n    pass\n", ("line 1",)),
        ("x = 1\n", ("get_config",)),
        ("import absent_module\n", ("absent_module",)),
        ("def get_config():\n    return None\n", ("get_config", "None")),
        ("def get_config():\n    return {}\n", ("get_config", "dict")),
        ("def get_config():\n    return undefined_name\n", ("undefined_name", "line 2")),
        ("def get_config():\n    return 1 / 0\n", ("division by zero", "line 2")),
        (CONFIG.replace("dim=32", "dimm=32"), ("'model.dimm'", "Did you mean model.dim?")),
        (CONFIG.replace("model=", "modle="), ("'modle'", "Did you mean model?")),
        (CONFIG.replace("dim=32", "dim='32'"), ("model.dim='32'", "int")),
        (CONFIG.replace("dim=32", "dim=-1"), ("model.dim=-1",)),
    ],
)
def test_a_wrong_config_file(refused, text, words):
    Path("wrong.py").write_text(text)
    message = refused(config="wrong.py")
    has(message, *words)
    assert len(message.splitlines()) == 1


# The data.


@pytest.mark.parametrize(
    ("name", "content", "flags", "words"),
    [
        ("gone.txt", None, (), ("gone.txt does not exist", "data.source=stories")),
        ("*.jsonl", None, (), ("'*.jsonl' matches no file",)),
        ("empty.txt", b"", (), ("empty.txt is empty",)),
        ("blank.txt", b" \n\n", (), ("blank.txt", "white space")),
        ("text.doc", b"words", (), ("'.doc'", ".txt, .jsonl, .parquet, .bin")),
        ("nul.txt", b"words\0words\n" * 99, (), ("nul.txt:1", "binary")),
        ("latin.txt", b"\xe9t\xe9\n" * 99, (), ("latin.txt", "UTF-8")),
        ("short.txt", b"Sixteen letters.", (), ("15 tokens", "sequence_length=32", "at most 15")),
        (
            "wide.bin",
            np.full(999, 320, np.uint16).tobytes(),
            (),
            ("wide.bin", "token id 320", "vocab_size=320", "321"),
        ),
        ("odd.bin", b"\1" * 999, (), ("odd.bin", "999 bytes", "cut short")),
        (
            "text.txt",
            b"words " * 999,
            ("--config.data.tokenizer=gpt2",),
            ("50257 ids", "vocab_size=320", "50304"),
        ),
        ("text.txt", b"words " * 999, ("--config.data.tokenizer=none",), ("'none'", "gpt2, bytes")),
        (
            "text.txt",
            b"words " * 999,
            ("--config.data.validation_source=no.txt",),
            ("validation_source", "no.txt"),
        ),
    ],
)
@pytest.mark.parametrize("main", [train.main, verify.main])
def test_data(refused, main, name, content, flags, words):
    if content is not None:
        Path(name).write_bytes(content)
    has(refused(f"--config.data.source={name}", *flags, main=main), *words)


# The workdir.


def test_a_file_in_the_way_of_the_workdir(refused):
    has(refused("--workdir=text.txt"), "--workdir=text.txt", "is a file", "give a folder")
    has(refused("--workdir=text.txt/below"), "--workdir=text.txt/below", "text.txt is a file")


def test_a_workdir_without_permission(refused, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    has(refused("--workdir=run"), "--workdir=run", "not writable", "give a folder that is")


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="only root can become someone else"
)
def test_a_workdir_that_cannot_even_be_looked_at(refused, tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "secret").mkdir(mode=0o700)
    os.setresuid(65534, 65534, 0)  # permission bits do not stop root
    try:
        with pytest.raises(cli.ConfigError, match=r"--workdir=.*secret/run.*not writable"):
            cli.check_writable(tmp_path / "secret" / "run")
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def used() -> Path:
    """A workdir with a complete checkpoint of the config, whose state is small and not that of its
    model."""
    request = cli.parse(["--config=cfg.py", "--workdir=used"], "")
    checkpointer = Checkpointer("used", request.config)
    checkpointer.save(3, {"weight": jnp.ones(8)}, position=Position(3, 24, 0))
    checkpointer.close()
    return Path("used")


def test_a_checkpoint_of_another_model(refused, used):
    flags = (
        "--config.model.dim=64",
        "--config.model.rope_scaling.factor=8",
        "--config.optimizer.name=sgd",
    )
    message = refused(f"--workdir={used}", *flags)
    has(message, "used/checkpoints/3 belongs to another run", "use another --workdir")
    has(message, "model.dim: checkpoint 32, config 64", "model.head_dim: checkpoint 8, config 16")
    has(
        message,
        "model.rope_scaling.factor: checkpoint 1.0, config 8.0",
        "optimizer.name: checkpoint adamw, config sgd",
    )
    assert "layers" not in message and "vocab_size" not in message


def test_a_checkpoint_of_another_tokenizer_or_state(refused, used):
    flags = ("--config.data.tokenizer=gpt2", "--config.model.vocab_size=50304")
    has(refused(f"--workdir={used}", *flags), "data.tokenizer: checkpoint bytes, config gpt2")
    message = refused(f"--workdir={used}", "--config.train.steps=9", late=True)
    has(message, "weight: only in the checkpoint", "model.embedding: not in the checkpoint")


def test_restore(refused, used):
    has(
        refused("--workdir=used", "--config.checkpoint.restore=none"),
        "restore=none",
        "steps 3",
        "restore=auto",
    )
    has(refused("--workdir=new", "--config.checkpoint.restore=gone"), "gone holds no checkpoints")
    flags = ("--config.checkpoint.restore=used", "--config.train.steps=9")
    has(refused("--workdir=new", *flags, late=True), "only in the checkpoint")


@pytest.mark.parametrize("workdir", ["/proc/run", "x" * 300, "run/" + "x" * 300])
@pytest.mark.parametrize("main", [train.main, prepare.main])
def test_a_workdir_that_the_file_system_refuses(refused, main, workdir):
    has(refused(f"--workdir={workdir}", main=main), f"--workdir={workdir[:200]}", "can't be made")


def test_prepare_keeps_out_of_a_run(refused):
    Path("run").mkdir()
    Path("run/config.json").write_text("{}")
    has(refused("--workdir=run", main=prepare.main), "--workdir=run", "of a run", "config.json")
    has(refused("--workdir=new", "--workers=-1", main=prepare.main), "--workers=-1", "at least 0")


def test_what_does_not_fit_into_this_machine_is_not_begun(refused, monkeypatch):
    monkeypatch.setattr(cli, "_free_memory", lambda: 1000)
    words = "parameters", "of memory", "0.00 MiB free", "--config.model.layers", "--hardware=h100"
    has(refused("--mesh.fsdp=8", main=verify.main), *words)
    has(refused(EIGHT, "--mesh.fsdp=8", main=explain.main), *words)
    monkeypatch.setattr(cli, "_free_memory", lambda: None)
    cli.check_memory(2**60, "a system that does not tell")


def test_verify_of_one_device_compares_nothing(refused, monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    has(refused(main=verify.main), "nothing to compare", "--cpu_devices=8 --mesh.fsdp=4")


@pytest.mark.parametrize("main", [verify.main, prepare.main])
def test_other_commands_refuse_alike(refused, main):
    has(refused("--config.model.dimm=3", main=main), "Did you mean model.dim?")
    has(refused("--frobnicate=3", main=main), "unknown flag --frobnicate")


def test_verify_refuses_what_it_could_not_write(refused):
    has(refused("--json=gone/report.json", main=verify.main), "--json=gone/report.json")
    has(refused("--json=text.txt/report.json", main=verify.main), "--json=text.txt/report.json")
    for value in ("nan", "-1"):
        has(refused(f"--tolerance={value}", main=verify.main), f"--tolerance={value}")


# Exit codes and processes.


@pytest.mark.parametrize("code", [0, 1, 143])
def test_run_exits_with_the_code(code):
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda _: code)
    assert exit.value.code == code


def test_ctrl_c_before_the_loop_is_130(capsys):
    def interrupted(_: list[str] | None) -> typing.NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        cli.run(interrupted)
    assert (exit.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda _: 1 // 0)


def python(*argv: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_processes():
    """What only a process shows: the exit code and all of stderr, and `--help` of every command."""
    commands = {name: python("-m", f"jaxpar.{name}", "--help") for name in __main__.COMMANDS}
    commands |= {
        "jaxpar": python("-m", "jaxpar", "--help"),
        "jaxpar train": python("-m", "jaxpar", "train", "-h"),
    }
    wrong = python(
        "-m", "jaxpar.train", "--config=cfg.py", "--config.model.dimm=3", "--workdir=run"
    )
    helps = {}
    for name, process in commands.items():
        helps[name], err = process.communicate()
        assert (process.returncode, err) == (0, ""), name
    out, err = wrong.communicate()
    assert (wrong.returncode, out) == (2, "")
    assert err == "error: unknown config field 'model.dimm'. Did you mean model.dim?\n"
    assert not Path("run").exists()

    assert helps["jaxpar train"] == helps["train"]
    for name in __main__.COMMANDS:
        has(helps["jaxpar"], f"jaxpar {name}")
        has(
            helps[name],
            "Flags:",
            "--cpu_devices=N",
            "--coordinator",
            "--mesh.AXIS=N",
            "pipeline, data, fsdp",
        )
    for name in ("train", "verify", "prepare"):
        has(
            helps[name],
            "--config=FILE",
            "--workdir",
            *(f"--config.{path}=" for path in field_paths()),
        )
    for choices in CHOICES.values():
        has(helps["train"], " | ".join(choices))
    has(helps["verify"], "--json", "--tolerance=VALUE", "1e-05")
    has(
        helps["generate"],
        "--checkpoint",
        "--prompt",
        "--max_tokens=N",
        "--temperature",
        "--top_k",
        "--top_p",
        "--seed",
    )
    assert "--config" not in helps["generate"]


def test_numbers_of_other_commands(refused):
    gpus = ("--hardware=h100", "--devices=8")
    has(refused("--hardware=h100", main=plan.main), "--devices is missing")
    has(refused(*gpus, "--top=-1", main=plan.main), "--top=-1 must be at least 1")
    has(refused(*gpus, "--html=/proc/x", main=plan.main), "--html=/proc/x can't be written")
    has(refused("--rows=0", main=explain.main), "--rows=0 must be at least 1")
    has(refused("--timeout=nan", main=explain.main), "--timeout=nan must be at least 0")
    has(refused("tiny", main=train.main, config=None), "'tiny'", "did you mean --config=tiny?")


def test_version_and_a_reader_that_goes_away():
    for command in (("-m", "jaxpar"), ("-m", "jaxpar.train")):
        out, err = python(*command, "--version").communicate()
        assert (out.split()[0], err) == ("jaxpar", "")
    command = [sys.executable, "-m", "jaxpar.plan", "--help"]
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment)
    os.close(write)
    assert (run.returncode, run.stderr) == (128 + signal.SIGPIPE, b"")


def test_the_console_script_passes_on(refused, capsys):
    has(
        refused("trian", main=__main__.command, config=None),
        "unknown command 'trian'. Did you mean train?",
    )
    has(
        refused("train", "--config=gone.py", main=__main__.command, config=None),
        "--config=gone.py: no such file",
    )
    assert __main__.command([]) == 0
    has(capsys.readouterr().out, *__main__.COMMANDS)


def test_generate_has_no_config(refused):
    has(refused(main=generate.main, config=None), "--checkpoint is missing")
    has(refused("--checkpoint=gone", main=generate.main, config=None), "gone holds no checkpoints")
    has(refused("--checkpoint=gone", main=generate.main), "unknown flag --config")
