"""Training recipes: YAML into one phase of training, `hcf train recipes/train/*.yaml`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import Field, TypeAdapter

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
    said = recipe.model_dump(mode="json", exclude={"model": True, "work": True, "data": {"emoji"}})
    _same_recipe(recipe, said)
    first = rank() == 0
    try:
        metrics = PHASES[recipe.phase](recipe, log if first else _silent)
    finally:
        close()
    history = recipe.model / "training.json"
    runs = json.loads(history.read_text()) if history.exists() else {}
    runs[recipe.phase] = {
        "recipe": said,
        "metrics": metrics,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_text(history, json.dumps(runs, ensure_ascii=False, indent=2))
    return recipe.model


def _same_recipe(recipe: Any, said: dict[str, Any]) -> None:
    """Keeps the recipe in `work`, and compares it where a checkpoint is there already. The loop's
    own keys are in each checkpoint."""
    kept, now = recipe.work / "recipe.json", {k: v for k, v in said.items() if k != "loop"}
    if kept.exists() and any(recipe.work.glob("**/checkpoints/*/state.json")):
        differing = changes(json.loads(kept.read_text()), now, recipe.loop.accept_changes)
        if differing:
            raise ValueError(other_recipe(recipe.work, differing))
    recipe.work.mkdir(parents=True, exist_ok=True)
    write_text(kept, json.dumps(now, ensure_ascii=False, indent=2))


def _silent(line: str) -> None: ...
