"""The recipes of recipes/quantize on a tiny model: each does what its header says, in small."""

from __future__ import annotations

from pathlib import Path

import pytest

from hcf.quantize.quantize import quantize
from hcf.quantize.scales import SCALES_FILE, read_scales
from hcf.recipe import stage_config
from hcf.settings import QuantizeConfig, SensitivityConfig

FOLDER = Path(__file__).parents[1] / "recipes" / "quantize"
SMALL = (
    "quantize.calibration_samples=2",
    "quantize.calibration_steps=3",
    "quantize.calibration_prompts=[red cat, blue dog]",
)


@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_quantising_by_recipe(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    # the tiny layers have no 32 ranks to spare
    small = (*SMALL, "quantize.low_rank=4") if name == "int4" else SMALL
    config = stage_config(QuantizeConfig, "quantize", FOLDER / f"{name}.yaml", small)
    output = quantize(tiny_folder, tmp_path / "out", config, lambda line: None)
    scales = read_scales(output / "unet" / SCALES_FILE)
    assert config.format == name and name in {scale.scheme for scale in scales.values()}
    smooth = [scale for scale in scales.values() if scale.smooth is not None]
    low_rank = [scale for scale in scales.values() if scale.low_rank is not None]
    assert bool(smooth) == (name != "fp8") and bool(low_rank) == (name == "int4")


def test_every_recipe_reads() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {"int8", "fp8", "int4", "sensitivity"}
    path = FOLDER / "sensitivity.yaml"
    assert stage_config(SensitivityConfig, "sensitivity", path).latency_ratio == 1.0
