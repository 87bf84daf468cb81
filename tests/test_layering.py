"""Imports run one way, collectives live in parallel/, files and options stay few."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpar.config import field_paths

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxpar"
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

# A module may import those above its line, not those beside it.
LAYERS = """
    config cudnn hlo timetable tree
    counts hardware show sources tokenizer validation xla
    apart memory sharding traffic
    cli matmul page parallel shards optimizer metrics checkpoint timing
    ranking
    plan remedy
    windows attention loss
    data model
    convert stages
    step
    compile
    account
    explain generate prepare train verify
    __main__
"""
LAYER = {name: number for number, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}

# Stricter than its line.
ONLY = {
    "config": set(),
    "cudnn": set(),
    "hlo": set(),
    "timetable": set(),
    "tree": set(),
    "counts": {"config"},
    "hardware": {"config"},
    "validation": {"config"},
    "apart": {"config", "hardware"},
    "memory": {"config", "counts"},
    "traffic": {"config", "counts", "timetable"},
    "timing": {"config", "counts", "hardware", "timetable", "traffic"},
    "ranking": {"config", "counts", "hardware", "memory", "timing", "validation"},
    "show": {"tree"},
    "page": {"memory"},
    "parallel": {"sharding", "timetable"},
    "metrics": {"config", "counts", "hardware"},
}

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
    *("config", "validation", "counts", "hardware", "memory", "traffic", "timing", "apart", "page", "plan", "remedy"),
    *("ranking", "explain", "timetable", "cli", "__init__", "__main__"),
)
"""What runs before jax starts: `--help`, a wrong flag, and the planner."""

OPTIONS = 70
"""Fields of the config. Raise it only for an option that cannot be derived from the others."""

LONGEST = 500


def tree_of(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def imports(name: str) -> set[str]:
    """Modules of this package that a file imports, anywhere in it; a module of parallel/ counts as `parallel`."""
    found = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"jaxpar/{name}.py:{node.lineno}: relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "jaxpar" else {module}
    found = {module.split(".")[1] for module in found if module.startswith("jaxpar.")}
    return found - {"__version__"}


def part(name: str) -> str:
    return name.split("/")[0]


@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way(name):
    if name == "__init__":
        assert imports(name) == set()
        return
    here = part(name)
    assert here in LAYER, f"jaxpar/{name}.py has no line in LAYERS of this test: say what it stands on"
    for other in imports(name) - {here}:
        assert LAYER[other] < LAYER[here], f"jaxpar/{name}.py imports {other}, which does not stand above it in LAYERS"
        assert other in ONLY.get(here, {other}), f"jaxpar/{name}.py imports {other}; {here} imports only {ONLY[here]}"


@pytest.mark.parametrize("name", [name for name in FILES if part(name) != "parallel"])
def test_collectives_only_in_parallel(name):
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("lax", "jax.lax"):
            used = {node.attr}
        elif isinstance(node, ast.ImportFrom) and node.module == "jax.lax":
            used = {alias.name for alias in node.names}
        else:
            continue
        assert not used & COLLECTIVES, f"jaxpar/{name}.py:{node.lineno}: {used & COLLECTIVES} belongs into parallel/"


@pytest.mark.parametrize("name", NO_JAX)
def test_no_jax_at_import(name):
    for node in tree_of(name).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {module.split(".")[0] for module in names} & {"jax", "jaxlib", "flax", "optax", "orbax"}


def test_no_jax_comes_in_with_them():
    modules = ", ".join("jaxpar" if name == "__init__" else f"jaxpar.{name}" for name in NO_JAX)
    code = f"import sys, {modules}; print(sorted({{'jax', 'flax', 'optax', 'torch'}} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_unchecked_regions_say_why():
    for name, path in FILES.items():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert "check_vma=False" not in line or "#" in line, f"jaxpar/{name}.py:{number}: no reason on the line"


@pytest.mark.parametrize("folder", ["jaxpar", "configs", "tests", "scripts"])
def test_files_stay_short(folder):
    for path in (ROOT / folder).rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= LONGEST, f"{path.relative_to(ROOT)} has {lines} lines"


def test_number_of_options():
    assert len(field_paths()) == OPTIONS
