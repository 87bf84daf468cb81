"""Imports run one way, collectives live in parallel/, files and options stay few."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpar.config import field_paths

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxpar"
FILES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

COMMANDS = {"train", "verify", "plan", "explain", "prepare", "generate", "__main__"}
"""Nothing imports them."""

# The core, which is flat: a module may import those above its line, not those beside it.
CORE = """
    hints
    config tree watchdog
    dimensions
    show validation xla parameters
    sharding optimizer
    config_file
    cli metrics
    checkpoint
    resume
    attention loss
    model
    program
    step
    compile
"""
LINE = {name: number for number, line in enumerate(CORE.split("\n")) for name in line.split()}

MAY = {
    "data": {"data", "config", "sharding"},
    "kernels": {"kernels"},
    "parallel": {"parallel", "kernels", "sharding"},
    "estimate": {
        *("estimate", "hints", "config", "validation", "dimensions", "parameters"),
        "parallel/timetable",
    },
    "report": {
        *("report", "estimate", "parallel/timetable", "hints", "config", "validation", "tree"),
        *("cli", "sharding", "compile"),
    },
}
"""What the modules of a folder may import: modules, and folders as a whole."""

STRICTER = {
    "metrics": {"config", "estimate"},
    "show": {"tree"},
    "validation": {"config", "hints"},
    "hints": set(),
    "tree": set(),
    "dimensions": {"config"},
    "parameters": {"config", "dimensions"},
    "watchdog": set(),
    "resume": {"config", "checkpoint", "data"},
    "parallel/timetable": set(),
    "report/hlo": set(),
    "report/apart": {"config", "estimate"},
    "report/page": {"config", "estimate", "report"},
    "report/gantt": {"parallel/timetable"},
}
"""Modules that import less than their place allows."""

COLLECTIVES = {
    "all_gather",
    "all_gather_invariant",
    "all_gather_reduced",
    "all_to_all",
    "pmax",
    "pmin",
    "ppermute",
    "pshuffle",
    "psum",
    "psum_invariant",
    "psum_scatter",
    "ragged_all_to_all",
    "unreduced_psum_scatter",
    "unreduced_reduce_scatter",
}

NO_JAX = (
    *(
        f"estimate/{name}"
        for name in "counts memory traffic timing hardware ranking remedy".split()
    ),
    *("parallel/timetable", "report/apart", "report/page", "report/gantt"),
    *("data/sources", "data/tokenizer", "data/shards", "data/windows", "data/corpus"),
    *(
        "hints",
        "config",
        "config_file",
        "dimensions",
        "parameters",
        "validation",
        "cli",
        "plan",
        "explain",
        "__init__",
        "__main__",
    ),
)
"""What runs before jax starts: `--help`, a wrong flag, and the planner."""

OPTIONS = 72
"""Fields of the config. Raise it only for an option that cannot be derived from the others."""

TESTED_BY = {
    "__main__": "cli",
    "dimensions": "parameters",
    "model": "llama_torch",
    "parallel/microbatches": "program",
    "validation": "config",
    "data/batches": "data",
    "data/corpus": "data",
    "data/shards": "data",
    "kernels/rows": "attention",
    "kernels/tiles": "attention",
    "parallel/by_layer": "optimizer",
    "parallel/layers": "parity",
    "parallel/reduce": "loss",
    "report/gantt": "timetable",
}
"""Modules without a tests/test_<file>.py, and the one that tests them: with what they are part of,
or as a whole."""

LONGEST = {"jaxpar": 500, "configs": 500, "tests": 650, "scripts": 500}
"""Lines of a file."""


def tree_of(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def imports(name: str) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("jaxpar") for alias in node.names), (
                "from jaxpar import"
            )
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"jaxpar/{name}.py:{node.lineno}: relative import"
            path = (node.module or "").split(".")
            if path[0] == "jaxpar":
                modules = ("/".join([*path[1:], alias.name]) for alias in node.names)
                found |= {m if m in FILES else "/".join(path[1:]) or "__init__" for m in modules}
    return found


def folder(name: str) -> str:
    return name.rpartition("/")[0]


def test_no_cycles():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"imports go round: {' -> '.join([*path, name])}"
        if name not in done:
            for other in imports(name):
                visit(other, (*path, name))
            done.add(name)

    for name in FILES:
        visit(name, ())
    assert done == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way(name):
    if name.endswith("__init__"):
        assert imports(name) == set()
        return
    home, found = folder(name), imports(name) - {"__init__"}
    assert not found & COMMANDS, f"jaxpar/{name}.py imports a command: {found & COMMANDS}"
    allowed = STRICTER.get(name, MAY.get(home))
    if allowed is not None:
        stray = {other for other in found if not {other, folder(other)} & allowed}
        assert not stray, f"jaxpar/{name}.py imports {stray}; it may import {allowed}"
    elif name not in COMMANDS:
        assert name in LINE, (
            f"jaxpar/{name}.py has no line in CORE of this test: say what it stands on"
        )
        later = {other for other in found if not folder(other) and LINE[other] >= LINE[name]}
        assert not later, f"jaxpar/{name}.py imports {later}, which do not stand above it in CORE"


@pytest.mark.parametrize("name", [name for name in FILES if folder(name) != "parallel"])
def test_collectives_only_in_parallel(name):
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("lax", "jax.lax"):
            used = {node.attr}
        elif isinstance(node, ast.ImportFrom) and node.module == "jax.lax":
            used = {alias.name for alias in node.names}
        else:
            continue
        assert not used & COLLECTIVES, (
            f"jaxpar/{name}.py:{node.lineno}: {used & COLLECTIVES} belongs into parallel/"
        )


@pytest.mark.parametrize("name", NO_JAX)
def test_no_jax_at_import(name):
    for node in tree_of(name).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {module.split(".")[0] for module in names} & {
            "jax",
            "jaxlib",
            "flax",
            "optax",
            "orbax",
        }


def test_no_jax_comes_in_with_them():
    dotted = (name.replace("/", ".") for name in NO_JAX)
    modules = ", ".join("jaxpar" if name == "__init__" else f"jaxpar.{name}" for name in dotted)
    heavy = {"jax", "flax", "optax", "torch"}
    code = f"import sys, {modules}; print(sorted({heavy} & sys.modules.keys()))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_unchecked_regions_say_why():
    for name, path in FILES.items():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert "check_vma=False" not in line or "#" in line, (
                f"jaxpar/{name}.py:{number}: no reason on the line"
            )


def test_every_file_has_its_tests():
    files = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    for name in FILES:
        own = name.rpartition("/")[2]
        if own != "__init__":
            assert (own in files) != (name in TESTED_BY), (
                f"jaxpar/{name}.py needs a tests/test_{own}.py or, without one, a line in TESTED_BY"
            )
    assert set(TESTED_BY) <= set(FILES) and set(TESTED_BY.values()) <= files


@pytest.mark.parametrize("root", LONGEST)
def test_files_stay_short(root):
    for path in (ROOT / root).rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= LONGEST[root], f"{path.relative_to(ROOT)} has {lines} lines"


def test_number_of_options():
    assert len(field_paths()) == OPTIONS
