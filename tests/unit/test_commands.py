"""The console script `svd-ds`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from svd_ds.commands import command_files, overview
from svd_ds.package_files import package_folder

ROOT = Path(__file__).parents[2]


def svd_ds(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "svd_ds.commands", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_tool_is_a_command() -> None:
    tools = {path.stem.replace("_", "-") for path in (ROOT / "tools").glob("*.py")}
    assert set(command_files()) == {"train", *tools}
    assert all(path.is_file() for path in command_files().values())


def test_folders_of_the_repository_are_found() -> None:
    assert package_folder("conf") == ROOT / "conf"


def test_overview_has_a_line_for_each_command() -> None:
    ended = svd_ds()
    assert ended.returncode == 0
    assert ended.stdout == overview(command_files()) + "\n"
    assert all(f"\n  {name} " in ended.stdout for name in command_files())


def test_unknown_command_is_refused_with_the_nearest() -> None:
    ended = svd_ds("smaple")
    assert ended.returncode == 2
    assert ended.stderr == "error: there is no command smaple: do you mean sample?\n"


def test_exit_codes_and_messages_of_a_command_are_kept(tmp_path: Path) -> None:
    refused = svd_ds("report", str(tmp_path))
    assert refused.returncode == 2 and refused.stderr.startswith("error: ")
    assert svd_ds("train", "optim.lrr=1").returncode == 2
    assert svd_ds("elo", "--help").returncode == 0
