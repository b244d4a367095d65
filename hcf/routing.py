"""Sends the calls of a pipeline's component to an engine, in place.

The component stays the object it was: its class, config, dtype, device, weights, `save_pretrained`
and adapters are the model's own. Only `forward` (or `decode`, `encode` of a first stage) of that
one object is replaced, and `unroute` takes the replacement away. What a call holds that an engine
cannot take is an error that names it: nothing falls back to torch in silence.

B batch, C channels, H W latent size, f the first stage's factor, S text tokens, D width.
"""

from __future__ import annotations

import copy
import functools
import re
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hcf.decode import decode as decode_with
from hcf.engines import Engine
from hcf.errors import HcfError
from hcf.export.component import CACHED, VAE_DECODER, VAE_ENCODER
from hcf.feature_cache import CachedDenoiser
from hcf.lora import unwatch, watch, weights_token
from hcf.trace import flatten_call

ROUTES = "_hcf_routes"  # on the component: {component name: Route}
GUARDED = "_hcf_guarded"  # on a first stage whose `decode` is `guard_decoder`'s
RESIDUAL = re.compile(r"(down_block_additional_residuals_|mid_block_additional_residual)")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
EAGER = "load it with engine='eager'"

Rebuild = Callable[[], Engine]


@dataclass
class Route:
    """What answers for one component. `shapes`: those the engine was made with, by input name.

    `token` is that of the weights the engine holds; when the module's differs, `rebuild` makes the
    engine of the new ones.
    """

    component: str
    engine: Engine
    shapes: Mapping[str, Sequence[int]]
    token: Hashable
    rebuild: Rebuild | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Route:
        return self  # a copied module does not use it

    def current(self, module: nn.Module) -> Engine:
        """The engine of the weights that `module` has now."""
        token = weights_of(module)
        if token != self.token:
            if self.rebuild is None:
                raise HcfError(
                    f"the weights of {self.component} have changed since its "
                    f"{self.engine.report.engine} engine was built",
                    fix="call hcf.accelerate on the pipeline again",
                )
            self.engine = self.rebuild()
            self.token = token
        return self.engine


def weights_of(module: nn.Module) -> Hashable:
    """What changes when adapters, fused weights or the vocabulary of `module` do."""
    embedding = getattr(module, "get_input_embeddings", None)
    rows = len(embedding().weight) if embedding is not None else 0
    return weights_token(module), rows


def owner_of(pipe: Any, component: str) -> nn.Module:
    """The module of `pipe` whose calls stand for `component`."""
    name = "vae" if component in (VAE_DECODER, VAE_ENCODER) else component
    name = "unet" if CACHED.fullmatch(component) else name
    module: nn.Module = getattr(pipe, name)
    return module


def route(
    pipe: Any,
    component: str,
    engine: Engine,
    shapes: Mapping[str, Sequence[int]],
    rebuild: Rebuild | None = None,
) -> Route:
    """From now on `engine` answers for `component`; what answered before does no more."""
    module = owner_of(pipe, component)
    unroute_component(module, component)
    if component == VAE_DECODER and module.__dict__.pop(GUARDED, False):
        del module.__dict__["decode"]
    found = Route(component, engine, shapes, weights_of(module), rebuild)
    if component == VAE_DECODER:
        answer = _decode(module, found)
    elif component == VAE_ENCODER:
        answer = _encode(module, found)
    elif component in TEXT_ENCODERS:
        answer = _encode_text(module, found)
    elif component == "controlnet":
        answer = _control(module, found)
    else:
        answer = _denoise(module, found)
    attribute = attribute_of(component)
    original = getattr(type(module), attribute)
    owner = id(module)

    # pipelines and our own tracing read the signature
    @functools.wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if id(self) != owner:  # a deep copy has weights of its own, and no engine
            return original(self, *args, **kwargs)
        return answer(*args, **kwargs)

    setattr(module, attribute, types.MethodType(method, module))
    routes = module.__dict__.setdefault(ROUTES, {})
    routes[component] = found
    watch(module)
    return found


