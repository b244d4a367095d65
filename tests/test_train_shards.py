"""Training from a data set of shards: buckets, latents, damage, other languages, its hash."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file
from test_train_text import tiny_pipeline

from taiji.autoencoder.kl import encode_images, to_tensor
from taiji.data import shapes
from taiji.data.corpus import SKIPPED, CorpusConfig, load, source_of
from taiji.data.manifest import MANIFEST, read_manifest, reweight, write_manifest
from taiji.data.metadata import file_hash
from taiji.data.reader import Reader, open_reader
from taiji.data.recipe import DataRecipe, filter_pairs, shard_pairs
from taiji.data.shard_corpus import ShardCorpus, listed
from taiji.text.captions import only_chinese
from taiji.train.latents import corpus_latents
from taiji.train.phases import release
from taiji.train.phases.unet import save_pipeline
from taiji.train.recipe import read_recipe, train
from taiji.train.settings import step_generators

SIZES = [[48, 80], [64, 64]]
BUCKETS = {"base": 64, "step": 16, "sizes": SIZES}


def silent(line: str) -> None: ...


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 scenes, a third of them 96 pixels wide, two with English captions, in shards of 8."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "in").mkdir()
    rows = ["file,caption,domain"]
    for i, (scene, text, pixels) in enumerate(shapes.sample(36, 0, size=64)):
        wide = i % 3 == 0
        image = Image.new("RGB", (96 if wide else 64, 64), "white")
        image.paste(Image.fromarray(pixels), (16 if wide else 0, 0))
        image.save(folder / "in" / f"{i}.png")
        text = shapes.caption(scene, "en") if i in (4, 5) else text
        rows.append(f"{i}.png,{text},{'wide' if wide else 'square'}")
    (folder / "in" / "pairs.csv").write_text("\n".join(rows) + "\n")
    recipe = DataRecipe.model_validate(
        {
            "name": "tiny",
            "output": folder / "set",
            "source": {"kind": "table", "path": folder / "in" / "pairs.csv"},
            "select": {
                "rules": {"caption": {"column": "caption_ok", "equals": True}},
                "domains": {"alpha": 0.0},  # as many of each
            },
            "shards": {"samples": 8},
        }
    )
    filter_pairs(recipe, log=silent)
    shard_pairs(recipe, log=silent)
    return folder / "set"


@pytest.fixture
def data_set(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "set"))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "model"
    save_pipeline(tiny_pipeline(), folder)
    return folder


def damage(data_set: Path, number: int, *, record: bool = False) -> str:
    """Spoils the image or the record of a sample in its tar; the sample's name."""
    reader = open_reader(data_set)
    name = reader.name(number)
    path = data_set / "shards" / f"{name.partition('/')[0]}.tar"
    data, start = bytearray(path.read_bytes()), int(reader.offset[number])
    end = start + int(reader.size[number])
    place = data.index(b'"caption"', start, end) if record else data.index(b"IDAT", start, end)
    data[place : place + 12] = b"\xff" * 12
    path.write_bytes(data)
    return name


def opened(data_set: Path, work: Path | None = None, **keys: Any) -> ShardCorpus:
    corpus = load(CorpusConfig(manifest=data_set, **keys), work, silent)
    assert isinstance(corpus, ShardCorpus)
    return corpus


def skipped(work: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (work / SKIPPED).read_text().splitlines()]


