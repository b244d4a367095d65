"""Training recipes: YAML into one phase of training, `hcf train recipes/train/*.yaml`."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor
from transformers import ChineseCLIPConfig, ChineseCLIPModel, PreTrainedTokenizerFast

from taiji import presets
from taiji.autoencoder.kl import FirstStageObjective, measure_scaling_factor
from taiji.data.corpus import Corpus, CorpusConfig
from taiji.data.corpus import load as load_corpus
from taiji.data.release import ReleaseConfig, check_prompts, distillation_captions, to_json
from taiji.pipelines import TaijiStableDiffusionPipeline
from taiji.text import SandwichTextEncoder, TextFusion
from taiji.text.conditioner import TextConditioner
from taiji.text.tokenizer import build_tokenizer
from taiji.train.loop import Batch, Log, LoopConfig, run
from taiji.train.phases import ImageClipObjective, UNetObjective


class TrainRecipe(BaseModel):
    """One phase. `model` is the folder that grows by a component a phase; `work` holds the
    checkpoint and the log. `emoji_share` is the share of emoji in a batch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    phase: Literal["first_stage", "image_clip", "unet", "release"]
    model: Path
    work: Path
    data: CorpusConfig
    loop: LoopConfig = LoopConfig(steps=1)
    release: ReleaseConfig = ReleaseConfig()
    emoji_share: float = Field(0.6, ge=0, le=1)
    kl_weight: float = 1e-5
    min_snr_gamma: float | None = 5.0
    high_noise_share: float = Field(0.0, ge=0, lt=1)


def read_recipe(path: Path, overrides: dict[str, Any] | None = None) -> TrainRecipe:
    """Raises pydantic.ValidationError for unknown keys and wrong values, OSError for no file."""
    tree = yaml.safe_load(path.read_text())
    for dotted, value in (overrides or {}).items():
        node, keys = tree, dotted.split(".")
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
    return TrainRecipe.model_validate(tree)


