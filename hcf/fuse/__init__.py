"""The only place where models meet kernels: fused kernels into a model's modules, and out again.

    report = hcf.fuse(pipe)         # or one of its models; print(report) says what it swapped
    hcf.unfuse(pipe)                # every module as it was

For UNet2DConditionModel, ControlNetModel, AutoencoderKL and VQModel, by the structure of their
blocks. Parameters, names, config and class tests stay, so adapters, `save_pretrained`,
`torch.compile(fullgraph=True)` and simulated quantisation work on a fused model. Kernels are for
inference: a gradient through one is an error of torch that names it.

`DEFAULTS` is what runs on a device unless operators are named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from hcf.errors import RecipeError

if TYPE_CHECKING:
    from hcf.quantize.scales import LayerScale

Op = Literal["group_norm_silu", "layer_norm", "geglu", "attention", "upsample_conv3x3", "conv3x3"]
OPS: tuple[Op, ...] = get_args(Op)
DEFAULTS: dict[str, tuple[Op, ...]] = {
    # until it is measured against cuDNN's, the convolution has to be named
    "cuda": tuple(op for op in OPS if op != "conv3x3"),
    "cpu": (),  # none pays there end to end: docs/fusion.md has the figures
}
ORIGINAL = "_hcf_unfused"  # on a swapped module: the class it had, or an attention's processor
FOLDED = "_hcf_folded"  # on an upsampling block: its weight's sums
CODES = "hcf_codes"  # on a layer in 8 bits
STATE = (ORIGINAL, FOLDED, CODES)
DENOISERS = ("unet.", "transformer.")
NONE_PAYS = "on a CPU no kernel is faster than torch from end to end; name them in ops to use them"


@dataclass
class FuseReport:
    """What was swapped: {module: operator}, and what was not: {module: why}."""

    swapped: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """{operator: modules that use it}."""
        return dict(Counter(self.swapped.values()))

    def __str__(self) -> str:
        made = ", ".join(f"{op} in {count}" for op, count in self.counts().items())
        lines = [f"fused: {made or 'nothing'}"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"not {names[0]}{more}: {reason}")
        return "\n".join(lines)


def fuse(
    model: Any,
    ops: Sequence[Op] | None = None,
    scales: Mapping[str, LayerScale] | None = None,
) -> FuseReport:
    """Swaps the modules of a pipeline or model that the kernels `ops` are for; returns what it did.

    Without `ops` those of `DEFAULTS` for the device the weights are on: none on a CPU. With
    `scales` (of `hcf quantize`, {layer: scale}) the layers of the denoiser that they name compute
    in 8 bits. A model that is fused already is unfused first. Raises RecipeError for an unknown
    operator, scales that name no layer of the model, or a model with no module that any of them is
    for; then, as after any error, nothing is fused.
    """
    parts = _parts(model)
    if scales:
        _check_scales(parts, scales)
    for op in ops or ():
        if op not in OPS:
            raise RecipeError(f"unknown operator {op!r}", fix=f"use {', '.join(OPS)}")
    unfuse(model)
    report = FuseReport()
    try:
        for prefix, part in parts.items():
            wanted = DEFAULTS[_device(part)] if ops is None else tuple(ops)
            if scales and prefix in ("", *DENOISERS):
                _quantize_layers(prefix, part, scales, report)
            if ops is None and not wanted:
                report.kept[prefix.rstrip(".") or type(part).__name__] = NONE_PAYS
            _fuse_part(prefix, part, wanted, report)
    except Exception:
        unfuse(model)
        raise
    if not report.swapped and not report.kept:
        names = ", ".join(type(part).__name__ for part in parts.values())
        raise RecipeError(
            f"nothing in {names} is of a kind that fused kernels are for",
            fix="give a UNet2DConditionModel, ControlNetModel, AutoencoderKL or VQModel",
        )
    return report


def unfuse(model: Any) -> int:
    """Every swapped module of a pipeline or model as it was; how many there were.

    An attention whose processor has been set since (an IP-Adapter's, say) keeps that.
    """
    count = 0
    for part in _parts(model).values():
        for module in part.modules():
            original = module.__dict__.pop(ORIGINAL, None)
            if original is None:
                continue
            for held in (FOLDED, CODES):
                module.__dict__.pop(held, None)
            if isinstance(original, type):
                module.__class__ = original
            elif _has_our_processor(module):
                module.processor = original
            count += 1
    return count


@contextmanager
def fused(model: Any, ops: Sequence[Op] | None = None) -> Iterator[None]:
    """Inside, a pipeline or model is fused; one that is already stays so. Raises as `fuse`."""
    if is_fused(model):
        yield
        return
    fuse(model, ops)
    try:
        yield
    finally:
        unfuse(model)


def is_fused(model: Any) -> bool:
    """Whether any module of a pipeline or model is swapped."""
    return any(
        ORIGINAL in module.__dict__ for part in _parts(model).values() for module in part.modules()
    )


def layers_in_8_bits(model: nn.Module) -> list[str]:
    """Names of the layers that `scales` have swapped."""
    return [name for name, module in model.named_modules() if CODES in module.__dict__]


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes with torch's own operators, as what reads its graph expects.

    Its layers in 8 bits compute in floating point meanwhile.
    """
    held = {
        module: ({name: module.__dict__[name] for name in STATE if name in module.__dict__},
                 module.__class__, getattr(module, "processor", None))
        for module in model.modules()
        if ORIGINAL in module.__dict__
    }  # fmt: skip
    unfuse(model)
    try:
        yield
    finally:
        for module, (state, kind, processor) in held.items():
            module.__dict__.update(state)
            module.__class__ = kind
            if processor is not None:
                module.processor = processor


def _fuse_part(prefix: str, part: nn.Module, ops: Sequence[Op], report: FuseReport) -> None:
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention_processor import Attention
    from diffusers.models.upsampling import Upsample2D

    from hcf.fuse import modules as fused

    absorbed: set[nn.Module] = set()  # norms that a swapped block calls the kernel for
    names = {module: f"{prefix}{name}" for name, module in part.named_modules()}
    if "group_norm_silu" in ops:
        _fuse_norms(part, names, report, absorbed)
    if "layer_norm" in ops:
        for module in _of_kind(part, nn.LayerNorm, names, report):
            if len(module.normalized_shape) > 1:
                report.kept[names[module]] = "it is over more than the last axis"
                continue
            _swap(module, fused.FusedLayerNorm, "layer_norm", names, report)
    if "geglu" in ops:
        for module in _of_kind(part, GEGLU, names, report):
            _swap(module, fused.FusedGEGLU, "geglu", names, report)
    if "upsample_conv3x3" in ops:
        for module in _of_kind(part, Upsample2D, names, report):
            if (reason := fused.takes_upsample(module)) is not None:
                report.kept[names[module]] = reason
                continue
            _swap(module, fused.FusedUpsample2D, "upsample_conv3x3", names, report)
    if "conv3x3" in ops:
        folded = {m.conv for m in part.modules() if type(m) is fused.FusedUpsample2D}
        for module in _of_kind(part, nn.Conv2d, names, report):
            if module in folded:
                continue
            if (reason := fused.takes_conv(module)) is not None:
                report.kept[names[module]] = reason
                continue
            _swap(module, fused.FusedConv2d, "conv3x3", names, report)
    if "attention" in ops:
        for module in _of_kind(part, Attention, names, report):
            if (reason := fused.takes_processor(module)) is not None:
                report.kept[names[module]] = reason
                continue
            module.__dict__[ORIGINAL] = module.processor
            module.processor = fused.FusedAttnProcessor()
            report.swapped[names[module]] = "attention"


def _quantize_layers(
    prefix: str, part: nn.Module, scales: Mapping[str, LayerScale], report: FuseReport
) -> None:
    from hcf.fuse import quantized

    names = {module: f"{prefix}{name}" for name, module in part.named_modules()}
    for name, scale in scales.items():
        layer = part.get_submodule(name)
        if (reason := quantized.why_not(layer, scale)) is not None:
            report.kept[f"{prefix}{name}"] = reason
            continue
        codes = quantized.codes_of(layer, scale)
        linear = isinstance(layer, nn.Linear)
        kind = quantized.QuantizedLinear if linear else quantized.QuantizedConv2d
        _swap(
            layer, kind, f"{scale.scheme} {'product' if linear else 'convolution'}", names, report
        )
        layer.__dict__[CODES] = codes


def _check_scales(parts: Mapping[str, nn.Module], scales: Mapping[str, LayerScale]) -> None:
    """RecipeError for scales of layers that the denoiser does not have."""
    part = next((parts[name] for name in ("", *DENOISERS) if name in parts), None)
    known = dict(part.named_modules()) if part is not None else {}
    if unknown := [name for name in scales if name not in known]:
        raise RecipeError(
            f"the scales name {unknown[0]!r} and {len(unknown) - 1} more layers that the model "
            "does not have",
            fix="give the scales that `hcf quantize` wrote for this model",
        )


def _fuse_norms(
    part: nn.Module,
    names: Mapping[nn.Module, str],
    report: FuseReport,
    absorbed: set[nn.Module],
) -> None:
    """Residual blocks, the norm and SiLU at a model's end, then the norms that stand alone."""
    from diffusers.models.resnet import ResnetBlock2D

    from hcf.fuse import modules as fused

    for block in _of_kind(part, ResnetBlock2D, names, report):
        absorbed |= {block.norm1, block.norm2}
        if (reason := fused.takes_resnet(block)) is not None:
            report.kept[names[block]] = reason
            continue
        _swap(block, fused.FusedResnetBlock2D, "group_norm_silu", names, report)
    for module in list(part.modules()):
        norm, act = (getattr(module, name, None) for name in ("conv_norm_out", "conv_act"))
        if type(norm) is nn.GroupNorm and act is not None and fused.is_activation(act):
            absorbed.add(norm)
            with_it, without = fused.WITH_ACTIVATION[type(act)]
            _swap(norm, with_it, "group_norm_silu", names, report)
            act.__dict__[ORIGINAL] = type(act)
            act.__class__ = without
    for module in _of_kind(part, nn.GroupNorm, names, report):
        if module in absorbed:
            continue
        if module.weight is None:
            report.kept[names[module]] = "its norm has no weight"
            continue
        _swap(module, fused.FusedGroupNorm, "group_norm_silu", names, report)


def _swap(
    module: nn.Module,
    kind: type[nn.Module],
    op: str,
    names: Mapping[nn.Module, str],
    report: FuseReport,
) -> None:
    module.__dict__[ORIGINAL] = type(module)
    module.__class__ = kind
    report.swapped[names[module]] = op


def _of_kind(
    part: nn.Module, kind: type[nn.Module], names: Mapping[nn.Module, str], report: FuseReport
) -> list[Any]:
    """Modules of exactly this class; those whose forward somebody has replaced are kept."""
    found = [module for module in part.modules() if type(module) is kind]
    for module in found:
        if "forward" in module.__dict__:
            report.kept[names[module]] = "something else has replaced its forward"
    return [module for module in found if "forward" not in module.__dict__]


def _has_our_processor(module: nn.Module) -> bool:
    from hcf.fuse.modules import FusedAttnProcessor

    return isinstance(module.processor, FusedAttnProcessor)


def _parts(model: Any) -> dict[str, nn.Module]:
    """{prefix of names: module}: the components of a pipeline that kernels are for, or the model.

    RecipeError for what is neither.
    """
    if isinstance(model, nn.Module):
        return {"": model}
    components = getattr(model, "components", None)
    if not isinstance(components, Mapping):
        raise RecipeError(
            f"a {type(model).__name__} is neither a pipeline nor a model",
            fix="give a diffusers pipeline, or one of its models",
        )
    wanted = ("unet", "transformer", "controlnet", "vae")
    found = {f"{n}.": components[n] for n in wanted if isinstance(components.get(n), nn.Module)}
    if not found:
        raise RecipeError(
            f"{type(model).__name__} has none of {', '.join(wanted)}", fix="give a model itself"
        )
    return found


def _device(part: nn.Module) -> str:
    weight = next(part.parameters(), None)
    return weight.device.type if weight is not None and weight.device.type in DEFAULTS else "cpu"
