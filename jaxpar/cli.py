"""The door of every command: flags in, one plain message and an exit code out. jax starts in
`start`, not before.

Exit codes: 0 done; 1 the run failed; 2 the request is wrong (`ConfigError`); 128 + n stopped by
signal n.
"""

import contextlib
import dataclasses
import inspect
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from jaxpar import __version__, config_file
from jaxpar.config import (
    AXES,
    LARGEST,
    Config,
    ConfigError,
    check_field,
    config_fields,
    field_paths,
    value_of,
)
from jaxpar.estimate.memory import human
from jaxpar.hints import ALIASES, meant_flag, nearest
from jaxpar.validation import CHOICES, resolve, resolve_mesh, validate_mesh

if typing.TYPE_CHECKING:
    from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Option:
    """A flag of one command, beyond those that all take. A `required` one has no default; a number
    is `least` or more."""

    default: str | int | float | None
    help: str
    required: bool = False
    least: int | None = None


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
    """The launch of a run that has a config and a place to write. `source`: the config file, as it
    was given; `named`: the dotted fields that the command line names."""

    config: Config
    workdir: Path
    source: str = ""
    named: frozenset[str] = frozenset()


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
    """Runs a command and exits: `ConfigError` becomes one message and code 2, and a reader of the
    output that goes away, as `head` does, is no error."""
    try:
        try:
            code = main(None)
        finally:
            sys.stdout.flush()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # What is left in the buffer goes nowhere, also when Python closes the output at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def parse(
    argv: Sequence[str] | None, doc: str, *, chooses: Collection[str] = (), **options: Option
) -> Request:
    """Reads `--config`, its overrides, `--workdir`, the launch flags, and the `options` of one
    command.

    Args:
      argv: arguments without the program; None takes those of the process.
      doc: the command's docstring, the head of `--help`.
      chooses: dotted fields that the command chooses, with the mesh, where the command line does
        not name them: whatever the file says they have their defaults, and config and mesh are not
        held against each other here.
      **options: further flags by name.

    Raises:
      ConfigError: whatever is wrong with them for every number of devices, before jax starts.
      SystemExit: after `--help`.
    """
    flags = {**options, **_RUN, **_LAUNCH}
    name, rest = _take_config(_arguments(argv, doc, flags, config=True))
    if stray := next((arg for arg in rest if not arg.startswith("-")), None):
        hint = f"; did you mean --config={stray}?" if name is None else ""
        raise ConfigError(f"unexpected argument {stray!r}; flags are written --NAME=VALUE{hint}")
    _check_names(rest)
    values = _parse_flags(rest, flags, config_file.load(name))
    launch = _launch(values, options)
    named = frozenset(path for group, path in _dotted(rest) if group == "config")
    for path in set(chooses) - named:
        group, field = path.split(".")
        values.config[group][field] = value_of(Config(), path)
    config = resolve(values.config)
    if not chooses:
        validate_mesh(config, resolve_mesh(launch.mesh, launch.devices))
    source = name or ""
    workdir = Path(values.workdir or Path("runs") / Path(source).stem)
    return Request(**vars(launch), config=config, workdir=workdir, source=source, named=named)


def parse_launch(argv: Sequence[str] | None, doc: str, **options: Option) -> Launch:
    """The same for a command that takes no config."""
    flags = {**options, **_LAUNCH}
    return _launch(_parse_flags(_arguments(argv, doc, flags, config=False), flags, None), options)


def _arguments(
    argv: Sequence[str] | None, doc: str, options: Mapping[str, Option], *, config: bool
) -> list[str]:
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(arg in ("--help", "-h", "-help", "--helpfull") for arg in argv):
        print(_help(doc, options, config=config))
        raise SystemExit(0)
    if "--version" in argv:
        print(f"jaxpar {__version__}")
        raise SystemExit(0)
    return joined(argv)


