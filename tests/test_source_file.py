"""Checkpoints in one file, written here by the inverse of diffusers' own conversion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_TO_LDM_MAPPING,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hcf.errors import InvalidArtifact, RecipeError, UnsafeFile
from hcf.source import open_pipeline
from hcf.source_configs import (
    BY_TEXT_WIDTH,
    OPEN_CLIP_G,
    SD15,
    SD21,
    SDXL,
    SDXL_REFINER,
    Architecture,
    architecture_of,
    scheduler_config,
)
from hcf.source_file import tokenizer_folder
from hcf.weights import TensorEntry

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip


def renamed(state: Mapping[str, Any], prefix: str, names: Mapping[str, str]) -> dict[str, Any]:
    """The tensors under `prefix`, without it, the first parts of their names changed."""
    found = {}
    for key, value in state.items():
        if key.startswith(prefix):
            rest = key.removeprefix(prefix)
            for new, old in names.items():
                if rest.startswith(new + "."):
                    rest = old + rest.removeprefix(new)
                    break
            found[rest] = value
    return found


def compvis_unet(unet: Any) -> dict[str, Tensor]:
    """The state of a U-Net under CompVis names: diffusers' conversion, inverted."""
    state = unet.state_dict()
    tables = DIFFUSERS_TO_LDM_MAPPING["unet"]
    names = {**tables["layers"]}
    if unet.config.addition_embed_type:
        names |= tables["addition_embed_type"]
    found = {old: state[new] for new, old in names.items()}
    per_block, blocks = unet.config.layers_per_block, len(unet.config.block_out_channels)

    def put(where: str, prefix: str, table: Mapping[str, str]) -> None:
        found.update({f"{where}.{k}": v for k, v in renamed(state, prefix, table).items()})

    for block in range(blocks):
        for layer in range(per_block):
            where = f"input_blocks.{1 + block * (per_block + 1) + layer}"
            put(f"{where}.0", f"down_blocks.{block}.resnets.{layer}.", RESNET)
            put(f"{where}.1", f"down_blocks.{block}.attentions.{layer}.", {})
        where = f"input_blocks.{(block + 1) * (per_block + 1)}.0.op"
        put(where, f"down_blocks.{block}.downsamplers.0.conv.", {})
    put("middle_block.0", "mid_block.resnets.0.", RESNET)
    put("middle_block.1", "mid_block.attentions.0.", {})
    put("middle_block.2", "mid_block.resnets.1.", RESNET)
    for block in range(blocks):
        for layer in range(per_block + 1):
            where = f"output_blocks.{block * (per_block + 1) + layer}"
            put(f"{where}.0", f"up_blocks.{block}.resnets.{layer}.", RESNET)
            put(f"{where}.1", f"up_blocks.{block}.attentions.{layer}.", {})
        after = 1 + any(key.startswith(f"up_blocks.{block}.attentions.") for key in state)
        where = f"output_blocks.{(block + 1) * (per_block + 1) - 1}.{after}.conv"
        put(where, f"up_blocks.{block}.upsamplers.0.conv.", {})
    assert len(found) == len(state)
    return found


