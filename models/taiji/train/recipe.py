"""Training recipes: YAML into one phase of training, `hcf train recipes/train/*.yaml`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import Field, TypeAdapter

from taiji.data.corpus import SKIPPED, CorpusConfig, source_of
from taiji.data.shard_corpus import listed
from taiji.train.checkpoint import changes, other_recipe, write_text
from taiji.train.loop import Log
from taiji.train.parallel import close, rank
from taiji.train.phases import (
    adapter,
    first_stage,
    image_clip,
    imagen,
    release,
    super_resolution,
    text,
    unet,
    vqgan,
)

Recipe = Annotated[
    adapter.Config
    | first_stage.Config
    | image_clip.Config
    | imagen.Config
    | super_resolution.Config
    | text.Config
    | unet.Config
    | vqgan.Config
    | release.Config,
    Field(discriminator="phase"),
]
PHASES: dict[str, Callable[[Any, Log], dict[str, float]]] = {
    "adapter": adapter.train,
    "first_stage": first_stage.train,
    "image_clip": image_clip.train,
    "imagen": imagen.train,
    "super_resolution": super_resolution.train,
    "text": text.train,
    "unet": unet.train,
    "vqgan": vqgan.train,
    "release": release.train,
}


def read_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Any:
    """Raises pydantic.ValidationError for unknown keys and wrong values, OSError for no file."""
    tree = yaml.safe_load(path.read_text())
    for dotted, value in (overrides or {}).items():
        node, keys = tree, dotted.split(".")
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
    return TypeAdapter[Any](Recipe).validate_python(tree)


def train(path: Path, overrides: dict[str, Any] | None = None, log: Log = print) -> Path:
    """Runs the recipe's phase and returns the model folder. Under a launcher of several processes
    each of them calls this; the first one logs and writes.

    Raises ValueError when `work` holds the checkpoint of another recipe.
    """
    recipe = read_recipe(path, overrides)
    said, source = settings(recipe), _source(recipe)
    _same_recipe(recipe, said, source)
    first = rank() == 0
    try:
        metrics = PHASES[recipe.phase](recipe, log if first else _silent)
    finally:
        close()
    if first:
        _record(recipe, said, source, metrics)
    return recipe.model


def settings(recipe: Any, *, exclude_defaults: bool = False) -> dict[str, Any]:
    """All that a recipe says but where things are; a data set is named by its hash elsewhere."""
    places = {"model": True, "work": True, "latents": True, "data": {"emoji", "manifest"}}
    said: dict[str, Any] = recipe.model_dump(
        mode="json", exclude=places, exclude_defaults=exclude_defaults
    )
    return said


def _source(recipe: Any) -> dict[str, str]:
    data = getattr(recipe, "data", None)
    return source_of(data) if isinstance(data, CorpusConfig) else {}


def _record(recipe: Any, said: dict[str, Any], source: dict[str, str], metrics: Any) -> None:
    """The run in training.json: its recipe, its data, and what was measured."""
    history, skipped = recipe.model / "training.json", recipe.work / SKIPPED
    runs = json.loads(history.read_text()) if history.exists() else {}
    run = {
        "recipe": said,
        "data": source,
        "metrics": metrics,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if "data" in said and "manifest" not in source:
        run["data"] = {**source, "corpus": said["data"]}
    if skipped.is_file():
        run["skipped_samples"] = len(listed(skipped.read_bytes()))
    write_text(history, json.dumps({**runs, recipe.phase: run}, ensure_ascii=False, indent=2))


def _same_recipe(recipe: Any, said: dict[str, Any], source: dict[str, str]) -> None:
    """Keeps the recipe in `work`, and compares it where a checkpoint is there already. The loop's
    own keys are in each checkpoint."""
    kept, now = recipe.work / "recipe.json", {k: v for k, v in said.items() if k != "loop"}
    if "data" in now:
        now["data"] = {"manifest": None, "buckets": None, **now["data"], **source}
    if kept.exists() and any(recipe.work.glob("**/checkpoints/*/state.json")):
        before = json.loads(kept.read_text())
        if "data" in before:  # by an earlier version: of the mini corpus
            before["data"] = {"manifest": None, "buckets": None, **before["data"]}
        differing = changes(before, now, recipe.loop.accept_changes)
        if differing:
            raise ValueError(other_recipe(recipe.work, differing))
    recipe.work.mkdir(parents=True, exist_ok=True)
    write_text(kept, json.dumps(now, ensure_ascii=False, indent=2))


def _silent(line: str) -> None: ...
