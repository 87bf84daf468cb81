"""Compiles a step in a process of its own, with a timeout, for devices that may be absent. Never
imports jax."""

import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from jaxpar.config import Config, ConfigError, MeshConfig
from jaxpar.estimate.hardware import Hardware, find, topology_size

TIMEOUT = 600.0
"""Seconds that one compilation may take, where nobody says otherwise."""


class CompileFailed(RuntimeError):
    """The compiler crashed, raised or took too long; the message says what it said last."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Where to compile for: GPUs that are not there, simulated CPU devices, or, with neither, this
    machine."""

    hardware: Hardware | None = None
    topology: str = ""
    cpu_devices: int = 0

    @classmethod
    def absent(cls, hardware: str, devices: int) -> "Target":
        """So many GPUs of a kind (`h100`, or a hardware file), in hosts as they are sold."""
        gpu = find(hardware)
        return cls(gpu, gpu.topology(devices))

    @property
    def devices(self) -> int | None:
        """Their number, where it is known before jax starts."""
        if not self.hardware:
            return self.cpu_devices or None
        domains, hosts, gpus = topology_size(self.topology)
        return domains * hosts * gpus


def compiler_path() -> list[str]:
    """Where python finds modules, and the place for a GPU compiler that only this command is to
    find."""
    return [path or str(Path.cwd()) for path in sys.path] + [str(Path(sys.prefix) / "gpu-compiler")]


def check_gpu_compiler() -> None:
    """Refuses to compile for GPUs without jax's CUDA plugin.

    Raises:
      ConfigError: with the command that installs it.
    """
    if any(PathFinder.find_spec(f"jax_cuda{n}_plugin", compiler_path()) for n in (12, 13)):
        return
    version = importlib.metadata.version("jax")
    raise ConfigError(
        "compiling for GPUs that are not there needs jax's CUDA plugin (300 MB, no GPU, no CUDA); "
        "install it with\n"
        f"  {sys.executable} -m pip install --no-deps --target {Path(sys.prefix) / 'gpu-compiler'} "
        f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}"
    )


def compile_report(
    config: Config,
    mesh: MeshConfig | Mapping[str, int | None],
    target: Target,
    timeout: float = TIMEOUT,
    *,
    xla_flags: Sequence[str] = (),
    text: bool = False,
) -> dict[str, Any]:
    """Compiles one training step in a process of its own: the account of `account.py`, with
    `warnings`. It is how whatever compiles a step apart does so: commands, scripts and tests.

    Args:
      config: the run.
      mesh: sizes of the axes; of a mapping one may be -1, and those left out are 1.
      target: the devices.
      timeout: seconds after which the compiler is stopped.
      xla_flags: options of XLA, as `xla_gpu_enable_triton_gemm=false`.
      text: whether `text`, the HLO of the compiled step, is in the account.

    Raises:
      ConfigError: the mesh does not fit the devices of this machine, or XLA has no description of
        the hardware.
      CompileFailed: it crashed, raised, or took longer than `timeout` seconds.
    """
    if target.hardware and not target.hardware.target:
        raise ConfigError(
            f"{target.hardware.name} has no target description, so nothing can be compiled for it"
        )
    request = {
        "config": dataclasses.asdict(config),
        "mesh": dataclasses.asdict(mesh) if isinstance(mesh, MeshConfig) else dict(mesh),
        "hardware": dataclasses.asdict(target.hardware) if target.hardware else None,
        "topology": target.topology,
        "cpu_devices": target.cpu_devices,
        "text": text,
    }
    report, said = run_apart(
        ["-m", "jaxpar.report.account"], request, target, timeout, xla_flags=xla_flags
    )
    return report | {"warnings": plain_warnings(said)}


