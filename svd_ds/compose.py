"""From conf/ and a command line to a RunConfig: what Hydra is asked, and what it says in return.

Hydra composes conf/train.yaml and its groups into a DictConfig; `to_config` turns that into a RunConfig,
once. Beyond this file nobody sees a DictConfig.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from svd_ds.config import SPELLING, InitConfig, RunConfig

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException)
"""A key, choice or value that Hydra or OmegaConf does not take."""

OPEN = "? "
"""How the value of a key begins that must be given on the command line; what it is follows. (OmegaConf's own
sign, ???, gives way to a default.)"""

CONF = Path(__file__).resolve().parent.parent / "conf"


def register() -> None:
    """Tell Hydra the schema, so that an unknown key or a wrong type is refused."""
    ConfigStore.instance().store(name="schema", node=_schema())


def to_config(node: DictConfig, now: Callable[[], datetime] = datetime.now) -> RunConfig:
    """The one conversion from Hydra's tree to values; runs every part's own checks.

    Args:
        now: what `${now:PATTERN}` shows, asked only where a value needs it. Hydra's own resolver asks each
            rank's clock, and again in each restart of a job: they would have run folders of their own.
    """
    OmegaConf.register_new_resolver("now", lambda pattern: now().strftime(pattern), replace=True)
    _check_keys(node, _schema())
    parts: Any = OmegaConf.to_object(node)
    names = {spelling: name for name, spelling in SPELLING.items()}
    init = InitConfig(**{names.get(key, key): value for key, value in parts["init"].items()})
    return _tuples(RunConfig(**parts | {"init": init}))


def compose(overrides: Sequence[str] = (), now: Callable[[], datetime] = datetime.now) -> RunConfig:
    """The config that `python -m svd_ds.train OVERRIDES` runs with; `now` as for `to_config`."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = hydra_compose("train", debug_last(overrides), return_hydra_config=True)
    # A run is named after the choices that Hydra made: ${hydra:runtime.choices...}.
    HydraConfig.instance().set_config(node)
    with read_write(node), open_dict(node):
        del node["hydra"]
    return to_config(node, now)


def debug_last(overrides: Sequence[str]) -> list[str]:
    """Make `debug=tiny` the last of the appended groups, so that it lies over any experiment."""
    is_debug = [override.lstrip("+").startswith("debug=") for override in overrides]
    debug = ["+" + override.lstrip("+") for override, flag in zip(overrides, is_debug, strict=True) if flag]
    # Hydra takes a group once; as with any other key, the last word counts.
    return [override for override, flag in zip(overrides, is_debug, strict=True) if not flag] + debug[-1:]


def explain(error: BaseException) -> str:
    """One sentence from Hydra's several lines: what it could not do, why, and what there is to choose."""
    told, _, choices = str(error).partition("Available options in ")
    sentence = told.strip().splitlines()[0].rstrip(".")
    if "--multirun" in told:
        sentence += ": one run takes one value; python -m svd_ds.train -m ... runs all of them"
    if isinstance(error, OverrideParseException):
        sentence = f"{error.override} cannot be read: {sentence}"
    if error.__cause__ is not None:
        sentence += f": {str(error.__cause__).splitlines()[0]}"
    options = [line.strip() for line in choices.partition("Config search path")[0].splitlines()[1:]]
    return sentence + (f"; there are {', '.join(filter(None, options))}" if options else "")


def _check_keys(node: DictConfig, schema: DictConfig, path: str = "") -> None:
    """Refuse what Hydra's +key=value added beyond the schema, and values that are left open."""
    for key in node:
        if key not in schema:
            raise ValueError(
                f"there is no key {path}{key!s}; {path[:-1] or 'the config'} has {', '.join(sorted(schema))}"
            )
        child: Any = node._get_node(key)
        known = schema._get_node(key)
        # A part without keys of its own, such as data.caption_weights, takes any.
        if isinstance(known, DictConfig) and len(known):
            if not isinstance(child, DictConfig):
                keys = ", ".join(map(str, known))
                raise ValueError(f"{path}{key!s} is {node[key]!r}, and must have the keys {keys}")
            _check_keys(child, known, f"{path}{key!s}.")
        elif str(value := child._value()).startswith(OPEN):
            raise ValueError(f"{path}{key!s} must be given: {value.removeprefix(OPEN)}")


def _schema() -> DictConfig:
    """RunConfig as a typed tree, spelt as users write it, that Hydra may write to: OmegaConf makes frozen
    dataclasses read-only."""
    parts = OmegaConf.structured(RunConfig)
    init = {SPELLING.get(name, name): parts.init._get_node(name) for name in parts.init}
    node: Any = OmegaConf.create({**{name: parts._get_node(name) for name in parts}, "init": init})
    stack = [node]
    while stack:
        branch = stack.pop()
        OmegaConf.set_readonly(branch, None)
        if isinstance(branch, DictConfig):
            if not len(branch):
                # It has no keys of its own, such as data.buckets: it takes any.
                OmegaConf.set_struct(branch, False)
            children = (branch._get_node(key) for key in branch)
            stack.extend(child for child in children if OmegaConf.is_config(child))
    return node


def _tuples(value: Any) -> Any:
    """OmegaConf gives lists where a dataclass declares tuples."""
    changes = {}
    for entry in dataclasses.fields(value):
        old = getattr(value, entry.name)
        if isinstance(old, list):
            changes[entry.name] = tuple(old)
        elif dataclasses.is_dataclass(old):
            changes[entry.name] = _tuples(old)
    return dataclasses.replace(value, **changes)
