"""The door of every command: flags in, one plain message and an exit code out. jax starts in `start`, not before.

Exit codes: 0 done; 1 the run failed; 2 the request is wrong (`ConfigError`); 128 + n stopped by signal n.
"""

import dataclasses
import os
import re
import shutil
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from jaxpar.config import AXES, Config, ConfigError, check_field, field_paths, nearest, value_of
from jaxpar.validation import CHOICES, resolve, resolve_mesh, validate_mesh

if typing.TYPE_CHECKING:
    from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Option:
    """A flag of one command, beyond those that all take. A `required` one has no default."""

    default: str | int | float | None
    help: str
    required: bool = False


@dataclasses.dataclass(frozen=True)
class Launch:
    """On which devices to run, and the options of one command; checked as far as it can be without devices."""

    mesh: Mapping[str, int | None]
    cpu_devices: int | None
    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Request(Launch):
    """The launch of a run that has a config and a place to write."""

    config: Config
    workdir: Path


_LAUNCH = {
    "cpu_devices": Option(0, "simulate this many devices on the CPU"),
    "coordinator": Option(None, "HOST:PORT of process 0, on several hosts without Slurm, Open MPI or Kubernetes"),
    "num_processes": Option(0, "number of processes, with --coordinator"),
    "process_id": Option(-1, "number of this process, with --coordinator"),
}

_RUN = {"workdir": Option(None, "where the run writes (default: runs/NAME, after the config file)")}


def run(main: Callable[[list[str] | None], int]) -> typing.NoReturn:
    """Runs a command and exits: `ConfigError` becomes one message and code 2."""
    try:
        code = main(None)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def parse(argv: Sequence[str] | None, doc: str, **options: Option) -> Request:
    """Reads `--config`, its overrides, `--workdir`, the launch flags, and the `options` of one command.

    Args:
      argv: arguments without the program; None takes those of the process.
      doc: the command's docstring, the head of `--help`.
      **options: further flags by name.

    Raises:
      ConfigError: whatever is wrong with them for every number of devices, before jax starts.
      SystemExit: after `--help`.
    """
    argv = _arguments(argv, doc, {**options, **_RUN, **_LAUNCH}, config=True)
    values = _parse_flags(argv, {**options, **_RUN, **_LAUNCH}, config=True)
    launch = _launch(values, options)
    config = resolve(values.config)
    validate_mesh(config, resolve_mesh(launch.mesh, launch.cpu_devices))
    workdir = values.workdir or Path("runs") / Path(_config_path(argv)).stem
    return Request(**vars(launch), config=config, workdir=Path(workdir))


def parse_launch(argv: Sequence[str] | None, doc: str, **options: Option) -> Launch:
    """The same for a command that takes no config."""
    argv = _arguments(argv, doc, {**options, **_LAUNCH}, config=False)
    return _launch(_parse_flags(argv, {**options, **_LAUNCH}, config=False), options)


def _arguments(argv: Sequence[str] | None, doc: str, options: Mapping[str, Option], *, config: bool) -> list[str]:
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(arg in ("--help", "-h", "-help", "--helpfull") for arg in argv):
        print(_help(doc, options, config=config))
        raise SystemExit(0)
    return argv


def _launch(values: flags.FlagValues, options: Mapping[str, Option]) -> Launch:
    if values["cpu_devices"].present and values.cpu_devices < 1:
        raise ConfigError(f"--cpu_devices={values.cpu_devices} must be at least 1")
    mesh = values.mesh.to_dict()
    resolve_mesh(mesh, values.cpu_devices or None)
    return Launch(
        mesh=mesh,
        cpu_devices=values.cpu_devices or None,
        coordinator=values.coordinator,
        num_processes=values.num_processes or None,
        process_id=values.process_id if values.process_id >= 0 else None,
        options={name: values[name].value for name in options},
    )


def _parse_flags(argv: Sequence[str], options: Mapping[str, Option], *, config: bool) -> flags.FlagValues:
    """The flags themselves: `--mesh.AXIS`, the `options`, and with `config` also `--config` with its overrides.

    Raises:
      ConfigError: an unknown or malformed flag, field or axis, or a config file that cannot be read.
    """
    values = flags.FlagValues()
    for name, option in options.items():
        kinds: dict[type, Any] = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
        define = kinds.get(type(option.default), flags.DEFINE_string)
        define(name, option.default, option.help, flag_values=values)
    _check_names(argv)
    sizes = config_dict.ConfigDict({axis: config_dict.placeholder(int) for axis in AXES})
    try:
        config_flags.DEFINE_config_dict("mesh", sizes, flag_values=values, sys_argv=["", *argv])
        if config:
            path = _config_path(argv)
            if not Path(path).is_file():
                raise ConfigError(f"--config={path}: no such file.{_known_configs(path)}")
            config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["", *argv])
        rest = values(["jaxpar", *argv])[1:]
        if config:
            _ = values.config  # a config file is read on first use; what it raises must be caught here
    except flags.UnrecognizedFlagError as error:
        known = [*options, "mesh", *(["config"] if config else [])]
        raise ConfigError(f"unknown flag --{error.flagname}.{nearest(error.flagname, known)}") from error
    except (flags.Error, AttributeError, KeyError, TypeError, SyntaxError, ImportError) as error:
        raise ConfigError(str(error).strip("'\"")) from error
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}; flags are written --NAME=VALUE")
    for name, option in options.items():
        if option.required and values[name].value in (None, ""):
            raise ConfigError(f"--{name} is missing: {option.help}")
    return values


