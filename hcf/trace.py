"""What a pipeline feeds its denoiser, recorded from real runs: no stage has to know the pipeline.

Nested and listed arguments become flat names, and go back where they came from in `call_denoiser`:

    added_cond_kwargs={"text_embeds": t}     text_embeds
    down_block_additional_residuals=(a, b)   down_block_additional_residuals_0, ..._1 (ControlNet)
    down_intrablock_additional_residuals     likewise (T2I-Adapter)

B batch (guidance doubles it: [unconditional, conditional]), C channels, H W latent size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hcf.errors import HcfError

CONTROLNET = "controlnet"
NESTED = "added_cond_kwargs"  # the one nested argument of diffusers U-Nets; flattened here
LISTED = ("down_block_additional_residuals", "down_intrablock_additional_residuals")
AFTER = ("conditioning_scale", "guess_mode")  # a ControlNet only scales its outputs by these
IP_ADAPTER = "image_embeds"
CONCATENATED = "concatenated"  # image (B, C', H, W) behind the sample's channels: super-resolution


@dataclass(frozen=True)
class DenoiserCall:
    """One forward call: sample (B, C, H, W), timestep (B,), flat conditioning, each (B, ...)."""

    sample: Tensor
    timestep: Tensor
    kwargs: dict[str, Tensor] = field(default_factory=dict)


class _EnoughCalls(Exception):
    """Leaves the pipeline from inside the hook; never seen by a caller."""


def denoiser_name(pipe: Any) -> str:
    """Which component predicts the noise: "unet" or "transformer". Raises HcfError without one."""
    for name in ("unet", "transformer"):
        if getattr(pipe, name, None) is not None:
            return name
    raise HcfError(
        f"{type(pipe).__name__} has neither a `unet` nor a `transformer`",
        fix="use a text-to-image diffusers pipeline",
    )


def record_calls(
    pipe: Any,
    prompts: list[str],
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int = 8,
    max_calls: int | None = None,
    height: int | None = None,
    width: int | None = None,
    component: str | None = None,
) -> list[DenoiserCall]:
    """Every denoiser call of real sampling runs over `prompts`, in order.

    Prompt i starts from the noise of seed + i whatever the batch size. Stops after `max_calls`.
    `height` and `width` are pixels, the pipeline's own where not given. Images that the pipeline
    wants are those of `example_arguments`. `component` "controlnet" records its calls instead.
    """
    if not prompts:
        raise HcfError("no prompts to record", fix="give at least one prompt")
    calls: list[DenoiserCall] = []

    def keep(call: DenoiserCall) -> None:
        calls.append(call)
        if max_calls is not None and len(calls) >= max_calls:
            raise _EnoughCalls

    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        size = height, width
        _run(pipe, batch, steps, guidance_scale, generators, keep, size, component)
        if max_calls is not None and len(calls) >= max_calls:
            break
    return calls


def conditioning(
    pipe: Any, prompts: list[str], guidance_scale: float
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Flat conditioning of `prompts`, each (B, ...): (conditional, unconditional or None).

    None where the pipeline does not guide. It runs up to its first denoiser call, no further.
    """
    first: list[DenoiserCall] = []

    def keep(call: DenoiserCall) -> None:
        first.append(call)
        raise _EnoughCalls

    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    _run(pipe, prompts, 1, guidance_scale, generators, keep)
    kwargs, count = first[0].kwargs, len(prompts)
    if len(first[0].sample) == count:
        return kwargs, None
    if len(first[0].sample) != 2 * count:
        raise HcfError(
            f"{type(pipe).__name__} calls its denoiser with batch {len(first[0].sample)} for "
            f"{count} prompts; expected {count} or {2 * count} (unconditional, then conditional)"
        )
    return {k: v[count:] for k, v in kwargs.items()}, {k: v[:count] for k, v in kwargs.items()}


def call_denoiser(
    denoiser: nn.Module, sample: Tensor, timestep: Tensor, kwargs: Mapping[str, Tensor]
) -> Tensor:
    """sample (B, C, H, W), timestep (B,), flat kwargs -> prediction (B, C, H, W).

    What `kwargs` has as "concatenated" goes behind the sample's channels.
    """
    if CONCATENATED in kwargs:
        kwargs = dict(kwargs)
        sample = torch.cat([sample, kwargs.pop(CONCATENATED).to(sample.dtype)], dim=1)
    return call_flat(denoiser, sample, timestep, kwargs)[0]


def call_flat(
    module: nn.Module, sample: Tensor, timestep: Tensor, kwargs: Mapping[str, Tensor]
) -> tuple[Any, ...]:
    """What `module` returns for flat arguments, without return_dict; see `flatten_call`."""
    known = _parameters(module)
    named: dict[str, Any] = {}
    nested: dict[str, Tensor] = {}
    listed: dict[str, dict[int, Tensor]] = {}
    for name, value in kwargs.items():
        base, _, index = name.rpartition("_")
        if base in LISTED and index.isdigit():
            listed.setdefault(base, {})[int(index)] = value
        elif name in known:
            named[name] = value
        else:
            nested[name] = value
    # U-Nets join one of them to a tuple and pop from the other
    for base, kind in zip(LISTED, (tuple, list), strict=True):
        if base in listed:
            named[base] = kind(value for _, value in sorted(listed[base].items()))
    if nested:
        named[NESTED] = nested
    result: tuple[Any, ...] = module(sample, timestep=timestep, **named, return_dict=False)
    return result


