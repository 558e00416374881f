"""Reference of the configuration: `--help KEY` of the training command, and docs/configuration.md.

    python -m svd_ds.config_reference docs/configuration.md    write the page

Types and ranges come from the settings dataclasses, explanations from the docstrings under their fields,
defaults from conf/train.yaml as a run composes it.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from svd_ds.command_line import CONF, PRIMARY
from svd_ds.compose import compose
from svd_ds.config import RunConfig
from svd_ds.settings import Setting, Text, direct_settings

TOP = "top"
"""Name of the section that has the keys without a section: name, task, precision, recompute."""
KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}
LISTS = {int: "whole numbers", float: "numbers", str: "texts", bool: "true and false"}
WIDTH = 100
INTRODUCTION = f"""# Configuration reference

<!-- Written by `make docs` from the settings dataclasses and conf/: change those, not this page. -->

Every setting of a run, as `python -m svd_ds.train` composes it. `python -m svd_ds.train --help KEY` prints
one of them, `--help GROUP` all settings of a group and its choices, and `--cfg job` the composed
configuration. On the command line `KEY=VALUE` sets a key, `GROUP=NAME` chooses a file of a group, and
`+experiment=NAME` adds an experiment. A key that does not exist, a value of another type or out of its range
is refused at the start, in one sentence with the full key.

Defaults are those of `conf/{PRIMARY}.yaml`, the small quickstart run; an experiment changes some of them.
"""


@dataclass(frozen=True)
class Entry:
    """One setting as users see it."""

    setting: Setting
    default: Any
    description: str
    """Docstring of the field, on one line; empty if it has none."""

    @property
    def type_name(self) -> str:
        """Type of the value, in words."""
        setting = self.setting
        is_path = isinstance(setting.rule, Text) and setting.rule.is_path
        name = "path or URL" if is_path else KINDS[setting.kind]
        if setting.is_list:
            name = f"list of {LISTS[setting.kind]}"
        elif setting.is_dict:
            name = f"NAME: {name}, ..."
        return f"{name}, or null" if setting.is_optional else name

    @property
    def allowed(self) -> str:
        """Values that the setting takes, in words; empty if any of its type."""
        rule = self.setting.rule
        return "" if rule is None or isinstance(rule, Text) else rule.describe()

    @property
    def default_value(self) -> str:
        """The default as it is written on the command line."""
        value = self.default
        return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Section:
    """The settings with one prefix, such as batch."""

    name: str
    description: str
    entries: tuple[Entry, ...]


@cache
def sections() -> dict[str, Section]:
    """Return every section of the configuration by name, in the order of RunConfig."""
    defaults = compose([]).as_dict()
    found = {}
    for kind in _settings_classes(RunConfig):
        name = kind.section or TOP
        values = defaults.get(name, defaults)
        descriptions = _field_descriptions(kind)
        entries = tuple(
            Entry(setting, values[setting.key.rpartition(".")[2]], descriptions.get(setting.name, ""))
            for setting in direct_settings(kind)
        )
        found[name] = Section(name, _class_description(kind), entries)
    return found


@cache
def groups() -> dict[str, dict[str, str]]:
    """Return each config group -> its choices -> the first sentence of the choice's file."""
    return {
        folder.name: {path.stem: _first_sentence(path) for path in sorted(folder.glob("*.yaml"))}
        for folder in sorted(CONF.iterdir())
        if folder.is_dir()
    }


