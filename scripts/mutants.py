"""Changes one thing in the code at a time, and sees whether a fast test fails.

  python scripts/mutants.py [--count=60] [--seed=0] [--only=WORD] [--list]

A mutant is one number doubled, one comparison or condition negated, one operator replaced, or one
result left out, in a module of `TESTS`. A sample of them, chosen by --seed, runs against the fast
tests of its module in copies of the repository, two at a time. A mutant is caught where a test
fails; tests that are not done by --timeout have said nothing. Prints what nothing noticed; the exit
code is 1 if fewer than 90% were caught. `make test-mutants` runs it.
"""

import ast
import concurrent.futures
import dataclasses
import hashlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from arguments import ROOT, parser

_PATH = re.compile(r"path|folder|directory|\bfile\b", re.IGNORECASE)

ENOUGH = 0.9
"""Share of the mutants that the tests have to catch."""

TESTS = {
    "optimizer": "optimizer counts lowering",
    "checkpoint": "checkpoint",
    "data/batches": "data",
    "data/corpus": "data windows",
    "data/shards": "data windows prepare",
    "data/sources": "sources data",
    "data/tokenizer": "tokenizer",
    "data/windows": "windows data",
    "estimate/counts": "counts memory",
    "estimate/memory": "memory counts plan",
    "estimate/traffic": "traffic plan",
    "estimate/timing": "timing plan remedy",
    "estimate/hardware": "hardware counts plan",
    "estimate/ranking": "ranking plan",
    "estimate/remedy": "remedy explain",
    "report/account": "account explain",
    "report/apart": "apart explain",
    "report/gantt": "timetable plan",
    "report/hlo": "hlo explain",
    "report/page": "page plan explain",
}
"""Modules, and which of the tests/test_*.py are theirs, the fastest first."""

EQUIVALENT = {
    "@functools.lru_cache(maxsize=256)": "maps held open: far fewer than files may be, either way",
    "TIMEOUT = 600.0": "how long to wait is a choice; that the limit holds is tested",
}
"""Lines on which no mutant changes what a test could see, and why."""

NEGATED = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
REPLACED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`before` becomes `after`, at bytes `start` to `stop` of jaxpar/MODULE.py."""

    module: str
    line: int
    start: int
    stop: int
    before: str
    after: str

    @property
    def change(self) -> str:
        return f"{self.before}  ->  {self.after}"

    def __str__(self) -> str:
        return f"jaxpar/{self.module}.py:{self.line}: {self.change}"


def mutants(module: str, source: str) -> list[Mutant]:
    """All mutants of a module, in the order of its text."""
    text, begins = source.encode(), [0]
    for line in source.encode().splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    found = []
    for node, after in _changes(ast.parse(source)):
        start = begins[node.lineno - 1] + node.col_offset
        stop = begins[node.end_lineno - 1] + node.end_col_offset
        before = " ".join(text[start:stop].decode().split())
        found.append(Mutant(module, node.lineno, start, stop, before, after))
    return sorted(found, key=lambda mutant: (mutant.start, mutant.stop))


def _changes(tree: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """Expressions, and what to put in their place. Nothing in annotations, nor in what only tells
    people something: messages of errors and assertions, what is printed or formatted."""
    for name, value in ast.iter_fields(tree):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or name in ("annotation", "returns", "format_spec"):
                continue
            if isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr):
                continue
            if isinstance(child, ast.Call) and ast.unparse(child.func).startswith(
                ("print", "log", "warnings")
            ):
                continue
            if change := _change(child, condition=name == "test"):
                yield child.value if isinstance(child, ast.Return) else child, change
            yield from _changes(child)


def _change(node: ast.AST, *, condition: bool) -> str:
    match node:
        case ast.Constant(value=bool() as value):
            return repr(not value)
        case ast.Constant(value=int() | float() as value):
            return repr(2 * value or 1)
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return f"({ast.unparse(ast.Compare(left, [NEGATED[type(op)]()], [right]))})"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in REPLACED:
            if any(map(_is_text, (left, right))):  # or a path: any other operator raises
                return ""
            return f"({ast.unparse(ast.BinOp(left, REPLACED[type(op)](), right))})"
        case ast.BoolOp(op=op, values=values):
            return f"({ast.unparse(ast.BoolOp(REPLACED[type(op)](), values))})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return f"({ast.unparse(operand)})"
        case ast.Return(value=ast.expr() as value) if not _is_nothing(value):
            return "None"
        case ast.expr() if condition:
            return f"(not {ast.unparse(node)})"
    return ""


def _is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    return isinstance(node, ast.JoinedStr) or bool(_PATH.search(ast.unparse(node)))


def _is_nothing(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def sample(count: int, seed: int, only: str) -> list[Mutant]:
    """`count` mutants spread over the modules whose name has `only`. Which ones depends on their
    own text, so that a change elsewhere in a module leaves them."""
    chosen, ranked = [], {}
    for module in TESTS:
        path = ROOT / "jaxpar" / f"{module}.py"
        if only in module:
            lines, here = path.read_text().splitlines(), mutants(module, path.read_text())
            here = [m for m in here if lines[m.line - 1].strip() not in EQUIVALENT]
            ranked[module] = sorted(here, key=lambda m: _rank(m, seed))
    while ranked and len(chosen) < count:  # one more of each module, the largest first
        for module in sorted(ranked, key=lambda name: -len(ranked[name])):
            if len(chosen) < count:
                chosen.append(ranked[module].pop(0))
        ranked = {name: rest for name, rest in ranked.items() if rest}
    return sorted(chosen, key=lambda m: (m.module, m.start))


def _rank(mutant: Mutant, seed: int) -> str:
    return hashlib.sha256(f"{seed} {mutant.module} {mutant.change}".encode()).hexdigest()


def copy_of_repository(folder: Path) -> Path:
    """What git knows of this working tree, and its environment."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").unlink(missing_ok=True)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def tests_of(module: str) -> list[str]:
    files = [f"tests/test_{name}.py" for name in TESTS[module].split()]
    return [file for file in files if (ROOT / file).is_file()]


