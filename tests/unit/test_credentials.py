"""Credentials in paths and URLs are used, and shown nowhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from svd_ds import credentials
from svd_ds.cli import open_console, print_error, print_line
from svd_ds.compose import compose
from svd_ds.credentials import MASK, redact, redact_tree, remember_tree
from svd_ds.data.config import DataConfig
from svd_ds.data.folders import open_folder
from svd_ds.data.quarantine import Fault, Quarantine
from svd_ds.evaluation.runs import read_run
from svd_ds.jobs.rank_session import RankSession
from svd_ds.jobs.watchdog import WatchdogConfig
from svd_ds.overrides import folder_name
from svd_ds.parallel.env import Env
from svd_ds.run_folder import RunFolder

SECRET = "hunter2hunter2"
PLACES = [
    "https://me:{}@host/shards",
    "https://{}@host/shards",
    "https://me:p@{}@host:8080/shards",
    "https://me:a/{}@host/shards",
    "sftp://me:{}@host/a b/shards",
    "s3://me:{}@bucket/shards",
    "https://host/{{}}?sv=2024&sig={}",
    "https://host/{{}}?a=1&X-Amz-Security-Token={}&b=2",
    "https://host/{{}}?x-goog-signature={}#part",
    "https://host/shards?api_key={}",
    "https://host/shards;token={}",
    "pipe:curl -sf -H 'Authorization: Bearer {}' https://host/{{}}",
    'pipe:curl -sf -H "PRIVATE-TOKEN: {}" https://host/{{}}',
    "pipe:curl -sf -HX-Api-Key:{} https://host/{{}}",
    "pipe:curl --header='Cookie: a=b; session={}' https://host/{{}}",
    "pipe:curl -u me:{} https://host/{{}}",
    "pipe:curl --user 'me:a {}' https://host/{{}}",
    "pipe:curl --proxy-user=me:{} https://host/{{}}",
    "pipe:curl --oauth2-bearer {} https://host/{{}}",
    "pipe:wget --http-password={} -O- https://host/{{}}",
    "pipe:tool --password {} {{}}",
    "pipe:tool --auth-token='{} and more' {{}}",
    "pipe:smbclient -U me%{} //host/share {{}}",
    "pipe:sshpass -p {} ssh me@host cat /shards/{{}}",
    "pipe:sshpass -p'{}' ssh me@host cat /shards/{{}}",
    "pipe:SSHPASS={} sshpass -e ssh host cat {{}}",
    "pipe:AWS_ACCESS_KEY_ID=me AWS_SECRET_ACCESS_KEY={} aws s3 cp s3://bucket/{{}} -",
    "pipe:az storage blob download --account-key {} -n {{}}",
    "pipe:RCLONE_CONFIG_R_PASS={} rclone cat r:{{}}",
    "pipe:git archive --remote=https://oauth2:{}@host/repo HEAD {{}}",
]  # fmt: skip
PLAIN = [
    "https://host:8080/a@b/shards?versionId=3&alt=media",
    "hf://datasets/name/set@main/shards",
    "s3://bucket/shards",
    "pipe:ssh me@host cat /shards/{}",
    "pipe:curl -sf -H 'Accept: text/plain' -H Range:bytes=0-1 https://host/{}",
    "/data/token=3/key=4/shards, v1",
    "runs/noise-key_1",
    "data.path is 'x': it must be a path, and not empty",
    "there is no key optim.learning_rate: use optim.lr",
    "conditioning.num_tokens=77 and model.context_width is 1024: no",
    "step 100  loss 0.1234  lr 1.00e-04  grad 0.123",
]


@pytest.fixture(autouse=True)
def _reset_known_secrets() -> Iterator[None]:
    """Reset the secrets that the previous test registered."""
    yield
    credentials._known.clear()


@pytest.mark.parametrize("place", PLACES)
def test_secret_is_masked_and_the_rest_of_the_path_is_kept(place: str) -> None:
    full = place.format(SECRET)
    assert DataConfig(path=full).path == full, "it is used as it is"
    for text in (full, f"{full} cannot be fetched: {full!r} gave 403", json.dumps({"data.path": full})):
        shown = redact(text)
        assert SECRET not in shown and MASK in shown
        assert redact(shown) == shown
    assert "host" not in full or "host" in redact(full)
    assert redact(place.format("another-secret9")) == redact(full), (
        "a renewed secret gives the same masked path"
    )


@pytest.mark.parametrize("text", PLAIN)
def test_text_without_credentials_is_unchanged(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("place", PLACES)
def test_masked_value_is_refused_by_its_key(place: str) -> None:
    masked = redact(place.format(SECRET))
    with pytest.raises(
        ValueError, match=r"^data\.path is .*: it must be complete: its credentials were masked"
    ):
        DataConfig(path=masked)
    with pytest.raises(
        ValueError, match=r"^data\.mixture has .*: it must be complete: its credentials were masked"
    ):
        DataConfig(mixture={"data/a": 1, masked: 1})


def test_config_of_a_run_does_not_start_another_without_the_secret(tmp_path: Path) -> None:
    url = PLACES[0].format(SECRET)
    words = ["debug=tiny", "data.cache=/cache"]
    RunFolder(tmp_path).open(compose([*words, f"data.path={url}"]).as_dict() | {"code": {}}, step=0)
    again = ["--config-path", str(tmp_path), "--config-name", "config"]
    with pytest.raises(ValueError, match=r"^data\.path is .*give it on the command line"):
        compose(again)
    assert compose([*again, f"data.path={url}"]).data.path == url


@pytest.mark.parametrize("key", ["data.path", "evaluation.path", "frozen.path", "init.from", "data.mixture"])
def test_configs_are_compared_in_their_masked_form(tmp_path: Path, key: str) -> None:
    def settings(secret: str) -> dict[str, Any]:
        tree = compose(["debug=tiny"]).as_dict()
        section, name = key.split(".")
        url = PLACES[11].format(secret)
        tree[section][name] = {"data/a": 1.0, url: 2.0} if key == "data.mixture" else url
        return tree

    folder = RunFolder(tmp_path)
    folder.open(settings(SECRET), step=0)
    for path in (folder.config, folder.config_copy):
        assert SECRET not in path.read_text() and MASK in path.read_text()
    assert folder.check_config_matches(settings("renewed-secret")) is None
    folder.config.write_text(yaml.safe_dump(settings(SECRET)) + "...\n")
    assert folder.check_config_matches(settings("renewed-secret")) is None, (
        "as an earlier version has written it"
    )
    assert SECRET not in str(read_run_settings(folder))


def read_run_settings(folder: RunFolder) -> dict[str, str]:
    folder.metrics.touch()
    return read_run(folder.path).settings


@pytest.mark.parametrize("place", PLACES)
def test_console_and_logs_of_a_failed_run_have_no_secret(
    tmp_path: Path, place: str, capfd: pytest.CaptureFixture[str]
) -> None:
    url = place.format(SECRET)
    env = Env(0, 1, 0, 1, "127.0.0.1", 0, torch.device("cpu"), "gloo")
    with pytest.raises(SystemExit), RankSession(RunFolder(tmp_path), env, WatchdogConfig()):
        print(f"retrying {url}", file=sys.stderr)
        try:
            raise KeyError(url)
        except KeyError as error:
            raise OSError(f"{url} cannot be fetched: 403") from error
    printed = capfd.readouterr()
    assert "cannot be fetched: 403" in printed.err
    texts = {path: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert {path.name for path in texts} == {"rank-00000.log", "outcome.json"}
    assert all("cannot be fetched" in text for text in texts.values())
    assert not any(SECRET in text for text in (*printed, *texts.values()))


def test_console_of_any_command_has_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    url = PLACES[0].format(SECRET)
    print_error(ValueError(url), f"{url} ")
    print_line(url)
    open_console().print(url)
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    assert printed.out.count(MASK) == 2 and printed.err.count(MASK) == 2


def test_traceback_at_the_end_of_a_command_has_no_secret() -> None:
    script = f"""
