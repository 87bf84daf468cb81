"""The door of every command: flags in, one plain message and an exit code out. jax starts in
`start`, not before.

Exit codes: 0 done; 1 the run failed; 2 the request is wrong (`ConfigError`); 128 + n stopped by
signal n.
"""

import dataclasses
import os
import re
import shutil
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from jaxpar.config import (
    AXES,
    LARGEST,
    Config,
    ConfigError,
    check_field,
    field_paths,
    nearest,
    value_of,
)
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
    """On which devices to run, and the options of one command; checked as far as it can be without
    devices."""

    mesh: Mapping[str, int | None]
    cpu_devices: int | None
    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    options: Mapping[str, Any]

    @property
    def devices(self) -> int | None:
        """Of all processes together, where it is known before jax starts."""
        return self.cpu_devices and self.cpu_devices * (self.num_processes or 1)


@dataclasses.dataclass(frozen=True)
class Request(Launch):
    """The launch of a run that has a config and a place to write."""

    config: Config
    workdir: Path


_LAUNCH = {
    "cpu_devices": Option(0, "simulate this many devices on the CPU"),
    "coordinator": Option(
        None, "HOST:PORT of process 0, on several hosts without Slurm, Open MPI or Kubernetes"
    ),
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
    """Reads `--config`, its overrides, `--workdir`, the launch flags, and the `options` of one
    command.

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
    validate_mesh(config, resolve_mesh(launch.mesh, launch.devices))
    workdir = values.workdir or Path("runs") / Path(_take_config(argv)[0] or "").stem
    return Request(**vars(launch), config=config, workdir=Path(workdir))


def parse_launch(argv: Sequence[str] | None, doc: str, **options: Option) -> Launch:
    """The same for a command that takes no config."""
    argv = _arguments(argv, doc, {**options, **_LAUNCH}, config=False)
    return _launch(_parse_flags(argv, {**options, **_LAUNCH}, config=False), options)


def _arguments(
    argv: Sequence[str] | None, doc: str, options: Mapping[str, Option], *, config: bool
) -> list[str]:
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(arg in ("--help", "-h", "-help", "--helpfull") for arg in argv):
        print(_help(doc, options, config=config))
        raise SystemExit(0)
    return argv


def _launch(values: flags.FlagValues, options: Mapping[str, Option]) -> Launch:
    if values["cpu_devices"].present and values.cpu_devices < 1:
        raise ConfigError(f"--cpu_devices={values.cpu_devices} must be at least 1")
    launch = Launch(
        mesh=values.mesh.to_dict(),
        cpu_devices=values.cpu_devices or None,
        coordinator=values.coordinator,
        num_processes=values.num_processes or None,
        process_id=values.process_id if values.process_id >= 0 else None,
        options={name: values[name].value for name in options},
    )
    resolve_mesh(launch.mesh, launch.devices)
    return launch


def _parse_flags(
    argv: Sequence[str], options: Mapping[str, Option], *, config: bool
) -> flags.FlagValues:
    """The flags themselves: `--mesh.AXIS`, the `options`, and with `config` also `--config` with
    its overrides.

    Raises:
      ConfigError: an unknown or malformed flag, field or axis, or a config file that cannot be
        read.
    """
    values = flags.FlagValues()
    for name, option in options.items():
        kinds: dict[type, Any] = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
        define = kinds.get(type(option.default), flags.DEFINE_string)
        define(name, option.default, option.help, flag_values=values)
    _check_names(argv)
    groups = {"mesh": config_dict.ConfigDict({axis: config_dict.placeholder(int) for axis in AXES})}
    if config:
        path, argv = _take_config(argv)
        groups["config"] = _load_config(path)
    try:
        for name, group in groups.items():
            config_flags.DEFINE_config_dict(name, group, flag_values=values, sys_argv=["", *argv])
        rest = values(["jaxpar", *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        known = [*options, "mesh", *(["config"] if config else [])]
        raise ConfigError(
            f"unknown flag --{error.flagname}.{nearest(error.flagname, known)}"
        ) from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}; flags are written --NAME=VALUE")
    for name, option in options.items():
        value = values[name].value
        if option.required and value in (None, ""):
            raise ConfigError(f"--{name} is missing: {option.help}")
        if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
            raise ConfigError(f"--{name}={value} does not fit into 64 bits; use at most {LARGEST}")
    return values


def _take_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--config`, and the arguments without it."""
    path, rest, arguments = None, [], iter(argv)
    for arg in arguments:
        name, given, value = arg.partition("=")
        if name in ("--config", "-config"):
            path = value if given else next(arguments, None)
        else:
            rest.append(arg)
    return path, rest


def _load_config(path: str | None) -> config_dict.ConfigDict:
    """What `get_config()` of a config file returns; whatever goes wrong in it is told in one
    line."""
    if not path:
        raise ConfigError(f"--config=FILE is missing.{_known_configs('configs/tiny.py')}")
    if not Path(path).is_file():
        raise ConfigError(f"--config={path}: no such file.{_known_configs(path)}")
    content: dict[str, Any] = {"__name__": Path(path).stem, "__file__": path}
    try:
        exec(compile(Path(path).read_text(), path, "exec"), content)
        config = content["get_config"]() if "get_config" in content else None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == path
        ]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error
    if not isinstance(config, config_dict.ConfigDict):
        found = (
            f"get_config() gives {type(config).__name__}"
            if "get_config" in content
            else "there is no get_config()"
        )
        raise ConfigError(
            f"{path}: {found}; a config file has a get_config() that returns configure(...)"
        )
    return config


