"""Remote data sets: fetched once to a local cache, by openers of webdataset and fsspec."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import fsspec
import pytest

from svd_ds.data.batching import BatchConfig
from svd_ds.data.config import DataConfig
from svd_ds.data.folders import open_folder
from svd_ds.data.loader import Loader, open_url
from tests.unit.data.test_fuzz import write

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def ids(path: str, cache: Path | None, **changes: object) -> list[str]:
    config = DataConfig(
        path, 1, 8, 8, crop="center", num_workers=0, cache=None if cache is None else str(cache)
    )
    loader = Loader(DataConfig(**{**vars(config), **changes}), 0, 0, 1, BatchConfig(4))
    return [name for batch, _ in islice(loader, 4) for name in batch.ids]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write(tmp_path / "shards", [4, 4], {})
    return tmp_path / "shards"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Discard the log."""


@pytest.mark.parametrize("kind", ["pipe", "template", "file", "memory", "http"])
def test_url_gives_same_batches_as_folder(shards: Path, tmp_path: Path, kind: str) -> None:
    urls = {
        "pipe": f"pipe:cat {shards}",
        "template": f"pipe:cat {shards}/{{}} | cat",
        "file": f"file://{shards}",
        "memory": "memory://shards",
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards)))
    threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
    urls["http"] = f"http://127.0.0.1:{server.server_port}"
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/shards/{path.name}", path.read_bytes())
    try:
        there = ids(urls[kind], tmp_path / "cache", num_workers=0 if kind == "memory" else 1)
    finally:
        server.shutdown()
        server.server_close()
    assert there == ids(str(shards), None)


def test_shards_are_fetched_once(shards: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    url = f"pipe:echo {{}} >> {log}; cat {shards}/{{}}"
    first = ids(url, tmp_path / "cache")
    assert ids(url, tmp_path / "cache") == first
    names = log.read_text().split()
    assert names.count("index.jsonl") == 2, "the index is looked at anew at each start"
    assert names.count("shard-00000.tar") == names.count("shard-00001.tar") == 1


def test_shard_of_earlier_data_set_is_fetched_again(shards: Path, tmp_path: Path) -> None:
    url, cache = f"pipe:cat {shards}/{{}}", tmp_path / "cache"
    ids(url, cache)
    (shards / "index.jsonl").unlink()
    write(shards, [3, 5], {})
    assert ids(url, cache) == ids(str(shards), None)


def test_fetch_errors_name_the_url(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^s3://a/b is remote: data\.cache must name"):
        ids("s3://a/b", None)
    with pytest.raises(OSError, match=r"^pipe:cat nowhere/index\.jsonl cannot be fetched: "):
        ids("pipe:cat nowhere", tmp_path / "cache")
    with pytest.raises(ValueError, match=r"^nothing://a/index\.jsonl cannot be fetched: Protocol not known"):
        ids("nothing://a", tmp_path / "cache")


@pytest.fixture
def served(shards: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards)))
    threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def rename(shards: Path, name: str, make: bool = True) -> None:
    """Rename the first shard in the index, and on disk if `make` is True."""
    index = shards / "index.jsonl"
    header, lines = index.read_text().split("\n", 1)
    fields = json.loads(header)
    if make:
        (shards / name).parent.mkdir(parents=True, exist_ok=True)
        (shards / fields["shards"][0]["name"]).rename(shards / name)
    fields["shards"][0]["name"] = name
    index.write_text(f"{json.dumps(fields)}\n{lines}")


UNSAFE = (
    *(
        "shard.tar; touch PWNED; true",
        "$(touch PWNED)",
        "`touch PWNED`",
        "a.tar|touch PWNED",
        "a\ntouch PWNED\n",
    ),
    *(
        "a.tar'; touch PWNED; '",
        'a.tar"; touch PWNED; "',
        "-rf",
        "sub/-rf",
        "~root/a.tar",
        "{a,b}.tar",
        "*.tar",
    ),
    *(
        "a.tar?x=1",
        "a.tar#x",
        "a%2e%2e/b.tar",
        "a\\b.tar",
        "a&b.tar",
        "a<b.tar",
        "a>b.tar",
        "!x.tar",
        "x:y.tar",
    ),
)
OUTSIDE = (
    "/etc/passwd",
    "\udce9.tar",
    "../a.tar",
    "a/../../b.tar",
    "a//b.tar",
    "./a.tar",
    "",
    ".",
    "a\0b",
    5,
    None,
)


