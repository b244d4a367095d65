"""An adversarial first stage: VQ-GAN, or KL with the same discriminator.

It adds the component `vqvae` (diffusers' VQModel) or `vae` (AutoencoderKL) with its measured latent
scale and a card that names the feature network of its losses.
"""

import json
import time
from typing import Any, Literal, Self

import numpy as np
import torch
from diffusers import AutoencoderKL, VQModel
from pydantic import BaseModel, ConfigDict, Field, model_validator

from taiji import presets
from taiji.autoencoder.codebook import CodebookConfig
from taiji.autoencoder.kl import KlFirstStage, measure_scaling_factor, to_tensor
from taiji.autoencoder.perceptual import (
    FeatureNetwork,
    PerceptualConfig,
    load_network,
    load_perceptual,
)
from taiji.autoencoder.reconstruction import heldout_scenes, make_frechet, measure
from taiji.autoencoder.vqgan import AdversarialConfig, AdversarialObjective, VqFirstStage
from taiji.data.corpus import Corpus, load, sampler
from taiji.train.checkpoint import save_component, write_text
from taiji.train.loop import Batch, Log, run
from taiji.train.phases.config import CorpusPhaseConfig

VQ: dict[str, dict[str, Any]] = {
    "vq-f4": presets.VQ_F4,
    "vq-f4-plain": presets.VQ_F4_PLAIN,
    "vq-f8": presets.VQ_F8,
    "vq-f16": presets.VQ_F16,
    "vq-f16-1024": presets.VQ_F16_1024,
    "tiny-vq-f4": presets.TINY_VQ_F4,
}
KL: dict[str, dict[str, Any]] = {
    "kl-f4": presets.KL_F4,
    "kl-f8": presets.KL_F8,
    "tiny-kl-f4": presets.TINY_KL_F4,
}
Architecture = Literal[
    "vq-f4",
    "vq-f4-plain",
    "vq-f8",
    "vq-f16",
    "vq-f16-1024",
    "tiny-vq-f4",
    "kl-f4",
    "kl-f8",
    "tiny-kl-f4",
]
# What CompVis/latent-diffusion and taming-transformers (f16) trained them with; a recipe's own
# keys go before. Their rate is 4.5e-6 times the global batch, without weight decay.
_KL_OBJECTIVE = {"gan_weight": 0.5, "disc_start": 50_001}
_F16_OBJECTIVE = {"gan_weight": 0.8, "disc_start": 250_001}
PUBLISHED: dict[str, dict[str, Any]] = {
    "vq-f8": {"gan_weight": 0.6, "disc_start": 1, "disc_layers": 2},
    "vq-f16": _F16_OBJECTIVE,
    "vq-f16-1024": _F16_OBJECTIVE,
    **{name: _KL_OBJECTIVE for name in KL},
}


