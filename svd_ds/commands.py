"""The console script `svd-ds COMMAND ARGUMENT...`. A command is `train` or the name of a file in tools/.

The command replaces this process, so its exit code, signals and output are those of
`python -m svd_ds.train ARGUMENT...` or `python tools/COMMAND.py ARGUMENT...`.
"""

from __future__ import annotations

import ast
import difflib
import os
import sys
import textwrap
from pathlib import Path

from svd_ds.cli import print_error
from svd_ds.package_files import PACKAGE, package_folder

TRAIN = "train"
USAGE = """usage: svd-ds COMMAND [ARGUMENT ...]

{commands}

svd-ds COMMAND --help shows the arguments of a command, svd-ds train --help KEY explains a setting."""


def main() -> None:
    """Run the command that the arguments name, or list all commands.

    Exit code 2: there is no such command.
    """
    files = command_files()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(overview(files))
    elif name in files:
        program = ["-m", "svd_ds.train"] if name == TRAIN else [str(files[name])]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *program, *arguments])
    else:
        near = difflib.get_close_matches(name, files, n=1) or [f"one of {', '.join(files)}"]
        print_error(ValueError(f"there is no command {name}: do you mean {near[0]}?"))
        sys.exit(2)


def command_files() -> dict[str, Path]:
    """Return the name of each command -> its Python file."""
    tools = sorted(package_folder("tools").glob("*.py"))
    files = {TRAIN: PACKAGE / "train.py"} | {path.stem.replace("_", "-"): path for path in tools}
    return {name: path for name, path in files.items() if path.stem != "__init__"}


def overview(files: dict[str, Path]) -> str:
    """Return the text of `svd-ds --help`: each command with the first paragraph of its file."""
    width = max(map(len, files))
    indent = " " * (width + 4)
    lines = [
        textwrap.fill(
            f"  {name:{width}}  {_summary(path)}", 110, subsequent_indent=indent, break_on_hyphens=False
        )
        for name, path in files.items()
    ]
    return USAGE.format(commands="\n".join(lines))


def _summary(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n\n")[0]


if __name__ == "__main__":
    main()
