"""The training order of Taiji-SD on a tiny random pipeline: encoder first, then all together."""

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import BertConfig, BertModel, ChineseCLIPModel

from taiji import presets
from taiji.data import shapes
from taiji.pipelines import TaijiStableDiffusionPipeline
from taiji.text import SandwichTextEncoder, TextFusion
from taiji.text.captions import lengthen
from taiji.text.conditioner import TextConditioner
from taiji.text.image_clip import image_clip_config
from taiji.text.tokenizer import build_tokenizer, tokens
from taiji.train.loop import LoopConfig
from taiji.train.objective import parameter_groups
from taiji.train.phases.text import Config, new_text
from taiji.train.phases.unet import (
    UNetObjective,
    checkpoint_activations,
    save_pipeline,
    size_condition,
)
from taiji.train.recipe import train

RECORD = Path(__file__).parents[1] / "recipes/train/results/tiny_text.json"
CHARACTERS = [shapes.caption(s) for s, _, _ in shapes.sample(300, 0)]
CHARACTERS.append(lengthen("", 200, Random(0)))
PARTS = ("text_encoder", "fusion", "unet", "vae", "image_clip")


def tiny_pipeline(**fusion: Any) -> TaijiStableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(CHARACTERS, max_length=24)
    return TaijiStableDiffusionPipeline(
        tokenizer,
        ChineseCLIPModel(image_clip_config("tiny", len(tokenizer))).eval(),
        SandwichTextEncoder(vocab_size=len(tokenizer), **presets.TINY_SANDWICH).eval(),
        TextFusion(**presets.TINY_FUSION | fusion),
        UNet2DConditionModel(**presets.TINY_SD_A_UNET).eval(),
        AutoencoderKL(**presets.TINY_KL_F4).eval(),
        DDIMScheduler(**presets.MINI_SCHEDULER),
        default_steps=1,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    save_pipeline(tiny_pipeline(), folder)
    return folder


def file_hash(folder: Path, part: str) -> str:
    (file,) = (folder / part).glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    return {part: file_hash(folder, part) for part in PARTS}


def run(folder: Path, phase: str, **keys: Any) -> Path:
    recipe = {
        "phase": phase,
        "model": str(folder),
        "work": str(folder.with_name(folder.name + "-work")),
        "data": {"shapes": 12, "colours": ["red", "blue"], "kinds": ["circle", "star"]},
        "loop": {"steps": 2, "batch_size": 4, "warmup_steps": 1, "ema_decay": 0.1},
        **keys,
    }
    path = folder.with_name(f"{folder.name}.yaml")
    path.write_text(yaml.safe_dump(recipe))
    return train(path, log=lambda line: None)


def test_encoder_first_moves_nothing_but_encoder_and_fusion(base: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "sandwich_tokens": 130,
        "captions": {"long_share": 0.5, "least_characters": 30},
        "judged": 2,
        "judged_steps": 1,
        "ablations": True,
        "data": {"shapes": 12},
        "loop": {"steps": 2, "batch_size": 4},
    }
    folder = run(tmp_path / "first", "text", base=str(base), **keys)
    metrics = json.loads((folder / "training.json").read_text())["text"]["metrics"]
    parts = ("", "image_clip_", "sandwich_", "unpooled_")
    assert {f"{split}{part}colour" for split in ("", "long_") for part in parts} <= set(metrics)
    assert metrics["tail_distance"] > 0 and metrics["seed_distance"] > 0
    before, after = hashes(base), hashes(folder)
    changed = {part for part in PARTS if before[part] != after[part]}
    assert changed == {"text_encoder", "fusion"}
    pipe = TaijiStableDiffusionPipeline.from_pretrained(folder)
    assert pipe.fusion.config.sandwich_tokens == pipe.text_encoder.config.max_length == 130
    assert pipe("一个红色的圆形", num_inference_steps=1).images[0].size == (64, 64)

    on = run(folder, "text", encoder="base", work=str(tmp_path / "again"))
    assert hashes(on)["unet"] == before["unet"]
    assert hashes(on)["text_encoder"] != after["text_encoder"]


def test_the_bases_own_encoder_is_lengthened(base: Path, tmp_path: Path) -> None:
    """A prompt that fits the base is encoded as before; training goes on from there."""
    pipe = TaijiStableDiffusionPipeline.from_pretrained(base)
    expected, pooled = pipe.encode_prompt(["一个红色的圆形"])
    settings = {"model": "m", "work": "w", "data": {"shapes": 4}, "encoder": "base"}
    assert new_text(Config(**settings), pipe) == (pipe.text_encoder, pipe.fusion)
    pipe.text_encoder, pipe.fusion = new_text(Config(**settings, sandwich_tokens=130), pipe)
    context, same = pipe.encode_prompt(["一个红色的圆形"])
    assert context.shape[1] == 16 + 130
    assert torch.allclose(context[:, : expected.shape[1]], expected, atol=1e-5)
    assert torch.allclose(same, pooled, atol=1e-5)

    keys: dict[str, Any] = {"encoder": "base", "sandwich_tokens": 130}
    folder = run(tmp_path / "long", "text", base=str(base), **keys)
    before, after = hashes(base), hashes(folder)
    assert {part for part in PARTS if before[part] != after[part]} == {"text_encoder", "fusion"}


def test_a_bert_becomes_the_encoder(base: Path, tmp_path: Path) -> None:
    words = len(TaijiStableDiffusionPipeline.from_pretrained(base).tokenizer)

    def save_bert(width: int, vocab_size: int) -> BertModel:
        config = BertConfig(
            vocab_size=vocab_size, hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32,
        )  # fmt: skip
        bert = BertModel(config)
        bert.save_pretrained(tmp_path / "bert")
        return bert

    bert = save_bert(32, words)
    keys = {"base": str(base), "encoder": "bert", "bert": str(tmp_path / "bert")}
    folder = run(tmp_path / "model", "text", **keys)
    encoder = SandwichTextEncoder.from_pretrained(folder / "text_encoder")
    assert encoder.config.sandwich_k == 0 and not encoder.config.sandwich_norm
    start = bert.embeddings.word_embeddings.weight
    assert torch.allclose(encoder.word.weight, start, atol=0.01)  # on from it

    for width, vocab_size, message in ((32, 9, "9 words and 512 tokens"), (16, words, "width 16")):
        save_bert(width, vocab_size)
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "other", "text", **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"encoder": "bert"}, "bert: FOLDER"),
        ({"bert": "b"}, "bert: FOLDER"),
    ],
)
def test_recipes_that_cannot_be_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(model=Path("m"), work=Path("w"), data={"shapes": 4}, **keys)


