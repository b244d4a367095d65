"""Which layers of which architecture stay in floating point or take another format, and why.

A preset is data: facts of the model's config that tell it apart, and ordered rules after the
general ones; the last rule that matches a layer decides. A model that no preset knows gets the
general rules, and the log says so.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hcf.errors import RecipeError
from hcf.settings import QuantizeConfig

Log = Callable[[str], None]
GENERIC = "generic"
FLOAT = "none"
ROUNDED_INPUTS = ("int8", "fp8", "int4")


@dataclass(frozen=True)
class Rule:
    """Layers whose names match `pattern` (fnmatch; `*` matches across dots) get `format`, if the
    format asked for is one of `asked` (all where empty). `{last}` in a pattern is the number of
    the last up block."""

    pattern: str
    format: str
    reason: str
    asked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preset:
    """`facts`: alternatives, each a part of the model's config that has to agree in every key."""

    facts: tuple[Mapping[str, Any], ...]
    rules: tuple[Rule, ...] = ()


GENERAL: tuple[Rule, ...] = (
    Rule(
        "conv_in",
        FLOAT,
        "first convolution: reads the latents, its error reaches every layer; few operations",
    ),
    Rule(
        "conv_out",
        FLOAT,
        "last convolution: its error is the error of the prediction; few operations",
    ),
    Rule("time_embedding.*", FLOAT, "time embedding: one row an image, every block depends on it"),
    Rule(
        "add_embedding.*",
        FLOAT,
        "pooled text and size embedding: one row an image, added to the time embedding",
    ),
    Rule("*.time_emb_proj", FLOAT, "projection of the time embedding: one row an image"),
    Rule("class_embedding*", FLOAT, "class embedding: one row an image"),
)
GEGLU_4_BITS = Rule(
    "*.ff.net.2",
    "int8",
    "reads the product of GEGLU's two halves, whose outliers 16 levels cannot hold",
    asked=("int4",),
)
SHORTCUTS_4_BITS = Rule(
    "*.conv_shortcut",
    "int8",
    "1x1 on the residual path itself: its error is not damped by a residual; 2 % of the operations",
    asked=("int4",),
)
LAST_SHORTCUTS = Rule(
    "up_blocks.{last}.resnets.*.conv_shortcut",
    FLOAT,
    "reads the residual stream without a norm, joined with the skip of the first convolution: one "
    "range for both cost 4x the error of all other layers together late in the trajectory "
    "(measured on Taiji-SD-mini); 1x1",
    asked=("int8", "int4"),
)
UNET_RULES = (GEGLU_4_BITS, SHORTCUTS_4_BITS, LAST_SHORTCUTS)
TEXT_PROJECTION = Rule(
    "encoder_hid_proj*",
    FLOAT,
    "projection of the text encoder's output, whose largest channels are 100x the others: every "
    "cross attention reads its error; one product an image",
)

PRESETS: dict[str, Preset] = {
    "sd15": Preset(
        (
            {
                "cross_attention_dim": 768,
                "block_out_channels": [320, 640, 1280, 1280],
                "addition_embed_type": None,
                "class_embed_type": None,
            },
        ),
        UNET_RULES,
    ),
    "sd21": Preset(
        (
            {
                "cross_attention_dim": 1024,
                "block_out_channels": [320, 640, 1280, 1280],
                "addition_embed_type": None,
                "class_embed_type": None,
            },
        ),
        UNET_RULES,
    ),
    "sdxl": Preset(
        (
            {
                "cross_attention_dim": 2048,
                "block_out_channels": [320, 640, 1280],
                "addition_embed_type": "text_time",
                "encoder_hid_dim": None,
            },
        ),
        UNET_RULES,
    ),
    "kolors": Preset(
        (
            {
                "cross_attention_dim": 2048,
                "block_out_channels": [320, 640, 1280],
                "addition_embed_type": "text_time",
                "encoder_hid_dim": 4096,
            },
        ),
        (*UNET_RULES, TEXT_PROJECTION),
    ),
    "taiji-sd": Preset(
        (
            {
                "cross_attention_dim": 1024,
                "block_out_channels": [320, 640, 1280, 1280],
                "addition_embed_type": "text_time",
            },
            {
                "cross_attention_dim": 192,
                "block_out_channels": [64, 128, 160],
                "addition_embed_type": "text_time",
            },
        ),
        UNET_RULES,
    ),
    "taiji-imagen": Preset(
        (
            {
                "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
                "addition_embed_type": "text",
                "resnet_time_scale_shift": "scale_shift",
            },
        ),
        (
            TEXT_PROJECTION,
            Rule(
                "*.add_k_proj",
                FLOAT,
                "keys of the text: a few rows that every pixel attends to",
            ),
            Rule("*.add_v_proj", FLOAT, "values of the text: a few rows that every pixel reads"),
            SHORTCUTS_4_BITS,
        ),
    ),
    "sr": Preset(
        (
            {"class_embed_type": "timestep", "in_channels": 6, "out_channels": 3},
            {"num_class_embeds": 1000, "in_channels": 7, "out_channels": 4},
        ),
        (
            Rule(
                "down_blocks.0.resnets.0.conv1",
                FLOAT,
                "sees the low-resolution image beside the noise: one range for a signal that stays "
                "and one that vanishes",
                asked=ROUNDED_INPUTS,
            ),
            GEGLU_4_BITS,
            SHORTCUTS_4_BITS,
        ),
    ),
}