def compvis_vae(vae: Any) -> dict[str, Tensor]:
    """The state of a first stage under CompVis names, its attention as 1x1 convolutions."""
    state = vae.state_dict()
    found = {old: state[new] for new, old in DIFFUSERS_TO_LDM_MAPPING["vae"].items()}
    last = len(vae.config.block_out_channels) - 1
    shortcut = {"conv_shortcut": "nin_shortcut"}

    def put(where: str, prefix: str, table: Mapping[str, str]) -> None:
        found.update({f"{where}.{k}": v for k, v in renamed(state, prefix, table).items()})

    for side, kind, sampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        for block in range(last + 1):
            # the decoder's blocks are counted from the image
            level = block if kind == "down" else last - block
            prefix = f"{side}.{kind}_blocks.{block}"
            for layer in range(vae.config.layers_per_block + (kind == "up")):
                put(f"{side}.{kind}.{level}.block.{layer}", f"{prefix}.resnets.{layer}.", shortcut)
            where = f"{side}.{kind}.{level}.{sampler}.conv"
            put(where, f"{prefix}.{kind}samplers.0.conv.", {})
        for layer in (0, 1):
            put(f"{side}.mid.block_{layer + 1}", f"{side}.mid_block.resnets.{layer}.", shortcut)
        put(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0.", VAE_ATTENTION)
    assert len(found) == len(state)
    return {
        k: v[..., None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in found.items()
    }


def compvis_clip(text_encoder: Any, flat: bool) -> dict[str, Tensor]:
    prefix = "" if flat else "text_model."
    return {prefix + name: value for name, value in text_encoder.state_dict().items()}


def open_clip(text_encoder: Any) -> dict[str, Tensor]:
    """A CLIPTextModelWithProjection under OpenCLIP's names, its three projections in one."""
    state = {k.removeprefix("text_model."): v for k, v in text_encoder.state_dict().items()}
    layers = DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"]
    found = {old: state[new.removeprefix("text_model.")] for new, old in layers.items()}
    found["text_projection"] = found["text_projection"].T.contiguous()
    names = {".layer_norm1.": ".ln_1.", ".layer_norm2.": ".ln_2.", ".fc1.": ".c_fc.",
             ".fc2.": ".c_proj.", ".self_attn.": ".attn."}  # fmt: skip
    for key, value in state.items():
        if not key.startswith("encoder.layers.") or any(f".{p}_proj." in key for p in "kv"):
            continue
        old = key.replace("encoder.layers.", "transformer.resblocks.")
        if ".q_proj." in key:
            value = torch.cat([state[key.replace(".q_proj.", f".{p}_proj.")] for p in "qkv"])
            old = old.replace(".q_proj.", ".in_proj_")
        for new, name in names.items():
            old = old.replace(new, name)
        found[old.replace(".attn.in_proj_", ".attn.in_proj_").replace(".mlp.mlp", ".mlp")] = value
    return found


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value.clone().contiguous() for name, value in state.items()}


def single_file(pipe: Any, file: Path, flat: bool = False) -> Path:
    """Writes `pipe` as A1111 and CompVis keep it."""
    state = under("model.diffusion_model.", compvis_unet(pipe.unet))
    state |= under("first_stage_model.", compvis_vae(pipe.vae))
    if hasattr(pipe, "text_encoder_2"):
        first = "conditioner.embedders.0.transformer."
        state |= under("conditioner.embedders.1.model.", open_clip(pipe.text_encoder_2))
    else:
        first = "cond_stage_model.transformer."
    state |= under(first, compvis_clip(pipe.text_encoder, flat))
    # as in files from training: statistics of it, and a buffer that is no weight
    state["model_ema.num_updates"] = torch.tensor(3)
    state["betas"] = torch.linspace(0, 1, 5)
    save_file(state, file)
    return file


def assert_equal_weights(found: Any, wanted: Any) -> None:
    for name, module in wanted.components.items():
        if isinstance(module, nn.Module):
            states = getattr(found, name).state_dict(), module.state_dict()
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


@pytest.fixture(scope="module")
def xl_pipeline() -> Any:
    from conftest import make_tiny_xl_pipeline

    return make_tiny_xl_pipeline()


@pytest.mark.parametrize("flat", [False, True])
def test_a_single_file_of_sd_is_the_folder_it_was_made_of(
    tiny_pipeline: Any, tiny_folder: Path, tmp_path: Path, flat: bool
) -> None:
    file = single_file(tiny_pipeline, tmp_path / "model.safetensors", flat)
    pipe = open_pipeline(file, config=tiny_folder)
    assert type(pipe) is type(tiny_pipeline)
    assert_equal_weights(pipe, tiny_pipeline)
    assert not pipe.unet.training and not pipe.unet.conv_in.weight.requires_grad
    given = {"num_inference_steps": 2, "output_type": "pt"}
    pipe.set_progress_bar_config(disable=True)
    images = [
        p("red cat", generator=torch.Generator().manual_seed(0), **given).images
        for p in (pipe, tiny_pipeline)
    ]
    assert torch.equal(*images)


@pytest.mark.parametrize("flat", [False, True])
def test_a_single_file_of_sdxl_has_both_text_encoders(
    xl_pipeline: Any, tmp_path: Path, flat: bool
) -> None:
    xl_pipeline.save_pretrained(tmp_path / "folder")
    file = single_file(xl_pipeline, tmp_path / "model.safetensors", flat)
    pipe = open_pipeline(file, config=tmp_path / "folder", dtype=torch.bfloat16)
    assert type(pipe) is type(xl_pipeline) and pipe.unet.dtype is torch.bfloat16
    assert_equal_weights(pipe.to(torch.float32), xl_pipeline.to(torch.bfloat16).to(torch.float32))


def test_the_drop_in_reads_single_files_for_any_task(
    tiny_pipeline: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    from hcf.pipelines import StableDiffusionImg2ImgPipeline, TaijiStableDiffusionPipeline

    file = single_file(tiny_pipeline, tmp_path / "model.safetensors")
    pipe = StableDiffusionImg2ImgPipeline.from_single_file(
        file, config=tiny_folder, engine="eager", local_files_only=True
    )
    assert type(pipe) is StableDiffusionImg2ImgPipeline
    assert [r.engine for r in pipe.hcf_report] == ["eager", "eager"]
    assert_equal_weights(pipe, tiny_pipeline)
    ckpt = file.rename(tmp_path / "model.ckpt")
    with pytest.raises(UnsafeFile, match="pickle"):
        StableDiffusionImg2ImgPipeline.from_single_file(ckpt, config=tiny_folder)
    with pytest.raises(Exception, match="from_pretrained"):
        TaijiStableDiffusionPipeline.from_single_file(file)


def entries(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorEntry]:
    return {name: TensorEntry("F16", shape, 0, 0) for name, shape in shapes.items()}


def header_of(architecture: Architecture, channels: int = 4) -> dict[str, TensorEntry]:
    width = next(width for width, a in BY_TEXT_WIDTH.items() if a is architecture)
    shapes = {f"{prefix}some.weight": (1,) for prefix in architecture.prefixes.values()}
    shapes["model.diffusion_model.input_blocks.0.0.weight"] = (320, channels, 3, 3)
    attention = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    return entries({**shapes, attention: (640, width)})


@pytest.mark.parametrize("architecture", [SD15, SD21, SDXL, SDXL_REFINER], ids=lambda a: a.name)
def test_architectures_are_told_by_their_tensors(architecture: Architecture) -> None:
    found = architecture_of(header_of(architecture), "model.safetensors")
    assert (found.name, found.pipeline) == (architecture.name, architecture.pipeline)
    if architecture is not SDXL_REFINER:
        inpaint = architecture_of(header_of(architecture, channels=9), "model.safetensors")
        assert inpaint.pipeline == architecture.pipeline.replace("Pipeline", "InpaintPipeline")
        assert inpaint.models["unet"]["in_channels"] == 9
    with pytest.raises(InvalidArtifact, match="takes 8 channels"):
        architecture_of(header_of(architecture, channels=8), "model.safetensors")
    header = header_of(architecture)
    header = {k: v for k, v in header.items() if not k.startswith("first_stage_model.")}
    with pytest.raises(InvalidArtifact, match="without vae"):
        architecture_of(header, "model.safetensors")


PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480,
             "text_encoder_2": 694_659_840},
    "sdxl-refiner": {"vae": 83_653_863, "text_encoder_2": 694_659_840},
}  # fmt: skip


