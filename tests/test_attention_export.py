"""INT8 attention in the exported graph: both products rounded, the model still the model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest

from hcf.artifact import read_manifest
from hcf.engines.build import build
from hcf.errors import HcfError, RecipeError
from hcf.export.attention import find_attention
from hcf.export.graphs import graph_name
from hcf.export.onnx import export
from hcf.quantize.quantize import quantize
from hcf.settings import BuildConfig, ExportConfig, QuantizeConfig

SETTINGS = {"calibration_prompts": ["red cat", "blue dog"], "calibration_samples": 2}


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def quantised(tiny_quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny student, quantised with its attention."""
    output = tmp_path_factory.mktemp("attention") / "quantised"
    config = QuantizeConfig(attention=True, **SETTINGS)
    return quantize(tiny_quantized.with_name("student"), output, config, quiet)


def test_the_graph_rounds_both_products_and_openvino_runs_them(quantised: Path) -> None:
    config = ExportConfig(components=["unet"])
    exported = export(quantised, quantised.with_name("exported"), config, quiet)
    plain = onnx.load(str(exported / "unet" / graph_name("fp32")))
    model = onnx.load(str(exported / "unet" / graph_name("int8")))
    attention = find_attention(plain)
    assert attention and not find_attention(model) == attention
    kinds = Counter(node.op_type for node in model.graph.node)
    names = [n.name for n in model.graph.node if n.name.endswith("_attention_q")]
    assert len(names) == len({t for one in attention for t in one.tensors})
    assert kinds["QuantizeLinear"] > len(names), "the layers are quantised as well"
    records = read_manifest(exported).exports["unet"]
    (error,) = [
        r["relative_error"]["calibration"] for r in records if r["file"].endswith(".int8.onnx")
    ]
    assert error < 0.15
    config = BuildConfig(
        engines=["openvino"], precisions=["int8"], components=["unet"], threads=1, repeats=2
    )
    built = build(exported, quantised.with_name("built"), config, quiet)
    (entry,) = [e for e in read_manifest(built).engines["unet"] if e.engine == "openvino"]
    assert entry.error is not None and entry.error < 0.2


def test_attention_as_one_operator_cannot_be_rounded(quantised: Path) -> None:
    with pytest.raises(HcfError, match="opset below 23"):
        export(
            quantised,
            quantised.with_name("opset23"),
            ExportConfig(components=["unet"], opset=23),
            quiet,
        )
    assert not quantised.with_name("opset23").exists()


def test_only_int8_has_it(tiny_quantized: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(attention=True, format="fp8", **SETTINGS)
    with pytest.raises(RecipeError, match="attention"):
        quantize(tiny_quantized.with_name("student"), tmp_path / "out", config, quiet)
