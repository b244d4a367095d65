"""Whether a LoRA fits a model, before peft has changed anything of it.

diffusers skips layers it does not know with a warning and ignores parts that are for no component;
peft finds a wrong shape when its layers are in place already.

O outputs, I inputs of a layer, R rank of the adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hcf.errors import InvalidArtifact, MissingDependency, UnsafeFile
from hcf.lora.effective import EffectiveWeights

OTHER_MODEL = "use a LoRA that was trained for this base model"
Shapes = dict[str, tuple[int, ...]]  # of "lora_A" (R, I, ...) and "lora_B" (O, R, ...)


def check_lora(
    module: nn.Module, source: Mapping[str, Tensor] | str | Path, component: str = "unet"
) -> int:
    """The number of layers of `module` that LoRA `source` changes, all of which it fits.

    `source`: a state dict or safetensors file, in diffusers', peft's or kohya's (A1111) keys.
    `component`: the name the file has for the module ("unet", "text_encoder", ...).
    Raises InvalidArtifact naming the first layer that the module does not have or has in another
    shape, or where nothing in the file is for `component`. Nothing is changed.
    """
    _require_peft()
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    config = {"unet_config": module.config} if component == "unet" else {}
    found = _converted(StableDiffusionLoraLoaderMixin, _read(source), config)
    layers = _layers_of(found, module, component)
    if not layers:
        others = ", ".join(sorted({key.partition(".")[0] for key in found}))
        raise InvalidArtifact(
            f"the LoRA has nothing for {component}: its tensors are for {others or 'nothing'}",
            OTHER_MODEL,
        )
    _check_layers(module, layers, component)
    return len(layers)


def check_pipeline_lora(
    pipe: Any, source: Mapping[str, Tensor] | str | Path, **kwargs: Any
) -> dict[str, int]:
    """{component: layers that LoRA `source` changes}, for everything in it; else InvalidArtifact.

    `source` and `kwargs` (`weight_name`, `subfolder`, ...) as for `pipe.load_lora_weights`, to be
    called before it: what that would leave out in silence is an error here.
    """
    _require_peft()
    given: Any = source
    if isinstance(source, Mapping) or Path(source).is_file():
        given = _read(source)
    unet = getattr(pipe, "unet", None)
    config = {} if unet is None else {"unet_config": unet.config}
    found = _converted(type(pipe), given, {"use_safetensors": True, **kwargs, **config})
    parts = sorted({key.partition(".")[0] for key in found})
    missing = [part for part in parts if getattr(pipe, part, None) is None]
    if missing or not parts:
        what = f"is for {', '.join(missing)}" if missing else "is empty"
        raise InvalidArtifact(
            f"the LoRA {what}; {type(pipe).__name__} has {', '.join(pipe._lora_loadable_modules)}",
            OTHER_MODEL,
        )
    layers = {part: _layers_of(found, getattr(pipe, part), part) for part in parts}
    for part in parts:
        _check_layers(getattr(pipe, part), layers[part], part)
    return {part: len(layers[part]) for part in parts}


def _read(source: Mapping[str, Tensor] | str | Path) -> dict[str, Tensor]:
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if not path.is_file():
        raise InvalidArtifact(f"{path} is no file", fix="give a LoRA's .safetensors file")
    if path.suffix != ".safetensors":
        raise UnsafeFile(
            f"{path} may be a pickle, which could run code when read",
            fix="use the LoRA's .safetensors file",
        )
    from safetensors.torch import load_file

    from hcf.weights import read_header

    read_header(path)
    return load_file(path)


def _converted(loader: Any, source: Any, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors under diffusers' names, by its own conversion."""
    names = list(source) if isinstance(source, Mapping) else []
    foreign = next((key for key in names if "lora" not in key), None)
    if foreign is not None:
        raise InvalidArtifact(f"{foreign} is no LoRA's tensor", fix="give a LoRA file")
    try:
        found: dict[str, Tensor] = loader.lora_state_dict(source, **kwargs)[0]
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise InvalidArtifact(
            f"the LoRA's layers are not those of this model ({names[0] if names else source}, "
            f"...): {error}",
            OTHER_MODEL,
        ) from error
    except OSError as error:
        raise InvalidArtifact(
            f"no LoRA in safetensors at {source}: {error}", fix="give a .safetensors file"
        ) from error
    for key, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise InvalidArtifact(
                f"{key} of the LoRA has NaN or infinite values",
                fix="its training diverged or the file is damaged: use another one",
            )
    return found


def _layers_of(found: Mapping[str, Tensor], module: nn.Module, component: str) -> dict[str, Shapes]:
    """{layer: shapes} of the tensors that are for `component`."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    prefix = f"{component}."
    own = {key.removeprefix(prefix): t for key, t in found.items() if key.startswith(prefix)}
    if component.startswith("text_encoder"):
        # as diffusers does on loading; both raise for names that are peft's already
        for convert in (convert_state_dict_to_diffusers, convert_state_dict_to_peft):
            with contextlib.suppress(ValueError):
                own = convert(own)
        if not hasattr(module, "text_model"):
            own = {key.removeprefix("text_model."): t for key, t in own.items()}
    elif own and "lora_A" not in next(iter(own)):
        own = convert_unet_state_dict_to_peft(own)
    layers: dict[str, Shapes] = {}
    for key, tensor in own.items():
        layer, _, side = key.removesuffix(".weight").rpartition(".")
        if side in ("lora_A", "lora_B") and key.endswith(".weight"):
            layers.setdefault(layer, {})[side] = tuple(tensor.shape)
        elif not key.endswith((".bias", ".alpha")) and "magnitude" not in key:
            raise InvalidArtifact(f"{prefix}{key} is no LoRA's tensor", fix="give a LoRA file")
    return layers


def _check_layers(module: nn.Module, layers: Mapping[str, Shapes], component: str) -> None:
    """lora_A (R, I) and lora_B (O, R) of a Linear, (R, I, kh, kw) and (O, R, 1, 1) of a Conv2d."""
    weights = EffectiveWeights(module)
    unknown = [layer for layer in layers if f"{layer}.weight" not in weights]
    if unknown:
        raise InvalidArtifact(
            f"the LoRA changes {len(unknown)} layer(s) that {component} does not have, first "
            f"{unknown[0]} with {_text(layers[unknown[0]])}",
            OTHER_MODEL,
        )
    for name in weights:
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in layers:
            continue
        shape = tuple(weights.base(name).shape)
        found = layers[layer]
        rank = found.get("lora_A", (0,))[0]
        needed = {
            "lora_A": (rank, *shape[1:]),
            "lora_B": (shape[0], rank, *(1 for _ in shape[2:])),
        }
        if found != needed:
            raise InvalidArtifact(
                f"the LoRA does not fit {component}: {layer} has {_text(found)}, needed is "
                f"{_text(needed)} for its weight {shape}",
                OTHER_MODEL,
            )


def _text(shapes: Shapes) -> str:
    return " and ".join(f"{side} {shape}" for side, shape in sorted(shapes.items()))


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingDependency("LoRA needs peft", fix="pip install 'hcf-toolkit[lora]'") from error