def write_recipe(folder: Path, phase: str, data_set: Path, **keys: Any) -> Path:
    tree = {
        "phase": phase,
        "model": str(folder / "model"),
        "work": str(folder / "work"),
        "data": {"manifest": str(data_set), "size": 64},
        "loop": {"steps": 2, "batch_size": 4, "warmup_steps": 1},
        **keys,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_unet_learns_from_shards_and_goes_on_after_a_kill(
    data_set: Path, start: Path, tmp_path: Path
) -> None:
    broken = damage(data_set, 3)
    loop = {
        "steps": 4, "batch_size": 4, "micro_batches": 2, "warmup_steps": 1,
        "log_every": 1, "checkpoint_every": 1,
    }  # fmt: skip
    data = {"manifest": str(data_set), "buckets": BUCKETS}
    paths = []
    for name in ("whole", "killed"):
        shutil.copytree(start, tmp_path / name / "model")
        paths.append(
            write_recipe(
                tmp_path / name, "unet", data_set, start="model", data=data, loop=loop,
                latents=str(tmp_path / "latents"),
            )
        )  # fmt: skip

    lines: list[str] = []
    train(paths[0], log=lines.append)
    files = sorted((tmp_path / "latents").rglob("*.safetensors"))
    assert [f.stem for f in files] == [
        "square-00000-64x64", "square-00001-64x64", "square-00002-64x64",
        "wide-00000-48x80", "wide-00001-48x80",
    ]  # fmt: skip
    assert "2 images left out: their captions are not Chinese" in lines
    times = [f.stat().st_mtime_ns for f in files]

    def kill(line: str) -> None:
        if line.startswith("step 3/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(paths[1], log=kill)
    lines.clear()
    train(paths[1], log=lines.append)
    assert "resumed at step 2" in lines
    assert times == [f.stat().st_mtime_ns for f in files]  # encoded once, for both

    name = "unet/diffusion_pytorch_model.safetensors"
    whole, killed, before = (
        load_file(folder / name)
        for folder in (tmp_path / "whole" / "model", tmp_path / "killed" / "model", start)
    )
    assert all(torch.equal(t, killed[n]) for n, t in whole.items())
    assert not all(torch.equal(t, before[n]) for n, t in whole.items())

    digest = read_manifest(data_set).hash
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        run = json.loads((folder / "model" / "training.json").read_text())["unet"]
        assert run["data"] == {"manifest": digest} and run["skipped_samples"] == 1
        state = sorted((folder / "work").rglob("state.json"))[-1]
        assert json.loads(state.read_text())["data"] == {"manifest": digest}
        assert [row["sample"] for row in skipped(folder / "work")] == [broken]
        assert skipped(folder / "work")[0]["reason"] == "not a readable image"

    (tmp_path / "bad.yaml").write_text("- {tag: wide, factor: 3}\n")
    changed = reweight(read_manifest(data_set), data_set, tmp_path / "bad.yaml", silent)
    write_manifest(changed, data_set / MANIFEST)
    with pytest.raises(ValueError, match=rf"data.manifest: {digest[:60]} -> {changed.hash[:60]}"):
        train(paths[1], log=silent)
    train(paths[1], {"loop.accept_changes": ["data.manifest"]}, silent)
    run = json.loads((tmp_path / "killed" / "model" / "training.json").read_text())["unet"]
    assert run["data"] == {"manifest": changed.hash}


SMALL: dict[str, dict[str, Any]] = {
    "vqgan": {
        "architecture": "tiny-vq-f4",
        "objective": {"perceptual_weight": 0.0, "disc_width": 8, "disc_layers": 2},
    },
    "imagen": {},
    "super_resolution": {
        "architecture": "tiny-pixel", "crop": 32, "measured": 1, "levels": [0.0],
        "compared_steps": [], "sampling": {"steps": 1},
    },
    "image_clip": {"preset": "tiny"},
}  # fmt: skip


@pytest.mark.parametrize("phase", SMALL)
def test_every_phase_on_images_takes_a_data_set(data_set: Path, tmp_path: Path, phase: str) -> None:
    names = {damage(data_set, number, record=number > 3) for number in range(8)}
    loop = {"steps": 1, "batch_size": 16, "warmup_steps": 1}
    path = write_recipe(tmp_path, phase, data_set, loop=loop, **SMALL[phase])
    folder = train(path, log=silent)
    run = json.loads((folder / "training.json").read_text())[phase]
    assert run["data"] == {"manifest": read_manifest(data_set).hash}
    assert np.isfinite(run["metrics"]["loss"])
    found = {row["sample"] for row in skipped(tmp_path / "work")}
    assert names & found and found <= names
    card = folder / "vqvae" / "README.md"
    assert phase != "vqgan" or run["data"]["manifest"] in card.read_text()


def test_a_first_stage_reads_its_pieces_from_the_shards(data_set: Path, made: Path) -> None:
    """Full batches of what is there, whatever was met before: another process's, or a restart's."""
    names = [damage(data_set, 3), damage(data_set, 5, record=True)]
    corpora = [opened(data_set), opened(data_set)]
    draws = [corpus.sampler(0.5) for corpus in corpora]
    pieces = [step_generators(0, step, piece)[0] for step in range(6) for piece in range(2)]
    again = [step_generators(0, step, piece)[0] for step in range(6) for piece in range(2)]
    first = [draws[0](rng, 8) for rng in pieces]
    backwards = [draws[1](rng, 8) for rng in reversed(again)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, backwards, strict=True))
    numbers = np.concatenate(first)
    assert len(numbers) == 96 and not {3, 5} & set(numbers.tolist())
    assert sorted(corpora[0].samples.skips.reasons) == [3, 5]
    assert [n.partition("/")[0] for n in names] == ["square-00000"] * 2
    batch = to_tensor(corpora[0].images[first[-1]])
    assert batch.shape == (8, 3, 64, 64)
    whole = opened(made)
    assert np.array_equal(corpora[0].images[3], whole.images[4])  # the next one of its bucket
    assert corpora[0].caption(3, Random(0)) == whole.caption(4, Random(0))
    assert corpora[0].concept[[3, 4]].tolist() == [whole.concept[4]] * 2


def test_a_skipped_sample_is_listed_once_by_all_processes(data_set: Path, tmp_path: Path) -> None:
    names = {damage(data_set, 3), damage(data_set, 5)}
    (tmp_path / SKIPPED).write_text('{"sample": "square-000')  # a torn line
    with (tmp_path / SKIPPED).open("a") as handle:
        handle.write("\n")
    corpora = [opened(data_set, tmp_path), opened(data_set, tmp_path)]
    for number in (3, 5):
        for corpus in corpora:
            corpus.caption(number, Random(0))
    lines = (tmp_path / SKIPPED).read_bytes()
    assert listed(lines) == names and len(lines.splitlines()) == 3


def test_only_what_is_drawn_is_read(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real: Callable[..., Any] = Reader.read

    def count(self: Reader, number: int) -> Any:
        read.append(number)
        return real(self, number)

    monkeypatch.setattr(Reader, "read", count)
    corpus = opened(data_set, buckets=BUCKETS)
    draw = corpus.sampler(0.5)
    index = draw(np.random.default_rng(0), 4)
    images = corpus.images[index]
    assert set(read) == set(index.tolist()) and len(images) == 4
    assert len(corpus.samples.held) <= 4


def test_weights_buckets_and_conditions_are_those_of_the_set(data_set: Path) -> None:
    corpus = opened(data_set, buckets=BUCKETS)
    samples, draw = corpus.samples, corpus.sampler(0.5)
    rng, shapes_seen, wide = np.random.default_rng(0), set(), 0
    for _ in range(60):
        index = draw(rng, 4)
        images, time_ids = corpus.images[index], corpus.time_ids(index)
        assert time_ids is not None and len(set(samples.bucket[index])) == 1
        shapes_seen.add(images.shape[1:3])
        if images.shape[1:3] == (48, 80):
            wide += 1
            assert time_ids[0].tolist() == [64, 96, 2, 0, 48, 80] or time_ids[0, 0] == 64
        else:
            assert time_ids[0].tolist() == [64, 64, 0, 0, 64, 64]
    assert shapes_seen == {(48, 80), (64, 64)}
    assert wide / 60 == pytest.approx(0.5, abs=0.15)  # a third of the images


def test_a_sample_that_is_never_to_be_drawn_stands_for_no_other(
    data_set: Path, tmp_path: Path
) -> None:
    never = open_reader(data_set).ids[4].as_py().hex()
    (tmp_path / "bad.yaml").write_text(f"- {{ids: [{never}], factor: 0}}\n")
    write_manifest(
        reweight(read_manifest(data_set), data_set, tmp_path / "bad.yaml", silent),
        data_set / MANIFEST,
    )
    damage(data_set, 3)
    corpus = opened(data_set)
    numbers = corpus.sampler(0.5)(np.random.default_rng(0), 400)
    assert set(numbers.tolist()) == set(range(36)) - {3, 4}
    assert corpus.samples.find(3)[0] == corpus.samples.find(4)[0] == 5


def test_captions_of_another_language_are_never_drawn(data_set: Path) -> None:
    kept, left_out = only_chinese(opened(data_set), 0.5)
    assert left_out == 2 and kept.samples.weight.sum() == pytest.approx(1.0)
    square = kept.samples.reader.shard < 3
    assert kept.samples.weight[square].sum() == pytest.approx(0.5)  # its share stays
    assert not any("a" in text for text in kept.texts()) and len(list(kept.texts())) == 34
    with pytest.raises(ValueError, match="none of 36 captions has a Chinese share"):
        only_chinese(opened(data_set), 1.1)


def test_latents_are_those_of_the_images_and_of_one_first_stage(
    data_set: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, vae = damage(data_set, 3), tiny_pipeline().vae
    folder = tmp_path / "latents"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")  # it begins with its own share, and does the rest as well
    lines: list[str] = []
    corpus = opened(data_set, tmp_path / "work", buckets=BUCKETS)
    latents = corpus_latents(folder, folder, vae, corpus, lines.append)
    assert [line.partition(":")[0] for line in lines if "latents of" in line] == [
        f"{name}-{size}" for name, size in (
            ("square-00001", "64x64"), ("wide-00000", "48x80"), ("square-00000", "64x64"),
            ("square-00002", "64x64"), ("wide-00001", "48x80"),
        )
    ]  # fmt: skip
    monkeypatch.setenv("RANK", "0")
    again = opened(data_set, tmp_path / "work", buckets=BUCKETS)
    same = corpus_latents(folder, folder, vae, again, lines.append)
    assert len([line for line in lines if "latents of" in line]) == 5
    assert [row["sample"] for row in skipped(tmp_path / "work")] == [broken]
    draw, plain = again.sampler(0.5), opened(data_set, buckets=BUCKETS)
    for step in range(6):
        index = draw(np.random.default_rng(step), 4)
        assert 3 not in index
        expected = encode_images(vae, plain.images[index])
        for found in (latents, same):
            assert torch.allclose(found[index].float(), expected.float(), atol=2e-3)
    mini = load(CorpusConfig(shapes=3))
    first = corpus_latents(None, tmp_path / "mini", vae, mini, silent)
    assert torch.equal(first, encode_images(vae, mini.images))
    monkeypatch.setattr("taiji.train.latents.encode_images", None)  # read, not encoded again
    assert torch.equal(corpus_latents(None, tmp_path / "mini", vae, mini, silent), first)
    monkeypatch.setattr("taiji.train.latents.encode_images", encode_images)
    other = tiny_pipeline().vae
    torch.nn.init.zeros_(other.quant_conv.weight)
    with pytest.raises(ValueError, match="name another folder"):
        corpus_latents(folder, folder, other, again, silent)

    name = "shards/square-00000.tar"
    shutil.copy2(made / name, data_set / name)  # mended: encoded after all
    mended = opened(data_set, buckets=BUCKETS)
    lines.clear()
    latents = corpus_latents(folder, folder, vae, mended, lines.append)
    assert len(lines) == 1 and not mended.samples.skips.reasons
    assert torch.equal(latents[np.array([3])], encode_images(vae, plain.images[[3]]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"shapes": 3}, "data.shapes is of the mini corpus"),
        ({"emoji": "data/emoji"}, "data.emoji is of the mini corpus"),
        ({"buckets": {**BUCKETS, "base": 96, "sizes": None}}, "set both to the same"),
        ({"buckets": {**BUCKETS, "sizes": [[64, 63]]}}, "have no 64x63"),
        ({"manifest": None, "buckets": BUCKETS}, "data.buckets are for data.manifest"),
    ],
)
def test_data_that_cannot_be_meant_are_refused(keys: dict[str, Any], message: str) -> None:
    tree = {"manifest": "set", **keys}
    with pytest.raises(ValidationError, match=message):
        CorpusConfig(**{key: value for key, value in tree.items() if value is not None})


@pytest.mark.parametrize(
    ("phase", "keys", "message"),
    [
        ("vqgan", {"data": {"manifest": "set", "buckets": BUCKETS}}, "phases unet and text"),
        ("release", {}, "for the mini corpus"),
        ("image_clip", {"positives": "scene"}, "captions, not scenes"),
        ("imagen", {"judged": 8}, "no scenes to be judged"),
        ("first_stage", {"emoji_share": 0.5}, "weights of its own"),
    ],
)
def test_phases_refuse_data_they_cannot_take(
    tmp_path: Path, phase: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        read_recipe(write_recipe(tmp_path, phase, Path("set"), **keys))


def test_a_set_that_is_not_whole_is_refused_before_training(data_set: Path, start: Path) -> None:
    with pytest.raises(ValueError, match=r"fewer than 1 images: 32x128 \(0\)"):
        opened(data_set, buckets={**BUCKETS, "sizes": None})
    work = data_set.parent / "run"
    shutil.copytree(start, work / "model")
    buckets = {"base": 62, "step": 15, "sizes": [[62, 62], [47, 77]]}
    data = {"manifest": str(data_set), "size": 62, "buckets": buckets}
    with pytest.raises(ValueError, match="no multiples of 4"):
        train(write_recipe(work, "unet", data_set, start="model", data=data), log=silent)

    listed = data_set / "shards" / "wide-00000.parquet"
    table = pq.read_table(listed)
    pq.write_table(table.select(["id", "offset", "bytes"]), listed)
    with pytest.raises(ValueError, match="earlier version"):
        opened(data_set)
    pq.write_table(table, listed)
    tar = listed.with_suffix(".tar")
    tar.write_bytes(tar.read_bytes()[:-600])
    with pytest.raises(ValueError, match="cut or changed"):
        opened(data_set)
    tar.unlink()
    with pytest.raises(FileNotFoundError, match="hcf data shard"):
        opened(data_set)


def test_the_mini_corpus_is_named_by_its_emoji_and_settings(data_set: Path, tmp_path: Path) -> None:
    (tmp_path / "metadata.parquet").write_bytes(b"a list")
    source = source_of(CorpusConfig(emoji=tmp_path))
    assert source == {"emoji": file_hash(tmp_path / "metadata.parquet")}
    with pytest.raises(FileNotFoundError, match="hcf data build emoji"):
        source_of(CorpusConfig(emoji=tmp_path / "none"))
    keys = {**SMALL["vqgan"], "evaluation": {"scenes": 0}}
    path = write_recipe(tmp_path, "vqgan", tmp_path, data={"shapes": 9}, **keys)
    run = json.loads((train(path, log=silent) / "training.json").read_text())["vqgan"]
    assert run["data"] == {"corpus": run["recipe"]["data"]}
    assert run["data"]["corpus"]["shapes"] == 9 and "manifest" not in run["data"]["corpus"]
    path = write_recipe(tmp_path, "vqgan", data_set, **SMALL["vqgan"])
    with pytest.raises(ValueError, match="data.manifest: None -> "):
        train(path, log=silent)


def test_of_several_processes_the_first_one_releases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    path = write_recipe(tmp_path, "release", tmp_path, data={"shapes": 9})
    assert release.train(read_recipe(path), silent) == {}
    assert not (tmp_path / "model").exists()


def test_an_unreadable_set_says_so(data_set: Path) -> None:
    corpus = opened(data_set, buckets=BUCKETS)
    for number in np.flatnonzero(corpus.samples.bucket == 0).tolist():
        damage(data_set, number)
    with pytest.raises(ValueError, match="no sample of 48x80 pixels can be used"):
        corpus.caption(int(np.flatnonzero(corpus.samples.bucket == 0)[0]), Random(0))
