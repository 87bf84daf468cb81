"""What the scripts that write a page of docs/ share: flags, tables, and when a page is written."""

import argparse
import datetime
import importlib.metadata
from pathlib import Path
from typing import Any

from arguments import ROOT, parser

from jaxpar.report.apart import compiler_path


def page_parser(doc: str | None, page: str, only: str) -> argparse.ArgumentParser:
    """A parser of `--only`, `--output` and `--timeout`; see `write`.

    Args:
      doc: the script's docstring.
      page: file of docs/.
      only: what `--only` selects.
    """
    flags = parser(doc)
    flags.add_argument("--only", default="", help=f"only {only}; printed, and docs/{page} stays")
    flags.add_argument(
        "--output", type=Path, help=f"the file to write (default: docs/{page}, if all is in it)"
    )
    flags.add_argument(
        "--timeout", type=float, default=300.0, help="seconds that a compilation may take"
    )
    flags.set_defaults(page=ROOT / "docs" / page)
    return flags


def write(text: str, options: argparse.Namespace) -> None:
    """Prints a page and writes it; a part of it takes the place of the whole nowhere unasked."""
    print(text)
    output = options.output or (None if options.only else options.page)
    if output:
        output.write_text(text)


def written() -> dict[str, str]:
    """Today's `date`, and versions: of `jax`, and of its CUDA `plugin`, which lies beside the
    environment."""
    found = importlib.metadata.distributions(name="jax-cuda12-plugin", path=compiler_path())
    return {
        "date": datetime.date.today().isoformat(),
        "jax": importlib.metadata.version("jax"),
        "plugin": next((one.version for one in found), "none"),
    }


def table(header: str, rows: list[list[Any]]) -> str:
    """A table in Markdown, of a header with columns between bars."""
    lines = [header.split("|"), ["---"] * (header.count("|") + 1), *rows]
    return "\n".join("| " + " | ".join(str(cell).strip() for cell in line) + " |" for line in lines)
