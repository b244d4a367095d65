"""Shards: the same bytes whoever writes them, continued mid-shard, without what is broken."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from taiji.data import shards
from taiji.data.manifest import MANIFEST, make_manifest, read_manifest, write_manifest
from taiji.data.metadata import file_hash, read_bytes
from taiji.data.reader import open_reader, stream
from taiji.data.shards import Shard, write_shards
from taiji.data.sources import ShapesSource, TableSource, TarSource, ingest, ingest_tar
from taiji.data.tar import END, members, tar_bytes

ROWS = 90
NAMES = ("a", "b")


def silent(line: str) -> None: ...


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated pairs as tars."""
    out = tmp_path_factory.mktemp("raw")
    ingest(ShapesSource(count=ROWS, size=32), out, rows_per_part=40, log=silent)
    return out / "source"


@pytest.fixture
def work(raw: Path, tmp_path: Path) -> Path:
    ingest(TarSource(path=raw), tmp_path / "work", rows_per_part=40, log=silent)
    return tmp_path / "work"


def write(work: Path, root: Path, **options: Any) -> list[Shard]:
    """Every row but the tenth; domains by turns."""
    kept, domain = np.ones(ROWS, np.bool_), (np.arange(ROWS) % 2).astype(np.int32)
    kept[10] = False
    return write_shards(
        work, root, kept, domain, NAMES, **{"samples": 20, "log": silent, **options}
    )


def contents(work: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((work / "shards").iterdir())}


def test_two_workers_write_the_bytes_of_one_and_a_second_run_writes_nothing(
    raw: Path, work: Path, tmp_path: Path
) -> None:
    first = write(work, raw)
    assert [(s.name, s.samples) for s in first] == [
        ("a-00000", 20), ("a-00001", 20), ("a-00002", 4),
        ("b-00000", 20), ("b-00001", 20), ("b-00002", 5),
    ]  # fmt: skip
    found = contents(work)
    times = {p: p.stat().st_mtime_ns for p in (work / "shards").iterdir()}
    assert write(work, raw) == first
    assert times == {p: p.stat().st_mtime_ns for p in (work / "shards").iterdir()}
    ingest(TarSource(path=raw), tmp_path / "two", rows_per_part=40, log=silent)
    assert write(tmp_path / "two", raw, workers=2) == first
    assert contents(tmp_path / "two") == found
    # fewer shards later: nothing old stays
    write(work, raw, samples=50)
    assert len(list((work / "shards").glob("*.tar"))) == 2


def test_a_list_of_an_earlier_version_is_made_anew_and_the_tar_stays(raw: Path, work: Path) -> None:
    write(work, raw)
    found = contents(work)
    tar = work / "shards" / "a-00000.tar"
    before, listed = tar.stat().st_mtime_ns, tar.with_suffix(".parquet")
    table = pq.read_table(listed)
    assert table["caption"].null_count == 0 and set(table["width"].to_pylist()) == {32}
    pq.write_table(table.select(["id", "offset", "bytes"]), listed)
    write(work, raw)
    assert contents(work) == found and tar.stat().st_mtime_ns == before


@pytest.mark.parametrize("left", [0, 1, 700, 5000, 20_000, "samples", "all"])
def test_a_part_cut_anywhere_is_continued_to_the_same_bytes(
    raw: Path, work: Path, left: int | str
) -> None:
    shard = write(work, raw)[0]
    expected = contents(work)
    final = work / "shards" / f"{shard.name}.tar"
    whole = final.read_bytes()
    samples = len(whole) - len(END)
    size = {"samples": samples, "all": len(whole)}.get(str(left), left)
    final.with_name(f".{shard.name}.{shard.key[:16]}.part").write_bytes(whole[: int(size)])
    final.unlink()  # the report without its tar, as between the last two steps
    write(work, raw)
    assert contents(work) == expected


