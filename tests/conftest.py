"""Tiny real pipelines with random weights: built in memory, no download, a few MB."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton's kernels run in its interpreter where there is no GPU; it is asked when triton is imported
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from hcf.trace import DenoiserCall

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "use_linear_projection": True,
}
# with v-prediction the latents of a random model keep unit size over all steps
SCHEDULER: dict[str, Any] = {
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}


def tiny_tokenizer() -> Any:
    """A CLIP byte-level tokenizer without merges: 514 entries."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    entries = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(entries)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


def tiny_text_encoder(projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=32,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def tiny_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )


def make_tiny_pipeline() -> Any:
    """StableDiffusionPipeline: latents 4x8x8, images 16x16, DDIM, random weights of seed 0."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
        unet=UNet2DConditionModel(**UNET),
        scheduler=DDIMScheduler(**SCHEDULER, clip_sample=False, rescale_betas_zero_snr=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.eval().requires_grad_(False)
    return pipe


@pytest.fixture
def tiny_pipeline() -> Any:
    return make_tiny_pipeline()


@pytest.fixture
def tiny_xl_pipeline() -> Any:
    """StableDiffusionXLPipeline with one text encoder: conditions on text_embeds and time_ids."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=tiny_text_encoder(projection=True),
        tokenizer_2=tiny_tokenizer(),
        unet=UNet2DConditionModel(
            **UNET,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder_2):
        module.eval().requires_grad_(False)
    return pipe