def help_text(name: str) -> str:
    """Explain a key (`batch.size`), a section (`batch`) or a config group (`noise`).

    Raises:
        ValueError: no key, section or group has this name; the message has the nearest names.
    """
    name = name.lstrip("+")
    entries = {entry.setting.key: entry for section in sections().values() for entry in section.entries}
    if name in entries:
        return _explain(entries[name])
    parts = []
    if name in groups():
        choices = "\n".join(f"  {choice:20} {text}" for choice, text in groups()[name].items())
        plus = _plus(name)
        parts.append(f"{plus}{name}=NAME chooses a file of conf/{name}/:\n{choices}")
    if name in sections():
        parts += map(_explain, sections()[name].entries)
    if not parts:
        names = [*entries, *sections(), *groups()]
        same_end = [key for key in entries if key.rpartition(".")[2] == name]
        near = same_end or difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        there = f"the nearest are {', '.join(near)}" if near else f"there are {', '.join(sections())}"
        raise ValueError(f"there is no key or group {name}; {there}")
    return "\n\n".join(parts)


def markdown() -> str:
    """Return docs/configuration.md."""
    parts = [INTRODUCTION, "## Groups\n"]
    chosen = _default_choices()
    for group, choices in groups().items():
        default = f", by default `{chosen[group]}`" if group in chosen else ", none by default"
        parts.append(f"### `{group}`\n\n`{_plus(group)}{group}=NAME`{default}.\n")
        rows = [f"| `{name}` | {_cell(text)} |" for name, text in choices.items()]
        parts.append("\n".join(["| name | what it is |", "| --- | --- |", *rows]) + "\n")
    parts.append("## Settings\n")
    for section in sections().values():
        title = "Keys without a section" if section.name == TOP else f"`{section.name}`"
        parts.append(f"### {title}\n" if section.name == TOP else f"### Settings of {title}\n")
        if section.description:
            parts.append(f"{section.description}\n")
        rows = [
            f"| `{entry.setting.key}` | {_cell(_type_and_range(entry))} | `{entry.default_value}` | "
            f"{_cell(entry.description)} |"
            for entry in section.entries
        ]
        header = ["| key | takes | default | meaning |", "| --- | --- | --- | --- |"]
        parts.append("\n".join([*header, *rows]) + "\n")
    return "\n".join(parts)


def _settings_classes(kind: Any) -> Iterator[Any]:
    yield kind
    for entry in fields(kind):
        if entry.default_factory is not MISSING and is_dataclass(part := entry.default_factory()):
            yield from _settings_classes(type(part))


def _field_descriptions(kind: Any) -> dict[str, str]:
    """Return field name -> the docstring under it, on one line, fields of base classes included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        body = _class_node(base).body
        for statement, following in pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                found[statement.target.id] = " ".join(following.value.value.split())
    return found


def _class_description(kind: Any) -> str:
    return " ".join((ast.get_docstring(_class_node(kind)) or "").split())


def _class_node(kind: Any) -> ast.ClassDef:
    node = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(node, ast.ClassDef)
    return node


def _first_sentence(path: Path) -> str:
    """Return the first sentence of the comment at the head of a YAML file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("# ") or line.startswith("#   "):
            break
        lines.append(line.removeprefix("# "))
    return re.split(r"(?<=[^.\d]\.)\s|:$", " ".join(lines), maxsplit=1)[0].rstrip(".")


def _default_choices() -> Mapping[str, str]:
    """Return config group -> its choice in the primary config."""
    entries = yaml.safe_load((CONF / f"{PRIMARY}.yaml").read_text(encoding="utf-8"))["defaults"]
    choices = {key: value for entry in entries if isinstance(entry, dict) for key, value in entry.items()}
    return {group: choice for group, choice in choices.items() if group in groups()}


def _plus(group: str) -> str:
    """Return the prefix of a group on the command line: + if the defaults have no choice of the group."""
    return "" if group in _default_choices() or group == "debug" else "+"


def _type_and_range(entry: Entry) -> str:
    return "; ".join(filter(None, (entry.type_name, entry.allowed)))


def _explain(entry: Entry) -> str:
    about = f"{_type_and_range(entry)}; default: {entry.default_value}"
    paragraphs = [
        textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="  ")
        for text in (about, entry.description)
        if text
    ]
    return "\n".join([entry.setting.key, *paragraphs])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")
