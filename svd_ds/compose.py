"""Composition of the config with Hydra: conf/ and a command line become a RunConfig.

Hydra composes conf/train.yaml and its groups into a DictConfig, which `to_config` converts once into a
RunConfig. No other module uses a DictConfig.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException, ValidationError

from svd_ds import overrides as override_words
from svd_ds.command_line import CommandLine
from svd_ds.config import FIELD_ALIASES, InitConfig, RunConfig
from svd_ds.credentials import redact, remember_tree
from svd_ds.fsync_io import replace_text
from svd_ds.settings import Setting, all_settings, check_setting

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException)
"""Errors of Hydra and OmegaConf for a key, choice or value; see `explain`."""

REQUIRED_MARK = "? "
"""Prefix of the value of a key that must be given on the command line; a description follows. (OmegaConf's
own mark, ???, is overridden by a default.)"""

EXTRA_SECTIONS = ("code", "contents")
"""Sections of config.yaml that are not settings; they are ignored where the file is used as a config."""


def register() -> None:
    """Register the schema with Hydra, which then refuses unknown keys and wrong types, and `${len:LIST}`."""
    OmegaConf.register_new_resolver("len", len, replace=True)
    ConfigStore.instance().store(name="schema", node=_schema())


def to_config(
    node: DictConfig, now: Callable[[], datetime] = datetime.now, placeholder: str | None = None
) -> RunConfig:
    """Convert Hydra's DictConfig to a RunConfig, which checks every value.

    Args:
        now: returns the time of `${now:PATTERN}`; called only if a value uses it. Hydra's own resolver would
            read the clock of each rank in each restart of a job, so each would get a different run folder.
        placeholder: value of the required keys that are missing, where nothing is read; None refuses.

    Raises:
        ValueError: a key is unknown, or a value is wrong or missing.
    """
    OmegaConf.register_new_resolver("now", lambda pattern: now().strftime(pattern), replace=True)
    with read_write(node), open_dict(node):
        for name in EXTRA_SECTIONS:
            node.pop(name, None)
    if placeholder is not None:
        _fill_required(node, placeholder)
    _check_keys(node, _cached_schema())
    if OmegaConf.get_type(node, "run") is dict:
        # A user's own primary config need not name the schema in its defaults.
        node = cast(DictConfig, OmegaConf.merge(_schema(), node))
    _check_written(node)
    parts: Any = OmegaConf.to_object(node)
    names = {spelling: name for name, spelling in FIELD_ALIASES.items()}
    init = InitConfig(**{names.get(key, key): value for key, value in parts["init"].items()})
    config = RunConfig(**parts | {"init": init})
    remember_tree(config.as_dict())
    return config


def compose(
    words: Sequence[str] = (), now: Callable[[], datetime] = datetime.now, placeholder: str | None = None
) -> RunConfig:
    """Compose the config of `python -m svd_ds.train WORDS`.

    Args:
        words: arguments of the command line.
        now, placeholder: see `to_config`.

    Raises:
        ValueError: the words do not start exactly one run, or a value is wrong.
        HydraException, OmegaConfBaseException: see `explain`.
    """
    line = parse_command_line([word for word in words if word != "--debug"])
    line.check_is_one_run()
    node = _compose_node(line)
    # Names of runs use the choices that Hydra made: ${hydra:runtime.choices...}.
    HydraConfig.instance().set_config(node)
    with read_write(node), open_dict(node):
        del node["hydra"]
    return to_config(node, now, placeholder)


def parse_command_line(words: Sequence[str]) -> CommandLine:
    """Parse a command line, with its overrides quoted for Hydra.

    Raises:
        ValueError: a key or value cannot be read; the message says what to write.
    """
    line = CommandLine.parse(words)
    read = override_words.quote_for_hydra(
        [*line.option_words, *line.overrides], settings_by_key(), line.groups, line.multirun
    )
    return replace(line, overrides=tuple(debug_last(read[len(line.option_words) :])))


@cache
def settings_by_key() -> dict[str, Setting]:
    """Return full key -> each setting of a run."""
    return {setting.key: setting for setting in all_settings(RunConfig)}


def keys_for_folder(line: CommandLine) -> list[str]:
    """Return the keys that must be added to run.dir: they differ between runs of a multirun that have the
    same run.dir.

    Args:
        line: from `parse_command_line`.
    """
    swept = override_words.swept_values(line.overrides, line.choices)
    fixed = [word for word in line.overrides if _key(word) not in swept]
    first = {key: words[0] for key, words in swept.items() if words}
    return [
        key
        for key, words in swept.items()
        if len({_run_dir(line, [*fixed, *(first | {key: word}).values()]) for word in words[:2]})
        < len(words[:2])
    ]


def multirun_folder(folder: str, keys: Collection[str]) -> str:
    """Return run.dir of one run of a multirun, with its values of `keys`. Call it in Hydra's task."""
    words = [word for word in HydraConfig.get().overrides.task if _key(word) in keys]
    return f"{folder}-{override_words.folder_name(words)}" if words else folder


def mask_multirun_file() -> None:
    """Mask the credentials in the file in which Hydra stores the overrides of a multirun. Call it in Hydra's
    task."""
    path = Path(HydraConfig.get().sweep.dir, "multirun.yaml")
    if HydraConfig.get().mode is RunMode.MULTIRUN and (text := path.read_text()) != (masked := redact(text)):
        # Every rank writes the same text.
        with suppress(FileNotFoundError):
            replace_text(path, masked)


