"""Documentation: its commands work, and the files that it names exist.

tests/distributed/test_readme.py runs the commands of README.md and docs/index.md. Here the arguments of every
fenced bash command are checked: settings are composed, options parsed, job scripts and make targets looked
up. Commands of other programs are in ELSEWHERE, with the reason. Any other command fails.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from svd_ds.command_line import NO_RUN, CommandLine
from svd_ds.commands import command_files
from svd_ds.compose import compose
from svd_ds.config_reference import help_text
from svd_ds.overrides import swept_values

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {
    "source .venv/bin/activate": "a shell's own",
    "cp slurm/site.env.example slurm/site.env": "a copy",
    "wandb agent ENTITY/PROJECT/SWEEP": "needs W&B's server: tests/cluster/test_sweeps.py has one",
}
"""Command -> why it is not checked here."""
OWN_FILES = {"slurm/site.env", "conf/conditioning/azimuth.yaml"}
"""Files that a user makes."""
WRAPPERS = {"srun", "torchrun", "env", "time"}


class Command(NamedTuple):
    """One command of a fenced bash block."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)


class ParsedError(Exception):
    """Raised instead of running a tool after it has parsed its arguments."""


def commands(page: Path) -> list[Command]:
    """The commands of a page's fenced bash blocks, without comments and assignments of variables."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"^\w+=\$\((.*?)\)", r"\1", line.strip())
            words = shlex.split(line, comments=True)
            while words and ("=" in words[0] or words[0] in WRAPPERS):
                del words[0]
            if words:
                found.append(Command(page.name, tuple(words)))
    return found


COMMANDS = [command for page in PAGES for command in commands(page)]


def check(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless the command is known and its arguments are right."""
    program, *rest = words
    if " ".join(words) in ELSEWHERE:
        return
    if program == "make":
        check_make(rest)
    elif program == "sbatch":
        check_job(rest, monkeypatch)
    elif program == "python" and rest[:2] == ["-m", "svd_ds.train"]:
        check_training(rest[2:])
    elif program == "python" and rest and rest[0].startswith("tools/"):
        check_tool(ROOT / rest[0], rest[1:], monkeypatch)
    elif program == "svd-ds" and rest and rest[0] in command_files():
        if rest[0] == "train":
            check_training(rest[1:])
        else:
            check_tool(command_files()[rest[0]], rest[1:], monkeypatch)
    elif [program, *rest[:1]] == ["wandb", "sweep"]:
        assert (ROOT / rest[1]).is_file()
    else:
        raise AssertionError(
            f"no test checks {shlex.join(words)}: add a check here, or a reason to ELSEWHERE"
        )


def check_make(words: list[str]) -> None:
    planned = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr


def check_training(words: list[str]) -> None:
    """Compose the settings; of a multirun, those of each value by itself."""
    if "--help" in words:
        for name in words[1:]:
            help_text(name)
        return
    line = CommandLine.parse(words)
    if any(getattr(line.options, name) for name in NO_RUN):
        return
    if line.options.config_dir is not None:
        # Its files are the user's.
        return
    several = swept_values(line.overrides, line.choices) if line.multirun else {}
    fixed = [word for word in line.overrides if word.lstrip("+").partition("=")[0] not in several]
    first = [values[0] for values in several.values()]
    for values in several.values() or [[]]:
        for value in values or [""]:
            key = value.partition("=")[0]
            others = [word for word in first if word.partition("=")[0] != key]
            compose([*fixed, *others, *([value] if value else [])])


def check_tool(path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the arguments with the tool's own parser, and do nothing else."""
    assert path.is_file()
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *arguments: object, **options: object) -> None:
        parse(parser, *arguments, **options)  # type: ignore[call-overload]
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    monkeypatch.syspath_prepend(str(path.parent))
    with pytest.raises(ParsedError):
        runpy.run_path(str(path), run_name="documented")["main"]()
    if "--" in words and path.name == "launch.py" and "--script" not in words:
        check_training(words[words.index("--") + 1 :])


def check_job(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the script exists and accepts the arguments; test_scripts.py composes the settings."""
    place = next(i for i, word in enumerate(words) if word.endswith(".sh"))
    script = ROOT / words[place]
    assert os.access(script, os.X_OK)
    arguments = [word.replace("%a", "0") for word in words[place + 1 :]]
    if script.stem in ("encode", "curate"):
        check_tool(ROOT / "tools" / f"{script.stem}.py", arguments, monkeypatch)


@pytest.mark.parametrize("command", sorted(set(COMMANDS)), ids=lambda command: f"{command.page}: {command}")
def test_documented_command_works(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    check(command.words, monkeypatch)


@pytest.mark.parametrize(
    "line",
    ["make brain", "pip install nothing", "python tools/smaple.py runs/small", "sbatch slurm/stage9.sh"],
)
def test_wrong_command_fails(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, OSError)):
        check(tuple(line.split()), monkeypatch)


@pytest.mark.parametrize("line", ["python tools/sample.py runs/small --imagge a.png", "svd-ds report"])
def test_wrong_option_fails(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        check(tuple(line.split()), monkeypatch)


def test_wrong_setting_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"there is no key run\.stepps"):
        check(("python", "-m", "svd_ds.train", "run.stepps=4"), monkeypatch)


def test_unchecked_commands_are_documented_ones() -> None:
    assert set(ELSEWHERE) <= {" ".join(command.words) for command in COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_in_bash_blocks(page: Path) -> None:
    """No test checks an indented command."""
    outside = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    assert not re.findall(r"^ {4,}(?:python|make|sbatch|srun|svd-ds) .*", outside, flags=re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_links_exist(page: Path) -> None:
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)]
    assert not [link for link in links if not (page.parent / link).exists()]
    named = re.findall(r"`((?:svd_ds|conf|tools|tests|slurm|sweeps|docs)/[\w./-]*)", text)
    missing = [path for path in named if not (ROOT / path).exists() and path not in OWN_FILES]
    assert not [path for path in missing if not re.search(r"[A-Z]{3,}", path)], "capitals are placeholders"


def test_files_of_the_design_page_exist() -> None:
    block = (ROOT / "docs" / "design.md").read_text().split("```")[1]
    files = {path.name for folder in ("svd_ds", "tools") for path in (ROOT / folder).rglob("*.py")}
    named = set(re.findall(r"(?<!\*)\b\w+\.py", block))
    assert named <= files
    assert len(named) > 80


def test_messages_of_troubleshooting_are_in_the_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    sources = "".join(
        path.read_text()
        for folder in ("svd_ds", "tools", "slurm")
        for path in (ROOT / folder).rglob("*.[ps][yh]")
    )
    # A message may be in several literals.
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)
    quoted = [quote for quote in re.findall(r"`([^`]+)`", text) if " " in quote]
    plain = [quote for quote in quoted if not re.search(r"\d|SIGKILL|the loss is|^tools/|^python ", quote)]
    assert len(plain) > 15
    assert not [quote for quote in plain if quote not in sources]


def test_site_builds_without_network(tmp_path: Path) -> None:
    """The option --strict makes broken links and anchors errors."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    proxies = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    environment = {**os.environ, **proxies, "NO_MKDOCS_2_WARNING": "true"}
    built = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "index.html").read_text()
    assert not re.findall(r"(?:src|href)=\"https?://[^\"]*\.(?:js|css|woff2?)", page)
