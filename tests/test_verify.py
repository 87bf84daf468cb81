"""The verifier through the command: meshes that are equal, computations that are not, and its
JSON."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxpar import verify
from jaxpar.parallel import context

pytestmark = pytest.mark.usefixtures("compile_once")

# bfloat16, which verify must not use: its rounding alone is a thousand times the tolerance.
CONFIG = """
from jaxpar.config import configure

def get_config():
    return configure(
        model=dict(vocab_size=320, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64),
        data=dict(source="text.txt", tokenizer="bytes", sequence_length=32),
        train=dict(batch_size=8),
        precision=dict(compute="bfloat16"),
    )
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cfg.py").write_text(CONFIG)
    Path("text.txt").write_text(
        "".join(f"{n} plus {n} is {2 * n}.\n<|endoftext|>\n" for n in range(300))
    )


def strict(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def verified(capsys):
    """`verified(*flags)`: the exit code, and the JSON that is all of standard output."""

    def verified(*argv: str) -> tuple[int, dict]:
        code = verify.main(["--config=cfg.py", "--cpu_devices=8", "--json=-", *argv])
        return code, strict(capsys.readouterr().out)

    return verified


@pytest.mark.parametrize(
    "flags",
    [
        ("--mesh.fsdp=2", "--mesh.sequence=2", "--mesh.tensor=2"),
        (
            *(
                "--mesh.data=2",
                "--mesh.expert=2",
                "--mesh.tensor=2",
                "--config.train.microbatches=2",
            ),
            *("--config.parallel.sequence_parallel=false", "--config.memory.remat=full"),
        ),
    ],
)
def test_equal(verified, flags):
    code, report = verified(*flags)
    assert code == 0
    assert report.keys() == {"loss", "grad_norm", "gradients", "tolerance", "equal"}
    assert report["equal"] is True and report["tolerance"] == 1e-5
    gradients = report["gradients"]
    for name in ("loss", "grad_norm"):
        row = report[name]
        assert row.keys() == {"reference", "mesh", "relative_error"}
        assert row["relative_error"] == pytest.approx(
            abs(row["mesh"] / row["reference"] - 1), abs=1e-12
        )
    assert report["loss"]["reference"] == pytest.approx(math.log(320), rel=0.02)
    assert {
        "embedding",
        "layers.attention.query",
        "layers.mlp_norm.scale",
        "norm.scale",
        "head",
    } < set(gradients)
    assert len(gradients) == 12
    assert 0 < max(gradients.values()) <= 1e-5, (
        "float32 sums in another order are not the same bits"
    )


def test_a_wrong_order_of_tokens_is_found(verified, monkeypatch):
    """Context parallelism that joins the shards of a sequence in the wrong order; one device has no
    order."""

    def swapped(x, axis="sequence"):
        return jax.numpy.roll(jax.lax.all_gather(x, axis, axis=1, tiled=True), x.shape[1], axis=1)

    monkeypatch.setattr(context, "all_gather_tokens", swapped)
    code, report = verified("--mesh.sequence=2", "--mesh.fsdp=4")
    assert (code, report["equal"]) == (1, False)
    assert report["loss"]["relative_error"] > 1e-5
    assert report["gradients"]["layers.attention.query"] > 0.01


def test_a_wrong_gradient_is_found_though_the_loss_is_right(capsys, monkeypatch):
    """One leaf in twelve, off by one in ten thousand, and only where `data` is spread."""

    def wrong(*args):
        losses, gradients = right(*args)
        if jax.sharding.get_abstract_mesh().shape["data"] > 1:
            gradients.layers.mlp.up[...] = gradients.layers.mlp.up[...] * 1.0001
        return losses, gradients

    right = verify.loss_and_gradients
    monkeypatch.setattr(verify, "loss_and_gradients", wrong)
    assert verify.main(["--config=cfg.py", "--mesh.data=8", "--json=report.json"]) == 1
    report = strict(Path("report.json").read_text())
    assert report["equal"] is False and report["loss"]["relative_error"] <= 1e-5
    assert [name for name, error in report["gradients"].items() if error > 1e-5] == [
        "layers.mlp.up"
    ]
    assert report["gradients"]["layers.mlp.up"] == pytest.approx(1e-4, rel=0.05)
    table = capsys.readouterr().out
    assert all(words in table for words in ("data=8", "quantity or gradient", "head"))
    assert "DIFFERENT within a relative error of 1e-05" in table


def test_what_is_not_finite_is_different_and_still_json(verified, monkeypatch):
    norms = iter([1.0, math.nan])
    monkeypatch.setattr(
        verify,
        "run_batch",
        lambda *_: verify.Result(1.0, norm := next(norms), {"weight": np.array([norm])}),
    )
    code, report = verified()
    assert (code, report["equal"]) == (1, False)
    assert report["loss"] == {"reference": 1.0, "mesh": 1.0, "relative_error": 0.0}
    assert report["grad_norm"] == {"reference": 1.0, "mesh": None, "relative_error": None}
    assert report["gradients"] == {"weight": None}


def test_the_tolerance_decides(monkeypatch, capsys):
    results = [
        verify.Result(1.0, 2.0, {"weight": np.array([3.0, 4.0 + more])}) for more in (0.0, 0.005)
    ]
    for tolerance, code, verdict in ((1.1e-3, 0, "equal"), (0.9e-3, 1, "DIFFERENT")):
        left = iter(results)
        monkeypatch.setattr(verify, "run_batch", lambda *_: next(left))  # noqa: B023
        assert verify.main(["--config=cfg.py", f"--tolerance={tolerance}"]) == code
        output = capsys.readouterr().out
        assert (
            "1.0e-03" in output and f"{verdict} within a relative error of {tolerance:g}" in output
        )


@pytest.mark.parametrize(
    ("value", "reference", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([3.0, 5.0], [3.0, 4.0], 0.2),
        (float("nan"), 1.0, math.inf),
        (1.0, float("nan"), math.inf),
        ([1.0, float("inf")], [1.0, 1.0], math.inf),
    ],
)
def test_relative_error(value, reference, error):
    assert verify.relative_error(value, reference) == pytest.approx(error)