def test_recomputed_activations_change_nothing(base: Path, tmp_path: Path) -> None:
    """Of a frozen U-Net too, which the gradient passes through."""
    folders = []
    for recompute in (False, True):
        loop = {"steps": 1, "batch_size": 2, "gradient_checkpointing": recompute}
        folders.append(run(tmp_path / f"recompute-{recompute}", "text", base=str(base), loop=loop))
    assert hashes(folders[0]) == hashes(folders[1]) != hashes(base)
    pipe, calls = TaijiStableDiffusionPipeline.from_pretrained(base), []
    checkpoint_activations(pipe, LoopConfig(steps=1, gradient_checkpointing=True))
    for module in (pipe.unet.down_blocks[0], pipe.text_encoder):
        assert module.gradient_checkpointing
    for part in (pipe.text_encoder.sublayers[0], pipe.unet.down_blocks[0].resnets[0]):
        part.register_forward_pre_hook(lambda *_: calls.append(1))
    objective = objective_of(pipe, train_unet=False)
    loss_of(objective, pipe).backward()
    assert len(calls) == 4  # each once more for the backward pass


@pytest.mark.parametrize(
    ("train_text", "moved"),
    [
        ("none", {"unet"}),
        ("fusion", {"unet", "fusion"}),
        ("all", {"unet", "fusion", "text_encoder"}),
    ],
)
def test_joint_phase_goes_on_from_the_folder(
    base: Path, tmp_path: Path, train_text: str, moved: set[str]
) -> None:
    folder = tmp_path / "model"
    save_pipeline(TaijiStableDiffusionPipeline.from_pretrained(base), folder)
    before = hashes(folder)
    assert before == hashes(base)
    slower = {"encoder_lr_scale": 0.1, "encoder_layer_decay": 0.9}
    run(folder, "unet", start="model", train_text=train_text, **slower)
    after = hashes(folder)
    assert {part for part in PARTS if before[part] != after[part]} == moved