def joined(argv: Sequence[str]) -> list[str]:
    """The arguments with every `--NAME VALUE` as `--NAME=VALUE`."""
    result: list[str] = []
    for arg in argv:
        name = result[-1] if result else ""
        if name.startswith("-") and "=" not in name and not arg.startswith("--"):
            result[-1] = f"{name}={arg}"
        else:
            result.append(arg)
    return result


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
    argv: Sequence[str], options: Mapping[str, Option], config: config_dict.ConfigDict | None
) -> flags.FlagValues:
    """The flags themselves: `--mesh.AXIS`, the `options`, and the overrides of a `config`.

    Raises:
      ConfigError: an unknown or malformed flag, field or axis.
    """
    values = flags.FlagValues()
    for name, option in options.items():
        kinds: dict[type, Any] = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
        define = kinds.get(type(option.default), flags.DEFINE_string)
        define(name, option.default, option.help, flag_values=values)
    groups = {"mesh": config_dict.ConfigDict({axis: config_dict.placeholder(int) for axis in AXES})}
    if config is not None:
        groups["config"] = config
    try:
        for name, group in groups.items():
            config_flags.DEFINE_config_dict(name, group, flag_values=values, sys_argv=["", *argv])
        rest = values(["jaxpar", *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        hint = meant_flag(
            error.flagname, options, field_paths() if "config" in groups else (), AXES
        )
        raise ConfigError(f"unknown flag --{error.flagname}.{hint}") from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(_explained(str(error))) from error
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}; flags are written --NAME=VALUE")
    for name, option in options.items():
        value, given = values[name].value, values[name].present
        if option.required and not (given and value != ""):
            raise ConfigError(f"--{name} is missing: {option.help}")
        if given and value == "" and option.default is None:
            raise ConfigError(f"--{name}= has no value; give one, or leave the flag out")
        least = option.least
        if isinstance(value, int | float) and given and least is not None and not value >= least:
            raise ConfigError(f"--{name}={value} must be at least {least}")
        if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
            raise ConfigError(f"--{name}={value} does not fit into 64 bits; use at most {LARGEST}")
    return values


def _explained(message: str) -> str:
    """Python's complaint about the value of a flag, as a rule."""
    rules = {"int()": "an int, a whole number", "to float": "a float, a number"}
    for complaint, rule in rules.items():
        if match := re.match(rf"flag (--\S+=.*): .*{re.escape(complaint)}", message, re.DOTALL):
            return f"{match[1]} must be {rule}"
    return message


def _take_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--config`, the last one, and the arguments without it."""
    name, rest = None, []
    for arg in argv:
        flag, _, value = arg.partition("=")
        if flag in ("--config", "-config"):
            name = value
        else:
            rest.append(arg)
    return name, rest


def _check_names(argv: Sequence[str]) -> None:
    for group, name in _dotted(argv):
        if group == "config":
            check_field(name)
        elif name not in AXES:
            other = ALIASES.get(name.lower(), "")
            meant = other if other.startswith("--mesh.") else ""
            hint = f" Did you mean {meant}?" if meant else nearest(name, AXES)
            raise ConfigError(f"unknown mesh axis {name!r}.{hint}")


def _dotted(argv: Sequence[str]) -> list[tuple[str, str]]:
    """What the arguments name: `("config", "train.steps")`, `("mesh", "fsdp")`."""
    matches = (re.match(r"--?(?:no)?(config|mesh)\.([\w.]*)", arg) for arg in argv)
    return [(match[1], match[2]) for match in matches if match]


def _help(doc: str, options: Mapping[str, Option], *, config: bool) -> str:
    """The command's docstring, then every flag and every field of the config, explained."""
    width = max(min(shutil.get_terminal_size((100, 24)).columns, 120), 60)
    lines = [doc.strip(), "", "Flags:"]
    if config:
        lines += _entry(
            "--config=FILE",
            "a Python file with get_config(), or a name: " + ", ".join(config_file.bundled()),
            width,
        )
    for name, option in options.items():
        kind = "N" if isinstance(option.default, int) else "VALUE"
        hidden = option.default in (None, "") or name in _LAUNCH
        default = "" if hidden else f" (default: {option.default})"
        lines += _entry(f"--{name}={kind}", option.help + default, width)
    sizes = f"{', '.join(AXES)}; one may be -1: the devices left over (default: data=-1, others 1)"
    lines += _entry("--mesh.AXIS=N", sizes, width)
    lines += _entry("--version", "print the version", width)
    if not config:
        return "\n".join(lines)
    lines += ["", "Config fields, with the defaults of what a config file leaves out:"]
    group = None
    for path, item in sorted(config_fields().items(), key=lambda entry: _place(entry[0])):
        if group != (group := path.rpartition(".")[0]):
            about = inspect.getdoc(type(value_of(Config(), group))) or ""
            lines += ["", f"  {group}: {' '.join(about.split())}"]
        bar = "\N{NO-BREAK SPACE}|\N{NO-BREAK SPACE}"
        choices = f" ({bar.join(CHOICES[path])})" if path in CHOICES else ""
        default = "N" if item.metadata["derived"] else item.default
        lines += _entry(f"  --config.{path}={default}", item.metadata["doc"] + choices, width)
    return "\n".join(lines)


def _place(path: str) -> tuple[int, int]:
    """Groups in their order, and of each the fields before the groups in it."""
    groups = list(dataclasses.asdict(Config()))
    return groups.index(path.partition(".")[0]), path.count(".")


def _entry(name: str, text: str, width: int, column: int = 42) -> list[str]:
    """A flag and what it does, beside it, or below it where the flag is long."""
    indent = " " * column
    head = f"  {name}".ljust(column) if len(name) < column - 3 else f"  {name}\n{indent}"
    lines = textwrap.wrap(text, width - column, break_long_words=False, break_on_hyphens=False)
    return [(head + f"\n{indent}".join(lines)).replace("\N{NO-BREAK SPACE}", " ")]


def check_writable(workdir: Path) -> None:
    """Refuses a workdir in which the run could not write, without writing."""
    path = workdir.absolute()
    # os.path: Path.exists raises where a folder above may not be looked into.
    existing = next(parent for parent in [path, *path.parents] if os.path.exists(parent))  # noqa: PTH110
    if not existing.is_dir():
        raise ConfigError(f"--workdir={workdir}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--workdir={workdir}: {existing} is not writable; give a folder that is")
    try:  # what permissions do not tell: file systems that are read-only, names that are too long
        with tempfile.TemporaryDirectory(dir=existing) as trial:
            (Path(trial) / path.relative_to(existing)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--workdir={str(workdir)[:200]} can't be made ({error.strerror}); give another folder"
        ) from error


def check_output(flag: str, path: str | None) -> None:
    """Refuses a file that could not be written when the work is done."""
    if path and not _can_hold(Path(path).absolute()):
        raise ConfigError(
            f"--{flag}={path} can't be written; give a file in a folder that exists and is writable"
        )


def _can_hold(path: Path) -> bool:
    """Whether a file could be written at `path`; tried out beside it, for permissions alone do not
    tell."""
    if os.path.isdir(path) or not os.access(path.parent, os.W_OK | os.X_OK):  # noqa: PTH112
        return False
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as trial:
            (Path(trial) / path.name).touch()
    except OSError:
        return False
    return True


def check_memory(needed: int, what: str) -> None:
    """Refuses what the memory of this machine could not hold, where the system tells it.

    Args:
      needed: bytes of host memory.
      what: the work, for the message.
    """
    free = _free_memory()
    if free is not None and needed > free:
        raise ConfigError(
            f"{what} takes about {human(needed)} of memory, and this machine has {human(free)} "
            "free; use a smaller --config.model.layers, --config.train.batch_size or "
            "--config.data.sequence_length, or see what GPUs that are not here would hold by "
            "python -m jaxpar.explain --hardware=h100"
        )


def _free_memory() -> int | None:
    """Bytes of host memory that a process can still have: of the system, or of its container."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = [1024 * int(fields["MemAvailable"].split()[0])]
    except (OSError, KeyError):  # not Linux
        return None
    with contextlib.suppress(OSError, ValueError):  # no container, or a limit of "max"
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
        free.append(int(limit.read_text()) - int(used.read_text()))
    return min(free)


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
        xla.simulate_devices(launch.cpu_devices)
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
