"""A lint of docstrings: how they begin, and which functions need one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "svd_ds").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])
BAD_FIRST_WORDS = {
    "Of",
    "Those",
    "What",
    "Whether",
    "How",
    "Which",
    "From",
    "As",
    "By",
    "In",
    "For",
    "Where",
    "Until",
}
"""A sentence that begins so has its subject elsewhere: begin with a noun phrase or an imperative verb."""
MAX_LINES = 5
"""Lines of a public function that needs no docstring."""
COMMAND_LINE = {"main", "parse_arguments"}
"""Functions of a script in tools/ that the docstring of the script describes: it is the text of --help."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Docstrings of the module, its classes, functions and attributes: every string that is a statement."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str()) as text):
                yield text


def public_functions(body: list[ast.stmt]) -> Iterator[Function]:
    """Functions and methods whose names, and classes, have no leading underscore; no nested functions."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            if isinstance(node, ast.ClassDef):
                yield from public_functions(node.body)
            else:
                yield node


def faults(source: str, exempt: frozenset[str] = frozenset()) -> list[str]:
    """Sentences about the docstrings of a file that break the rules, with their lines."""
    tree, found = ast.parse(source), []
    for text in docstrings(tree):
        words = text.value.split()
        if not words or words[0] in BAD_FIRST_WORDS:
            found.append(f"line {text.lineno}: a docstring begins with {words[0] if words else 'nothing'}")
    for function in public_functions(tree.body):
        num_lines = (function.end_lineno or 0) - function.lineno + 1
        if num_lines > MAX_LINES and ast.get_docstring(function) is None and function.name not in exempt:
            found.append(f"line {function.lineno}: {function.name} has {num_lines} lines and no docstring")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_their_subject_and_long_functions_have_one(path: Path) -> None:
    exempt = COMMAND_LINE if path.is_relative_to(ROOT / "tools") else set()
    found = faults(path.read_text(), frozenset(exempt))
    assert not found, "\n".join([str(path), *found])


LONG = "\n    x = 1" * 5
"""The body of a function of six lines."""


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ('"""Of a module."""', "line 1: a docstring begins with Of"),
        ('class A:\n    """Those of a class."""', "line 2: a docstring begins with Those"),
        ('class A:\n    x: int\n    """What an attribute is."""', "line 3: a docstring begins with What"),
        ('def _f():\n    """Whether it is so."""', "line 2: a docstring begins with Whether"),
        ('x = 1\n""""""', "line 2: a docstring begins with nothing"),
        (f"def f():{LONG}", "line 1: f has 6 lines and no docstring"),
        (f"class A:\n  def f():{LONG}".replace("    ", "     "), "line 2: f has 6 lines and no docstring"),
    ],
)
def test_lint_finds(source: str, fault: str) -> None:
    assert faults(source) == [fault]


@pytest.mark.parametrize(
    "source",
    [
        '"""Offsets of samples."""\nx = 1\n"""Whatever."""',
        f"def _f():{LONG}",
        f"class _A:\n  def f():{LONG}".replace("    ", "     "),
        f'def f():\n    """Do it."""{LONG}',
        "def f():" + "\n    x = 1" * 4,
        f"def main():{LONG}",
    ],
)
def test_lint_accepts(source: str) -> None:
    assert faults(source, frozenset(COMMAND_LINE)) == []


def test_lint_sees_all_files() -> None:
    assert len(FILES) > 150
