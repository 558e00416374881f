"""Data sets that are elsewhere: fetched once to a local cache, by webdataset's openers and by fsspec's."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import fsspec
import pytest

from svd_ds.data.config import DataConfig
from svd_ds.data.loader import Loader
from tests.unit.data.test_fuzz import write

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def ids(path: str, cache: Path | None, **changes: object) -> list[str]:
    config = DataConfig(
        path, 1, 8, 8, crop="center", num_workers=0, cache=None if cache is None else str(cache)
    )
    loader = Loader(DataConfig(**{**vars(config), **changes}), 0, 0, 1, 4, 4)
    return [name for batch, _ in islice(loader, 4) for name in batch.ids]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write(tmp_path / "shards", [4, 4], {})
    return tmp_path / "shards"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Tests say nothing."""


@pytest.mark.parametrize("kind", ["pipe", "template", "file", "memory", "http"])
def test_a_url_gives_what_the_folder_gives(shards: Path, tmp_path: Path, kind: str) -> None:
    urls = {
        "pipe": f"pipe:cat {shards}",
        "template": f"pipe:cat {shards}/{{}} | cat",
        "file": f"file://{shards}",
        "memory": "memory://shards",
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
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


def test_a_shard_of_an_earlier_data_set_is_fetched_again(shards: Path, tmp_path: Path) -> None:
    url, cache = f"pipe:cat {shards}/{{}}", tmp_path / "cache"
    ids(url, cache)
    (shards / "index.jsonl").unlink()
    write(shards, [3, 5], {})
    assert ids(url, cache) == ids(str(shards), None)


def test_what_goes_wrong_is_told(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^s3://a/b is fetched from elsewhere: data\.cache must name"):
        ids("s3://a/b", None)
    with pytest.raises(OSError, match=r"^pipe:cat nowhere/index\.jsonl cannot be fetched: "):
        ids("pipe:cat nowhere", tmp_path / "cache")
    with pytest.raises(ValueError, match=r"^nothing://a/index\.jsonl cannot be fetched: Protocol not known"):
        ids("nothing://a", tmp_path / "cache")