def objective_of(pipe: TaijiStableDiffusionPipeline, **keys: Any) -> UNetObjective:
    text = TextConditioner(pipe.image_clip, pipe.text_encoder, pipe.fusion)
    return UNetObjective(pipe.unet, text, pipe.scheduler, size_condition(64), **keys)


def loss_of(objective: UNetObjective, pipe: TaijiStableDiffusionPipeline) -> torch.Tensor:
    ids, mask = tokens(pipe.tokenizer, ["一个红色的圆形"] * 2, 24)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    loss, parts = objective(latents, ids[:, :16], mask[:, :16], ids, mask, generator)
    assert parts["mse"] > 0
    return loss


def test_learning_rates_fall_with_depth() -> None:
    pipe = tiny_pipeline()
    objective = objective_of(pipe, encoder_lr_scale=0.1, encoder_layer_decay=0.9)
    scale = {
        id(p): group["lr_scale"]
        for group in parameter_groups(objective, "")
        for p in group["params"]
    }
    encoder = pipe.text_encoder
    expected = {
        pipe.unet.conv_in.weight: 1.0,
        pipe.fusion.padding: 1.0,
        encoder.final_norm.weight: 0.1,
        encoder.sublayers[3].norm_out.weight: 0.1,
        encoder.sublayers[1].norm_out.weight: 0.09,
        encoder.word.weight: 0.081,
    }
    assert [scale[id(p)] for p in expected] == pytest.approx(list(expected.values()))
    assert not any(id(p) in scale for p in pipe.image_clip.parameters())
    assert len(parameter_groups(objective_of(tiny_pipeline()), "")) == 1


@pytest.mark.parametrize("use_pooled", [True, False])
@pytest.mark.parametrize("encoders", ["both", "image_clip", "sandwich"])
def test_every_ablation_trains_and_samples(encoders: str, use_pooled: bool) -> None:
    """An encoder that is left out is not trained."""
    pipe = tiny_pipeline(encoders=encoders, use_pooled=use_pooled)
    objective = objective_of(pipe)
    used = encoders != "image_clip"
    assert all(p.requires_grad == used for p in pipe.text_encoder.parameters())
    loss_of(objective, pipe).backward()
    assert all(p.grad is not None for p in (*pipe.unet.parameters(), *pipe.fusion.parameters()))
    assert (pipe.text_encoder.word.weight.grad is not None) == used
    with torch.no_grad():
        for p in objective.parameters():
            if p.grad is not None:
                p -= 0.01 * p.grad
    image = pipe("一个红色的圆形", num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (64, 64, 3) and np.isfinite(image).all()


def test_words_beyond_the_hundredth_token_reach_the_image() -> None:
    """Two prompts of 128 characters that differ in their last ones only."""
    pipe = tiny_pipeline(sandwich_tokens=130)
    shape = {**presets.TINY_SANDWICH, "max_length": 130}
    pipe.text_encoder = SandwichTextEncoder(vocab_size=len(pipe.tokenizer), **shape).eval()
    head = lengthen("", 121, Random(0))
    prompts = [head + "一个红色的圆形", head + "一个蓝色的方形"]
    first = len(head) + 1  # [CLS]
    assert 100 < first and max(map(len, prompts)) <= 128
    context, pooled = pipe.encode_prompt(prompts)
    same = (context[0] == context[1]).all(-1)
    assert same[:16].all()  # ImageCLIP reads the beginning
    assert not same[16 + first + 2 : 16 + first + 4].any()
    assert not torch.equal(pooled[0], pooled[1])
    x_t, size = torch.randn(1, 4, 16, 16), size_condition(64)
    with torch.no_grad():
        eps = [
            pipe.unet(
                x_t, 500, c[None], added_cond_kwargs={"text_embeds": p[None], "time_ids": size}
            ).sample
            for c, p in zip(context, pooled, strict=True)
        ]
    assert (eps[0] - eps[1]).abs().max() > 1e-6


def test_the_recorded_run_reads_long_prompts() -> None:
    """By the end of 128 characters alone; with both encoders and the pooled text no worse than
    with either alone or without it."""
    metrics = json.loads(RECORD.read_text())["metrics"]
    assert metrics["colour"] >= 0.90 and metrics["long_colour"] >= 0.80
    assert metrics["tail_distance"] > metrics["seed_distance"]
    for part in ("image_clip", "sandwich", "unpooled"):
        assert metrics["long_colour"] >= metrics[f"long_{part}_colour"]
        assert metrics["colour"] >= metrics[f"{part}_colour"]