from svd_ds.cli import run_cli
def main():
    raise KeyError("{PLACES[0].format(SECRET)}")
run_cli(main)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 1 and f"KeyError: 'https://{MASK}@host/shards'" in ended.stderr
    assert SECRET not in ended.stderr.replace(f'KeyError("{PLACES[0].format(SECRET)}")', "")


def test_secret_without_its_url_is_masked_once_a_config_has_it(tmp_path: Path) -> None:
    assert redact(f"no such user {SECRET}") == f"no such user {SECRET}"
    compose(
        [
            "debug=tiny",
            "data.cache=/c",
            "data.path=https://me:hunter2%2Fhunter2@host/{}?se=2026-12-01&sig=abcdefgh",
        ]
    )
    assert (
        redact("denied for hunter2%2Fhunter2") == redact("denied for hunter2/hunter2") == f"denied for {MASK}"
    )
    assert redact("abcdefgh") == MASK
    assert redact("me, on 2026-12-01") == "me, on 2026-12-01", (
        "names of users and dates are also part of other texts"
    )
    remember_tree({"a": ["https://me:x@host"]})
    assert redact("x marks the spot") == "x marks the spot", "so short a secret is masked only in its URL"


@pytest.mark.parametrize("place", PLACES)
def test_quarantine_and_cache_of_a_remote_data_set_have_no_secret(tmp_path: Path, place: str) -> None:
    url = place.format(SECRET)
    folder = open_folder(url, str(tmp_path / "cache"), 0, lambda _: pytest.fail("not opened"))  # type: ignore
    fault = Fault("a", folder.location("shard-0.tar"), f"{url} gave 403")
    assert SECRET not in f"{fault}"
    listed = Quarantine(1.0, 10, tmp_path / "quarantine.jsonl")
    listed.add([fault], write=True)
    assert SECRET not in (tmp_path / "quarantine.jsonl").read_text()
    renewed = open_folder(place.format("renewed-secret"), str(tmp_path), 0, lambda _: pytest.fail("not"))  # type: ignore
    known = Quarantine(1.0, 10, tmp_path / "quarantine.jsonl")
    assert known.add([Fault("a", renewed.location("shard-0.tar"), "403")]) == 1, "it is the same sample"


@pytest.mark.parametrize("place", PLACES)
def test_names_of_files_and_folders_have_no_secret(place: str) -> None:
    from svd_ds.data.folders import _cache_name

    url = place.format(SECRET)
    assert SECRET not in _cache_name(url)
    names = [folder_name([f"data.path={place.format(secret)}"]) for secret in (SECRET, "renewed-secret")]
    assert SECRET not in names[0] and names[0] == names[1], "the multirun resumes in the same folder"


def test_masking_keeps_the_structure_of_a_tree() -> None:
    url = PLACES[0].format(SECRET)
    tree = {"a": {url: 1.5, "b": [url, None, True]}, "c": (url,)}
    shown = f"https://{MASK}@host/shards"
    assert redact_tree(tree) == {"a": {shown: 1.5, "b": [shown, None, True]}, "c": (shown,)}