class EvaluationConfig(BaseModel):
    """After training: `scenes` held-out compositions of the corpus's own world, and whether the
    Frechet distance is measured on them. No scenes, no evaluation; none of a data set either, whose
    world may be another, unless the recipe asks for it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenes: int = Field(512, ge=0)
    seed: int = 0
    frechet: bool = True


class Config(CorpusPhaseConfig):
    """`kl_weight` is for KL architectures, `codebook` for VQ. What `objective` leaves out is as
    published for the architecture. `perceptual` is read where `objective.perceptual_weight` is not
    0, and for the Frechet distance."""

    phase: Literal["vqgan"] = "vqgan"
    architecture: Architecture = "tiny-vq-f4"
    objective: AdversarialConfig = AdversarialConfig()
    perceptual: PerceptualConfig = PerceptualConfig()
    codebook: CodebookConfig = CodebookConfig()
    kl_weight: float = Field(1e-6, ge=0)
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _published_objective(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or not isinstance(tree.get("objective", {}), dict):
            return tree
        published = PUBLISHED.get(tree.get("architecture", ""), {})
        return {**tree, "objective": {**published, **tree.get("objective", {})}}

    @model_validator(mode="after")
    def _one_regulariser(self) -> Self:
        other = "kl_weight" if self.architecture in VQ else "codebook"
        if other in self.model_fields_set:
            raise ValueError(f"{other} means nothing to {self.architecture}: leave it out")
        return self

    @property
    def evaluates(self) -> bool:
        asked = self.data.manifest is None or "evaluation" in self.model_fields_set
        return asked and self.evaluation.scenes > 0


def make_first_stage(config: Config) -> VqFirstStage | KlFirstStage:
    if config.architecture in VQ:
        return VqFirstStage(VQModel(**VQ[config.architecture]), config.codebook)
    return KlFirstStage(AutoencoderKL(**KL[config.architecture]), config.kl_weight)


def evaluate(model: Any, config: Config, network: FeatureNetwork | None) -> dict[str, float]:
    world = {
        "size": config.data.size,
        "colours": config.data.colours,
        "shapes": config.data.kinds,
        "counts": config.data.counts,
        "relation_share": config.data.relation_share,
        "texture_share": config.data.texture_share,
    }
    scenes = heldout_scenes(config.evaluation.scenes, config.evaluation.seed, **world)
    found = measure(model.eval(), scenes, network)
    return {f"heldout_{name}": value for name, value in found.items()}


def card(
    config: Config, model: Any, network: dict[str, Any] | None, source: dict[str, str], found: Any
) -> str:
    """The component's README: what it is, what it was trained against, what was measured."""
    lines = [
        f"# First stage {config.architecture}",
        "",
        f"`{type(model).__name__}` of diffusers, {sum(p.numel() for p in model.parameters()):,} "
        f"parameters, trained by the phase `vqgan` for {config.loop.steps:,} steps of "
        f"{config.loop.batch_size} images of {config.data.size} px.",
        "",
        *(f"- data: {kind} `{digest}`" for kind, digest in source.items()),
        f"- objective: `{config.objective.model_dump_json()}`",
        f"- codebook: `{config.codebook.model_dump_json()}`"
        if config.architecture in VQ
        else f"- KL weight: {config.kl_weight}",
        f"- feature network of the perceptual loss: `{json.dumps(network)}`"
        if network
        else "- no perceptual loss",
        *(f"- {name}: {value:.6g}" for name, value in found.items()),
    ]
    return "\n".join(lines) + "\n"


def train(config: Config, log: Log) -> dict[str, float]:
    corpus = load(config.data, config.work, log)
    log(f"{config.phase}: {corpus}")
    perceptual = load_perceptual(config.perceptual) if config.objective.perceptual_weight else None
    judging = None
    if config.evaluates and config.evaluation.frechet:
        judging = load_network(config.perceptual.network)
        make_frechet(judging)  # a missing package is better known before the training
    torch.manual_seed(config.loop.seed)
    first_stage = make_first_stage(config)
    objective = AdversarialObjective(first_stage, config.objective, perceptual)
    begun = time.process_time()
    draw = make_draw(corpus, config)
    metrics = run(objective, draw, config.loop, config.work, log, corpus.source)
    metrics["cpu_seconds"] = time.process_time() - begun
    model = first_stage.model
    if config.evaluates:
        metrics |= evaluate(model, config, judging)
    probe = np.random.default_rng(config.loop.seed).permutation(len(corpus))[:512]
    metrics["scaling_factor"] = measure_scaling_factor(model, to_tensor(corpus.images[probe]))
    model.register_to_config(scaling_factor=metrics["scaling_factor"])
    folder = config.model / ("vqvae" if config.architecture in VQ else "vae")
    save_component(model, folder)
    network = perceptual.card if perceptual else None
    write_text(folder / "README.md", card(config, model, network, corpus.source, metrics))
    return metrics


def make_draw(corpus: Corpus, config: Config) -> Any:
    pick = sampler(corpus, config.emoji_share)

    def draw(rng: np.random.Generator, count: int) -> Batch:
        return {"images": to_tensor(corpus.images[pick(rng, count)])}

    return draw
