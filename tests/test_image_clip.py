"""ImageCLIP on tiny random towers; two real processes where the negatives of several count."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import ChineseCLIPModel

from taiji.data import shapes
from taiji.data.corpus import Corpus, CorpusConfig
from taiji.text.captions import scene_key
from taiji.text.image_clip import (
    ImageClipObjective,
    ImageTower,
    TextTower,
    contrastive_loss,
    image_clip_config,
    lock_image_tower,
    retrieval_r1,
)
from taiji.train.phases.image_clip import Config, heldout_sets, scene_numbers
from taiji.train.recipe import train

WORDS = 12
CONCEPTS = torch.tensor([0, 1, 2, 1, 3, 4, 0, 5])


def tiny_towers() -> ChineseCLIPModel:
    torch.manual_seed(0)
    return ChineseCLIPModel(image_clip_config("tiny", WORDS))


def batch(rows: slice = slice(None)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(8, 10, dtype=torch.int64)
    mask[::2, 6:] = 0
    made = {
        "images": torch.randn(8, 3, 64, 64, generator=generator),
        "input_ids": torch.randint(1, WORDS, (8, 10), generator=generator),
        "attention_mask": mask,
        "concept": CONCEPTS,
    }
    return {name: tensor[rows] for name, tensor in made.items()}


def loss_of(objective: nn.Module, rows: slice = slice(None)) -> Tensor:
    loss, _ = objective(**batch(rows), generator=torch.Generator().manual_seed(2))
    return loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def naive_loss(text: Tensor, image: Tensor, concept: Tensor, scale: float) -> float:
    """Row by row, in plain Python."""
    total, count = 0.0, len(text)
    for a, b in ((text, image), (image, text)):
        for i in range(count):
            scores = [math.exp(scale * float(a[i] @ b[j])) for j in range(count)]
            positives = [j for j in range(count) if concept[j] == concept[i]]
            logs = [math.log(scores[j] / sum(scores)) for j in positives]
            total -= sum(logs) / len(positives) / count / 2
    return total


def test_loss_is_the_naive_one() -> None:
    model = tiny_towers().eval()
    data = batch()
    text = TextTower(model)(data["input_ids"], data["attention_mask"])
    image = ImageTower(model)(data["images"])
    text, image = text.detach(), image.detach()
    loss, hit = contrastive_loss(text, image, CONCEPTS, torch.tensor(7.0))
    assert loss.item() == pytest.approx(naive_loss(text, image, CONCEPTS, 7.0), abs=1e-5)
    best = (text @ image.t()).argmax(1)
    assert hit.item() == (CONCEPTS[best] == CONCEPTS).float().mean().item()


def test_towers_are_those_of_transformers() -> None:
    model, data = tiny_towers().eval(), batch()
    out = model(data["input_ids"], data["images"], data["attention_mask"])
    text = TextTower(model)(data["input_ids"], data["attention_mask"])
    assert torch.allclose(text, out.text_embeds, atol=1e-6)
    assert torch.allclose(ImageTower(model)(data["images"]), out.image_embeds, atol=1e-6)


def _one_of_two(rank: int, folder: str) -> None:
    """Half of the batch on each of two processes; the first one saves what both agree on."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    try:
        model = DistributedDataParallel(ImageClipObjective(tiny_towers(), chunk_size=3))
        loss = loss_of(model, slice(4 * rank, 4 * rank + 4))
        loss.backward()
        torch.distributed.all_reduce(loss.detach_())
        if rank == 0:
            found = gradients(model.module)
            save_file({**found, "loss": loss / 2}, Path(folder) / "found.safetensors")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Negatives come from both processes, and gradients go back to the one they came from."""
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    found = load_file(tmp_path / "found.safetensors")
    whole = ImageClipObjective(tiny_towers())
    loss = loss_of(whole)
    loss.backward()
    assert found.pop("loss").item() == pytest.approx(loss.item(), abs=1e-6)
    expected = gradients(whole)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name


@pytest.mark.parametrize("masking", [0.0, 0.5])
def test_cached_gradients_are_the_gradients(masking: float) -> None:
    results, kept = [], []
    for chunk_size in (None, 3):
        objective = ImageClipObjective(tiny_towers(), chunk_size=chunk_size, masking=masking)
        stored = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal stored
            stored += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = loss_of(objective)
        kept.append(stored)
        loss.backward()
        results.append((loss, gradients(objective)))
    (loss, plain), (cached_loss, cached) = results
    assert cached_loss.item() == pytest.approx(loss.item(), abs=1e-6)
    assert plain.keys() == cached.keys()
    largest = max(gradient.abs().max().item() for gradient in plain.values())
    worst = max((plain[n] - cached[n]).abs().max().item() for n in plain)
    assert worst < 1e-5 * largest
    pixels = batch()["images"].numel()  # inputs are kept either way
    assert kept[1] - pixels < (kept[0] - pixels) / 100


def test_temperature_is_capped() -> None:
    objective = ImageClipObjective(tiny_towers())
    with torch.no_grad():
        objective.image_clip.logit_scale.fill_(9.0)
    loss_of(objective)
    assert objective.image_clip.logit_scale.exp().item() == pytest.approx(100.0, rel=1e-5)


def test_masking_looks_at_a_share_of_the_patches() -> None:
    objective = ImageClipObjective(tiny_towers(), masking=0.75)
    patches = objective.draw_patches(5, torch.Generator().manual_seed(0))
    assert patches is not None and patches.shape == (5, 4)  # of 16
    assert all(len(set(row.tolist())) == 4 for row in patches)
    tower, images = ImageTower(objective.image_clip.eval()), batch(slice(5))["images"]
    every = torch.arange(16).expand(5, -1)
    assert torch.allclose(tower(images, every), tower(images), atol=1e-6)
    hidden = images.clone()  # what is not looked at does not count
    for image, row in zip(hidden, patches, strict=True):
        unseen = torch.ones(16, dtype=torch.bool)
        unseen[row] = False
        hole = unseen.reshape(4, 4).repeat_interleave(16, 0).repeat_interleave(16, 1)
        image[:, hole] = 0
    assert torch.allclose(tower(hidden, patches), tower(images, patches), atol=1e-6)


def weight_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_a_locked_tower_keeps_its_hash_through_both_stages(tmp_path: Path) -> None:
    def stage(name: str, **keys: Any) -> ChineseCLIPModel:
        recipe = {
            "phase": "image_clip",
            "model": str(tmp_path / name),
            "work": str(tmp_path / f"{name}-work"),
            "preset": "tiny",
            "data": {"shapes": 24, "colours": ["red", "blue"], "kinds": ["circle", "star"]},
            "loop": {"steps": 2, "batch_size": 4, "warmup_steps": 1},
            **keys,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        folder = train(tmp_path / f"{name}.yaml", log=lambda line: None)
        return ChineseCLIPModel.from_pretrained(folder / "image_clip")

    base = stage("base")
    first = {"start": str(tmp_path / "base"), "lock_image_tower": True, "chunk_size": 2}
    locked = stage("locked", **first)
    unlocked = stage("unlocked", start=str(tmp_path / "locked"), positives="scene")
    for part in ("vision_model", "visual_projection"):
        hashes = [weight_hash(getattr(m, part)) for m in (base, locked, unlocked)]
        assert hashes[0] == hashes[1] != hashes[2]
    assert weight_hash(base.text_model) != weight_hash(locked.text_model)
    trained = [n for n, p in locked.named_parameters() if p.requires_grad]
    lock_image_tower(locked)
    left = [n for n, p in locked.named_parameters() if p.requires_grad]
    assert {n.split(".")[0] for n in trained} - {n.split(".")[0] for n in left} == {
        "vision_model",
        "visual_projection",
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lock_image_tower": True}, "lock_image_tower needs start"),
        ({"start": "a", "tokenizer": "b"}, "leave tokenizer out"),
    ],
)
def test_recipes_that_cannot_be_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(model=Path("m"), work=Path("w"), data=CorpusConfig(shapes=4), **keys)


def test_wrong_sizes_and_divided_batches_are_refused(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "phase": "image_clip",
        "model": str(tmp_path),
        "work": str(tmp_path / "work"),
        "preset": "tiny",
        "data": {"shapes": 8, "size": 32},
        "loop": {"steps": 1, "batch_size": 4},
    }
    path = tmp_path / "image_clip.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match="takes 64 pixels, data.size is 32"):
        train(path, log=lambda line: None)
    with pytest.raises(ValueError, match="micro_batches=1, and chunk_size"):
        train(path, {"loop.micro_batches": 2}, log=lambda line: None)


def test_held_out_sets_have_scenes_that_differ() -> None:
    sets = heldout_sets(CorpusConfig(shapes=1, relation_share=0.25), 2)
    assert [len(pairs) for pairs in sets] == [64, 64]
    assert all(len({caption for caption, _ in pairs}) == 64 for pairs in sets)
    with pytest.raises(ValueError, match="1 retrieval_sets of 64"):
        heldout_sets(CorpusConfig(shapes=1, relation_share=0.0, colours=("red", "blue")), 1)


def test_scenes_are_one_concept_in_every_wording() -> None:
    drawn = [scene for scene, _, _ in shapes.sample(60, 0, colours=("red", "blue"))]
    rows: Any = ({"label": "苹果"}, {"label": "梨"})
    images, concept = np.zeros((62, 1, 1, 3), np.uint8), np.array([0, 1, *range(9, 69)])
    number = scene_numbers(Corpus(images, concept, rows, tuple(drawn)))
    assert number[:2].tolist() == [0, 1] and number[2:].min() == 2
    keys = [scene_key(scene) for scene in drawn]
    same = torch.tensor([[a == b for b in keys] for a in keys])
    assert torch.equal(number[2:, None] == number[None, 2:], same) and same.sum() > 60


def test_retrieval_counts_the_diagonal() -> None:
    text = torch.eye(4)
    image = torch.eye(4)[[0, 1, 3, 2]]
    assert retrieval_r1(text, image) == (0.5, 0.5)


@pytest.mark.parametrize(("preset", "image_tower"), [("large", 304.0), ("huge", 632.1)])
def test_sizes(preset: str, image_tower: float) -> None:
    with torch.device("meta"):
        model = ChineseCLIPModel(image_clip_config(preset, 21128))
    parts = (model.vision_model, model.visual_projection)
    millions = sum(p.numel() for part in parts for p in part.parameters()) / 1e6
    assert round(millions, 1) == image_tower
    with pytest.raises(ValueError, match="preset 'giant'"):
        image_clip_config("giant", 10)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_onnx_export_agrees(tower: str, tmp_path: Path) -> None:
    model, data = tiny_towers().eval(), batch()
    module: nn.Module = ImageTower(model) if tower == "image" else TextTower(model)
    names = ["images"] if tower == "image" else ["input_ids", "attention_mask"]
    rows = torch.export.Dim("rows", min=1, max=64)
    torch.onnx.export(
        module.eval(),
        tuple(data[name][:2] for name in names),
        tmp_path / "tower.onnx",
        input_names=names,
        dynamic_shapes=({0: rows},) * len(names),
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "tower.onnx")
    (found,) = session.run(None, {name: data[name].numpy() for name in names})
    with torch.no_grad():
        expected = module(*(data[name] for name in names)).numpy()
    assert found.shape == (8, 32) and np.abs(found - expected).max() < 1e-4