def _compose_node(line: CommandLine) -> DictConfig:
    register()
    with line.hydra():
        return hydra_compose(line.config_name, list(line.overrides), return_hydra_config=True)


def _run_dir(line: CommandLine, overrides: Sequence[str]) -> str:
    node = _compose_node(replace(line, overrides=tuple(overrides)))
    HydraConfig.instance().set_config(node)
    # Two runs can begin in the same second, so the time does not keep their folders apart.
    OmegaConf.register_new_resolver("now", lambda pattern: pattern, replace=True)
    return str(node.run.dir)


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def debug_last(overrides: Sequence[str]) -> list[str]:
    """Move `debug=tiny` to the end of the overrides, so that it overrides any experiment."""
    is_debug = [override.lstrip("+").startswith("debug=") for override in overrides]
    debug = ["+" + override.lstrip("+") for override, flag in zip(overrides, is_debug, strict=True) if flag]
    # Hydra accepts a group once; as with any other key, the last value counts.
    return [override for override, flag in zip(overrides, is_debug, strict=True) if not flag] + debug[-1:]


def explain(error: BaseException) -> str:
    """Turn an error of Hydra into one sentence: what failed, why, and the available choices."""
    if sentence := _wrong_type(error):
        return sentence
    message, _, choices = str(error).partition("Available options in ")
    sentence = message.strip().splitlines()[0].rstrip(".")
    if "--multirun" in message:
        sentence += ": one run takes one value; python -m svd_ds.train -m ... runs all of them"
    if isinstance(error, OverrideParseException):
        sentence = f"{error.override} cannot be read: {sentence}"
    if error.__cause__ is not None:
        sentence += f": {str(error.__cause__).splitlines()[0]}"
    key = str(getattr(error, "full_key", None) or "")
    if key not in sentence:
        # An interpolation ${...} names no key.
        sentence = f"{key} cannot be read: {sentence}"
    options = [line.strip() for line in choices.partition("Config search path")[0].splitlines()[1:]]
    return sentence + (f"; there are {', '.join(filter(None, options))}" if options else "")


def _wrong_type(error: BaseException) -> str:
    """Return a sentence for a value of a wrong type, "" for other errors."""
    cause = error if isinstance(error, ValidationError) else error.__cause__
    setting = settings_by_key().get(str(getattr(cause, "full_key", "")).partition("[")[0])
    if not isinstance(cause, ValidationError) or setting is None:
        return ""
    return f"{cause.full_key} is {cause.value!r}: it must be {setting.type_name}"


def _check_keys(node: DictConfig, schema: DictConfig, path: str = "") -> None:
    """Check that all keys are in the schema (+key=value can add others), and that no required value is
    missing.

    Raises:
        ValueError: a key is unknown, or a required value is missing.
    """
    for key in node:
        if key not in schema:
            raise ValueError(
                f"there is no key {path}{key!s}; {path[:-1] or 'the config'} has {', '.join(sorted(schema))}"
            )
        child: Any = node._get_node(key)
        known = schema._get_node(key)
        # A section without keys of its own, such as data.caption_weights, accepts any.
        if isinstance(known, DictConfig) and len(known):
            if not isinstance(child, DictConfig):
                keys = ", ".join(map(str, known))
                raise ValueError(f"{path}{key!s} is {node[key]!r}: it must have the keys {keys}")
            _check_keys(child, known, f"{path}{key!s}.")
        elif str(value := child._value()).startswith(REQUIRED_MARK):
            raise ValueError(f"{path}{key!s} must be given: {value.removeprefix(REQUIRED_MARK)}")


def _fill_required(node: DictConfig, placeholder: str) -> None:
    for key in node:
        child: Any = node._get_node(key)
        if isinstance(child, DictConfig):
            _fill_required(child, placeholder)
        elif str(child._value()).startswith(REQUIRED_MARK):
            node[key] = placeholder


def _check_written(node: DictConfig) -> None:
    """Check the values that are not interpolations. An error must name data.num_frames, which the user wrote,
    and not model.num_frames, which is ${data.num_frames}."""
    for key, setting in settings_by_key().items():
        section, _, name = key.rpartition(".")
        part: Any = node[section] if section else node
        if not OmegaConf.is_interpolation(part, name):
            value = part[name]
            check_setting(setting, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)


@cache
def _cached_schema() -> DictConfig:
    return _schema()


def _schema() -> DictConfig:
    """Return RunConfig as a typed DictConfig with the key names of users, and writable: OmegaConf makes
    frozen dataclasses read-only."""
    parts = OmegaConf.structured(RunConfig)
    init = {FIELD_ALIASES.get(name, name): parts.init._get_node(name) for name in parts.init}
    node: Any = OmegaConf.create({**{name: parts._get_node(name) for name in parts}, "init": init})
    stack = [node]
    while stack:
        branch = stack.pop()
        OmegaConf.set_readonly(branch, None)
        if isinstance(branch, DictConfig):
            if not len(branch):
                # A section without keys of its own, such as data.buckets, accepts any.
                OmegaConf.set_struct(branch, False)
            children = (branch._get_node(key) for key in branch)
            stack.extend(child for child in children if OmegaConf.is_config(child))
    return node
