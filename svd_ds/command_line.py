"""Command line of the training: Hydra's options, overrides, and the search path of configs."""

from __future__ import annotations

import os
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import SearchPathException

from svd_ds.package_files import package_folder

CONF = package_folder("conf")
VERSION_BASE = "1.3"
"""Version of Hydra whose defaults are used."""
PRIMARY = "train"
"""Name of the primary config, unless --config-name gives another."""
MAIN_FILE = str(Path(__file__).with_name("train.py"))
"""File from whose folder Hydra resolves a relative --config-path."""
NO_RUN = ("help", "hydra_help", "cfg", "resolve", "package", "shell_completion", "info", "experimental_rerun")
"""Options of Hydra that do something other than run a composed config."""
OWN_FOLDER = (
    "hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"
)  # fmt: skip
"""Settings of Hydra in conf/train.yaml, which are added for another primary config. Without them Hydra would
write files of its own into the run folder, with unmasked credentials of the overrides."""


@dataclass(frozen=True)
class CommandLine:
    """Arguments of `python -m svd_ds.train`, parsed as Hydra does; options may be anywhere among them."""

    options: Namespace
    """Options of Hydra, by its names."""
    option_words: tuple[str, ...]
    """The same options, one word each, and those that Hydra does not know."""
    overrides: tuple[str, ...]

    @staticmethod
    def parse(words: Sequence[str]) -> CommandLine:
        """Parse the arguments; overrides are not quoted yet (svd_ds.compose.parse_command_line)."""
        parser = get_args_parser()
        options, rest = parser.parse_known_args(list(words))
        option_words = []
        for action in parser._actions:
            value = getattr(options, action.dest, None)
            if action.dest != "overrides" and value:
                name = action.option_strings[0]
                option_words.append(name if value is True else f"{name}={value}")
        # argparse returns the words after the first option that follows an override unparsed.
        unknown = [word for word in rest if word.startswith("-")]
        overrides = [*options.overrides, *(word for word in rest if not word.startswith("-"))]
        if options.config_name or options.config_path:
            overrides[:0] = OWN_FOLDER
        return CommandLine(options, (*option_words, *unknown), tuple(overrides))

    @property
    def multirun(self) -> bool:
        return bool(self.options.multirun)

    @property
    def config_name(self) -> str:
        return self.options.config_name or PRIMARY

    def words(self) -> list[str]:
        return [*self.option_words, *self.overrides]

    def check_is_one_run(self) -> None:
        """Check that the arguments start exactly one run.

        Raises:
            ValueError: the arguments start several runs, or no run.
        """
        if self.multirun:
            raise ValueError("-m starts several runs one after the other, and this command starts one")
        if asked := next((name for name in NO_RUN if getattr(self.options, name)), None):
            raise ValueError(f"--{asked.replace('_', '-')} starts no run, and this command starts one")

    def groups(self) -> list[str]:
        """Return the config groups in all folders of Hydra's search path, such as conf/ and --config-dir."""
        return self._options_of("", ObjectType.GROUP)

    def choices(self, group: str) -> list[str]:
        """Return the configs of a group."""
        return sorted(self._options_of(group, ObjectType.CONFIG))

    @contextmanager
    def hydra(self) -> Iterator[None]:
        """Make `hydra.compose` use the search path of hydra.main inside the context."""
        version.setbase(VERSION_BASE)
        before = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            Hydra.create_main_hydra2(task_name=PRIMARY, config_search_path=self._search_path())
            yield
        finally:
            GlobalHydra.instance().hydra = before

    def _options_of(self, group: str, kind: ObjectType) -> list[str]:
        loader: Any = ConfigLoaderImpl(config_search_path=self._search_path())
        search = [word for word in self.overrides if word.lstrip("+").startswith("hydra.searchpath=")]
        with warnings.catch_warnings():
            # Hydra itself warns later about a missing folder.
            warnings.simplefilter("ignore")
            found: list[str] = loader.get_group_options(group, kind, self.config_name, search)
        return found

    def _search_path(self) -> ConfigSearchPath:
        """Build the search path as hydra.main does."""
        path = create_automatic_config_search_path(MAIN_FILE, None, self.options.config_path or str(CONF))
        if (folder := self.options.config_dir) is not None:
            folder = os.path.abspath(folder)
            if not os.path.isdir(folder):
                raise SearchPathException(f"--config-dir is {folder}, and there is no such folder")
            path.prepend("command-line", f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
        return path
