"""The rule that every field of a settings dataclass declares, and the one check of all of them.

    @dataclass(frozen=True)
    class OptimConfig(Settings, section="optim"):
        lr: float = number(1e-4, gt=0, le=100)
        schedule: str = choice("constant", SCHEDULES)

A field's rule holds for each element of a list or dict. It is checked wherever the dataclass is built: from
the command line, from a file, or in Python. An error names the full config key, the value and what is
allowed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from svd_ds.credentials import MASK

WHOLE = f"whole: its credentials were masked ({MASK}) where it was stored, give it on the command line"
INT64_MAX = 2**63 - 1
"""What tensors and files hold of a whole number: the upper bound where a field has none of its own."""
FLOAT32_MAX = 3.4e38
"""What a tensor holds of a number: the bound, on both sides, where a field has none of its own."""
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes; they are finite."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    off: float | None = None
    """A number outside the range that is allowed as well: it switches something off."""
    hint: str = ""
    path_keys: bool = False
    """The keys of the dict are paths or URLs."""

    def check(self, value: Any) -> str:
        """What is wrong with a number, "" if nothing is."""
        if not math.isfinite(value):
            return "finite, " + self.describe()
        fits = (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )
        return "" if fits or value == self.off else self.describe()

    def describe(self) -> str:
        """Return the range in words."""
        bounds = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        words = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
        words += f", or {self.off} to switch it off" if self.off is not None else ""
        return words + (f" ({self.hint})" if self.hint else "")


@dataclass(frozen=True)
class Choice:
    """The words that a field takes."""

    options: tuple[str, ...]

    def check(self, value: Any) -> str:
        return "" if value in self.options else self.describe()

    def describe(self) -> str:
        """Return the options in words."""
        return f"one of {', '.join(self.options)}"


@dataclass(frozen=True)
class Text:
    """A text that is not empty; of a path, "~" is the user's home."""

    is_path: bool = False

    def check(self, value: Any) -> str:
        if not value.strip():
            return "a path, and not empty" if self.is_path else "a text, and not empty"
        if not value.isprintable():
            return "one line without control characters"
        return WHOLE if self.is_path and MASK in value else ""


Rule = Range | Choice | Text


def number(
    default: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    off: float | None = None,
    hint: str = "",
    path_keys: bool = False,
) -> Any:
    """A dataclass field for a number, or a tuple or dict of numbers, each in the range; see `Range`.

    The default `dict` is an empty dict.
    """
    return _field(default, Range(ge, gt, le, lt, off, hint, path_keys))


def choice(default: Any, options: Collection[str]) -> Any:
    """A dataclass field for one of some words, or a tuple of such."""
    return _field(default, Choice(tuple(options)))


def text(default: Any) -> Any:
    """A dataclass field for a text, or a tuple of texts, none of them empty."""
    return _field(default, Text())


def location(default: Any, key: str | None = None) -> Any:
    """A dataclass field for a path or URL; `key`: what users write in place of the field's name."""
    return _field(default, Text(is_path=True), key)


def _field(default: Any, rule: Rule, key: str | None = None) -> Any:
    metadata = {"rule": rule, "key": key}
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """One field of a settings dataclass."""

    name: str
    key: str
    """The full config key."""
    kind: type
    """int, float, str or bool: of the value, or of each element."""
    is_optional: bool
    is_list: bool
    is_dict: bool
    rule: Rule | None
    """None for true or false."""

    @property
    def is_text(self) -> bool:
        return self.kind is str and not self.is_list and not self.is_dict


class Settings:
    """Base of a settings dataclass: checks every field's rule when one is built, and expands "~" in paths.

    A subclass with a `__post_init__` of its own, for checks across fields, calls this one first.
    """

    section: ClassVar[str] = ""
    """Where the dataclass stands in the config: the first part of its keys."""

    def __init_subclass__(cls, section: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if section is not None:
            cls.section = section

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for setting in settings_of(kind):
            value = getattr(self, setting.name)
            check_setting(setting, value)
            object.__setattr__(self, setting.name, _normalize(setting, value))


@cache
def settings_of(kind: Any) -> tuple[Setting, ...]:
    """The fields of a settings dataclass that hold values, not further settings."""
    hints = get_type_hints(kind)
    prefix = f"{section}." if (section := getattr(kind, "section", "")) else ""
    found = []
    for entry in fields(kind):
        annotation = hints[entry.name]
        members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        inner = next(member for member in members if member is not NoneType)
        container = get_origin(inner)
        leaf = [part for part in get_args(inner) if part is not Ellipsis][-1] if container else inner
        if is_dataclass(leaf):
            continue
        key = prefix + (entry.metadata.get("key") or entry.name)
        rule = entry.metadata.get("rule")
        is_optional = NoneType in members
        found.append(Setting(entry.name, key, leaf, is_optional, container is tuple, container is dict, rule))
    return tuple(found)


def all_settings(kind: Any) -> Iterator[Setting]:
    """Every setting of a tree of settings dataclasses."""
    yield from settings_of(kind)
    for entry in fields(kind):
        if entry.default_factory is not MISSING and is_dataclass(part := entry.default_factory()):
            yield from all_settings(type(part))


def check_setting(setting: Setting, value: Any) -> None:
    """Check a value by its setting's type and rule.

    Raises:
        ValueError: the setting does not take the value; the sentence has the full key.
    """
    if value is None and setting.is_optional:
        return
    container = list | tuple if setting.is_list else Mapping if setting.is_dict else None
    if container is not None and not isinstance(value, container):
        raise ValueError(f"{setting.key} is {value!r}: it must be a {'list' if setting.is_list else 'dict'}")
    if isinstance(setting.rule, Range) and setting.rule.path_keys:
        for name in value:
            if MASK in name:
                raise ValueError(f"{setting.key} has {name!r}: it must be {WHOLE}")
    for key, element in _elements(setting, value):
        if wrong := _fault(setting, element):
            raise ValueError(f"{key} is {_show(element)}: it must be {wrong}")


def _elements(setting: Setting, value: Any) -> Iterator[tuple[str, Any]]:
    """Full key -> each number or text of a value."""
    if setting.is_dict:
        yield from ((f"{setting.key}.{name}", element) for name, element in value.items())
    elif setting.is_list:
        yield from ((f"{setting.key}[{place}]", element) for place, element in enumerate(value))
    else:
        yield setting.key, value


def _fault(setting: Setting, value: Any) -> str:
    # True is an int, and a whole number is a float.
    kinds: Any = (int, float) if setting.kind is float else setting.kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and setting.kind is not bool):
        return TYPE_NAMES[setting.kind]
    if setting.rule is not None and (wrong := setting.rule.check(value)):
        return wrong
    bounds: dict[type, float] = {int: INT64_MAX, float: FLOAT32_MAX}
    bound = bounds.get(setting.kind)
    if bound is None or abs(value) <= bound:
        return ""
    return f"at most {bound}" if value > 0 else f"at least {-bound}"


def _show(value: Any) -> str:
    shown = "null" if value is None else repr(value)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."


def _normalize(setting: Setting, value: Any) -> Any:
    rule = setting.rule
    if isinstance(rule, Text) and rule.is_path and isinstance(value, str):
        return os.path.expanduser(value)
    if isinstance(rule, Range) and rule.path_keys and value is not None:
        return {os.path.expanduser(name): element for name, element in value.items()}
    return tuple(value) if isinstance(value, list) else value