def run_apart(
    command: Sequence[str],
    request: Mapping[str, Any],
    target: Target,
    timeout: float,
    *,
    xla_flags: Sequence[str] = (),
) -> tuple[dict[str, Any], str]:
    """Runs python in a process of its own, whose jax starts with flags of its own.

    Args:
      command: after `python`: a module, or a file. It reads the request as JSON from standard
        input, with `dump`, the folder into which XLA writes buffers and live ranges, and ends with
        its answer as one line of JSON.
      request: what it is asked.
      target: the devices that its jax is to find or to describe.
      timeout: seconds.
      xla_flags: options of XLA.

    Returns:
      The answer, and what was said on file descriptor 2.

    Raises:
      ConfigError: it ended with code 2 and `error: ...`.
      CompileFailed: it crashed, raised, or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="jaxpar-") as dump:
        try:
            run = subprocess.run(
                [sys.executable, *command],
                input=json.dumps({**request, "dump": dump}),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                env=_environment(target, dump, xla_flags),
            )
        except subprocess.TimeoutExpired as error:
            raise CompileFailed(
                f"compiling took longer than --timeout={timeout:g} s and was stopped"
            ) from error
    if run.returncode == 2 and run.stderr.rpartition("error: ")[1]:
        raise ConfigError(run.stderr.rpartition("error: ")[2].strip())
    if run.returncode:
        lines = [
            line for line in run.stderr.splitlines() if line.strip() and not _NOISE.search(line)
        ]
        how = (
            f"was ended by signal {-run.returncode}"
            if run.returncode < 0
            else f"failed with code {run.returncode}"
        )
        raise CompileFailed(
            "\n  ".join([f"the compiler's process {how}; it said last:", *lines[-8:]])
        )
    return json.loads(run.stdout.splitlines()[-1]), run.stderr


def _environment(target: Target, dump: str, xla_flags: Sequence[str]) -> dict[str, str]:
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        *(f"--{flag}" for flag in xla_flags),
        f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_train_step",
    ]
    version = tuple(int(part) for part in importlib.metadata.version("jax").split(".")[:2])
    if target.hardware and version >= (0, 12):
        flags.append("--xla_gpu_experimental_use_collective_kernels=")  # aborts for some topologies
    environment = os.environ | {
        "XLA_FLAGS": " ".join(flags).strip(),
        "PYTHONPATH": os.pathsep.join(compiler_path() if target.hardware else compiler_path()[:-1]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is read from it is not dumped
    }
    if target.hardware or target.cpu_devices:
        environment["JAX_PLATFORMS"] = "cpu"
    return environment


_NOISE = re.compile(r"cuda drivers|absl::InitializeLog|cudart_stub|^\s*$")
_CANNOT_FIT = re.compile(
    r"Can't reduce memory use below ([\d.]+\s*\w+).*?only reduced to ([\d.]+\s*\w+)", re.S
)
_REMATERIALIZATION = re.compile(
    r"Involuntary full rematerialization.*?from sharding (\{.*?\}) to (\{.*?\})", re.S
)


def plain_warnings(said: str) -> list[str]:
    """What XLA said on file descriptor 2, in plain words, each once; what is not known as it is."""
    warnings = []
    for limit, reached in _CANNOT_FIT.findall(said):
        warnings.append(
            f"The compiler aims to stay below {limit} a device, a share of its memory, and could "
            "not get below "
            f"{reached}; to get there it may have computed again more than memory.remat asks for."
        )
    for before, after in _REMATERIALIZATION.findall(said):
        warnings.append(
            f"An array had to be gathered whole on every device to bring it from sharding {before} "
            f"to {after}: this "
            "costs memory and traffic that nobody asked for, and is a fault of the program's "
            "shardings."
        )
    known = ("Can't reduce memory use", "Involuntary full remat")
    for line in said.splitlines():
        if (
            re.match(r"^[WE]\d{4} ", line)
            and not _NOISE.search(line)
            and not any(text in line for text in known)
        ):
            warnings.append(line.partition("] ")[2] or line)
    return list(dict.fromkeys(warnings))
