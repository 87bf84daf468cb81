"""GPUs by name: memory, peaks, links. Needs no device.

A name is a target description of XLA in assets/gpus/ plus its links in `_LINKS`; or a file of one's
own, in TOML:

    target = "mine.txtpb"     # a description as in assets/gpus/, beside this file
    link_gbps = 450           # GB/s a GPU sends over the fast links, in one direction
    network_gbps = 50         # GB/s a GPU sends to other hosts, in one direction
    domain = 8                # GPUs that the fast links join
    host = 8                  # GPUs of a host
    bfloat16_tflops = 989.4   # dense peak, of the dtypes that runs compute in: float16, float32
    matmul_share = 0.8        # and the other `Rates`, with `measured` to say where they come from

Peaks that the kind of GPU tells may be left out, and so may rates. `scripts/calibrate.py` writes
such a file on the machine itself. What XLA has no description for, such as CPUs, takes `kind`,
`memory_gib` and `memory_gbps` in place of `target`; times can be predicted then, but nothing
compiled.
"""

import dataclasses
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpar.config import ConfigError
from jaxpar.hints import nearest

ASSETS = Path(__file__).parents[1] / "assets" / "gpus"
DTYPES = ("bfloat16", "float16", "float32")
NAMES = ("a40", "a100-40gb", "a100-80gb", "h100", "h200", "b200", "b300", "gb200")

# GB/s of a GPU in one direction: (fast links, network, GPUs that the fast links join, GPUs of a
# host).
_LINKS: dict[str, tuple[float, float, int, int]] = {
    # PCIe 4.0 x16 of 32 GB/s, as transfers get; one 200 Gb/s card a host.
    "a40": (25.0, 3.125, 8, 8),
    # DGX A100: NVLink 3 of 600 GB/s both ways, eight 200 Gb/s cards a host.
    "a100-40gb": (300.0, 25.0, 8, 8),
    "a100-80gb": (300.0, 25.0, 8, 8),
    # DGX H100: NVLink 4 of 900 GB/s both ways, eight 400 Gb/s cards a host.
    "h100": (450.0, 50.0, 8, 8),
    "h200": (450.0, 50.0, 8, 8),
    # DGX B200: NVLink 5 of 1.8 TB/s both ways, eight 400 Gb/s cards a host.
    "b200": (900.0, 50.0, 8, 8),
    # DGX B300: the same links, eight 800 Gb/s cards a host.
    "b300": (900.0, 100.0, 8, 8),
    # GB200 NVL72: 18 hosts of four GPUs in one domain, 400 Gb/s a GPU.
    "gb200": (900.0, 50.0, 72, 4),
}