@dataclass(frozen=True)
class Choice:
    """What each Conv2d and Linear of a model gets: `formats` layer -> scheme; `excluded` layer ->
    why it stays in floating point; `reasons` layer -> why it has another format than was asked;
    `alphas` layer -> smoothing that a rule gave it; `preset` whose rules were taken."""

    formats: dict[str, str]
    excluded: dict[str, str]
    reasons: dict[str, str]
    alphas: dict[str, float]
    preset: str


def preset_of(denoiser: nn.Module) -> str | None:
    """The preset whose facts agree with the model's config, None where none does."""
    config = getattr(denoiser, "config", None)
    if config is None:
        return None
    for name, preset in PRESETS.items():
        for facts in preset.facts:
            if all(_plain(config.get(key)) == value for key, value in facts.items()):
                return name
    return None


def rules_of(denoiser: nn.Module, preset: str, log: Log = print) -> tuple[str, tuple[Rule, ...]]:
    """(name, rules) of the preset asked for ("auto": found by the model's config).

    Raises RecipeError for a name that is none.
    """
    if preset == "auto":
        found = preset_of(denoiser)
        if found is None:
            log(
                "quantisation preset: this architecture is not among "
                f"{', '.join(PRESETS)}; general rules only"
            )
        preset = found or GENERIC
    if preset == GENERIC:
        return GENERIC, GENERAL
    if preset not in PRESETS:
        raise RecipeError(
            f"quantize.preset {preset!r} is not known",
            fix=f"use auto, {GENERIC}, {', '.join(PRESETS)}",
        )
    return preset, (*GENERAL, *PRESETS[preset].rules)


def choose_formats(
    denoiser: nn.Module, config: QuantizeConfig, log: Log = print
) -> tuple[dict[str, str], dict[str, str]]:
    """({layer: format}, {layer left in floating point: why}); see `choose`."""
    choice = choose(denoiser, config, log)
    return choice.formats, choice.excluded


WEIGHT_ONLY = ("int8-weight", "int4-weight")


def choose(denoiser: nn.Module, config: QuantizeConfig, log: Log = print) -> Choice:
    """A format for every Conv2d and Linear: the preset's rules, then `exclude`, then `rules`.

    Raises RecipeError for an unknown preset, for a rule of the recipe that matches no layer, or
    where nothing is left to quantise.
    """
    names = quantisable_layers(denoiser)
    preset, rules = rules_of(denoiser, config.preset, log)
    formats: dict[str, str] = dict.fromkeys(names, config.format)
    reasons: dict[str, str] = {}
    alphas: dict[str, float] = {}

    def apply(matched: Sequence[str], form: str, reason: str) -> None:
        for name in matched:
            formats[name] = form
            reasons[name] = reason

    for rule in rules:
        if not rule.asked or config.format in rule.asked:
            pattern = rule.pattern.format(last=_last_up_block(names))
            apply(fnmatch.filter(names, pattern), rule.format, rule.reason)
    if config.format in WEIGHT_ONLY:
        convolutions = [n for n in names if isinstance(denoiser.get_submodule(n), nn.Conv2d)]
        wide = [name for name in convolutions if formats[name] == config.format]
        apply(wide, FLOAT, "no engine computes a convolution from weights of 8 or 4 bits alone")
    for given in config.exclude:
        matched = _matched(names, given.pattern, "exclude")
        apply(matched, FLOAT if given.exclude else config.format, given.reason)
    for wanted in config.rules:
        matched = _matched(names, wanted.pattern, "rule")
        apply(matched, wanted.format, wanted.reason)
        if wanted.smooth is not None:
            alphas |= dict.fromkeys(matched, wanted.smooth)
    chosen = {name: form for name, form in formats.items() if form != FLOAT}
    if not chosen:
        raise RecipeError("every layer is excluded from quantisation", fix="remove an exclude rule")
    return Choice(
        formats=chosen,
        excluded={name: reasons[name] for name in names if name not in chosen},
        reasons={n: reasons[n] for n, form in chosen.items() if form != config.format},
        alphas={n: alpha for n, alpha in alphas.items() if n in chosen},
        preset=preset,
    )


def quantisable_layers(denoiser: nn.Module) -> list[str]:
    """Names of all Conv2d and Linear modules."""
    return [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]


def _last_up_block(names: Sequence[str]) -> int:
    """Number of the last up block, -1 without any."""
    numbers = [name.split(".")[1] for name in names if name.startswith("up_blocks.")]
    return max((int(number) for number in numbers if number.isdigit()), default=-1)


def _matched(names: Sequence[str], pattern: str, kind: str) -> list[str]:
    matched = fnmatch.filter(names, pattern)
    if not matched:
        raise RecipeError(
            f"quantize {kind} {pattern!r} matches none of {len(names)} Conv2d/Linear layers",
            fix=f"layer names look like {names[len(names) // 2]!r}; `*` matches across dots",
        )
    return matched


def _plain(value: Any) -> Any:
    """A config value as JSON would have it."""
    return list(value) if isinstance(value, tuple) else value
