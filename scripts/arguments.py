"""The command line of the scripts. Imported before jaxpar, which it lets them find without an
install."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose `--help` begins with a script's docstring. It takes no shortened flags. A
    script that needs jax parses before it imports that, which takes seconds."""
    return argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