def flatten_call(
    denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> DenoiserCall:
    """The arguments of denoiser(*args, **kwargs) as a `DenoiserCall`.

    Raises HcfError naming an argument an engine cannot take: an IP-Adapter's list of images,
    attention options.
    """
    bound = inspect.signature(_inner(denoiser).forward).bind(*args, **kwargs).arguments
    bound.update(bound.pop("kwargs", {}))
    bound.pop("return_dict", None)
    sample: Tensor = bound.pop(next(iter(bound)))
    batch = len(sample)
    flat: dict[str, Any] = {**bound, **(bound.get(NESTED) or {})}
    flat.pop(NESTED, None)
    for name in LISTED:
        for index, value in enumerate(flat.pop(name, None) or ()):
            flat[f"{name}_{index}"] = value
    timestep = torch.as_tensor(flat.pop("timestep"), device=sample.device).reshape(-1).expand(batch)
    tensors: dict[str, Tensor] = {}
    for name, value in flat.items():
        if isinstance(value, Tensor):
            tensors[name] = value.detach()
        elif value is not None and value != {}:
            raise HcfError(
                f"the denoiser is called with {name}={type(value).__name__}, which is not a tensor",
                fix="pipe.unload_ip_adapter(): an engine has no IP-Adapter's image attention"
                if name == IP_ADAPTER
                else f"leave out {name}: engines take tensors only",
            )
    return DenoiserCall(sample.detach(), timestep.detach(), tensors)


def example_arguments(
    pipe: Any, count: int, height: int | None = None, width: int | None = None
) -> dict[str, Any]:
    """What `pipe` wants besides prompts: images (count, 3, H, W) in [0, 1], masks (count, 1, H, W).

    `height`, `width` in pixels, the pipeline's own size where not given. Image-to-image runs at
    full strength, so that a run of n steps has n. Nothing for a text-to-image pipeline at its size.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    images = [name for name in ("image", "control_image") if name in parameters]
    found: dict[str, Any] = {}
    for name, value in (("height", height), ("width", width)):
        if value is not None and name in parameters:
            found[name] = value
        elif value is not None and "image" not in images:
            raise HcfError(f"{type(pipe).__name__} takes no {name}", fix="leave its size as it is")
    if images:
        size = height or own_size(pipe), width or own_size(pipe)
        if hasattr(pipe, "low_res_scheduler"):  # an upscaler's image is as large as its latents
            size = size[0] // pipe.vae_scale_factor, size[1] // pipe.vae_scale_factor
        for seed, name in enumerate(images):
            found[name] = _for_each_net(pipe, name, images, _blobs(count, *size, seed))
        if "mask_image" in parameters:
            found["mask_image"] = torch.zeros(count, 1, *size)
            found["mask_image"][..., size[1] // 2 :] = 1.0
    if "strength" in parameters:
        found["strength"] = 1.0
    return found


def own_size(pipe: Any) -> int:
    """Edge of the images a pipeline makes when it is not told a size, in pixels."""
    config = getattr(pipe, denoiser_name(pipe)).config
    size = getattr(config, "sample_size", None) or pipe.default_sample_size
    factor = int(getattr(pipe, "vae_scale_factor", 1))  # an upscaler without one takes any size
    return int(size if isinstance(size, int) else max(size)) * factor


def _blobs(count: int, height: int, width: int, seed: int) -> Tensor:
    """Smooth coloured images (count, 3, height, width) in [0, 1]."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    size = (height, width)
    return nn.functional.interpolate(coarse, size, mode="bicubic", align_corners=False).clamp(0, 1)


def _for_each_net(pipe: Any, name: str, images: list[str], image: Tensor) -> Any:
    """A list of one image a network where several ControlNets share the pipeline."""
    nets = getattr(getattr(pipe, CONTROLNET, None), "nets", None)
    # with both, `image` is where the run starts from
    controls = name == images[-1]
    return [image] * len(nets) if nets is not None and controls else image


def _inner(denoiser: nn.Module) -> Any:
    return getattr(denoiser, "_orig_mod", denoiser)  # torch.compile's wrapper hides the signature


def _parameters(denoiser: nn.Module) -> set[str]:
    return set(inspect.signature(_inner(denoiser).forward).parameters)


def _run(
    pipe: Any,
    prompts: list[str],
    steps: int,
    guidance_scale: float,
    generators: list[torch.Generator],
    keep: Callable[[DenoiserCall], None],
    size: tuple[int | None, int | None] = (None, None),
    component: str | None = None,
) -> None:
    module: nn.Module = getattr(pipe, component or denoiser_name(pipe))

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if component == CONTROLNET:
            kwargs = {name: value for name, value in kwargs.items() if name not in AFTER}
        call = flatten_call(module, args, kwargs)
        # a scheduler may update its latents in place after the call
        keep(DenoiserCall(call.sample.clone(), call.timestep, call.kwargs))

    given: dict[str, Any] = {
        "prompt": prompts,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "generator": generators,
        "output_type": "latent",
        **example_arguments(pipe, len(prompts), *size),
    }
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with quiet(pipe), torch.no_grad():
            pipe(**given)
    except _EnoughCalls:
        pass
    finally:
        handle.remove()


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Switches the pipeline's progress bar off inside, and back to what it was after."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
