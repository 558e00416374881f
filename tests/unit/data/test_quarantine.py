"""Unreadable samples are counted once and listed, and end the run if there are too many; so does a hanging
read."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path

import pytest

from svd_ds.data.batching import BatchConfig
from svd_ds.data.config import DataConfig
from svd_ds.data.loader import Loader
from svd_ds.data.quarantine import Fault, Quarantine
from svd_ds.data.shards import Index
from tests.unit.data.test_fuzz import write

FAULTS = [Fault(f"s{number}", "a.tar", "it is junk") for number in range(5)]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def test_each_sample_is_listed_once_across_restarts(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(0.02, 100, path)
    assert quarantine.add(FAULTS[:1], step=3, write=True) == 1
    assert quarantine.add(FAULTS[:2], step=9, write=True) == 2
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 3, "id": "s0", "shard": "a.tar", "cause": "it is junk", "is_retryable": False},
        {"step": 9, "id": "s1", "shard": "a.tar", "cause": "it is junk", "is_retryable": False},
    ]
    later = Quarantine(0.02, 100, path)
    assert later.add(FAULTS[:2]) == 2, "a resumed run has read the list"
    message = (
        r"^sample s2 of a\.tar cannot be read: it is junk; that makes 3 of 100 samples, but "
        r"data\.max_quarantined=0\.02 allows 2; .*quarantine\.jsonl lists them$"
    )
    with pytest.raises(ValueError, match=message):
        later.add(FAULTS[2:3])


def test_small_set_may_have_one_unreadable_sample_unless_the_share_is_0(tmp_path: Path) -> None:
    assert (Quarantine(0.01, 5).allowed, Quarantine(0.0, 5).allowed, Quarantine(0.5, 5).allowed) == (1, 0, 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_replaces_reports_and_stops(tmp_path: Path, num_workers: int) -> None:
    write(tmp_path, [6, 6], {3: "junk", 7: "cut"})
    config = DataConfig(
        str(tmp_path), 1, 8, 8, crop="center", max_quarantined=0.1, num_workers=num_workers, prefetch=1
    )
    loader = Loader(config, 0, 0, 1, BatchConfig(4))
    ids = [name for batch, _ in islice(loader, 6) for name in batch.ids]
    assert "s3" not in ids and "s7" not in ids
    faults = loader.pop_faults()
    assert {(fault.id, Path(fault.shard).name) for fault in faults} == {
        ("s3", "shard-00000.tar"),
        ("s7", "shard-00001.tar"),
    }
    assert all("cannot be decoded" in fault.cause for fault in faults) and not loader.pop_faults()
    write(tmp_path / "worse", [6, 6], dict.fromkeys((1, 3, 7), "junk"))
    config = DataConfig(str(tmp_path / "worse"), 1, 8, 8, max_quarantined=0.1, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"that makes 3 of 12 samples, but .* allows 2$"):
        list(islice(Loader(config, 0, 0, 1, BatchConfig(4)), 9))


def test_set_without_readable_samples_ends_the_run(tmp_path: Path) -> None:
    write(tmp_path, [3], dict.fromkeys(range(3), "junk"))
    config = DataConfig(str(tmp_path), 1, 8, 8, max_quarantined=1.0, num_workers=0)
    with pytest.raises(ValueError, match=r"^no sample in .* can be read: the file cannot be decoded"):
        next(iter(Loader(config, 0, 0, 1, BatchConfig(2))))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_hanging_read_ends_the_run_and_names_the_shard(tmp_path: Path, num_workers: int) -> None:
    write(tmp_path, [3], {})
    config = DataConfig(str(tmp_path), 1, 8, 8, read_timeout_seconds=0.3, num_workers=num_workers)
    loader = Loader(config, 0, 0, 1, BatchConfig(2))
    # Opening a pipe without a writer blocks, like a file of a server that is down.
    (tmp_path / "shard-00000.tar").unlink()
    os.mkfifo(tmp_path / "shard-00000.tar")
    message = r"^a read of .*shard-00000\.tar has hung for data\.read_timeout_seconds=0\.3$"
    with pytest.raises(OSError, match=message):
        next(iter(loader))


@pytest.mark.parametrize(
    ("error", "kind"), [(OSError(116, "stale"), OSError), (ValueError("no"), ValueError)]
)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_too_many_retryable_faults_are_an_os_error(
    error: Exception, kind: type[Exception], share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sample is unreadable while a file system is not available."""
    write(tmp_path, [3], {})
    config = DataConfig(str(tmp_path), 1, 8, 8, max_quarantined=share, num_workers=0)
    loader = Loader(config, 0, 0, 1, BatchConfig(2))

    def away(*_: object) -> None:
        raise error

    monkeypatch.setattr(Index, "open", away)
    with pytest.raises(Exception, match=r"(cannot|can) be read: ") as ended:
        next(iter(loader))
    assert ended.type is kind


def test_missing_shard_is_a_fault_of_its_samples(tmp_path: Path) -> None:
    write(tmp_path, [3, 30], {})
    config = DataConfig(str(tmp_path), 1, 8, 8, max_quarantined=0.1, num_workers=0)
    loader = Loader(config, 0, 0, 1, BatchConfig(11))
    (tmp_path / "shard-00000.tar").unlink()
    ids = [name for batch, _ in islice(loader, 3) for name in batch.ids]
    assert set(ids) == {f"s{number}" for number in range(3, 33)}
    assert {fault.id for fault in loader.pop_faults()} == {"s0", "s1", "s2"}
