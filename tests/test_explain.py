"""`explain`: what it reports is what was compiled; bad requests, crashes and time-outs are told in
one message."""

import io
import json
import resource
import time
from pathlib import Path

import jax
import pytest
from rich.console import Console

from jaxpar import explain
from jaxpar.config import ConfigError, MeshConfig, configure
from jaxpar.estimate import counts, hardware, memory, remedy
from jaxpar.report import apart
from jaxpar.report.apart import CompileFailed, Target, compile_report, plain_warnings
from jaxpar.report.gantt import picture
from jaxpar.report.page import explain_page
from jaxpar.sharding import make_mesh
from jaxpar.validation import resolve

SIZES = dict(dim=64, layers=3, heads=4, kv_heads=2)
MODEL = [f"--config.model.{name}={size}" for name, size in SIZES.items()]
TINY = [
    *(
        "--config=configs/tiny.py",
        "--config.model.ffn_dim=96",
        "--config.model.vocab_size=512",
        *MODEL,
    ),
    *(
        "--config.data.sequence_length=64",
        "--config.train.batch_size=4",
        "--config.train.microbatches=1",
    ),
]


def tiny_config(**groups):
    model = dict(vocab_size=512, dim=64, layers=3, heads=4, kv_heads=2, ffn_dim=96)
    base = dict(model=model, data=dict(sequence_length=64), train=dict(batch_size=4))
    return resolve(configure(**(base | groups)))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of the smallest model on eight GPUs that are not there, as the command writes it. A device
    has one sequence, as long as the model is wide: stacked activations have the shapes of stacked
    weights."""
    folder = tmp_path_factory.mktemp("explain")
    flags = ["--mesh.fsdp=4", "--mesh.tensor=2", "--hardware=h100", "--topology=1x1x8"]
    outputs = [f"--json={folder / 'report.json'}", f"--html={folder / 'report.html'}"]
    assert explain.main([*TINY, *flags, *outputs]) == 0
    return json.loads((folder / "report.json").read_text()) | {
        "page": (folder / "report.html").read_text()
    }


def test_memory_adds_up(report):
    found = report["memory"]
    assert (
        found["peak"] == found["arguments"] + found["output"] - found["alias"] + found["temporary"]
    )
    assert sum(found["parts"].values()) == found["peak"]
    config, mesh = tiny_config(), MeshConfig(fsdp=4, tensor=2)
    state = memory.state_bytes(config, mesh)
    by_leaf = {
        kind: sum(
            leaf["bytes_per_device"]
            for leaf in report["by_parameter"]
            if leaf["name"].startswith(kind)
        )
        for kind in ("model", "optimizer")
    }
    assert (by_leaf["model"], by_leaf["optimizer"]) == (state["parameters"], state["optimizer"])
    assert (
        report["backend"] == "NVIDIA H100 80GB HBM3"
        and report["devices"] == 8
        and report["fits"] is True
    )


def test_buffers_are_told_by_what_made_them(report):
    """Activations [layers, 1, tokens, ffn] are no weights [layers, dim, ffn], which have the same
    numbers."""
    config, mesh = tiny_config(), MeshConfig(fsdp=4, tensor=2)
    parts, sizes = report["memory"]["parts"], memory.activation_bytes(config, mesh)
    kept = config.model.layers * sum(sizes[name] for name in config.memory.kept)
    weight = counts.parameter_shapes(config.model)["layers.mlp.gate"]
    both = [row for row in report["temporaries"] if row["shape"] == "bf16[3,1,64,48]"]
    assert (weight[0], 1, weight[1], weight[2] // mesh.tensor) == (3, 1, 64, 48)
    assert len(both) >= 2 and {row["part"] for row in both} == {"activations"}
    assert kept <= parts["activations"] < 1.5 * kept
    assert 0 <= parts["weights"] < 2 * counts.layer_elements(config.model) // 2
    assert all(size >= 0 for size in parts.values()) and parts.keys() == memory.PART_NAMES.keys()


def test_collectives_have_axes_source_and_time(report):
    found = report["collectives"]
    layers = tiny_config().model.layers
    gathers = [
        row
        for row in found
        if row["op"] == "all-gather" and row["axes"] == ["fsdp"] and row["count"] == layers
    ]
    assert {row["source"].partition(":")[0] for row in gathers} == {"model.py"}
    assert {row["phase"] for row in gathers} == {"forward", "backward"}
    assert all(row["bytes"] == row["size"] * row["count"] and row["seconds"] > 0 for row in found)
    assert {tuple(row["axes"]) for row in found} <= {("fsdp",), ("tensor",), ("fsdp", "tensor")}
    assert any(row["asynchronous"] for row in found)


def test_temporaries_name_their_source(report):
    largest = report["temporaries"][0]
    assert largest["bytes"] == max(row["bytes"] for row in report["temporaries"])
    assert (
        sum(bool(row["source"]) for row in report["temporaries"]) > len(report["temporaries"]) / 2
    )
    assert report["flops"] > 0


def test_page_has_every_leaf_and_collective_and_nothing_from_elsewhere(report):
    from html.parser import HTMLParser

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.text, self.urls = [], [], []

        def handle_starttag(self, tag, attrs):
            self.urls += [value for name, value in attrs if name in ("src", "href")]
            if tag not in ("meta",):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_data(self, data):
            self.text.append(data)

    reader = Reader()
    reader.feed(report["page"])
    assert not reader.open and not reader.urls
    text = " ".join(reader.text)
    assert all(leaf["name"] in text for leaf in report["by_parameter"])
    assert text.count("all-gather") >= sum(
        row["op"] == "all-gather" for row in report["collectives"]
    )
    assert "prefers-color-scheme: dark" in report["page"] and "max-width" in report["page"]


def test_page_and_json_say_what_they_are_of(report):
    asked = report["request"]
    assert asked["config"] == "tiny" and "3 layers, dim 64," in asked["model"]
    assert "global batch 4 sequences x 64 tokens" in asked["batch"]
    assert report["attention"] == "cudnn" and "<dt>attention</dt><dd>cudnn</dd>" in report["page"]
    assert asked["command"].startswith("python -m jaxpar.explain --config=configs/tiny.py ")
    for text in (asked["model"], asked["batch"], "--mesh.fsdp=4", "<h1>tiny: one training step on"):
        assert text in report["page"]


@pytest.mark.parametrize("width", [60, 80])
def test_narrow_terminals_cut_no_number(report, width):
    """The verdict and the remedies come first, then the accounts."""
    changed = report | dict(fits=False, room=2**20, warnings=["of the compiler"])
    changed["remedies"] = [dict(flags="--config.memory.remat=full", peak=2**29)]
    console = Console(width=width, highlight=False, record=True, quiet=False, file=io.StringIO())
    explain.print_report(changed, 100, console)
    lines = console.export_text().splitlines()
    assert "DOES NOT FIT" in lines[0] and lines[1] == "  512.00 MiB with --config.memory.remat=full"
    words = {word for line in lines for word in line.split()}
    assert not any("…" in word for word in words)
    for row in report["collectives"]:
        assert {
            explain.mib(row["bytes"]),
            f"{1e3 * row['seconds']:.2f}",
            str(row["count"]),
        } <= words
    for row in (*report["temporaries"], *report["by_parameter"]):
        assert explain.mib(row.get("bytes", row.get("bytes_per_device"))) in words


def test_page_of_what_does_not_fit_and_has_a_pipeline(report):
    memory_ = report["memory"] | {"peak": 90 * 2**30, "parts": {"activations": 90 * 2**30}}
    remedies = [{"flags": "--config.memory.remat=full", "peak": 2**30, "fits": True}]
    warnings = ["<b>no</b>"]
    page = explain_page(
        report | dict(memory=memory_, fits=False, remedies=remedies, warnings=warnings),
        "<svg></svg>",
    )
    assert (
        "Does not fit" in page
        and "--config.memory.remat=full" in page
        and "12.89 GiB too much" in page
    )
    assert "<svg></svg>" in page and "&lt;b&gt;no&lt;/b&gt;" in page
    assert "<svg" not in explain_page(report)


def test_flops_are_those_of_the_matmuls():
    """Counted by hand for one layer kept whole: forward and twice as much backward, attention over
    all pairs and once more because its scores are computed again."""
    from jaxpar.compile import compile_train_step
    from jaxpar.report import hlo

    config = tiny_config(precision=dict(compute="float32"))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    found = hlo.flops(compile_train_step(config, mesh).as_text())
    m, tokens = config.model, 4 * 64
    weights = (
        m.layers * (2 * m.dim * 64 + 2 * m.dim * 32 + 3 * m.dim * m.ffn_dim) + m.dim * m.vocab_size
    )
    attention = m.layers * 2 * m.dim * 64 * (3 + 0.5) * 2
    assert found == pytest.approx(tokens * (6 * weights + attention), rel=0.02)


def test_json_alone_goes_to_standard_output(capfd, monkeypatch):
    compiled = dict(memory=dict(peak=1, parts={}), capacity=None, mesh={}, warnings=[])
    monkeypatch.setattr(explain, "compile_report", lambda *_, **__: dict(compiled))
    assert explain.main([*TINY, "--cpu_devices=1", "--json=-"]) == 0
    assert json.loads(capfd.readouterr().out)["fits"] is None


def test_what_does_not_fit_is_blamed_and_remedied(monkeypatch, capsys, tmp_path):
    """Three remedies, the cheapest first, each with its compiled peak; one that does not fit after
    all is left out."""
    sizes = iter([90, 30, 80, 40, 50])
    asked = []

    def compiled(config, mesh, target, timeout):
        asked.append(config)
        peak = next(sizes) * 2**30
        parts = dict.fromkeys(memory.PART_NAMES, 0) | {
            "activations": peak - 2**30,
            "optimizer": 2**30,
        }
        rest = dict(by_parameter=[], temporaries=[], collectives=[], flops=1, compile_seconds=1.0)
        rest["attention"] = "cudnn"
        here = dict(
            memory=dict(peak=peak, parts=parts),
            capacity=hardware.find("h100").memory_bytes,
            warnings=[],
        )
        return here | rest | dict(mesh=dict(fsdp=8), devices=8, backend="NVIDIA H100 80GB HBM3")

    monkeypatch.setattr(explain, "compile_report", compiled)
    text = Path("configs/llama3_8b.py").read_text().replace('remat="full"', 'remat="none"')
    (tmp_path / "kept.py").write_text(text)  # what the command line names would stay
    flags = [f"--config={tmp_path / 'kept.py'}", "--config.train.batch_size=32"]
    assert explain.main([*flags, "--mesh.fsdp=-1", "--hardware=h100", "--topology=1x1x8"]) == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "activations kept for the backward pass 89.00 GiB" in out
    assert [line.split(" with ")[0].strip() for line in out.splitlines() if " with --" in line] == [
        "30.00 GiB",
        "40.00 GiB",
        "50.00 GiB",
    ]
    assert len({str(config) for config in asked}) == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--hardware=h10"],
            r"--hardware=h10 is neither known .* Did you mean h100\? Known: a40, a1",
        ),
        (
            ["--hardware=h100", "--topology=8x8"],
            r"--topology=8x8 must be NVLink domains x hosts in each x GPUs in",
        ),
        (
            ["--hardware=h100", "--topology=1x1x8", "--mesh.fsdp=4", "--mesh.data=1"],
            r"8 devices: mesh fsdp=4 = 4",
        ),
        (["--hardware=h100", "--mesh.fsdp=12"], r"model.dim=64 is not divisible by mesh.fsdp=12"),
        (
            ["--hardware=h100", "--mesh.data=-1"],
            r"mesh size of -1 needs .* give --topology",
        ),
        (["--topology=1x1x8"], r"is of absent GPUs; say which"),
        (["--hardware=h100", "--cpu_devices=2"], r"exclude each other"),
    ],
)
def test_bad_requests(flags, message):
    with pytest.raises(ConfigError, match=message):
        explain.main([*TINY, *flags])


def test_a_missing_compiler_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(apart, "compiler_path", lambda: [])
    with pytest.raises(
        ConfigError,
        match=rf"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}",
    ):
        explain.main([*TINY, "--hardware=h100"])


def test_a_compilation_that_hangs_is_stopped():
    begin = time.monotonic()
    with pytest.raises(CompileFailed, match=r"took longer than --timeout=0.2 s"):
        compile_report(tiny_config(), {}, Target(cpu_devices=1), 0.2)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("crash", "message"),
    [
        (
            "import os; print('LLVM ERROR: no', file=__import__('sys').stderr, flush=True); "
            "os.abort()",
            "signal 6.*LLVM ERR",
        ),
        ("raise RuntimeError('unsupported')", "failed with code 1.*RuntimeError: unsupported"),
    ],
)
def test_a_crash_is_reported(monkeypatch, tmp_path, crash, message):
    (tmp_path / "jaxpar" / "report").mkdir(parents=True)
    for folder in ("jaxpar", "jaxpar/report"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "jaxpar" / "report" / "account.py").write_text(crash)
    monkeypatch.setattr(apart, "compiler_path", lambda: [str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CompileFailed, match=rf"(?s){message}"):
        compile_report(tiny_config(), {}, Target(cpu_devices=1), 60)


def test_warnings_in_plain_words():
    said = (
        "W1121 20:00:00.1 1 hlo_remat.cc:3005] Can't reduce memory use below 60.68GiB (1 bytes) by "
        "rematerialization; only reduced to 65.96GiB (1 bytes), down from 65.96GiB\n"
        "E1121 20:00:00.1 1 spmd.cc:613] [SPMD] Involuntary full rematerialization. The compiler "
        "was not "
        "able to go from sharding {devices=[8,1]<=[8]} to {devices=[1,8]<=[8]}\n"
        "W1121 20:00:00.1 1 cudart_stub.cc:31] Could not find cuda drivers on your machine, GPU "
        "will not be used.\n"
        "W1121 20:00:00.1 1 other.cc:31] Something else.\n"
        "W1121 20:00:00.1 1 other.cc:31] Something else.\n"
    )
    memory_, sharding, other = plain_warnings(said)
    assert "below 60.68GiB a device" in memory_ and "below 65.96GiB" in memory_
    assert "from sharding {devices=[8,1]<=[8]} to {devices=[1,8]<=[8]}" in sharding
    assert other == "Something else."


@pytest.mark.slow
def test_1024_gpus_take_less_than_a_minute_and_4_gib():
    begin = time.monotonic()
    flags = ["--mesh.fsdp=128", "--mesh.tensor=8", "--hardware=h100", "--topology=128x1x8"]
    assert explain.main(["--config=configs/llama3_405b.py", *flags]) == 0
    assert time.monotonic() - begin < 60
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20  # KiB


def test_blame_and_parts():
    assert remedy.blame({"optimizer": 3 * 2**30, "params": 2**29, "batch": 0}) == (
        "optimizer state 3.00 GiB, parameters 512.00 MiB"
    )


def test_a_pipeline_has_its_timetable_and_its_stash(tmp_path):
    output, page = tmp_path / "explain.json", tmp_path / "explain.html"
    flags = [
        "--cpu_devices=2",
        "--mesh.pipeline=2",
        "--config.train.microbatches=4",
        f"--json={output}",
    ]
    assert explain.main(["--config=configs/tiny.py", *flags, f"--html={page}"]) == 0
    parts = json.loads(output.read_text())["memory"]["parts"]
    assert parts["stash"] > 0 and parts["gradients"] > 0
    assert (
        "Timetable of the pipeline" in page.read_text()
        and picture("1f1b", 2, 4) in page.read_text()
    )
