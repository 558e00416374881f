"""Settings dataclasses: each field declares a rule, and one function checks all of them.

    @dataclass(frozen=True)
    class OptimConfig(Settings, section="optim"):
        lr: float = number(1e-4, gt=0, le=100)
        schedule: str = choice("constant", SCHEDULES)

The rule of a field applies to each element of a list or dict. It is checked whenever the dataclass is built:
from the command line, from a file, or in Python. An error names the full config key, the value and the
allowed values.
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

UNMASKED = f"complete: its credentials were masked ({MASK}) when it was stored; give it on the command line"
INT64_MAX = 2**63 - 1
"""Default upper bound of whole numbers: the range of tensors and files."""
FLOAT32_MAX = 3.4e38
"""Default bound of the magnitude of numbers: the range of a float32 tensor."""
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True)
class Range:
    """Range of finite numbers that a field accepts."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    off: float | None = None
    """Allowed number outside the range, which switches the feature off."""
    hint: str = ""
    path_keys: bool = False
    """True if the keys of the dict are paths or URLs."""
    words: tuple[str, ...] = ()
    """Words that are accepted in place of a number."""

    def check(self, value: Any) -> str:
        """Return what the number must be; "" if it is in the range."""
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
        words += "".join(f", or {word}" for word in self.words)
        return words + (f" ({self.hint})" if self.hint else "")


@dataclass(frozen=True)
class Choice:
    """Words that a field accepts."""

    options: Collection[str]
    """Allowed words. A registry's names may be added to later, so this is the live collection."""

    def check(self, value: Any) -> str:
        return "" if value in self.options else self.describe()

    def describe(self) -> str:
        """Return the options in words."""
        return f"one of {', '.join(self.options)}"


@dataclass(frozen=True)
class Text:
    """Text that is not empty. In a path "~" is the home of the user."""

    is_path: bool = False

    def check(self, value: Any) -> str:
        """Return what the text must be; "" if it is valid."""
        if not value.strip():
            return "a path, and not empty" if self.is_path else "a text, and not empty"
        if not value.isprintable():
            return "one line without control characters"
        return UNMASKED if self.is_path and MASK in value else ""


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
    words: tuple[str, ...] = (),
) -> Any:
    """Declare a dataclass field for a number, or for a tuple or dict of numbers, each in the range.

    Args:
        default: default value; `dict` is an empty dict.
        ge, gt, le, lt, off, hint, path_keys, words: see `Range`.
    """
    return _field(default, Range(ge, gt, le, lt, off, hint, path_keys, words))


def choice(default: Any, options: Collection[str]) -> Any:
    """Declare a dataclass field for one of the options, or for a tuple of them."""
    return _field(default, Choice(options))


def text(default: Any) -> Any:
    """Declare a dataclass field for a text, or for a tuple of texts, none of them empty."""
    return _field(default, Text())


def location(default: Any, key: str | None = None) -> Any:
    """Declare a dataclass field for a path or URL.

    Args:
        key: name of the config key, if it differs from the name of the field.
    """
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
    """Type of the value or of each element: int, float, str or bool."""
    is_optional: bool
    is_list: bool
    is_dict: bool
    rule: Rule | None
    """None for a bool."""

    @property
    def is_text(self) -> bool:
        return self.kind is str and not self.is_list and not self.is_dict

    @property
    def type_name(self) -> str:
        """Return what a value or element must be, for error messages."""
        words = self.rule.words if isinstance(self.rule, Range) else ()
        return " or ".join((TYPE_NAMES[self.kind], *words))


class Settings:
    """Base class of settings dataclasses. It checks the rule of every field, and expands "~" in paths.

    A subclass may override `__post_init__` for checks across fields; it calls this one first.
    """

    section: ClassVar[str] = ""
    """Section of the config: the first part of the keys of this dataclass."""

    def __init_subclass__(cls, section: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if section is not None:
            cls.section = section

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for setting in direct_settings(kind):
            value = getattr(self, setting.name)
            check_setting(setting, value)
            object.__setattr__(self, setting.name, _normalize(setting, value))


@cache
def direct_settings(kind: Any) -> tuple[Setting, ...]:
    """Return the fields of a settings dataclass that are values, not nested settings."""
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
    """Yield every setting of a tree of settings dataclasses."""
    yield from direct_settings(kind)
    for entry in fields(kind):
        if entry.default_factory is not MISSING and is_dataclass(part := entry.default_factory()):
            yield from all_settings(type(part))


def check_setting(setting: Setting, value: Any) -> None:
    """Check a value by the type and rule of its setting.

    Raises:
        ValueError: the setting does not accept the value; the message names the full key.
    """
    if value is None and setting.is_optional:
        return
    container = list | tuple if setting.is_list else Mapping if setting.is_dict else None
    if container is not None and not isinstance(value, container):
        raise ValueError(f"{setting.key} is {value!r}: it must be a {'list' if setting.is_list else 'dict'}")
    if isinstance(setting.rule, Range) and setting.rule.path_keys:
        for name in value:
            if MASK in name:
                raise ValueError(f"{setting.key} has {name!r}: it must be {UNMASKED}")
    for key, element in _elements(setting, value):
        if wrong := _requirement_not_met(setting, element):
            raise ValueError(f"{key} is {_show(element)}: it must be {wrong}")


def _elements(setting: Setting, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield full key and value of each number or text in a value."""
    if setting.is_dict:
        yield from ((f"{setting.key}.{name}", element) for name, element in value.items())
    elif setting.is_list:
        yield from ((f"{setting.key}[{index}]", element) for index, element in enumerate(value))
    else:
        yield setting.key, value


def _requirement_not_met(setting: Setting, value: Any) -> str:
    """Return what the value must be; "" if it is valid."""
    if isinstance(setting.rule, Range) and value in setting.rule.words:
        return ""
    # isinstance(True, int) holds, and a whole number is accepted for a float.
    kinds: Any = (int, float) if setting.kind is float else setting.kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and setting.kind is not bool):
        return setting.type_name
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
