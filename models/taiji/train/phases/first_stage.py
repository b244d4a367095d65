"""The KL first stage of the mini model."""

from typing import Literal

import numpy as np
import torch
from diffusers import AutoencoderKL

from taiji import presets
from taiji.autoencoder.kl import FirstStageObjective, measure_scaling_factor, to_tensor
from taiji.data.corpus import load, sampler
from taiji.train.checkpoint import save_component
from taiji.train.loop import Batch, Log, run
from taiji.train.phases.config import CorpusPhaseConfig


class Config(CorpusPhaseConfig):
    phase: Literal["first_stage"] = "first_stage"
    kl_weight: float = 1e-5


def train(config: Config, log: Log) -> dict[str, float]:
    corpus = load(config.data, config.work, log)
    log(f"{config.phase}: {corpus}")
    torch.manual_seed(config.loop.seed)
    vae = AutoencoderKL(**presets.MINI_VAE)
    pick = sampler(corpus, config.emoji_share)

    def draw(rng: np.random.Generator, count: int) -> Batch:
        return {"images": to_tensor(corpus.images[pick(rng, count)])}

    objective = FirstStageObjective(vae, kl_weight=config.kl_weight)
    metrics = run(objective, draw, config.loop, config.work, log, corpus.source)
    probe = np.random.default_rng(config.loop.seed).permutation(len(corpus))[:512]
    factor = measure_scaling_factor(vae, to_tensor(corpus.images[probe]))
    vae.register_to_config(scaling_factor=factor)
    save_component(vae, config.model / "vae")
    return {**metrics, "scaling_factor": factor}
