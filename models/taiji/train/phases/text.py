"""Encoder first: the text side of Taiji-SD is trained to a U-Net and first stage that are frozen.

So Stable Diffusion keeps what it can draw and learns Chinese: Taiyi-Stable-Diffusion-Chinese was
made this way (IDEA-CCNL, Fengshenbang-LM). The Sandwich encoder and the fusion are trained, new or
on from a Chinese BERT or the base's own; `captions.long_share` teaches them long prompts as well.
"""

from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from taiji.data import shapes
from taiji.data.corpus import CorpusConfig
from taiji.data.rule_judge import judge
from taiji.pipelines import TaijiStableDiffusionPipeline
from taiji.text import SandwichTextEncoder, TextFusion
from taiji.text.captions import CaptionConfig, lengthen
from taiji.train.loop import Log
from taiji.train.phases.config import CorpusPhaseConfig
from taiji.train.phases.unet import (
    make_objective,
    open_corpus,
    run_on_captions,
    save_pipeline,
)


class Config(CorpusPhaseConfig):
    """`base`: the pipeline whose U-Net, first stage, ImageCLIP and tokenizer are used; the model
    folder itself by default. `encoder`: a new one of the base's shape, the base's own, or that of
    the Chinese BERT checkpoint in `bert`. `sandwich_tokens`: another text length for a new fusion.
    `judged`: held-out scenes that are drawn and scored at the end, by plain and by long prompts.
    """

    phase: Literal["text"] = "text"
    base: Path | None = None
    encoder: Literal["new", "base", "bert"] = "new"
    bert: Path | None = None
    sandwich_tokens: int | None = Field(None, gt=0)
    captions: CaptionConfig = CaptionConfig()
    min_snr_gamma: float | None = 5.0
    high_noise_share: float = Field(0.0, ge=0, lt=1)
    judged: int = Field(0, ge=0)
    judged_steps: int = Field(20, gt=0)

    @model_validator(mode="after")
    def check_encoder(self) -> "Config":
        if (self.encoder == "bert") != (self.bert is not None):
            raise ValueError("encoder: bert goes with bert: FOLDER, and neither without the other")
        if self.encoder == "base" and self.sandwich_tokens is not None:
            raise ValueError("sandwich_tokens is for a new fusion; encoder: base keeps the base's")
        return self


def new_text(
    config: Config, pipe: TaijiStableDiffusionPipeline
) -> tuple[SandwichTextEncoder, TextFusion]:
    """The encoder and fusion that the recipe asks for. Raises ValueError where they do not fit."""
    if config.encoder == "base":
        return pipe.text_encoder, pipe.fusion
    torch.manual_seed(config.loop.seed)
    length = config.sandwich_tokens or pipe.fusion.config.sandwich_tokens
    if config.bert is not None:
        encoder = SandwichTextEncoder.from_bert(config.bert)
    else:
        shape = {**pipe.text_encoder.config, "max_length": length}
        encoder = SandwichTextEncoder.from_config(shape)
    found = encoder.config
    if found["vocab_size"] < len(pipe.tokenizer) or found["max_length"] < length:
        raise ValueError(
            f"an encoder of {found['vocab_size']} words and {found['max_length']} tokens does not "
            f"fit a tokenizer of {len(pipe.tokenizer)} and a text of {length}"
        )
    width = pipe.fusion.config["sandwich_width"]
    if found["width"] != width:
        raise ValueError(
            f"an encoder of width {found['width']}: the base's U-Net is frozen and takes a pooled "
            f"text of width {width} from it; choose a checkpoint of that width"
        )
    return encoder, TextFusion.from_config({**pipe.fusion.config, "sandwich_tokens": length})


@torch.no_grad()
def judge_scenes(
    pipe: TaijiStableDiffusionPipeline, data: CorpusConfig, config: Config, *, long: bool
) -> dict[str, float]:
    """Share of held-out scenes of one group whose colour, shape and count are right."""
    drawn = shapes.sample(
        config.judged, data.seed, size=data.size, colours=data.colours, shapes=data.kinds,
        counts=data.counts, relation_share=0.0, texture_share=0.0, split="heldout",
    )  # fmt: skip
    words = Random(data.seed)
    scenes = [scene for scene, _, _ in drawn]
    prompts = [shapes.caption(scene) for scene in scenes]
    if long:
        prompts = [lengthen(text, config.captions.characters, words) for text in prompts]
    images: Any = []
    for i in range(0, len(prompts), 16):
        generator = torch.Generator().manual_seed(data.seed + i)
        out = pipe(
            prompts[i : i + 16],
            generator=generator,
            num_inference_steps=config.judged_steps,
            output_type="np",
            return_dict=False,
        )
        images += list(out[0])
    scores = [
        judge((image * 255).round().astype(np.uint8), scene.truth())
        for image, scene in zip(images, scenes, strict=True)
    ]
    prefix = "long_" if long else ""
    return {
        prefix + aspect: float(np.mean([bool(score[aspect]) for score in scores]))
        for aspect in ("colour", "shape", "count")
    }


def train(config: Config, log: Log) -> dict[str, float]:
    corpus = open_corpus(config, config.captions.min_chinese, log)
    pipe = TaijiStableDiffusionPipeline.from_pretrained(config.base or config.model)
    pipe.text_encoder, pipe.fusion = new_text(config, pipe)
    objective = make_objective(pipe, config, train_unet=False)
    metrics = run_on_captions(objective, pipe, corpus, config, log)
    if config.judged:
        for long in (False, True) if config.captions.long_share else (False,):
            metrics |= judge_scenes(pipe, config.data, config, long=long)
    save_pipeline(pipe, config.model)
    return metrics