def _config_path(argv: Sequence[str]) -> str:
    """The value of `--config`."""
    for at, arg in enumerate(argv):
        if match := re.fullmatch(r"--?config(?:=(.*))?", arg):
            if match[1] is not None:
                return match[1]
            if at + 1 < len(argv):
                return argv[at + 1]
    raise ConfigError(f"--config=FILE is missing.{_known_configs('configs/tiny.py')}")


def _known_configs(path: str) -> str:
    folder = Path(path).parent if Path(path).parent.is_dir() else Path("configs")
    files = sorted(str(file) for file in folder.glob("*.py"))
    return nearest(path, files) if files else " Give a file with a get_config() function."


def _check_names(argv: Sequence[str]) -> None:
    for arg in argv:
        if match := re.match(r"--?(?:no)?(config|mesh)\.([\w.]+)", arg):
            if match[1] == "config":
                check_field(match[2])
            elif match[2] not in AXES:
                raise ConfigError(f"unknown mesh axis {match[2]!r}.{nearest(match[2], AXES)}")


def _help(doc: str, options: Mapping[str, Option], *, config: bool) -> str:
    lines = [doc.strip(), "", "Flags:"]
    if config:
        lines.append("  --config=FILE  a Python file with get_config(); see configs/")
    for name, option in options.items():
        default = "" if option.default in (None, "") or name in _LAUNCH else f" (default: {option.default})"
        lines.append(f"  --{name}={'N' if isinstance(option.default, int) else 'VALUE'}  {option.help}{default}")
    lines.append(
        f"  --mesh.AXIS=N  {', '.join(AXES)}; one may be -1: the devices left over (default: data=-1, others 1)"
    )
    if not config:
        return "\n".join(lines)
    lines += [
        "",
        "Config fields, as --config.GROUP.FIELD=VALUE; shown are the defaults of what a config file leaves out:",
    ]
    group = ""
    for path in field_paths():
        if path.split(".")[0] != group:
            group = path.split(".")[0]
            lines.append(f"  {group}")
        choices = f"  ({' | '.join(CHOICES[path])})" if path in CHOICES else ""
        lines.append(f"    --config.{path}={value_of(Config(), path)}{choices}")
    return "\n".join(lines)


def check_writable(workdir: Path) -> None:
    """Refuses a workdir in which the run could not write, without writing."""
    existing = next(parent for parent in [workdir.absolute(), *workdir.absolute().parents] if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"--workdir={workdir}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--workdir={workdir}: {existing} is not writable; give a folder that is")


def start(launch: Launch, config: Config) -> "Mesh":
    """Starts jax with the devices that were asked for and makes the mesh.

    Several hosts: Slurm, Open MPI and Kubernetes are detected by jax; elsewhere `--coordinator` tells.

    Raises:
      ConfigError: the mesh does not fit the devices, or the config does not fit the mesh.
    """
    import jax

    from jaxpar.sharding import make_mesh

    if launch.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", launch.cpu_devices)
    elif "JAX_PLATFORMS" not in os.environ and not _nvidia_driver():
        jax.config.update("jax_platforms", "cpu")  # spares a user without a GPU the CUDA plugin's complaints
    _start_processes(launch)
    devices = jax.devices()
    try:
        mesh = resolve_mesh(launch.mesh, len(devices))
    except ConfigError as error:
        raise ConfigError(f"{error}. Found {len(devices)} of kind {devices[0].device_kind!r}") from error
    validate_mesh(config, mesh)
    return make_mesh(mesh)


def _start_processes(launch: Launch) -> None:
    import jax

    given = (launch.coordinator, launch.num_processes, launch.process_id)
    if any(item is not None for item in given):
        if any(item is None for item in given):
            raise ConfigError("--coordinator, --num_processes and --process_id belong together; give all three")
        if launch.cpu_devices:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(*given)
    elif not launch.cpu_devices and _launched_by_cluster():
        jax.distributed.initialize()


def _launched_by_cluster() -> bool:
    """Whether a launcher that jax can detect started more than one process."""
    sizes = (os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    kubernetes = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    return kubernetes or any(size.isdigit() and int(size) > 1 for size in sizes)


def _nvidia_driver() -> bool:
    files = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")
    return any(map(os.path.exists, files)) or bool(shutil.which("nvidia-smi") or find_library("cuda"))