def guard_decoder(pipe: Any) -> None:
    """`vae.decode` stays torch's, but tiles without seams, and an image that cannot be right (not
    finite, black, constant) is an error. For an AutoencoderKL; other first stages stay as they are.
    """
    from diffusers import AutoencoderKL
    from diffusers.models.autoencoders.vae import DecoderOutput

    vae = getattr(pipe, "vae", None)
    if not isinstance(vae, AutoencoderKL) or "decode" in vae.__dict__:
        return

    @functools.wraps(AutoencoderKL.decode)
    def decode(
        self: Any, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> Any:
        image = decode_with(self, z)
        return DecoderOutput(sample=image) if return_dict else (image,)

    vae.__dict__["decode"] = types.MethodType(decode, vae)
    vae.__dict__[GUARDED] = True


def unroute(pipe: Any) -> None:
    """Every component of `pipe` computes in torch again."""
    for module in pipe.components.values():
        held = getattr(module, "__dict__", {})
        for component in list(held.get(ROUTES, {})):
            unroute_component(module, component)
        if held.pop(GUARDED, False):
            held.pop("decode", None)


def unroute_component(module: nn.Module, component: str) -> None:
    routes: dict[str, Route] = module.__dict__.get(ROUTES, {})
    if (route := routes.pop(component, None)) is not None:
        if isinstance(route.engine, CachedDenoiser):
            route.engine.follower.release()
        module.__dict__.pop(attribute_of(component), None)
        if not routes:
            module.__dict__.pop(ROUTES, None)
            unwatch(module)


def routes_of(pipe: Any) -> dict[str, Route]:
    """{component: route} of everything that an engine answers for."""
    found: dict[str, Route] = {}
    for module in pipe.components.values():
        found |= getattr(module, "__dict__", {}).get(ROUTES, {})
    return found


def attribute_of(component: str) -> str:
    """Name of the method of the component's module that an engine takes over."""
    return {VAE_DECODER: "decode", VAE_ENCODER: "encode"}.get(component, "forward")


def unrouted(module: nn.Module) -> nn.Module:
    """A second object with the same weights and children, whose calls are torch's own.

    Engines that run torch hold this one: the other's `forward` would lead back to them.
    """
    twin = copy.copy(module)
    twin.__dict__.pop(ROUTES, None)
    twin.__dict__.pop(GUARDED, None)
    # methods bound to the other one: ours, and those of `watch`
    for name, value in list(twin.__dict__.items()):
        if isinstance(value, types.MethodType) and value.__self__ is module:
            del twin.__dict__[name]
    return twin


def _run(
    route: Route, module: nn.Module, given: Mapping[str, Tensor], like: Tensor
) -> dict[str, Tensor]:
    """The engine's outputs for `given`, on the device and in the float type of `like`."""
    engine = route.current(module)
    report = engine.report
    if like.device.type != "cpu" and report.device == "cpu":
        raise HcfError(
            f"{route.component} was moved to {like.device}, its {report.engine} engine runs on the "
            "CPU",
            fix="call hcf.accelerate on the moved pipeline again, or move it back",
        )
    given = {name: value.detach() for name, value in given.items()}
    missing = [name for name in route.shapes if name not in given]
    if missing and all(RESIDUAL.match(name) for name in missing):
        given |= {name: _zero_residual(route, name, given["sample"]) for name in missing}
    if set(given) != set(route.shapes):
        raise HcfError(
            f"{route.component} is called with {', '.join(sorted(given))}; its engine takes "
            f"{', '.join(sorted(route.shapes))}",
            fix="call hcf.accelerate on the pipeline as it is used, or " + EAGER,
        )
    inputs = {
        name: given[name].float() if given[name].is_floating_point() or name == "timestep"
        else given[name].long()
        for name in route.shapes
    }  # fmt: skip
    return {name: value.to(like.device, like.dtype) for name, value in engine(inputs).items()}


def _zero_residual(route: Route, name: str, sample: Tensor) -> Tensor:
    """A ControlNet residual of a call without one: adding zeros changes nothing.

    Its size is that of `sample`, halved (rounded up) as often as it was at the engine's own size.
    """
    made, own = route.shapes[name], route.shapes["sample"]
    height, width, full = sample.shape[-2], sample.shape[-1], int(own[-2])
    while full > int(made[-2]):
        full, height, width = -(-full // 2), -(-height // 2), -(-width // 2)
    return torch.zeros(len(sample), int(made[1]), height, width, device=sample.device)


def _denoise(module: nn.Module, route: Route) -> Callable[..., Any]:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    output = UNet2DConditionOutput if route.component == "unet" else Transformer2DModelOutput

    def forward(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """sample (B, C, H, W), timestep () or (B,), conditioning (B, ...) -> (B, C, H, W)"""
        _refuse_unknown(module, kwargs)
        call = flatten_call(unrouted(module), args, kwargs)
        given = {"sample": call.sample, "timestep": call.timestep, **call.kwargs}
        found = _run(route, module, given, call.sample)["out_sample"]
        return output(sample=found) if return_dict else (found,)

    return forward


def _refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Names what engines cannot take; drops options that have no effect."""
    # Kolors has an `encoder_hid_proj` too, of its text, which is in the graph
    if getattr(module.config, "encoder_hid_dim_type", None) == "ip_image_proj":
        raise HcfError(
            "this pipeline has an IP-Adapter, whose image attention engines do not have",
            fix="pipe.unload_ip_adapter(), or " + EAGER,
        )
    options = kwargs.get("cross_attention_kwargs")
    if options:
        if set(options) == {"scale"} and (options["scale"] == 1 or not _has_adapters(module)):
            kwargs.pop("cross_attention_kwargs")
            return
        raise HcfError(
            f"cross_attention_kwargs {sorted(options)} cannot reach into an engine",
            fix="set a LoRA's weight with pipe.set_adapters(name, weight), or " + EAGER,
        )


def _has_adapters(module: nn.Module) -> bool:
    return bool(getattr(module, "peft_config", None))


def _control(module: nn.Module, route: Route) -> Callable[..., Any]:
    from diffusers.models.controlnets.controlnet import ControlNetOutput

    def forward(
        *args: Any,
        conditioning_scale: float = 1.0,
        guess_mode: bool = False,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As ControlNetModel: sample (B, C, H, W), controlnet_cond (B, 3, f*H, f*W) -> residuals"""
        call = flatten_call(unrouted(module), args, kwargs)
        given = {"sample": call.sample, "timestep": call.timestep, **call.kwargs}
        found = list(_run(route, module, given, call.sample).values())
        # the network ends with these factors, so they are as good outside of it
        scales = [float(conditioning_scale)] * len(found)
        if guess_mode and not module.config.global_pool_conditions:  # type: ignore[union-attr]
            ramp = torch.logspace(-1, 0, len(found)).tolist()
            scales = [scale * factor for scale, factor in zip(scales, ramp, strict=True)]
        *down, mid = (value * scale for value, scale in zip(found, scales, strict=True))
        if not return_dict:
            return tuple(down), mid
        return ControlNetOutput(down_block_res_samples=tuple(down), mid_block_res_sample=mid)

    return forward


def _decode(module: Any, route: Route) -> Callable[..., Any]:
    from diffusers.models.autoencoders.vae import DecoderOutput

    def decode(
        z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> Any:
        """z (B, C, H, W) -> image (B, 3, f*H, f*W) in about [-1, 1]"""

        def run(latents: Tensor) -> Tensor:
            return _run(route, module, {"latents": latents}, z)["image"]

        image = decode_with(module, z, run, route.component)
        return DecoderOutput(sample=image) if return_dict else (image,)

    return decode


def _encode(module: Any, route: Route) -> Callable[..., Any]:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    def encode(x: Tensor, return_dict: bool = True) -> Any:
        """x (B, 3, f*H, f*W) -> posterior over latents (B, C, H, W)"""
        if getattr(module, "use_tiling", False) and max(x.shape[-2:]) > module.tile_sample_min_size:
            raise HcfError(
                f"encoding {tuple(x.shape)} in tiles is not offered on an engine",
                fix="vae.disable_tiling(), or leave vae_encoder out of `components`",
            )
        rows = x.split(1) if getattr(module, "use_slicing", False) else (x,)
        moments = torch.cat([_run(route, module, {"image": r}, x)["moments"] for r in rows])
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    return encode


def _encode_text(module: Any, route: Route) -> Callable[..., Any]:
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.clip.modeling_clip import CLIPTextModelOutput

    projected = type(module).__name__.endswith("WithProjection")

    def forward(
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unknown: Any,
    ) -> Any:
        """input_ids (B, S) -> states (B, S, D), pooled (B, D), every layer's states"""
        if attention_mask is not None or any(value is not None for value in unknown.values()):
            names = ["attention_mask"] * (attention_mask is not None) + sorted(unknown)
            raise HcfError(
                f"the engine of {route.component} takes input_ids alone, not {', '.join(names)}",
                fix=f"leave {route.component} out of `components`",
            )
        found = _run(
            route, module, {"input_ids": input_ids}, torch.empty(0, dtype=module.dtype,
                                                                 device=input_ids.device)
        )  # fmt: skip
        states = tuple(found["hidden_states"]) if output_hidden_states else None
        last, pooled = found["last_hidden_state"], found["pooled"]
        out: Any
        if projected:
            out = CLIPTextModelOutput(
                text_embeds=pooled, last_hidden_state=last, hidden_states=states
            )
        else:
            out = BaseModelOutputWithPooling(
                last_hidden_state=last, pooler_output=pooled, hidden_states=states
            )
        return out if return_dict is not False else out.to_tuple()

    return forward