def model_of(config: Mapping[str, Any]) -> Any:
    """The model of a configuration, on torch's meta device: shapes without numbers."""
    import diffusers
    import transformers

    with torch.device("meta"):
        if "_class_name" in config:
            return getattr(diffusers, config["_class_name"]).from_config(dict(config))
        kind = getattr(transformers, config["architectures"][0])
        return kind(kind.config_class(**config))


@pytest.mark.parametrize("architecture", [SD15, SD21, SDXL, SDXL_REFINER], ids=lambda a: a.name)
def test_configurations_have_the_published_sizes_and_names(architecture: Architecture) -> None:
    """Parameters as published; diffusers converts the names of each whole model to it."""
    for name, config in architecture.models.items():
        model = model_of(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == PARAMETERS[architecture.name].get(name, count), name
        if name == "unet":
            state = under("model.diffusion_model.", compvis_unet(model))
            found = convert_ldm_unet_checkpoint(state, dict(model.config))
        elif name == "vae":
            found = convert_ldm_vae_checkpoint(
                under("first_stage_model.", compvis_vae(model)), dict(model.config)
            )
        elif config["architectures"] == OPEN_CLIP_G["architectures"]:
            found = convert_open_clip_checkpoint(model, under("x.", open_clip(model)), "x.")
        else:
            continue
        assert {k: v.shape for k, v in found.items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }


def test_schedulers_follow_what_a_file_says() -> None:
    header = header_of(SD15)
    assert scheduler_config(SD15, header, {})["_class_name"] == "PNDMScheduler"
    zero = scheduler_config(SD15, {**header, **entries({"v_pred": (0,), "ztsnr": (0,)})}, {})
    assert zero["_class_name"] == "DDIMScheduler" and zero["rescale_betas_zero_snr"]
    assert zero["prediction_type"] == "v_prediction"
    assert scheduler_config(SD21, header, {})["prediction_type"] == "v_prediction"
    noise = {"model": {"params": {"linear_start": 0.00085}}}
    assert scheduler_config(SD21, header, noise)["prediction_type"] == "epsilon"
    v = {"model": {"params": {"parameterization": "v"}}}
    assert scheduler_config(SD15, header, v)["prediction_type"] == "v_prediction"


def broken(change: Callable[[dict[str, Tensor]], Any], file: Path) -> Path:
    state = load_file(file)
    change(state)
    save_file(state, file)
    return file


def test_what_is_no_whole_checkpoint_is_named(
    tiny_pipeline: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    file = single_file(tiny_pipeline, tmp_path / "model.safetensors")
    with pytest.raises(InvalidArtifact, match="width \\[32\\]; known are 768"):
        open_pipeline(file)
    with pytest.raises(RecipeError, match="for single files"):
        open_pipeline(tiny_folder, config=tiny_folder)
    unet = "model.diffusion_model.out.2.weight"
    broken(lambda state: state.pop(unet), file)
    with pytest.raises(InvalidArtifact, match="lacks weights|no weights for"):
        open_pipeline(file, config=tiny_folder)
    broken(lambda state: state.update({unet: torch.full((4, 16, 3, 3), float("nan"))}), file)
    with pytest.raises(InvalidArtifact, match="NaN"):
        open_pipeline(file, config=tiny_folder)
    broken(lambda state: state.update({unet: torch.zeros(2), "scaled_fp8": torch.zeros(1)}), file)
    with pytest.raises(InvalidArtifact, match="quantised already"):
        open_pipeline(file, config=tiny_folder)
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, file)
    with pytest.raises(InvalidArtifact, match="is a LoRA"):
        open_pipeline(file)
    save_file({"decoder.weight": torch.zeros(1)}, file)
    with pytest.raises(InvalidArtifact, match="no U-Net"):
        open_pipeline(file)
    for name in ("model.ckpt", "model.bin"):
        with pytest.raises(UnsafeFile, match="pickle"):
            open_pipeline(file.rename(tmp_path / name))
        (tmp_path / name).rename(file)


def test_tokenizers_come_from_a_folder(tiny_folder: Path, tmp_path: Path) -> None:
    assert tokenizer_folder(tiny_folder) == tiny_folder / "tokenizer"
    assert tokenizer_folder(tiny_folder / "tokenizer") == tiny_folder / "tokenizer"