def test_continuing_does_not_read_again_what_is_there(
    raw: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write(work, raw)[0]
    final = work / "shards" / f"{shard.name}.tar"
    ends = [m.end for m in members(final) if m.name.endswith(".txt")]
    part = final.with_name(f".{shard.name}.{shard.key[:16]}.part")
    part.write_bytes(final.read_bytes()[: ends[14] + 900])  # 15 samples and a piece
    final.unlink()
    read: list[str] = []

    def count(*arguments: Any) -> bytes:
        read.append("image")
        return read_bytes(*arguments)

    monkeypatch.setattr(shards, "read_bytes", count)
    write(work, raw)
    assert len(read) == 5


def test_broken_images_and_captions_are_skipped_and_listed(raw: Path, tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    image = next(m for m in members(raw / "00000.tar") if m.name.endswith(".png"))
    with (raw / "00000.tar").open("rb") as handle:
        png = image.read(handle)
    for name in ("0", "1", "2", "3"):
        (root / f"{name}.png").write_bytes(png)
    (root / "pairs.csv").write_text(
        "file,caption\n0.png,好\n1.png,很好\n2.png,坏\ufffd字\n3.png,\ngone.png,无\n"
    )
    (root / "1.png").write_bytes(png[:-30])
    out = tmp_path / "out"
    ingest(TableSource(path=root / "pairs.csv"), out, rows_per_part=9, log=silent)
    kept, domain = np.ones(5, np.bool_), np.zeros(5, np.int32)
    shard = write_shards(out, root, kept, domain, ["a"], log=silent)[0]
    assert shard.samples == 1 and len(shard.skipped) == 4
    reasons = " ".join(row["reason"] for row in shard.skipped)
    assert "damaged image" in reasons and "badly decoded" in reasons and "No such file" in reasons
    # mended halfway through: the interrupted shard begins again, in the order of a fresh one
    (root / "1.png").write_bytes(png)
    listed = json.loads((out / "shards" / "a-00000.json").read_text())
    final = out / "shards" / "a-00000.tar"
    final.rename(final.with_name(f".a-00000.{listed['key'][:16]}.part"))
    again = write_shards(out, root, kept, domain, ["a"], log=silent)[0]
    assert again.samples == 2 and len(again.skipped) == 3
    keys = [m.name.partition(".")[0] for m in members(final) if m.name.endswith(".txt")]
    assert keys == sorted(keys)


def test_a_domain_that_is_no_file_name_is_refused(raw: Path, work: Path) -> None:
    kept, domain = np.ones(ROWS, np.bool_), np.zeros(ROWS, np.int32)
    with pytest.raises(ValueError, match="cannot name a file"):
        write_shards(work, raw, kept, domain, ["../a"], log=silent)


def test_members_of_foreign_tars_are_read_and_damage_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    data = tar_bytes("k", {"txt": b"abc", "json": b"{}"})
    path.write_bytes(data)  # no end blocks: a part
    assert [m.name for m in members(path)] == ["k.txt", "k.json"]
    path.write_bytes(data + b"\x01" * 512)
    with pytest.raises(ValueError, match="damaged after"):
        list(members(path))
    path.write_bytes(b"")
    assert list(members(path)) == []


@pytest.fixture
def data_set(raw: Path, work: Path) -> Path:
    written = write(work, raw)
    query = {"domains": {"alpha": 0.5, "caps": {"a": 0.25}}}
    facts: dict[str, Any] = {
        "name": "x", "metadata": "", "rows": ROWS, "filters": {}, "bounds": {}, "rejected": {},
    }  # fmt: skip
    write_manifest(make_manifest(written, query, **facts), work / MANIFEST)
    return work


def test_webdataset_reads_every_sample(data_set: Path) -> None:
    files = sorted(str(path) for path in (data_set / "shards").glob("*.tar"))
    samples = list(webdataset.WebDataset(files, shardshuffle=False).decode("pil"))
    assert len(samples) == ROWS - 1
    for sample in samples:
        assert sample["png"].size == (32, 32) and sample["json"]["caption"] == sample["txt"]
        assert sample["__key__"] == sample["json"]["id"]


def test_the_reader_draws_by_share_and_reads_any_sample(data_set: Path) -> None:
    reader = open_reader(data_set)
    assert len(reader) == ROWS - 1
    image, record = reader.read(50)
    assert image.size == (32, 32) and record["id"] == reader.ids[50].as_py().hex()
    draw = reader.draw(np.random.default_rng(0), 4000)
    shares = np.isin(draw, [i for i in range(len(reader)) if reader.read(i)[1]["domain"] == "a"])
    assert shares.mean() == pytest.approx(0.25, abs=0.02)
    assert np.array_equal(draw, reader.draw(np.random.default_rng(0), 4000))
    assert len(set(draw.tolist())) == len(reader)


def test_the_stream_keeps_the_shares(data_set: Path) -> None:
    samples = stream(data_set, buffer=20)
    found = [next(samples)["json"]["domain"] for _ in range(400)]
    assert found.count("a") / 400 == pytest.approx(0.25, abs=0.06)
    assert sum(record.share for record in read_manifest(data_set).domains.values()) == 1


def test_an_index_is_of_the_tar_beside_it(data_set: Path) -> None:
    for shard in read_manifest(data_set).shards:
        path = data_set / "shards" / f"{shard.name}.tar"
        assert file_hash(path) == shard.sha256 and path.stat().st_size == shard.bytes
        table = pq.read_table(path.with_suffix(".parquet"))
        assert len(table) == shard.samples
        assert table["offset"][0].as_py() == 0


def test_a_pair_with_damaged_metadata_has_no_caption(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for name, data in {
            "a.txt": "一只猫", "a.json": '{"width": 3}', "b.txt": "一只狗", "b.json": '{"width',
        }.items():  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(data.encode())
            archive.addfile(member, io.BytesIO(data.encode()))
    assert ingest_tar((tmp_path / "in.tar", tmp_path / "out.parquet")) == ""
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["caption"], row["width"]) for row in rows] == [("一只猫", 3), (None, None)]