def train(path: Path, overrides: dict[str, Any] | None = None, log: Log = print) -> Path:
    """Runs the recipe's phase and returns the model folder."""
    recipe = read_recipe(path, overrides)
    corpus = load_corpus(recipe.data)
    log(f"{recipe.phase}: {len(corpus.rows)} emoji images, {len(corpus.scenes)} scenes")
    phases = {
        "first_stage": first_stage, "image_clip": image_clip, "unet": unet, "release": release
    }  # fmt: skip
    metrics = phases[recipe.phase](recipe, corpus, log)
    history = recipe.model / "training.json"
    runs = json.loads(history.read_text()) if history.exists() else {}
    runs[recipe.phase] = {
        "recipe": recipe.model_dump(
            mode="json", exclude={"model": True, "work": True, "data": {"emoji"}}
        ),
        "metrics": metrics,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    _write_text(history, json.dumps(runs, ensure_ascii=False, indent=2))
    return recipe.model


def sampler(corpus: Corpus, emoji_share: float) -> Callable[[np.random.Generator, int], Any]:
    """Index draws (batch,) with a fixed share of emoji when both kinds are there."""
    emoji, total = len(corpus.rows), len(corpus.images)

    def draw(rng: np.random.Generator, count: int) -> Any:
        if emoji in (0, total):
            return rng.integers(0, total, count)
        first = round(count * emoji_share)
        parts = [rng.integers(0, emoji, first), rng.integers(emoji, total, count - first)]
        return np.concatenate(parts)

    return draw


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) float32 in [-1, 1]"""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def first_stage(recipe: TrainRecipe, corpus: Corpus, log: Log) -> dict[str, float]:
    torch.manual_seed(recipe.loop.seed)
    vae = AutoencoderKL(**presets.MINI_VAE)
    pick = sampler(corpus, recipe.emoji_share)

    def draw(rng: np.random.Generator, count: int) -> Batch:
        return {"images": to_tensor(corpus.images[pick(rng, count)])}

    objective = FirstStageObjective(vae, kl_weight=recipe.kl_weight)
    metrics = run(objective, draw, recipe.loop, recipe.work, log)
    probe = np.random.default_rng(recipe.loop.seed).permutation(len(corpus.images))[:512]
    factor = measure_scaling_factor(vae, to_tensor(corpus.images[probe]))
    vae.register_to_config(scaling_factor=factor)
    _save(vae, recipe.model / "vae")
    return {**metrics, "scaling_factor": factor}


def image_clip(recipe: TrainRecipe, corpus: Corpus, log: Log) -> dict[str, float]:
    tokenizer = build_tokenizer(corpus.texts(), max_length=presets.MINI_SANDWICH_TOKENS)
    config = ChineseCLIPConfig(
        text_config={**presets.MINI_CLIP_TEXT, "vocab_size": len(tokenizer)},
        vision_config=presets.MINI_CLIP_VISION,
        projection_dim=presets.MINI_CLIP_PROJECTION,
    )
    torch.manual_seed(recipe.loop.seed)
    model = ChineseCLIPModel(config)
    pick = sampler(corpus, recipe.emoji_share)

    def draw(rng: np.random.Generator, count: int) -> Batch:
        index = pick(rng, count)
        words = Random(int(rng.integers(2**62)))
        ids, mask = _tokens(
            tokenizer, [corpus.caption(i, words) for i in index], presets.MINI_CLIP_TOKENS
        )
        return {
            "images": to_tensor(corpus.images[index]),
            "input_ids": ids,
            "attention_mask": mask,
            "concept": torch.from_numpy(corpus.concept[index]),
        }

    metrics = run(ImageClipObjective(model), draw, recipe.loop, recipe.work, log)
    _save(tokenizer, recipe.model / "tokenizer")
    _save(model, recipe.model / "image_clip")
    return metrics


def unet(recipe: TrainRecipe, corpus: Corpus, log: Log) -> dict[str, float]:
    vae = AutoencoderKL.from_pretrained(recipe.model / "vae").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(recipe.model / "tokenizer")
    clip = ChineseCLIPModel.from_pretrained(recipe.model / "image_clip").eval()
    torch.manual_seed(recipe.loop.seed)
    text_encoder = SandwichTextEncoder(vocab_size=len(tokenizer), **presets.MINI_SANDWICH)
    fusion = TextFusion(**presets.MINI_FUSION)
    model = UNet2DConditionModel(**presets.MINI_UNET)
    scheduler = DDIMScheduler(**presets.MINI_SCHEDULER)
    latents = encode(vae, corpus.images)
    pick = sampler(corpus, recipe.emoji_share)
    size = presets.MINI_IMAGE_SIZE

    def draw(rng: np.random.Generator, count: int) -> Batch:
        index = pick(rng, count)
        words = Random(int(rng.integers(2**62)))
        texts = [corpus.caption(i, words) for i in index]
        clip_ids, clip_mask = _tokens(tokenizer, texts, presets.MINI_CLIP_TOKENS)
        ids, mask = _tokens(tokenizer, texts, presets.MINI_SANDWICH_TOKENS)
        return {
            "latents": latents[index].float(),
            "clip_ids": clip_ids,
            "clip_mask": clip_mask,
            "ids": ids,
            "mask": mask,
        }

    objective = UNetObjective(
        model,
        TextConditioner(clip, text_encoder, fusion),
        scheduler,
        torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32),
        gamma=recipe.min_snr_gamma,
        high_noise_share=recipe.high_noise_share,
    )
    metrics = run(objective, draw, recipe.loop, recipe.work, log)
    pipe = TaijiStableDiffusionPipeline(
        tokenizer,
        clip,
        text_encoder,
        fusion,
        model,
        vae,
        scheduler,
        default_guidance_scale=presets.MINI_GUIDANCE,
    )
    save_pipeline(pipe, recipe.model)
    return metrics


def release(recipe: TrainRecipe, corpus: Corpus, log: Log) -> dict[str, float]:
    """Writes hcf_data/ beside the weights."""
    vae = AutoencoderKL.from_pretrained(recipe.model / "vae").eval()
    positions, captions, row = distillation_captions(corpus, recipe.release)
    prompts = check_prompts(corpus, recipe.data, recipe.release)
    folder = recipe.model / "hcf_data"
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / "latents_distill.safetensors.tmp"
    tensors = {"latents": encode(vae, corpus.images[positions]), "row": torch.tensor(row)}
    save_file(tensors, staging)
    os.replace(staging, folder / "latents_distill.safetensors")
    _write_text(folder / "captions_distill.json", to_json(captions))
    _write_text(folder / "check_prompts.json", to_json(prompts))
    log(f"{len(positions)} latents, {len(captions)} captions, {len(prompts)} prompts in {folder}")
    return {"latents": float(len(positions)), "prompts": float(len(prompts))}


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 64) -> Tensor:
    """uint8 (N, H, W, 3) -> scaled latents (N, C, h, w) float16"""
    factor = vae.config.scaling_factor
    parts = [
        (vae.encode(to_tensor(images[i : i + batch_size])).latent_dist.mean * factor).half()
        for i in range(0, len(images), batch_size)
    ]
    return torch.cat(parts).contiguous()


def save_pipeline(pipe: TaijiStableDiffusionPipeline, folder: Path) -> None:
    """Components in float16, each written beside and renamed. diffusers loads them as float32;
    transformers would keep float16, so ImageCLIP stays float32 on disk."""
    staging = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    halved = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.fusion)
    for module in halved:
        module.half()
    pipe.save_pretrained(staging)
    for module in halved:
        module.float()
    for item in staging.iterdir():
        target = folder / item.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(item, target)
    staging.rmdir()


def _tokens(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int
) -> tuple[Tensor, Tensor]:
    batch = tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return batch.input_ids, batch.attention_mask


def _save(component: Any, folder: Path) -> None:
    staging = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    component.save_pretrained(staging)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