MEASURED = (
    "assumed: shares of matmuls and copies as an H200 reached on plain ones (788 of 989 TFLOP/s, "
    "4.3 of 4.8 TB/s), the others guessed"
)
"""Where rates come from that nobody measured with `scripts/calibrate.py`."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """What is reached of the peaks: `matmul_share` of the dense peak by matmuls that fill the
    device, half of it at the width `matmul_half` (tiles are left empty, and launches show);
    `attention_share` of the dense peak by attention, forward and backward; `copy_share` of the
    memory bandwidth; `link_share` of the bandwidth of links and network, by large collectives."""

    matmul_share: float = 0.80
    matmul_half: float = 128.0
    attention_share: float = 0.55
    copy_share: float = 0.90
    link_share: float = 0.80
    measured: str = MEASURED


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of GPU and how its neighbours are joined.

    Attributes:
      name: as it was asked for.
      kind: as jax calls the device.
      target: the text of XLA's target description.
      memory_bytes: of the whole device.
      memory_bandwidth: bytes/s.
      peaks: dense FLOP/s by dtype, of those that are known; `peak` asks for one.
      link: bytes/s that a GPU sends over the fast links, in one direction; network: to other
        domains.
      domain: GPUs that the fast links join; host: GPUs of one host.
      rates: what is reached of all these.
    """

    name: str
    kind: str
    target: str
    memory_bytes: int
    memory_bandwidth: float
    peaks: dict[str, float]
    link: float
    network: float
    domain: int
    host: int
    rates: Rates = Rates()

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s of a dtype.

        Raises:
          ConfigError: it is not known.
        """
        if dtype not in self.peaks:
            raise ConfigError(
                f"--hardware={self.name}: the peak of {dtype} is not known, which "
                f"precision.compute={dtype} needs; add {dtype}_tflops to its file, or use "
                f"precision.compute in {{{', '.join(self.peaks)}}}"
            )
        return self.peaks[dtype]

    def topology(self, devices: int) -> str:
        """NVLink domains x hosts in each x GPUs in each, for a number of devices.

        Raises:
          ConfigError: they do not fill hosts or domains.
        """
        host, domain = min(devices, self.host), min(devices, self.domain)
        if devices % host or devices % domain or domain % host:
            whole = self.domain if devices > self.domain else self.host
            below = devices // whole * whole
            near = f"{below} or {below + whole}" if below else str(whole)
            raise ConfigError(
                f"{devices} devices do not fill whole hosts of {self.host} and domains of "
                f"{self.domain} {self.name}; use {near} devices (explain takes other "
                "topologies as --topology=DOMAINSxHOSTSxGPUS)"
            )
        return f"{devices // domain}x{domain // host}x{host}"


def find(name: str) -> Hardware:
    """Hardware by name or TOML file.

    Raises:
      ConfigError: neither; it lists the names.
    """
    if name in NAMES:
        return _make(name, (ASSETS / f"{name}.txtpb").read_text(), *_LINKS[name], {})
    path = Path(name)
    if not path.is_file():
        known = f" Known: {', '.join(NAMES)}."
        hint = nearest(name, NAMES)
        raise ConfigError(
            f"--hardware={name} is neither known hardware nor a "
            f"file.{hint}{known if known != hint else ''} A TOML "
            "file describes other hardware, see jaxpar/estimate/hardware.py"
        )
    try:
        fields = tomllib.loads(path.read_text())
        _check_fields(fields)
        target = (path.parent / fields["target"]).read_text() if "target" in fields else ""
        links = (fields["link_gbps"], fields["network_gbps"], fields["domain"], fields["host"])
        peaks = {
            dtype: 1e12 * fields[f"{dtype}_tflops"]
            for dtype in DTYPES
            if f"{dtype}_tflops" in fields
        }
        described = _make(path.stem, target or _description(fields), *links, peaks)
        rates = Rates(**{name: fields[name] for name in _RATES if name in fields})
        return dataclasses.replace(described, rates=rates, target=target)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--hardware={name}: {error}; see jaxpar/estimate/hardware.py") from error


_RATES = tuple(field.name for field in dataclasses.fields(Rates))
_LINK_FIELDS = ("link_gbps", "network_gbps", "domain", "host")
_TEXTS, _WHOLE = ("target", "kind", "measured"), ("domain", "host")


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Refuses a file that lacks something, or has something unknown or senseless."""
    described = ("target",) if "target" in fields else ("kind", "memory_gib", "memory_gbps")
    needed = (*described, *_LINK_FIELDS)
    known = (*needed, *(f"{dtype}_tflops" for dtype in DTYPES), *_RATES)
    for name in fields:
        if name not in known:
            raise ValueError(f"{name} is not a field of it.{nearest(name, known)}")
    if missing := [name for name in needed if name not in fields]:
        instead = " (or target in place of kind, memory_gib and memory_gbps)"
        undescribed = "target" not in fields and not set(described) <= fields.keys()
        raise ValueError(f"it lacks {', '.join(missing)}{instead if undescribed else ''}")
    for name, value in fields.items():
        if name in _TEXTS:
            right, rule = isinstance(value, str), "a text"
        elif name in _WHOLE:
            right, rule = type(value) is int and value > 0, "a whole number above 0"
        else:  # the width of half the rate is 0 where every width reaches it
            least = 0 if name == "matmul_half" else 5e-324
            right = type(value) in (int, float) and least <= value < math.inf
            rule = "a number " + ("of at least 0" if name == "matmul_half" else "above 0")
        if not right:
            raise ValueError(f"{name}={value!r} must be {rule}")


def of_kind(kind: str) -> Hardware:
    """The known hardware whose device jax calls so; an H100 where none does."""
    known = [find(name) for name in NAMES]
    return next((hardware for hardware in known if hardware.kind == kind), find("h100"))


def _description(fields: Mapping[str, Any]) -> str:
    """What `_make` reads of a description, from the fields of a file."""
    memory, bandwidth = int(fields["memory_gib"] * 2**30), fields["memory_gbps"] * 1e9
    kind = fields["kind"]
    return (
        f'device_description_str: "{kind}"\ndevice_memory_size: {memory}\n'
        f"memory_bandwidth: {bandwidth}\n"
    )