@pytest.fixture
def tiny_folder(tiny_pipeline: Any, tmp_path: Path) -> Path:
    """`tiny_pipeline` saved as a plain diffusers folder."""
    target = tmp_path / "tiny"
    tiny_pipeline.save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def tiny_quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make_tiny_pipeline` as an artefact sampled in 4 steps, its U-Net calibrated to INT8."""
    from hcf.artifact import Sampling, clone_artifact, write_manifest
    from hcf.quantize.quantize import quantize
    from hcf.settings import QuantizeConfig

    root = tmp_path_factory.mktemp("tiny")
    make_tiny_pipeline().save_pretrained(root / "plain")
    manifest = clone_artifact(root / "plain", root / "student")
    manifest.sampling = Sampling(steps=4, guidance_scale=1.0)
    write_manifest(root / "student", manifest)
    config = QuantizeConfig(calibration_prompts=["red cat", "blue dog"], calibration_samples=2)
    return quantize(root / "student", root / "quantized", config, lambda line: None)


@pytest.fixture(scope="session")
def tiny_exported(tiny_quantized: Path) -> Path:
    """`tiny_quantized` with its ONNX graphs: fp32 and both INT8 forms."""
    from hcf.export.onnx import export
    from hcf.settings import ExportConfig

    output = tiny_quantized.with_name("exported")
    return export(tiny_quantized, output, ExportConfig(), lambda line: None)


@pytest.fixture(scope="session")
def tiny_built(tiny_exported: Path) -> Path:
    """`tiny_exported` with the eager, ONNX Runtime and OpenVINO engines in every precision."""
    from hcf.engines.build import build
    from hcf.settings import BuildConfig

    config = BuildConfig(threads=1, repeats=3)
    return build(tiny_exported, tiny_exported.with_name("built"), config, lambda line: None)


def make_tiny_xl_pipeline() -> Any:
    """StableDiffusionXLPipeline with both text encoders, of different widths as in the real one."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    second = tiny_text_encoder(projection=True).config
    second.update({"hidden_size": 64, "projection_dim": 64})
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer_2=tiny_tokenizer(),
        unet=UNet2DConditionModel(
            **{**UNET, "cross_attention_dim": 96, "sample_size": 16},
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64 + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        module.eval().requires_grad_(False)
    return pipe


def make_tiny_controlnet(unet: Any) -> Any:
    """ControlNetModel that fits `unet`; its last convolutions, zero when new, are random."""
    from diffusers import ControlNetModel

    torch.manual_seed(1)
    # two sizes: this first stage halves the image once
    net = ControlNetModel.from_unet(unet, conditioning_channels=3, load_weights_from_unet=False,
                                    conditioning_embedding_out_channels=(8, 16))  # fmt: skip
    ends = [net.controlnet_mid_block, *net.controlnet_down_blocks]
    for convolution in (*ends, net.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(convolution.weight, std=0.1)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="session", autouse=True)
def engine_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """HCF_HOME of a session: what one test had calibrated or built serves the next, and nothing
    lands in the user's own cache."""
    home = tmp_path_factory.mktemp("hcf-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCF_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def drop_in_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{"sd": a plain folder of images 32x32, "sd-control": its ControlNet, "xl": ..., ...}."""
    root = tmp_path_factory.mktemp("drop-in")
    folders: dict[str, Path] = {}
    for family, pipe in (("sd", make_tiny_pipeline()), ("xl", make_tiny_xl_pipeline())):
        pipe.unet.register_to_config(sample_size=16)
        pipe.vae.register_to_config(sample_size=32)
        # every scheduler can start from this one's configuration
        pipe.scheduler.register_to_config(rescale_betas_zero_snr=False)
        folders[family] = root / family
        pipe.save_pretrained(folders[family])
        folders[f"{family}-control"] = root / f"{family}-control"
        make_tiny_controlnet(pipe.unet).save_pretrained(folders[f"{family}-control"])
    return folders


DROP_INS = {
    ("sd", "text"): "StableDiffusionPipeline",
    ("sd", "image"): "StableDiffusionImg2ImgPipeline",
    ("sd", "inpaint"): "StableDiffusionInpaintPipeline",
    ("sd", "control"): "StableDiffusionControlNetPipeline",
    ("sd", "control-image"): "StableDiffusionControlNetImg2ImgPipeline",
    ("sd", "control-inpaint"): "StableDiffusionControlNetInpaintPipeline",
    ("xl", "text"): "StableDiffusionXLPipeline",
    ("xl", "image"): "StableDiffusionXLImg2ImgPipeline",
    ("xl", "inpaint"): "StableDiffusionXLInpaintPipeline",
    ("xl", "control"): "StableDiffusionXLControlNetPipeline",
    ("xl", "control-image"): "StableDiffusionXLControlNetImg2ImgPipeline",
    ("xl", "control-inpaint"): "StableDiffusionXLControlNetInpaintPipeline",
}


@pytest.fixture(scope="session")
def drop_in(drop_in_folders: dict[str, Path], engine_store: Path) -> Any:
    """drop_in(library, family, task, **kwargs): a pipeline of `diffusers` or `hcf.pipelines`."""
    import diffusers

    def open_pipeline(library: Any, family: str, task: str, **kwargs: Any) -> Any:
        if task.startswith("control"):
            net = drop_in_folders[f"{family}-control"]
            kwargs["controlnet"] = diffusers.ControlNetModel.from_pretrained(net)
        if family == "sd":
            kwargs["safety_checker"] = None
        pipeline = getattr(library, DROP_INS[family, task])
        pipe = pipeline.from_pretrained(drop_in_folders[family], **kwargs)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return open_pipeline


@pytest.fixture(scope="session")
def drop_in_artifacts(drop_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """drop_in_artifacts(family): a ControlNet pipeline's folder, all of it on both engines."""
    import diffusers

    from hcf.artifact import clone_artifact
    from hcf.engines.build import build
    from hcf.export.component import components_of
    from hcf.export.onnx import export
    from hcf.settings import BuildConfig, ExportConfig

    root = tmp_path_factory.mktemp("drop-in-artifacts")

    def made(family: str) -> Path:
        if not (root / family).is_dir():
            pipe = drop_in(diffusers, family, "control")
            pipe.save_pretrained(root / f"{family}-plain")
            clone_artifact(root / f"{family}-plain", root / f"{family}-clone")
            parts = list(components_of(pipe))
            config = ExportConfig(components=parts)
            export(root / f"{family}-clone", root / f"{family}-exported", config, print)
            engines = BuildConfig(engines=["openvino", "onnxruntime"], precisions=["fp32"],
                                  components=parts, threads=1, repeats=1)  # fmt: skip
            build(root / f"{family}-exported", root / family, engines, print)
        return root / family

    return made


@pytest.fixture(scope="session")
def drop_in_pairs(drop_in: Any, drop_in_artifacts: Any) -> Any:
    """drop_in_pairs(family, task, engine): the plain pipeline, and the drop-in one in float32.

    With an engine all tasks are made of one ControlNet pipeline by from_pipe.
    """
    import diffusers

    import hcf.pipelines

    made: dict[tuple[str, ...], Any] = {}

    def ours(family: str, task: str, engine: str) -> Any:
        pipeline = getattr(hcf.pipelines, DROP_INS[family, task])
        if engine == "eager":
            return drop_in(hcf.pipelines, family, task, engine=engine)
        if task != "control":
            pipe = pipeline.from_pipe(pair(family, "control", engine)[1])
        else:
            folder = drop_in_artifacts(family)
            pipe = pipeline.from_pretrained(folder, engine=engine, precision="fp32")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def pair(family: str, task: str, engine: str) -> tuple[Any, Any]:
        if (family, task) not in made:
            made[family, task] = drop_in(diffusers, family, task)
        if (family, task, engine) not in made:
            made[family, task, engine] = ours(family, task, engine)
        return made[family, task], made[family, task, engine]

    return pair


def call_arguments(task: str, height: int = 32, width: int = 32, **changes: Any) -> dict[str, Any]:
    """What a pipeline of `task` is called with: three steps, seed 0, images where it wants some."""
    images = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(5)).unsqueeze(
        1
    )
    found: dict[str, Any] = {
        "prompt": "red cat",
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
    }
    if task in ("image", "inpaint", "control-image", "control-inpaint"):
        found |= {"image": images[0], "strength": 0.8}
    if "inpaint" in task:
        found["mask_image"] = (images[1][:, :1] > 0.5).float()
    if task == "control":
        found["image"] = images[2]
    if task in ("control-image", "control-inpaint"):
        found["control_image"] = images[2]
    if task in ("text", "inpaint", "control", "control-inpaint"):
        found |= {"height": height, "width": width}
    return {**found, **changes}


@pytest.fixture(scope="session")
def draw() -> Any:
    """draw(pipe, task, **changes): the images of one call, whatever form they have, as a tensor."""
    import numpy as np

    def run(pipe: Any, task: str, **changes: Any) -> torch.Tensor:
        out = pipe(**call_arguments(task, **changes))
        images = out.images if hasattr(out, "images") else out[0]
        if isinstance(images, torch.Tensor):
            return images
        return torch.stack(
            [torch.as_tensor(np.asarray(image, dtype=np.float32)) for image in images]
        )

    return run


# added conditioning of `make_tiny_xl_pipeline`, two rows
XL = {"text_embeds": torch.full((2, 32), 0.3), "time_ids": torch.ones(2, 6)}


def unet_inputs(
    height: int = 8, width: int = 8, batch: int = 2, timestep: float = 501.0
) -> list[Tensor]:
    """sample (B, 4, H, W), timestep (B,), text (B, 16, 32) for the tiny U-Nets"""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, height, width, generator=generator)
    text = torch.randn(batch, 16, 32, generator=generator)
    return [sample, torch.full((batch,), timestep), text]


@pytest.fixture(scope="session")
def mini_vae() -> Any:
    folder = Path(__file__).parents[1] / "models/weights/taiji-sd-mini/vae"
    return AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same_images(engine: str, found: Tensor, wanted: Tensor) -> None:
    """Equal in eager, to rounding on an engine."""
    from hcf.export.component import relative_error

    assert found.shape == wanted.shape
    if engine == "eager":
        assert torch.equal(found, wanted)
    elif wanted.max() > 8:  # 8 bits: rounding may go either way
        assert (found - wanted).abs().max() <= 1
    else:
        assert relative_error(found, wanted) < 1e-3


def unit_calls(*timesteps: int) -> list[DenoiserCall]:
    """Calls of the tiny U-Net with latents of unit variance: the trajectory of random weights would
    run away."""
    generator = torch.Generator().manual_seed(0)
    return [
        DenoiserCall(
            torch.randn(2, 4, 8, 8, generator=generator),
            torch.full((2,), timestep),
            {"encoder_hidden_states": torch.randn(2, 7, 32, generator=generator)},
        )
        for timestep in timesteps
    ]


def tiny_vq(**changes: Any) -> Any:
    config: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "latent_channels": 4,
        "norm_num_groups": 8,
        "num_vq_embeddings": 32,
    }
    return VQModel(**config | changes).eval()
