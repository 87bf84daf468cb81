"""Hardware by name and by file: what a file must have, and what is said of one that lacks it."""

import dataclasses

import pytest

from jaxpar import plan
from jaxpar.config import ConfigError, MeshConfig, configure
from jaxpar.estimate.hardware import _PEAKS, NAMES, find, of_kind, topology_size
from jaxpar.estimate.ranking import rank
from jaxpar.estimate.timing import step_time
from jaxpar.report.apart import Target, compile_report
from jaxpar.validation import resolve

H100 = find("h100")
LINKS = "link_gbps = 100\nnetwork_gbps = 10\ndomain = 4\nhost = 2\n"
OWN = 'kind = "Mine"\nmemory_gib = 40\nmemory_gbps = 1000\n' + LINKS


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.toml"

    def write(text: str) -> str:
        path.write_text(text)
        return str(path)

    return write


def small(compute: str = "bfloat16"):
    scale = 65536.0 if compute == "float16" else 0.0
    model = dict(vocab_size=256, dim=64, layers=2, heads=4, ffn_dim=128)
    return resolve(configure(model=model, precision=dict(compute=compute, loss_scale=scale)))


@pytest.mark.parametrize("name", NAMES)
def test_every_hardware_has_its_description(name):
    found = find(name)
    assert found.memory_bytes > 40e9 and found.peak("bfloat16") > found.peak("float32")
    domains, hosts, gpus = topology_size(found.topology(2 * found.domain))
    assert (domains, hosts * gpus, gpus) == (2, found.domain, found.host)


@pytest.mark.parametrize("name", _PEAKS)
def test_tensor_cores_are_twice_to_thirty_times_as_fast(name):
    """A digit of a datasheet mistyped shows here, or in the order of what a vendor sells."""
    bfloat16, float16, float32 = _PEAKS[name]
    assert 1.9 <= float16 / float32 <= 32 and bfloat16 in (None, float16)


def test_a_description_and_its_links(file, tmp_path):
    (tmp_path / "gpu.txtpb").write_text(H100.target.replace("NVIDIA H100 80GB HBM3", "Mine"))
    text = 'target = "gpu.txtpb"\n' + LINKS
    with pytest.raises(ConfigError, match=r"no peak of 'Mine' is known; give .*bfloat16_tflops"):
        find(file(text))
    found = find(file(text + "bfloat16_tflops = 500\nfloat32_tflops = 50\n"))
    assert (found.peaks, found.link, found.network) == (
        {"bfloat16": 5e14, "float32": 5e13},
        1e11,
        1e10,
    )
    assert (found.domain, found.host, found.name) == (4, 2, "mine")
    assert found.memory_bytes == H100.memory_bytes and "Mine" in found.target
    alone = text.replace("domain = 4", "domain = 1").replace("host = 2", "host = 1")
    assert find(file(alone + "bfloat16_tflops = 500\n")).host == 1
    # Peaks that the kind of GPU tells may be left out; one that is given counts.
    (tmp_path / "gpu.txtpb").write_text(H100.target)
    assert find(file(text + "float16_tflops = 1\n")).peaks == H100.peaks | {"float16": 1e12}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_one_peak_is_enough_for_the_runs_that_compute_in_it(file, dtype):
    path = file(OWN + f"{dtype}_tflops = 100\n")
    best = rank(small(dtype), find(path), 4)[0]
    assert best.fits and 0 < best.mfu(find(path)) < 1
    other = "float32" if dtype != "float32" else "bfloat16"
    with pytest.raises(ConfigError, match=rf"--hardware=mine: .* add {other}_tflops .*{{{dtype}}}"):
        rank(small(other), find(path), 4)


def test_plan_takes_a_file_with_one_peak(file, capsys):
    path = file(OWN + "bfloat16_tflops = 100\n")
    assert plan.main(["--config=configs/tiny.py", f"--hardware={path}", "--devices=4"]) == 0
    assert "4 x mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LINKS, "it lacks kind, memory_gib, memory_gbps .or target in place of"),
        (OWN.replace("network_gbps = 10\n", ""), "it lacks network_gbps;"),
        ('target = "gpu.txtpb"\ndomain = 8\nhost = 8\n', "it lacks link_gbps, network_gbps"),
        ('target = "no.txtpb"\n' + LINKS, "No such file"),
        ('target = "x"\nmemory_gib = 3\n' + LINKS, "memory_gib is not a field of it"),
        (OWN + "bfloat_tflops = 1\n", "bfloat_tflops is .* Did you mean bfloat16_tflops"),
        (OWN + "bfloat16_tflops = 0\n", "bfloat16_tflops=0 must be a number above 0"),
        (OWN + "bfloat16_tflops = nan\n", "bfloat16_tflops=nan must be a number above 0"),
        (OWN + 'bfloat16_tflops = "fast"\n', "bfloat16_tflops='fast' must be a number"),
        (OWN + "matmul_half = -1\n", "matmul_half=-1 must be a number of at least 0"),
        (OWN.replace("host = 2", "host = 2.5"), "host=2.5 must be a whole number above 0"),
        (OWN.replace('"Mine"', "7"), "kind=7 must be a text"),
        (OWN, "no peak of 'Mine' is known"),
        ("link_gbps 3", "mine.toml: .*line 1"),
    ],
)
def test_what_is_wrong_with_a_file(file, text, message):
    with pytest.raises(ConfigError, match=message):
        find(file(text))


def test_measured_rates(file):
    """What `scripts/calibrate.py` writes is read, and slower rates make slower steps."""
    found = find(
        file(
            'measured = "today"\nkind = "cpu"\nmemory_gib = 16.5\nmemory_gbps = 10.0\n'
            "bfloat16_tflops = 0.2\nfloat32_tflops = 0.1\nlink_gbps = 1.0\nnetwork_gbps = 1.0\n"
            "domain = 4\nhost = 4\nmatmul_share = 0.5\nmatmul_half = 0\nattention_share = 0.1\n"
            "copy_share = 1.0\n"
        )
    )
    rates = found.rates
    assert (rates.measured, rates.matmul_share, rates.link_share) == ("today", 0.5, 0.80)
    assert (found.kind, found.memory_bytes) == ("cpu", int(16.5 * 2**30))
    assert found.memory_bandwidth == 1e10
    quicker = dataclasses.replace(found, rates=dataclasses.replace(rates, matmul_share=1.0))
    slow, quick = (step_time(small(), MeshConfig(), gpu) for gpu in (found, quicker))
    assert slow.matmul == pytest.approx(2 * quick.matmul) and slow.attention == quick.attention
    with pytest.raises(ConfigError, match="mine has no target description"):
        compile_report(small(), {}, Target(found, "1x1x1"), 60)
    assert H100.rates.measured.startswith("assumed")


def test_hardware_by_the_kind_of_a_device():
    assert of_kind("NVIDIA H200 141GB HBM3e").name == "h200"
    assert of_kind("cpu").name == "h100"
