"""What is shipped beside the mini weights: latents, captions and prompts in hcf_data/."""

import os
from typing import ClassVar, Literal

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from taiji.autoencoder.kl import encode_images
from taiji.data.corpus import load
from taiji.data.release import ReleaseConfig, check_prompts, distillation_captions, to_json
from taiji.train.checkpoint import write_text
from taiji.train.loop import Log
from taiji.train.parallel import rank
from taiji.train.phases.config import CorpusPhaseConfig


class Config(CorpusPhaseConfig):
    takes_manifest: ClassVar[bool] = False

    phase: Literal["release"] = "release"
    release: ReleaseConfig = ReleaseConfig()


def train(config: Config, log: Log) -> dict[str, float]:
    """Writes hcf_data/ beside the weights. There is nothing to share: of several processes the
    first one does it."""
    if rank() != 0:
        return {}
    corpus = load(config.data)
    log(f"{config.phase}: {corpus}")
    vae = AutoencoderKL.from_pretrained(config.model / "vae").eval()
    positions, captions, row = distillation_captions(corpus, config.release, config.emoji_share)
    prompts = check_prompts(corpus, config.data, config.release)
    folder = config.model / "hcf_data"
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / "latents_distill.safetensors.tmp"
    tensors = {"latents": encode_images(vae, corpus.images[positions]), "row": torch.tensor(row)}
    save_file(tensors, staging)
    os.replace(staging, folder / "latents_distill.safetensors")
    write_text(folder / "captions_distill.json", to_json(captions))
    write_text(folder / "check_prompts.json", to_json(prompts))
    log(f"{len(positions)} latents, {len(captions)} captions, {len(prompts)} prompts in {folder}")
    return {"latents": float(len(positions)), "prompts": float(len(prompts))}