@pytest.mark.parametrize("url", ["pipe:cat a/{}", "pipe:cat a", "http://a", "gs://a", "hf://a", "s3://a"])
def test_unsafe_names_are_not_fetched(url: str, tmp_path: Path) -> None:
    folder = open_folder(url, str(tmp_path), 0.0, open_url)
    for name in (*UNSAFE, *(["a b.tar"] if url.startswith("pipe:") else [])):
        with pytest.raises(ValueError, match=r"^shard name .* is not fetched from") as caught:
            folder.check_name(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", ["pipe:cat {folder}/{{}}", "pipe:sh -c 'cat {folder}/{{}}'"])
@pytest.mark.parametrize("name", [UNSAFE[0], UNSAFE[1], UNSAFE[4], UNSAFE[5]])
def test_name_in_fetched_index_runs_no_command(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, template: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rename(shards, name, make=False)
    with pytest.raises(
        ValueError, match=r"index\.jsonl'? has a header that is damaged: shard name "
    ) as caught:
        ids(template.format(folder=shards), tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("PWNED*"))


@pytest.mark.parametrize("name", OUTSIDE)
def test_name_outside_the_folder_is_refused(shards: Path, tmp_path: Path, name: object) -> None:
    rename(shards, name, make=False)  # type: ignore[arg-type]
    for path in (str(shards), f"file://{shards}"):
        with pytest.raises(ValueError, match="has a header that is damaged: shard name"):
            ids(path, tmp_path / "cache")


def test_names_are_quoted_for_commands(tmp_path: Path) -> None:
    folder = open_folder("pipe:ssh host cat /shards/{}", str(tmp_path), 0.0, open_url)
    location = folder.location("a'; touch PWNED; '")
    assert location == """pipe:ssh host cat /shards/'a'"'"'; touch PWNED; '"'"''"""
    assert folder.location("sub/shard-00000.tar") == "pipe:ssh host cat /shards/sub/shard-00000.tar"


def test_names_with_letters_of_any_language_are_read(shards: Path, tmp_path: Path, served: str) -> None:
    rename(shards, "sub folder/Ümläute, 1+1=2 (b)&c;d'.tar")
    there = ids(str(shards), None)
    rename(shards, "sub folder/Ümläute, 1+1=2.tar", make=False)
    with pytest.raises(FileNotFoundError):
        ids(str(shards), None)
    (shards / "sub folder/Ümläute, 1+1=2 (b)&c;d'.tar").rename(shards / "sub folder/Ümläute, 1+1=2.tar")
    assert (
        ids(str(shards), None)
        == ids(served, tmp_path / "http")
        == ids(f"file://{shards}", tmp_path / "c")
        == there
    )
    (shards / "sub folder").rename(shards / "sub")
    rename(shards, "sub/Ümläute,1+1=2.tar", make=False)
    (shards / "sub/Ümläute, 1+1=2.tar").rename(shards / "sub/Ümläute,1+1=2.tar")
    assert ids(f"pipe:cat {shards}/{{}}", tmp_path / "pipe") == there


def test_cache_smaller_than_a_window_is_refused(shards: Path, tmp_path: Path) -> None:
    message = (
        r"^data\.cache_gb is 1e-05, and the 8 shards of each data set that are read at the same time have "
        r"[\d.e-]+ GB: it must be at least [\d.e-]+, or 0 to keep all shards$"
    )
    with pytest.raises(ValueError, match=message):
        ids(f"pipe:cat {shards}", tmp_path / "cache", cache_gb=1e-5)
    with pytest.raises(ValueError, match=r"^data\.cache_gb is 1e-12, and"):
        ids(f"pipe:cat {shards}", tmp_path / "cache", cache_gb=1e-12)
    (tmp_path / "file").write_text("a file")
    with pytest.raises((ValueError, OSError), match=r"cannot be fetched: .*/file"):
        ids(f"pipe:cat {shards}", tmp_path / "file")


def test_small_cache_fetches_the_index_once(tmp_path: Path) -> None:
    shards, log = tmp_path / "shards", tmp_path / "log"
    write(shards, [2] * 12, {})
    size = (shards / "shard-00000.tar").stat().st_size
    url = f"pipe:echo {{}} >> {log}; cat {shards}/{{}}"
    config = DataConfig(url, 1, 8, 8, num_workers=0, cache=str(tmp_path / "c"), cache_gb=8.5 * size / 1e9)
    loader = Loader(config, 0, 0, 1, BatchConfig(4))
    found = {name for batch, _ in islice(loader, 12) for name in batch.ids}
    assert found == {f"s{number}" for number in range(24)} and not loader.pop_faults()
    assert log.read_text().split().count("index.jsonl") == 1
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "c").rglob("shard-*")) <= 8.5 * size


def test_hanging_fetch_of_the_index_ends_the_run(tmp_path: Path) -> None:
    message = r"^reading pipe:sleep 5 #/index\.jsonl has hung for data\.read_timeout_seconds=0\.2$"
    with pytest.raises(OSError, match=message):
        ids("pipe:sleep 5 #", tmp_path, read_timeout_seconds=0.2)


def test_index_fetched_by_another_run_does_not_replace_ours(shards: Path, tmp_path: Path) -> None:
    url = f"pipe:cat {shards}/{{}}"
    config = DataConfig(url, 1, 8, 8, num_workers=0, cache=str(tmp_path / "cache"))
    loader = Loader(config, 0, 0, 1, BatchConfig(4))
    index = shards / "index.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    rows[1:] = [{**row, "annotations": {"new": 1.0}} for row in rows[1:]]
    index.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    ids(url, tmp_path / "cache")
    assert {name for batch, _ in islice(loader, 4) for name in batch.ids} == {f"s{n}" for n in range(8)}
    assert not loader.pop_faults()


def test_errors_of_storage_clients_name_the_url(tmp_path: Path) -> None:
    class ClientError(Exception):
        """Error that is not an OSError, like those of botocore."""

    def fails(url: str) -> None:
        raise ClientError("Access Denied")

    folder = open_folder("s3://a/b", str(tmp_path), 0.0, fails)  # type: ignore[arg-type]
    with pytest.raises(
        OSError, match=r"^s3://a/b/index\.jsonl cannot be fetched: ClientError: Access Denied$"
    ):
        folder.index_path()


class Redirect(Quiet):
    """Server that redirects every request to a file of the client's machine."""

    target = ""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", f"file://{self.target}/{self.path.rpartition('/')[2]}")
        self.end_headers()


def test_server_cannot_redirect_to_local_files(shards: Path, tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_", (Redirect,), {"target": str(shards)}))
    threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
    try:
        with pytest.raises(OSError, match=r"^http://127\.0\.0\.1:\d+/index\.jsonl cannot be fetched: "):
            ids(f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    finally:
        server.shutdown()
        server.server_close()
