"""jaxpar: train Llama models in JAX, every parallelism one mesh axis and one flag.

  jaxpar train     --config=configs/tiny.py --workdir=runs/tiny [--mesh.fsdp=4 --mesh.tensor=2]
  jaxpar verify    --config=...  --mesh....     a mesh against one device: loss and every gradient
  jaxpar plan      --config=...  --hardware=h100 --devices=64    rank meshes: memory, time, why
  jaxpar explain   --config=...  --mesh.... [--hardware=h100]    compile: memory and collectives
  jaxpar prepare   --config=...  --workdir=DIR  tokenize a corpus into shards
  jaxpar generate  --checkpoint=DIR --prompt="Once upon a time"

`jaxpar COMMAND --help` lists the flags of a command; `python -m jaxpar.COMMAND` is the same.
"""

import importlib
import sys

from jaxpar import __version__, cli
from jaxpar.config import ConfigError
from jaxpar.hints import nearest

COMMANDS = ("train", "verify", "plan", "explain", "prepare", "generate")


def command(argv: list[str] | None) -> int:
    """Runs the command that the first argument names."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(__doc__)
        return 0
    if argv[0] in ("--version", "version"):
        print(f"jaxpar {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        raise ConfigError(f"unknown command {argv[0]!r}.{nearest(argv[0], COMMANDS)}")
    return importlib.import_module(f"jaxpar.{argv[0]}").main(argv[1:])


def main() -> None:
    cli.run(command)


if __name__ == "__main__":
    main()
