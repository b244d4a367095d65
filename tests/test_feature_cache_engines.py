"""DeepCache on engines: full and shallow steps as graphs, and the pair that alternates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import XL, unet_inputs
from torch import Tensor

from hcf.engines import EngineReport
from hcf.errors import HcfError
from hcf.feature_cache import CachedDenoiser, FullStep, ShallowStep, attach
from hcf.settings import FeatureCacheConfig


class Runner:
    """An ONNX file as an engine."""

    def __init__(self, path: Path, outputs: tuple[str, ...]) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.outputs = outputs
        self.calls = 0
        self.report = EngineReport("onnxruntime", "", "unet", "cpu", "CPU", "fp32")

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        names = [entry.name for entry in self.session.get_inputs()]
        found = self.session.run(None, {name: inputs[name].numpy() for name in names})
        return dict(zip(self.outputs, map(torch.from_numpy, found), strict=True))


def test_both_steps_become_graphs_and_engines_alternate(
    tiny_xl_pipeline: Any, tmp_path: Path
) -> None:
    import ast

    import onnx

    unet, given = tiny_xl_pipeline.unet, unet_inputs()
    names = ("encoder_hidden_states", "text_embeds", "time_ids")
    full, shallow = FullStep(unet, 2, names).eval(), ShallowStep(unet, 2, names).eval()
    flat = (given[2], XL["text_embeds"], XL["time_ids"])
    batch, text = {0: "batch"}, {0: "batch", 1: "text_length"}
    picture = {0: "batch", 2: "height", 3: "width"}
    # half the sample's here: names of their own, or a runtime takes them to be equal
    halved = {0: "batch", 2: "features_height", 3: "features_width"}
    conditioning = (text, batch, batch)
    with torch.no_grad():
        wanted, features = full(given[0], given[1], *flat)
        assert torch.equal(shallow(given[0], given[1], features, *flat), wanted)
        for module, arguments, shapes, inputs_, outputs in (
            (full, (given[0], given[1], *flat), (picture, batch, conditioning),
             ["sample", "timestep", *names], ["out_sample", "features"]),
            (shallow, (given[0], given[1], features, *flat),
             (picture, batch, halved, conditioning),
             ["sample", "timestep", "features", *names], ["out_sample"]),
        ):  # fmt: skip
            program = torch.onnx.export(
                module, arguments, dynamo=True, opset_version=20, input_names=inputs_,
                output_names=outputs, dynamic_shapes=shapes, verbose=False,
            )  # fmt: skip
            assert program is not None
            program.save(str(tmp_path / f"{len(outputs)}.onnx"))
    engines = [
        Runner(tmp_path / "2.onnx", ("out_sample", "features")),
        Runner(tmp_path / "1.onnx", ("out_sample",)),
    ]
    config = FeatureCacheConfig(interval=2, branch=2)
    cached = CachedDenoiser(engines[0], engines[1], config)
    cache = attach(unet, config)
    with torch.no_grad():
        for height, width, step in ((8, 8, 501), (8, 8, 461), (8, 8, 421), (12, 10, 381)):
            sample, timestep, states = unet_inputs(height, width, 2, float(step))
            found = cached({"sample": sample, "timestep": timestep,
                            "encoder_hidden_states": states, **XL})  # fmt: skip
            wanted = unet(sample, timestep, states, added_cond_kwargs=XL).sample
            assert set(found) == {"out_sample"}
            assert torch.allclose(found["out_sample"], wanted, atol=1e-4)
    assert (engines[0].calls, engines[1].calls) == (3, 1)
    assert cache.memory.full_calls == 3
    # layers are found by their own names, as in the one graph
    nodes = onnx.load(str(tmp_path / "1.onnx")).graph.node
    scopes = [
        ast.literal_eval(entry.value)
        for node in nodes
        if node.op_type == "Conv"
        for entry in node.metadata_props
        if entry.key == "pkg.torch.onnx.name_scopes"
    ]
    found_names = {scope for chain in scopes for scope in chain}
    assert {"unet.conv_in", "unet.up_blocks.1.resnets.0.conv1", "unet.conv_out"} <= found_names
    assert not any("mid_block" in name for name in found_names)


def test_engines_start_afresh_with_the_scheduler(tiny_pipeline: Any) -> None:
    class Module:
        def __init__(self, module: Any, outputs: tuple[str, ...]) -> None:
            self.module, self.outputs, self.calls = module, outputs, 0
            self.report = EngineReport("eager", "", "unet", "cpu", "CPU", "fp32")

        def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            self.calls += 1
            names = ("sample", "timestep", "features", "encoder_hidden_states")
            found = self.module(*(inputs[name] for name in names if name in inputs))
            found = found if isinstance(found, tuple) else (found,)
            return dict(zip(self.outputs, found, strict=True))

    unet = tiny_pipeline.unet
    full = Module(FullStep(unet), ("out_sample", "features"))
    shallow = Module(ShallowStep(unet), ("out_sample",))
    cached = CachedDenoiser(full, shallow, FeatureCacheConfig(interval=4, schedule="power"))
    cached.follow(tiny_pipeline)
    assert cached.report.engine == "eager"
    sample, _, text = unet_inputs()
    for _ in range(2):
        tiny_pipeline.scheduler.set_timesteps(8)
        for timestep in tiny_pipeline.scheduler.timesteps:
            cached({"sample": sample, "timestep": timestep.float().expand(2),
                    "encoder_hidden_states": text})  # fmt: skip
    assert (full.calls, shallow.calls) == (4, 12)
    cached.follower.release()
    assert "set_timesteps" not in vars(tiny_pipeline.scheduler)
    plain = Module(unet, ("sample",))
    with pytest.raises(HcfError, match="no features"):
        CachedDenoiser(plain, shallow, FeatureCacheConfig())(
            {"sample": sample, "timestep": torch.ones(2), "encoder_hidden_states": text}
        )