def _make(
    name: str,
    target: str,
    link: float,
    network: float,
    domain: int,
    host: int,
    peaks: dict[str, float],
) -> Hardware:
    def field(key: str) -> Any:
        if not (match := re.search(rf'{key}: "?([^"\n]+)', target)):
            raise ValueError(f"the description has no {key}")
        return match[1]

    kind = field("device_description_str")
    known = {dtype: peak_flops(kind, dtype) for dtype in DTYPES}
    peaks = {dtype: peak for dtype, peak in known.items() if peak} | peaks
    if not peaks:
        raise ValueError(
            f"no peak of {kind!r} is known; give that of the dtype of precision.compute, as "
            "bfloat16_tflops, float16_tflops or float32_tflops"
        )
    sizes = int(field("device_memory_size")), float(field("memory_bandwidth"))
    return Hardware(name, kind, target, *sizes, peaks, link * 1e9, network * 1e9, domain, host)


def topology_size(topology: str) -> tuple[int, int, int]:
    """NVLink domains, hosts in each, GPUs in each, of `8x1x8`.

    Raises:
      ConfigError: it is not three positive numbers.
    """
    parts = topology.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(
            f"--topology={topology} must be NVLink domains x hosts in each x GPUs in each: 1x1x8 "
            "is one host of eight GPUs, 8x1x8 eight such hosts, 1x18x4 a GB200 NVL72"
        )
    domains, hosts, gpus = map(int, parts)
    return domains, hosts, gpus


# Dense peaks without sparsity, TFLOP/s, of `DTYPES`. bfloat16 and float16 are tensor-core rates
# with float32 accumulation; float32 is the plain rate, not TF32. A name matches a device whose kind
# has all of its words.
_PEAKS: dict[str, tuple[float | None, float, float]] = {
    # NVIDIA V100 datasheet (no bfloat16 tensor cores)
    "V100 SXM2": (None, 125.0, 15.7),
    "V100 SXM3": (None, 125.0, 15.7),
    "V100 PCIE": (None, 112.0, 14.0),
    "A40": (149.7, 149.7, 37.4),  # NVIDIA A40 datasheet
    "A100": (312.0, 312.0, 19.5),  # NVIDIA A100 datasheet, SXM and PCIe alike
    "RTX 3090": (71.0, 71.0, 35.6),  # NVIDIA Ampere GA102 whitepaper
    "RTX 3090 TI": (80.0, 80.0, 40.0),  # the same, scaled to 84 SMs at 1.86 GHz
    "RTX 4090": (165.2, 165.2, 82.6),  # NVIDIA Ada GPU architecture whitepaper
    "L4": (121.0, 121.0, 30.3),  # NVIDIA L4 datasheet (242 with sparsity)
    "L40": (181.05, 181.05, 90.5),  # NVIDIA L40 datasheet
    "L40S": (362.05, 362.05, 91.6),  # NVIDIA L40S datasheet
    "H100": (989.4, 989.4, 66.9),  # NVIDIA H100 whitepaper, SXM5
    "H100 PCIE": (756.0, 756.0, 51.2),  # NVIDIA H100 whitepaper, PCIe
    "H100 NVL": (835.5, 835.5, 60.0),  # NVIDIA H100 datasheet (1,671 with sparsity)
    "H200": (989.4, 989.4, 66.9),  # NVIDIA H200 datasheet, SXM
    "H200 NVL": (835.5, 835.5, 60.0),  # NVIDIA H200 datasheet (1,671 with sparsity)
    "GH200": (989.4, 989.4, 66.9),  # NVIDIA GH200 datasheet
    # NVIDIA HGX B200 and B300: 36 and 0.6 PFLOP/s for eight, the first with sparsity
    "B200": (2250.0, 2250.0, 75.0),
    "B300": (2250.0, 2250.0, 75.0),
    # NVIDIA GB200 NVL72: 10 and 0.16 PFLOP/s for two, the first with sparsity
    "GB200": (2500.0, 2500.0, 80.0),
    # NVIDIA GB300 NVL72: 360 PFLOP/s for 72 with sparsity
    "GB300": (2500.0, 2500.0, 80.0),
}
_OTHER_CHIPS = {"MIG", "LAPTOP", "D"}  # a slice of a GPU, or another chip under the same name


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Dense peak of one device in FLOP/s.

    Args:
      device_kind: as jax reports it, such as "NVIDIA H100 80GB HBM3".
      dtype: `bfloat16`, `float16` or `float32` (the plain rate, not TF32).

    Returns:
      None where it is not known: CPUs, MIG slices, other chips.
    """
    words = set(re.split(r"[\s-]+", device_kind.upper()))
    names = [name for name in _PEAKS if set(name.split()) <= words]
    if not names or words & _OTHER_CHIPS:
        return None
    peak = _PEAKS[max(names, key=len)][DTYPES.index(dtype)]
    return None if peak is None else peak * 1e12
