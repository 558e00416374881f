"""The cache removes only files that it fetched, and is safe for concurrent processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from svd_ds.data.cache import FOLDER, MARK, STALE_SECONDS, FileCache


def name(number: int) -> str:
    return f"{number:016x}-shard-{number:05d}.tar"


def content(number: int) -> bytes:
    return bytes([number]) * 1000


def read(cache: FileCache, number: int, fetched: list[int] | None = None) -> bytes:
    def fetch() -> Iterator[bytes]:
        if fetched is not None:
            fetched.append(number)
        yield content(number)[:400]
        yield content(number)[400:]

    with cache.open(name(number), 1000, fetch) as file:
        file.seek(0)
        return file.read()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_of_others_are_never_removed(tmp_path: Path) -> None:
    outside, user = tmp_path / "outside", tmp_path / "scratch"
    for path in (
        outside / "shard-0123456789abcdef-a.tar",
        user / "thesis/thesis.tex",
        user / "thesis/checkpoints/final.safetensors",
        user / "shard-00000.tar",
        user / name(1),
        user / f"shard-{name(2)}",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(5000))
    (user / "linked").symlink_to(outside)
    cache = FileCache(user, 2500)
    read(cache, 1)
    ours = user / FOLDER
    for path in (ours / "notes.txt", ours / "shard-00000.tar", ours / f"shard-{name(7)}.backup!"):
        path.write_bytes(os.urandom(5000))
    (ours / f"shard-{name(8)}").symlink_to(outside / "shard-0123456789abcdef-a.tar")
    (ours / f"shard-{name(9)}").mkdir()
    (ours / f"shard-{name(9)}" / "inside").write_bytes(b"x" * 5000)
    others = {path: data for path, data in tree(tmp_path).items() if path != str(ours / f"shard-{name(1)}")}
    for number in (2, 3, 4, 5):
        assert read(cache, number) == content(number)
    left = tree(tmp_path)
    assert {path: left.get(path) for path in others} == others
    assert (ours / f"shard-{name(8)}").is_symlink()
    fetched = [path for path in ours.iterdir() if path.name in {f"shard-{name(n)}" for n in range(1, 6)}]
    assert {path.name for path in fetched} == {f"shard-{name(4)}", f"shard-{name(5)}"}, "size is bounded"


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "shard-00000.tar").write_bytes(b"data of the user")
    with pytest.raises(
        ValueError, match=rf"{FOLDER} is not a data cache: it holds 'shard-00000.tar', but no {MARK}"
    ):
        read(FileCache(tmp_path, 1), 1)
    assert (tmp_path / FOLDER / "shard-00000.tar").read_bytes() == b"data of the user"


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    cache, precious = FileCache(tmp_path, 0), tmp_path / "precious"
    read(cache, 1)
    precious.write_bytes(b"precious")
    for kind in ("shard", "part"):
        (tmp_path / FOLDER / f"{kind}-{name(2)}").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        read(cache, 2)
    (tmp_path / FOLDER / f"part-{name(2)}").unlink()
    assert read(cache, 2) == content(2)
    assert precious.read_bytes() == b"precious"


def test_least_recently_read_are_evicted_and_readers_keep_open_files(tmp_path: Path) -> None:
    cache, fetched = FileCache(tmp_path, 2000), []
    with cache.open(name(0), 1000, lambda: [content(0)]) as first:
        for number in (1, 2, 1, 3, 1, 2):
            read(cache, number, fetched)
            time.sleep(0.01)
        assert fetched == [1, 2, 3, 2]
        first.seek(0)
        assert first.read() == content(0), "a file that is removed stays readable where it is open"


def test_indices_are_kept_by_content(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 1)
    old = cache.store(name(1), b"old")
    new = cache.store(name(1), b"newer")
    read(cache, 2)
    read(cache, 3)
    assert (old.read_bytes(), new.read_bytes()) == (b"old", b"newer"), "a run may still read the old one"
    new.write_bytes(b"")
    assert cache.store(name(1), b"newer").read_bytes() == b"newer", "a file of another size is replaced"


def test_file_of_another_size_is_fetched_again_and_short_fetch_is_refused(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 0)
    read(cache, 1)
    (tmp_path / FOLDER / f"shard-{name(1)}").write_bytes(b"torn")
    assert read(cache, 1) == content(1)
    with pytest.raises(ValueError, match="it has 3 bytes, but its index says 1000"):
        cache.open(name(2), 1000, lambda: [b"abc"])
    assert not list((tmp_path / FOLDER).glob("part-*")), "an incomplete file is removed"
    assert read(cache, 2) == content(2)


def test_unfinished_files_of_killed_processes_are_removed_when_old(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 10**6)
    read(cache, 1)
    old, young = (tmp_path / FOLDER / f"part-{name(number)}" for number in (8, 9))
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(old, (0, time.time() - STALE_SECONDS - 1))
    read(cache, 2)
    assert not old.exists() and young.exists()
    assert read(cache, 9) == content(9), "a young one is fetched from its start"


def test_one_reader_fetches_for_all(tmp_path: Path) -> None:
    fetched: list[int] = []

    def slow(number: int) -> Iterator[bytes]:
        fetched.append(number)
        yield content(number)[:500]
        time.sleep(0.1)
        yield content(number)[500:]

    def reader(found: list[bytes]) -> None:
        with FileCache(tmp_path, 0).open(name(1), 1000, lambda: slow(1)) as file:
            file.seek(0)
            found.append(file.read())

    found: list[bytes] = []
    threads = [threading.Thread(target=reader, args=(found,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [content(1)] * 4 and fetched == [1]
    assert not list((tmp_path / FOLDER).glob("part-*"))


def test_every_process_fetches_if_files_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    assert read(FileCache(tmp_path, 2000), 1) == content(1)
    assert [path.name for path in (tmp_path / FOLDER).glob("*-*")] == [f"shard-{name(1)}"]


def _read_many(folder: Path, seed: int, failures: Any) -> None:
    cache = FileCache(folder, 1500)
    for step in range(150):
        number = (step * (seed + 3)) % 7
        try:
            if read(cache, number) != content(number):
                failures.put(f"{number} has the content of another")
        except Exception as error:
            failures.put(repr(error))


def test_processes_that_evict_each_others_files_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    processes = [context.Process(target=_read_many, args=(tmp_path, seed, failures)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert failures.empty(), failures.get()
    assert [process.exitcode for process in processes] == [0] * 4