def _known_configs(path: str) -> str:
    folder = Path(path).parent if Path(path).parent.is_dir() else Path("configs")
    files = sorted(str(file) for file in folder.glob("*.py"))
    return nearest(path, files) if files else " Give a file with a get_config() function."


def _check_names(argv: Sequence[str]) -> None:
    for arg in argv:
        if match := re.match(r"--?(?:no)?(config|mesh)\.([\w.]*)", arg):
            if match[1] == "config":
                check_field(match[2])
            elif match[2] not in AXES:
                raise ConfigError(f"unknown mesh axis {match[2]!r}.{nearest(match[2], AXES)}")


def _help(doc: str, options: Mapping[str, Option], *, config: bool) -> str:
    lines = [doc.strip(), "", "Flags:"]
    if config:
        lines.append("  --config=FILE  a Python file with get_config(); see configs/")
    for name, option in options.items():
        default = (
            ""
            if option.default in (None, "") or name in _LAUNCH
            else f" (default: {option.default})"
        )
        lines.append(
            f"  --{name}={'N' if isinstance(option.default, int) else 'VALUE'}  "
            f"{option.help}{default}"
        )
    lines.append(
        f"  --mesh.AXIS=N  {', '.join(AXES)}; one may be -1: the devices left over (default: "
        "data=-1, others 1)"
    )
    if not config:
        return "\n".join(lines)
    lines += [
        "",
        "Config fields, as --config.GROUP.FIELD=VALUE; shown are the defaults of what a config "
        "file leaves out:",
    ]
    group = ""
    for path in field_paths():
        if path.split(".")[0] != group:
            group = path.split(".")[0]
            lines.append(f"  {group}")
        choices = f"  ({' | '.join(CHOICES[path])})" if path in CHOICES else ""
        default = value_of(Config(), path)
        derived = path in ("model.kv_heads", "model.head_dim")
        lines.append(f"    --config.{path}={'(derived)' if derived else default}{choices}")
    return "\n".join(lines)


def check_writable(workdir: Path) -> None:
    """Refuses a workdir in which the run could not write, without writing."""
    path = workdir.absolute()
    # os.path: Path.exists raises where a folder above may not be looked into.
    existing = next(parent for parent in [path, *path.parents] if os.path.exists(parent))  # noqa: PTH110
    if not existing.is_dir():
        raise ConfigError(f"--workdir={workdir}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--workdir={workdir}: {existing} is not writable; give a folder that is")


def check_output(flag: str, path: str | None) -> None:
    """Refuses a file that could not be written when the work is done."""
    if path and (
        Path(path).is_dir() or not os.access(Path(path).absolute().parent, os.W_OK | os.X_OK)
    ):
        raise ConfigError(
            f"--{flag}={path} can't be written; give a file in a folder that exists and is writable"
        )


def start(launch: Launch, config: Config, *, training: bool = True) -> "Mesh":
    """Starts jax with the devices that were asked for and makes the mesh.

    Several hosts: Slurm, Open MPI and Kubernetes are detected by jax; elsewhere `--coordinator`
    tells. Without `training` the batch and the sequence length of the config need not fit the mesh.

    Raises:
      ConfigError: the mesh does not fit the devices, or the config does not fit the mesh.
    """
    import jax

    from jaxpar import xla
    from jaxpar.data import sources
    from jaxpar.sharding import make_mesh

    if launch.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", launch.cpu_devices)
    elif "JAX_PLATFORMS" not in os.environ and not _nvidia_driver():
        jax.config.update(
            "jax_platforms", "cpu"
        )  # spares a user without a GPU the CUDA plugin's complaints
    xla.keep_compiled(config.compile, sources.cache())
    _start_processes(launch)
    devices = jax.devices()
    try:
        mesh = resolve_mesh(launch.mesh, len(devices))
    except ConfigError as error:
        raise ConfigError(
            f"{error}. Found {len(devices)} of kind {devices[0].device_kind!r}"
        ) from error
    validate_mesh(config, mesh, training=training)
    return make_mesh(mesh)


def _start_processes(launch: Launch) -> None:
    import jax

    given = (launch.coordinator, launch.num_processes, launch.process_id)
    if any(item is not None for item in given):
        if any(item is None for item in given):
            raise ConfigError(
                "--coordinator, --num_processes and --process_id belong together; give all three"
            )
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
    return any(map(os.path.exists, files)) or bool(
        shutil.which("nvidia-smi") or find_library("cuda")
    )
