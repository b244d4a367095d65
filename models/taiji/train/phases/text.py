"""Encoder first: the text side of Taiji-SD is trained to a U-Net and first stage that are frozen.

So Stable Diffusion keeps what it can draw and learns Chinese: Taiyi-Stable-Diffusion-Chinese was
made this way (IDEA-CCNL, Fengshenbang-LM). The Sandwich encoder and the fusion are trained, new or
on from a Chinese BERT or the base's own; `captions.long_share` teaches them long prompts as well.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ConfigMixin
from pydantic import Field, model_validator

from taiji.pipelines import TaijiStableDiffusionPipeline
from taiji.text import SandwichTextEncoder, TextFusion
from taiji.text.captions import CaptionConfig
from taiji.train.loop import Log
from taiji.train.phases.config import LatentPhaseConfig
from taiji.train.phases.text_judge import judge_text
from taiji.train.phases.unet import (
    make_objective,
    open_corpus,
    run_on_captions,
    save_pipeline,
)


class Config(LatentPhaseConfig):
    """`base`: the pipeline whose U-Net, first stage, ImageCLIP and tokenizer are used; the model
    folder itself by default. `encoder`: a new one of the base's shape, the base's own, or that of
    the Chinese BERT checkpoint in `bert`. `sandwich_tokens`: another text length, to which the
    base's own encoder and fusion are lengthened. `modulate_pooled`: added to the
    fusion if the base has none. `judged`: held-out scenes that are drawn and scored at the end, by
    plain and by long prompts; with `ablations`, also without either encoder and without the pooled
    text.
    """

    phase: Literal["text"] = "text"
    base: Path | None = None
    encoder: Literal["new", "base", "bert"] = "new"
    bert: Path | None = None
    sandwich_tokens: int | None = Field(None, gt=0)
    modulate_pooled: bool = False
    captions: CaptionConfig = CaptionConfig()
    min_snr_gamma: float | None = 5.0
    high_noise_share: float = Field(0.0, ge=0, lt=1)
    judged: int = Field(0, ge=0)
    judged_steps: int = Field(20, gt=0)
    ablations: bool = False

    @model_validator(mode="after")
    def check_encoder(self) -> "Config":
        if (self.encoder == "bert") != (self.bert is not None):
            raise ValueError("encoder: bert goes with bert: FOLDER, and neither without the other")
        return self


def settings_of(module: ConfigMixin) -> dict[str, Any]:
    """Its constructor's arguments. `from_config` would put defaults back that are changed here."""
    return {key: value for key, value in module.config.items() if not key.startswith("_")}


def new_text(
    config: Config, pipe: TaijiStableDiffusionPipeline
) -> tuple[SandwichTextEncoder, TextFusion]:
    """The encoder and fusion that the recipe asks for. Raises ValueError where they do not fit."""
    held = settings_of(pipe.fusion)
    length = config.sandwich_tokens or held["sandwich_tokens"]
    modulate = config.modulate_pooled or held["modulate_pooled"]
    wanted = {**held, "sandwich_tokens": length, "modulate_pooled": modulate}
    if config.encoder == "base" and wanted == held:
        return pipe.text_encoder, pipe.fusion
    if config.encoder == "base":
        longest = max(length, pipe.text_encoder.config.max_length)
        fusion = pipe.fusion.lengthened(length, modulate_pooled=modulate)
        return pipe.text_encoder.lengthened(longest), fusion
    torch.manual_seed(config.loop.seed)
    if config.bert is not None:
        encoder = SandwichTextEncoder.from_bert(config.bert)
    else:
        encoder = SandwichTextEncoder(**settings_of(pipe.text_encoder) | {"max_length": length})
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
    return encoder, TextFusion(**wanted)


def train(config: Config, log: Log) -> dict[str, float]:
    corpus = open_corpus(config, config.captions.min_chinese, log)
    pipe = TaijiStableDiffusionPipeline.from_pretrained(config.base or config.model)
    pipe.text_encoder, pipe.fusion = new_text(config, pipe)
    objective = make_objective(pipe, config, train_unet=False)
    metrics = run_on_captions(objective, pipe, corpus, config, log)
    if config.judged:
        metrics |= judge_text(
            pipe,
            config.data,
            config.judged,
            steps=config.judged_steps,
            characters=config.captions.characters if config.captions.long_share else None,
            ablations=config.ablations,
        )
    save_pipeline(pipe, config.model)
    return metrics
