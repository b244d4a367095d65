"""What a text side has learned: held-out scenes drawn by plain and by long prompts, and scored.

The rule judge says whether colour, shape and count are right; ImageCLIP's image tower, how far two
images lie apart. N images, H W pixels.
"""

from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from taiji.autoencoder.kl import to_tensor
from taiji.data import shapes
from taiji.data.corpus import CorpusConfig
from taiji.data.rule_judge import judge
from taiji.pipelines import TaijiStableDiffusionPipeline
from taiji.text.captions import lengthen
from taiji.text.fusion import left_out
from taiji.text.image_clip import ImageTower

Pixels = npt.NDArray[np.uint8]

ABLATIONS: dict[str, dict[str, Any]] = {
    "image_clip": {"encoders": "image_clip"},
    "sandwich": {"encoders": "sandwich"},
    "unpooled": {"use_pooled": False},
}


def heldout_scenes(data: CorpusConfig, count: int) -> list[shapes.Scene]:
    """Scenes of one group whose composition is never trained on."""
    drawn = shapes.sample(
        count, data.seed, size=data.size, colours=data.colours, shapes=data.kinds,
        counts=data.counts, relation_share=0.0, texture_share=0.0, split="heldout",
    )  # fmt: skip
    return [scene for scene, _, _ in drawn]


def draw_images(
    pipe: TaijiStableDiffusionPipeline, prompts: list[str], steps: int, seed: int
) -> Pixels:
    """(N, H, W, 3); the noise of an image is that of its place and the seed."""
    found: list[Pixels] = []
    for i in range(0, len(prompts), 16):
        generator = torch.Generator().manual_seed(seed + i)
        images: Any = pipe(
            prompts[i : i + 16],
            generator=generator,
            num_inference_steps=steps,
            output_type="np",
            return_dict=False,
        )[0]
        found.append((images * 255).round().astype(np.uint8))
    return np.concatenate(found)


def shares_right(images: Pixels, scenes: list[shapes.Scene]) -> dict[str, float]:
    """Share of the images whose colour, shape and count are those of their scene."""
    scores = [judge(i, scene.truth()) for i, scene in zip(images, scenes, strict=True)]
    return {
        aspect: float(np.mean([bool(score[aspect]) for score in scores]))
        for aspect in ("colour", "shape", "count")
    }


@torch.no_grad()
def clip_distances(pipe: TaijiStableDiffusionPipeline, a: Pixels, b: Pixels) -> Tensor:
    """1 - cosine of ImageCLIP's embeddings, (N,)"""
    size = pipe.image_clip.config.vision_config.image_size
    tower = ImageTower(pipe.image_clip.eval())
    a_hat, b_hat = (tower(interpolate(to_tensor(x), size, mode="area")) for x in (a, b))
    return 1 - (a_hat * b_hat).sum(1)


def judge_text(
    pipe: TaijiStableDiffusionPipeline,
    data: CorpusConfig,
    count: int,
    *,
    steps: int,
    characters: int | None,
    ablations: bool,
) -> dict[str, float]:
    """Scores of plain prompts, and as `long_` those of the same ones behind as many remarks as fit
    in `characters`; of either also with a part of the text side left out, as `sandwich_colour`.

    `tail_distance`: between images of one noise whose long prompts differ in their last words
    alone. `seed_distance`: between images of one long prompt and two noises.
    """
    scenes, words, seed = heldout_scenes(data, count), Random(data.seed), data.seed
    plain = [shapes.caption(scene) for scene in scenes]
    splits = {"": plain}
    if characters is not None:
        splits["long_"] = [lengthen(text, characters, words) for text in plain]
    metrics: dict[str, float] = {}
    for split, prompts in splits.items():
        images = draw_images(pipe, prompts, steps, seed)
        metrics |= {split + k: share for k, share in shares_right(images, scenes).items()}
        if split and len(prompts) > 1:
            metrics |= tail_distances(pipe, prompts, plain, images, steps=steps, seed=seed)
        for name, kept in ABLATIONS.items() if ablations else ():
            with left_out(pipe.fusion, **kept):
                right = shares_right(draw_images(pipe, prompts, steps, seed), scenes)
            metrics |= {f"{split}{name}_{k}": share for k, share in right.items()}
    return metrics


def tail_distances(
    pipe: TaijiStableDiffusionPipeline,
    prompts: list[str],
    tails: list[str],
    images: Pixels,
    *,
    steps: int,
    seed: int,
) -> dict[str, float]:
    """`images` are those of the `prompts`, which end in `tails`; each is drawn again with the tail
    of the next that is another, and again with other noise."""
    pairs = list(zip(prompts, tails, strict=True))
    others = []
    for i, (prompt, tail) in enumerate(pairs):
        other = next((t for t in tails[i + 1 :] + tails[:i] if t != tail), tail)
        others.append(prompt.removesuffix(tail) + other)
    changed = draw_images(pipe, others, steps, seed)
    again = draw_images(pipe, prompts, steps, seed + len(prompts))
    return {
        "tail_distance": clip_distances(pipe, images, changed).mean().item(),
        "seed_distance": clip_distances(pipe, images, again).mean().item(),
    }
