"""The record of a recipe's run that is kept beside the recipes.

    python -m taiji.train.results recipes/train/tiny_vqgan.yaml

copies the newest run of the recipe's phase from <model>/training.json to
recipes/train/results/<recipe>.json, on the machine that ran it.
"""

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

from taiji.train.checkpoint import changes, write_text
from taiji.train.recipe import read_recipe, settings


def cpu_name(listing: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's own name, "unknown" where Linux does not give one."""
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def record(recipe: Path) -> Path:
    """Writes and returns the record.

    Raises FileNotFoundError without a run, ValueError when the last one had other settings.
    """
    config = read_recipe(recipe)
    history = config.model / "training.json"
    runs: dict[str, Any] = json.loads(history.read_text()) if history.exists() else {}
    run = runs.get(config.phase)
    if run is None:
        raise FileNotFoundError(f"no run of {recipe} in {history}: hcf train {recipe}")
    odd = changes(run["recipe"], settings(config), ())
    odd += _added(run["recipe"], settings(config, exclude_defaults=True))
    if odd:
        raise ValueError(f"{history} is of a run with another {odd[0]}: hcf train {recipe}")
    found = {
        "command": f"hcf train {recipe.as_posix()}",
        "date": date.fromtimestamp(history.stat().st_mtime).isoformat(),
        "cpu": cpu_name(),
        "threads": run["threads"],
        "torch": run["torch"],
        "seconds": run["metrics"]["seconds"],
        "metrics": run["metrics"],
    }
    folder = recipe.parent / "results"
    folder.mkdir(exist_ok=True)
    target = folder / f"{recipe.stem}.json"
    write_text(target, json.dumps(found, ensure_ascii=False, indent=2) + "\n")
    return target


def _added(run: dict[str, Any], chosen: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys that the recipe sets and the run did not know. Keys that came later and are at
    their defaults leave what was run as it is."""
    found = []
    for key, value in chosen.items():
        if key not in run:
            found.append(f"{prefix}{key}: -> {value}")
        elif isinstance(value, dict) and isinstance(run[key], dict):
            found += _added(run[key], value, f"{prefix}{key}.")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="taiji.train.results", description=__doc__)
    parser.add_argument("recipe", type=Path)
    print(record(parser.parse_args().recipe))