def run_tests(copy: Path, files: list[str], timeout: float, *flags: str) -> tuple[str, str]:
    """`passed`, `failed` or `late`, and what pytest said last."""
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *flags, *files]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command,
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # tests start processes of their own
        process.communicate()
        return "late", f"stopped after {timeout:.0f} s"
    if process.returncode in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"{' '.join(command)}: {said}")
    told = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
    return "failed" if process.returncode else "passed", (told or said.splitlines() or [""])[-1]


def main() -> int:
    flags = parser(__doc__)
    flags.add_argument("--count", type=int, default=60, help="number of mutants")
    flags.add_argument("--seed", type=int, default=0, help="which ones")
    flags.add_argument("--only", default="", help="only the modules whose name has this word")
    flags.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    flags.add_argument("--workers", type=int, default=2, help="mutants that run at a time")
    flags.add_argument("--timeout", type=float, default=600.0, help="seconds a mutant may take")
    options = flags.parse_args()
    chosen = sample(options.count, options.seed, options.only)
    if options.list:
        print(*chosen, sep="\n")
        return 0
    begin, survivors = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(options.workers):
            copies.put(copy_of_repository(Path(scratch) / str(number)))
        files = sorted({file for mutant in chosen for file in tests_of(mutant.module)})
        copy = copies.get()
        outcome, said = run_tests(copy, files, 3600, "-n", str(options.workers))
        copies.put(copy)
        if outcome != "passed":
            print(f"without any mutant, the tests {outcome}: {said}")
            return 1

        def outcome_of(mutant: Mutant) -> tuple[str, str]:
            copy = copies.get()
            path = copy / "jaxpar" / f"{mutant.module}.py"
            source = path.read_bytes()
            try:
                changed = source[: mutant.start] + mutant.after.encode() + source[mutant.stop :]
                path.write_bytes(changed)
                return run_tests(copy, tests_of(mutant.module), options.timeout, "-n0")
            finally:
                path.write_bytes(source)
                copies.put(copy)

        with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
            for mutant, (outcome, said) in zip(chosen, pool.map(outcome_of, chosen), strict=True):
                caught = outcome == "failed"
                print(f"{'caught' if caught else 'MISSED'}  {mutant}\n        {said}", flush=True)
                if not caught:
                    survivors.append(mutant)
    share = 1 - len(survivors) / len(chosen)
    minutes = (time.monotonic() - begin) / 60
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught ({share:.0%})", end="")
    print(f" in {minutes:.0f} minutes", *survivors, sep="\n  missed: " if survivors else "")
    return share < ENOUGH


if __name__ == "__main__":
    sys.exit(main())
