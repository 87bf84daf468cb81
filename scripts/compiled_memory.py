"""Compiles the steps of tests/compiled_memory.json anew and writes their memory there; the fast
tests hold the arithmetic of `jaxpar/estimate/memory.py` against it.

  make test ARGS="--co -q"     # once: puts the GPU compiler into .venv/gpu-compiler
  python scripts/compiled_memory.py [--only=WORD] [--table=FILE] [--errors]

A case of the file is a `name`, `config` (what differs from the defaults) and `mesh`. This script
fills in its `peak` and `parts`, bytes of a device as XLA's compiler lays them out for H100s (no GPU
is needed), and `off`, the relative error of the arithmetic. To add a case, write the first three
and run the script with its name. Where only the arithmetic has changed, --errors writes `off` anew:
what has become better or worse is the difference of the file.
"""

import datetime
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from arguments import ROOT, parser

from jaxpar.config import Config, MeshConfig, configure
from jaxpar.estimate.memory import peak_memory
from jaxpar.report.apart import Target, check_gpu_compiler, compile_report
from jaxpar.validation import resolve, validate_mesh

TABLE = ROOT / "tests" / "compiled_memory.json"


def request(case: dict[str, Any]) -> tuple[Config, MeshConfig]:
    """The run and the mesh that a case describes.

    Raises:
      ConfigError: they do not go together.
    """
    config, mesh = resolve(configure(**case["config"])), MeshConfig(**case["mesh"])
    validate_mesh(config, mesh)
    return config, mesh


def compiled(case: dict[str, Any]) -> dict[str, Any]:
    """`peak` and `parts` of a case, compiled anew."""
    config, mesh = request(case)
    memory = compile_report(config, mesh, Target.absent("h100", mesh.devices))["memory"]
    return {name: memory[name] for name in ("peak", "parts")}


def error(case: dict[str, Any]) -> float:
    """Of the predicted peak, relative to the compiled one."""
    return peak_memory(*request(case)).total / case["peak"] - 1


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--only", default="", help="only the cases whose name has this word")
    flags.add_argument("--table", type=Path, default=TABLE, help="the file to read and write")
    flags.add_argument(
        "--errors", action="store_true", help="compile nothing: the errors of the arithmetic alone"
    )
    options = flags.parse_args()
    table = json.loads(options.table.read_text())
    if not options.errors:
        check_gpu_compiler()
        table |= {
            "compiled": datetime.date.today().isoformat(),
            "with": f"jax and jax-cuda12-plugin {importlib.metadata.version('jax')}",
            "by": "python scripts/compiled_memory.py",
        }
    for case in table["cases"]:
        if options.only in case["name"]:
            if not options.errors:
                case |= compiled(case)
            case["off"] = round(error(case), 3)
            print(f"{case['name']}: {case['peak'] / 2**20:,.1f} MiB, {case['off']:+.1%} predicted")
            options.table.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
