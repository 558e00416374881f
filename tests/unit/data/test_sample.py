"""Any index content is a valid sample, or an error of one sentence that names the index and the line."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svd_ds.data.batching import BatchConfig
from svd_ds.data.config import DataConfig
from svd_ds.data.loader import Loader
from svd_ds.data.quarantine import Quarantine
from svd_ds.data.sample import Sample, parse_sample
from svd_ds.data.shards import Index
from tests.unit.data.test_fuzz import write

FIELDS = [
    "id",
    "shard",
    "members",
    "num_frames",
    "fps",
    "height",
    "width",
    "motion",
    "elevation",
    "annotations",
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**400)
    | st.floats()
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SURROGATES = st.text(st.characters(categories=["Cs", "Cc", "L"]), max_size=4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    write(path, [3, 3], {})
    return path


@pytest.fixture(scope="module")
def lines(shards: Path) -> list[str]:
    return (shards / "index.jsonl").read_text().splitlines()


def with_line(folder: Path, lines: list[str], number: int, line: str | bytes) -> Index:
    content = [line.encode() if isinstance(line, str) else line for line in lines]
    content[number - 1] = line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line
    (folder / "index.jsonl").write_bytes(b"".join(part + b"\n" for part in content))
    return Index.load(folder)


@given(field=st.sampled_from([*FIELDS, "new"]), value=JSON | SURROGATES)
@settings(max_examples=60, deadline=None)
def test_any_value_in_any_field_is_valid_or_one_sentence(
    shards: Path, lines: list[str], field: str, value: Any
) -> None:
    row = {**json.loads(lines[2]), field: value}
    index = with_line(shards, lines, 3, json.dumps(row))
    try:
        samples = list(index.samples())
    except ValueError as error:
        assert str(error).startswith(f"line 3 of {shards}/index.jsonl is damaged: ") and "\n" not in str(
            error
        )
        str(error).encode()
        kept, faults = index.drop_damaged(Quarantine(1.0, 6))
        assert [sample.id for sample in kept.samples()] == ["s0", "s2", "s3", "s4", "s5"]
        assert [fault.id for fault in faults] == ["line 3"] and not faults[0].is_retryable
        return
    assert len(samples) == 6 and isinstance(samples[1], Sample)
    assert all(isinstance(number, int | float) for number in samples[1].annotations.values())
    assert samples[1].fps > 0 and samples[1].motion >= 0


@given(
    key=st.sampled_from(["format", "version", "motion_map", "shards", "new"])
    | st.tuples(st.just("shards"), st.sampled_from(["name", "num_bytes", "num_samples", "new"]))
    | st.tuples(st.just("motion_map"), st.sampled_from(["scores", "buckets", "new"])),
    value=JSON | SURROGATES | st.lists(st.floats() | st.integers(), max_size=3),
)
@settings(max_examples=80, deadline=None)
def test_any_value_in_the_header_is_valid_or_one_sentence(
    shards: Path, lines: list[str], key: Any, value: Any
) -> None:
    header = json.loads(lines[0])
    if isinstance(key, str):
        header[key] = value
    elif key[0] == "shards":
        header["shards"][0][key[1]] = value
    else:
        header["motion_map"][key[1]] = value
    try:
        index = with_line(shards, lines, 1, json.dumps(header))
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and str(shards) in str(error)
    else:
        assert len(list(index.samples())) == 6 and 0 <= index.motion_map.bucket(0.1) <= 255


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"fps": 0}, r"fps is 0: it must be above 0"),
        ({"fps": float("nan")}, r"fps is nan: it must be a number from 0 to 1e\+06"),
        ({"fps": float("inf")}, "fps is inf"),
        ({"fps": 1e300}, "fps is 1e\\+300"),
        ({"fps": "24"}, "fps is '24': it must be a number"),
        ({"fps": True}, "fps is True"),
        ({"motion": float("nan")}, "motion is nan"),
        ({"motion": -1}, "motion is -1"),
        ({"num_frames": 0}, "num_frames is 0: it must be an integer from 1"),
        ({"num_frames": 1.5}, "num_frames is 1.5"),
        ({"height": -8}, "height is -8"),
        ({"height": 16000, "width": 16000}, "height x width is 16000 x 16000: it must be at most 89478485"),
        ({"elevation": 120}, "elevation is 120: it must be a number from -90 to 90"),
        ({"id": "../../etc/hosts"}, "id is '../../etc/hosts': it must consist of letters"),
        ({"id": 5}, "id is 5"),
        ({"shard": 99}, "shard is 99: it must be an integer from 0 to 1"),
        ({"shard": -1}, "shard is -1"),
        ({"shard": 0}, "shard is 0, but its line in the index belongs to shard 1"),
        ({"members": {}}, "members has no video or image, but nothing"),
        ({"members": {"json": [512, 9]}}, "members has no video or image, but json"),
        (
            {"members": {"png": [512, 10**12]}},
            "members end at byte 1000000000512, but shard .*tar has .* bytes",
        ),
        ({"members": {"png": [512, 2**70]}}, r"members.png\[1\] is 1180591620717411303424"),
        ({"members": {"png": [-512, 9]}}, r"members.png\[0\] is -512"),
        (
            {"members": {"png": [513, 9]}},
            r"members.png\[0\] is 513: it must be a tar offset, a multiple of 512",
        ),
        ({"members": {"png": ["512", 9]}}, r"members.png\[0\] is '512'"),
        ({"members": {"png": [512]}}, r"members.png is \[512\]: it must be \[offset, size\]"),
        ({"members": {"png": [512, 9], "/../x": [512, 9]}}, r"members is .*: it must map extensions"),
        (
            {"members": {"png": [512, 9], "json": [512, 2**25]}},
            r"members.json\[1\] is 33554432 bytes: it must be at most 16777216",
        ),
        ({"annotations": [1]}, r"annotations is \[1\]: it must map names to numbers"),
        (
            {"depth": 3},
            "it has a field 'depth', which this version of svd_ds does not know: a newer one wrote",
        ),
    ],
)
def test_wrong_line_is_one_unreadable_sample(
    shards: Path, lines: list[str], changes: dict[str, Any], cause: str
) -> None:
    index = with_line(shards, lines, 5, json.dumps({**json.loads(lines[4]), **changes}))
    with pytest.raises(ValueError, match=rf"^line 5 of .*index\.jsonl is damaged: {cause}"):
        list(index.samples())
    config = DataConfig(str(shards), 1, 8, 8, num_workers=0, max_quarantined=0.2)
    loader = Loader(config, 0, 0, 1, BatchConfig(5))
    found = [name for batch, _ in islice(loader, 3) for name in batch.ids]
    assert sorted(set(found)) == ["s0", "s1", "s2", "s4", "s5"] and len(found) == 15
    faults = loader.pop_faults()
    assert [(fault.id, fault.shard) for fault in faults] == [("line 5", f"{shards}/index.jsonl")]
    assert re.match(cause, faults[0].cause)
    message = (
        rf"^sample line 5 of .*index\.jsonl cannot be read: {cause}.*; that makes 1 of 6 samples, but data"
    )
    with pytest.raises(ValueError, match=message):
        Loader(DataConfig(str(shards), 1, 8, 8, num_workers=0, max_quarantined=0.0), 0, 0, 1, BatchConfig(5))


@pytest.mark.parametrize(
    "line",
    [b"", b"not json", b"\xff\xfe", b"[" * 100_000, b'{"id": "s3"}', b"null", b"9" * 5000, b"\x00" * 40],
)
def test_line_that_is_not_json_is_one_unreadable_sample(shards: Path, lines: list[str], line: bytes) -> None:
    index = with_line(shards, lines, 5, line)
    kept, faults = index.drop_damaged(Quarantine(0.5, 6))
    assert [sample.id for sample in kept.samples()] == ["s0", "s1", "s2", "s4", "s5"]
    assert [fault.id for fault in faults] == ["line 5"]
    assert kept.shard_sizes == (3, 2) and kept.fingerprint != index.fingerprint


@pytest.mark.parametrize(
    "missing", ["id", "shard", "members", "num_frames", "fps", "height", "width", "motion"]
)
def test_missing_field_is_named(lines: list[str], missing: str) -> None:
    row = json.loads(lines[1])
    del row[missing]
    with pytest.raises(ValueError, match=f"^it has no {missing}$"):
        parse_sample(row)


def test_sample_with_repeated_id_is_left_out(shards: Path, lines: list[str]) -> None:
    rows = [json.loads(line) for line in lines]
    content = [
        lines[0],
        *(json.dumps({**row, "id": "s1" if row["id"] in ("s3", "s5") else row["id"]}) for row in rows[1:]),
    ]
    index = with_line(shards, content, 1, content[0])
    kept, faults = index.drop_damaged(Quarantine(0.5, 6))
    assert [sample.id for sample in kept.samples()] == ["s0", "s1", "s2", "s4"]
    assert [(fault.id, fault.cause) for fault in faults] == [
        ("s1 (line 5)", "line 3 has the same id"),
        ("s1 (line 7)", "line 3 has the same id"),
    ]


def test_members_of_other_samples_are_detected(shards: Path, lines: list[str]) -> None:
    rows = [json.loads(line) for line in lines]
    mixed = {**rows[1]["members"], "png": rows[2]["members"]["png"]}
    index = with_line(shards, lines, 2, json.dumps({**rows[1], "members": mixed}))
    with index.open(index.sample(0)) as read:
        assert json.loads(read("json"))["num_frames"] == 1
        with pytest.raises(
            ValueError, match=r"^at the offset of its \.png the shard has sample s1: the index is wrong$"
        ):
            read("png")
    swapped = [
        lines[0],
        *(
            json.dumps({**row, "members": other["members"]})
            for row, other in ((rows[1], rows[2]), (rows[2], rows[1]))
        ),
        *lines[3:],
    ]
    with_line(shards, swapped, 1, lines[0])
    loader = Loader(
        DataConfig(str(shards), 1, 8, 8, num_workers=0, max_quarantined=0.5), 0, 0, 1, BatchConfig(6)
    )
    assert {name for batch, _ in islice(loader, 4) for name in batch.ids} == {"s2", "s3", "s4", "s5"}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({}, "does not begin with the header of an index of svd_ds shards"),
        ({"format": "svd_ds shards"}, "has format version None; this program reads 1"),
        ({"format": "svd_ds shards", "version": True}, "has format version True"),
        ({"format": "svd_ds shards", "version": 1}, "has a header that is damaged: it has no motion_map"),
        ({"shards": []}, "lists no shards"),
        ({"shards": {}}, "lists no shards"),
        ({"columns": 1}, "has a field 'columns', which this version of svd_ds does not know"),
        ({"motion_map": {"scores": [2, 1], "buckets": [0, 1]}}, "both ascending"),
        ({"motion_map": {"scores": [0, 1], "buckets": [0, 1]}}, "scores above 0"),
        ({"motion_map": {"scores": [1], "buckets": [0, 1]}}, "as many buckets as scores"),
        ({"motion_map": {"scores": [1], "buckets": [float("nan")]}}, "motion_map.buckets is nan"),
    ],
)
def test_wrong_header_is_refused_in_one_sentence(
    shards: Path, lines: list[str], header: dict[str, Any], message: str
) -> None:
    whole = header if "format" in header or not header else {**json.loads(lines[0]), **header}
    with pytest.raises(ValueError, match=rf"^{shards}/index\.jsonl .*{message}"):
        with_line(shards, lines, 1, json.dumps(whole))


def test_shard_listed_twice_is_refused(shards: Path, lines: list[str]) -> None:
    header = json.loads(lines[0])
    header["shards"][1]["name"] = header["shards"][0]["name"]
    with pytest.raises(ValueError, match=r"lists shard 'shard-00000\.tar' 2 times"):
        with_line(shards, lines, 1, json.dumps(header))


def test_annotations_that_are_not_numbers_are_left_out(lines: list[str]) -> None:
    values = {
        "a": float("nan"),
        "b": True,
        "c": None,
        "d": "5",
        "e": [1],
        "f": 0.5,
        "g": float("inf"),
        "h": 3,
    }
    assert parse_sample({**json.loads(lines[1]), "annotations": values}).annotations == {"f": 0.5, "h": 3}
    assert parse_sample({**json.loads(lines[1]), "annotations": None}).annotations == {}
