"""Training recipes: YAML into one phase of training, `hcf train recipes/train/*.yaml`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import Field, TypeAdapter

from taiji.train.checkpoint import write_text
from taiji.train.loop import Log
from taiji.train.phases import first_stage, image_clip, release, unet

Recipe = Annotated[
    first_stage.Config | image_clip.Config | unet.Config | release.Config,
    Field(discriminator="phase"),
]
PHASES: dict[str, Callable[[Any, Log], dict[str, float]]] = {
    "first_stage": first_stage.train,
    "image_clip": image_clip.train,
    "unet": unet.train,
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
    """Runs the recipe's phase and returns the model folder."""
    recipe = read_recipe(path, overrides)
    metrics = PHASES[recipe.phase](recipe, log)
    history = recipe.model / "training.json"
    runs = json.loads(history.read_text()) if history.exists() else {}
    runs[recipe.phase] = {
        "recipe": recipe.model_dump(
            mode="json", exclude={"model": True, "work": True, "data": {"emoji"}}
        ),
        "metrics": metrics,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_text(history, json.dumps(runs, ensure_ascii=False, indent=2))
    return recipe.model
