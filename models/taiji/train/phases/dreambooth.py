"""A LoRA of one character: DreamBooth on the base that draws characters.

A few images of the subject under a rare word, beside characters that the base itself draws and a
replay of packs. Measured: who and what it draws by the word, an action that was never shown
included, and what is left of all other characters.

B batch, C latent channels, h w latent grid, S text tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from taiji.adapters.lora import (
    BatchShares,
    LoraSettings,
    add_lora,
    dreambooth_loss,
    save_lora,
    trained_share,
)
from taiji.data import characters
from taiji.data.characters import POSES, Character
from taiji.pipelines import TaijiStableDiffusionPipeline
from taiji.train.loop import Batch, Log, run
from taiji.train.phases.character_base import (
    FROZEN,
    CharacterPhaseConfig,
    Draw,
    Packs,
    caption_tokens,
    captions,
    draw_images,
    make_packs,
    parts,
    score,
)
from taiji.train.phases.unet import UNetObjective, size_condition

Parts = dict[str, float]


class DreamBoothConfig(BaseModel):
    """`word` names the subject, number `subject` of the held-out characters; `shots` images, of as
    many actions, show it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lora: LoraSettings = LoraSettings()
    shares: BatchShares = BatchShares()
    subject: int = Field(0, ge=0)
    word: str = Field("u", min_length=1)
    shots: int = Field(3, gt=0, le=len(POSES))
    prior_images: int = Field(32, gt=0)


class LoraObjective(UNetObjective):
    """DreamBooth: rows are the subject's, then the prior's, then general ones."""

    def __init__(
        self, pipe: TaijiStableDiffusionPipeline, size: int, lora: LoraSettings, shares: BatchShares
    ) -> None:
        super().__init__(*parts(pipe), size_condition(size), **FROZEN)
        self.trained, self.shares = add_lora(self.unet, lora), shares

    def forward(  # type: ignore[override]
        self, latents: Tensor, generator: torch.Generator, **ids: Tensor
    ) -> tuple[Tensor, Parts]:
        """latents (B, C, h, w) scaled, ids and masks (B, S) -> loss, parts"""

        def loss_of(rows: slice) -> tuple[Tensor, Parts]:
            texts = {name: tensor[rows] for name, tensor in ids.items()}
            return super(LoraObjective, self).forward(latents[rows], generator=generator, **texts)

        return dreambooth_loss(loss_of, len(latents), self.shares)


def train_lora(
    config: CharacterPhaseConfig,
    chosen: DreamBoothConfig,
    pipe: TaijiStableDiffusionPipeline,
    packs: Packs,
    unseen: Sequence[Character],
    log: Log,
) -> dict[str, float]:
    torch.manual_seed(config.loop.seed)
    if chosen.subject >= len(unseen):
        raise ValueError(f"subject={chosen.subject} of {len(unseen)} held-out characters")
    subject = unseen[chosen.subject]
    others = [one for one in unseen if one != subject][: config.judged]
    before = general(config, pipe, others, "general_before_")
    draw = dreambooth_draw(config, chosen, pipe, packs, subject)
    objective = LoraObjective(pipe, config.characters.size, chosen.lora, chosen.shares)
    number, share = trained_share(pipe.unet, objective.trained)
    log(f"lora: {number:,} parameters are trained, {share:.1%} of the U-Net")
    metrics = run(objective, draw, config.loop, config.work, log)
    save_lora(pipe.unet, config.model / "lora")
    metrics |= {"trained_parameters": float(number), "trained_share": share} | before
    wanted = [(subject, pose) for pose in POSES] * config.judged
    texts = [chosen.word + characters.caption(None, pose) for _, pose in wanted]
    pipe.to(pipe.unet.device)
    images = draw_images(pipe, texts, config)
    metrics |= score(images, wanted) | general(config, pipe, others, "general_")
    new = [i for i, (_, pose) in enumerate(wanted) if pose in list(POSES)[chosen.shots :]]
    return metrics | (score(images[new], [wanted[i] for i in new], "new_action_") if new else {})


def dreambooth_draw(
    config: CharacterPhaseConfig,
    chosen: DreamBoothConfig,
    pipe: TaijiStableDiffusionPipeline,
    packs: Packs,
    subject: Character,
) -> Draw:
    """Batches of the subject's images, of the base's own characters and of general packs."""
    shown = make_packs([subject], config.characters.model_copy(update={"variations": 1}), pipe)
    poses = [list(POSES)[i % len(POSES)] for i in range(chosen.prior_images)]
    with torch.no_grad():
        out: Any = pipe(
            [characters.caption(None, pose) for pose in poses],
            num_inference_steps=config.steps,
            guidance_scale=config.guidance_scale,
            generator=torch.Generator().manual_seed(config.loop.seed),
            output_type="latent",
        )
    prior: Tensor = out.images

    def draw(rng: np.random.Generator, count: int) -> Batch:
        subjects, priors, replays = chosen.shares.rows(count)
        a = rng.integers(0, chosen.shots, subjects)
        b = rng.integers(0, len(prior), priors)
        c = rng.integers(0, len(packs.latents), replays)
        texts = [chosen.word + characters.caption(None, shown.pose(i)) for i in a.tolist()]
        texts += [characters.caption(None, poses[i]) for i in b.tolist()]
        texts += captions(packs, c.tolist(), 1.0, rng)
        latents = torch.cat([shown.latents[a], prior[b], packs.latents[c]])
        return {"latents": latents, **caption_tokens(pipe, texts)}

    return draw


def general(
    config: CharacterPhaseConfig,
    pipe: TaijiStableDiffusionPipeline,
    others: Sequence[Character],
    prefix: str,
) -> dict[str, float]:
    """What the pipeline draws by whole captions of other characters."""
    wanted = [(who, pose) for who in others for pose in POSES]
    texts = [characters.caption(who, pose) for who, pose in wanted]
    images = draw_images(pipe, texts, config)
    return score(images, wanted, prefix)
