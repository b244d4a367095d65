"""What a pipeline feeds its denoiser, recorded from real runs: no stage has to know the pipeline.

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

NESTED = "added_cond_kwargs"  # the one nested argument of diffusers U-Nets; flattened here


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
) -> list[DenoiserCall]:
    """Every denoiser call of real sampling runs over `prompts`, in order.

    Prompt i starts from the noise of seed + i whatever the batch size. Stops after `max_calls`.
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
        _run(pipe, batch, steps, guidance_scale, generators, keep)
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
    """sample (B, C, H, W), timestep (B,), flat kwargs -> prediction (B, C, H, W)."""
    known = _parameters(denoiser)
    named: dict[str, Any] = {k: v for k, v in kwargs.items() if k in known}
    nested = {k: v for k, v in kwargs.items() if k not in known}
    if nested:
        named[NESTED] = nested
    return denoiser(sample, timestep=timestep, **named, return_dict=False)[0]


def flatten_call(
    denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> DenoiserCall:
    """The arguments of denoiser(*args, **kwargs) as a `DenoiserCall`.

    Raises HcfError for arguments an engine cannot take: ControlNet residuals, attention options.
    """
    bound = inspect.signature(_inner(denoiser).forward).bind(*args, **kwargs).arguments
    bound.update(bound.pop("kwargs", {}))
    bound.pop("return_dict", None)
    sample: Tensor = bound.pop(next(iter(bound)))
    batch = len(sample)
    flat: dict[str, Any] = {**bound, **(bound.get(NESTED) or {})}
    flat.pop(NESTED, None)
    timestep = torch.as_tensor(flat.pop("timestep"), device=sample.device).reshape(-1).expand(batch)
    tensors: dict[str, Tensor] = {}
    for name, value in flat.items():
        if isinstance(value, Tensor):
            tensors[name] = value.detach()
        elif value is not None and value != {}:
            raise HcfError(
                f"the denoiser is called with {name}={type(value).__name__}, which is not a tensor",
                fix="leave out ControlNet, IP-Adapter and attention options: these do not work",
            )
    return DenoiserCall(sample.detach(), timestep.detach(), tensors)


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
) -> None:
    denoiser: nn.Module = getattr(pipe, denoiser_name(pipe))

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = flatten_call(module, args, kwargs)
        # a scheduler may update its latents in place after the call
        keep(DenoiserCall(call.sample.clone(), call.timestep, call.kwargs))

    handle = denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with quiet(pipe), torch.no_grad():
            pipe(
                prompt=prompts,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=generators,
                output_type="latent",
            )
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
