"""The weights that a component under LoRA really computes with.

peft keeps adapters beside a layer (`to_q` becomes a tuner with `to_q.base_layer` and
`to_q.lora_A.<name>`), or adds them into its weight ("fused"). An engine has one weight: the
effective one, here under the name it has without peft,

    W_eff = W + sum over active adapters of scaling * B @ A        (LoRA, arXiv:2106.09685, eq. 3)

computed by peft's own merge, on a copy, so that every adapter type which can be fused is right.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hcf.errors import HcfError

HALF = (torch.float16, torch.bfloat16)


class EffectiveWeights(Mapping[str, Tensor]):
    """Parameters and persistent buffers of a module by their names without peft, one at a time.

    Tensors that no adapter touches are the module's own, to be read only; the others (`touched`)
    are computed when asked for, in float32 where the layer is float16 or bfloat16.
    """

    def __init__(self, module: nn.Module, adapters: bool = True) -> None:
        self._adapters = adapters
        self._slots = {name: (tensor, tuner) for name, tensor, tuner in _slots(module)}
        self._last: tuple[Any, dict[str, Tensor]] = (None, {})
        self.touched = frozenset(
            name for name, (_, tuner) in self._slots.items() if any(_pending(tuner, adapters))
        )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.touched:
            return self.base(name).detach()
        tuner = self._slots[name][1]
        if self._last[0] is not tuner:  # weight and bias of a layer are computed together
            self._last = (tuner, _merged(name, tuner, self._adapters))
        return self._last[1][name.rpartition(".")[2]]

    def base(self, name: str) -> Tensor:
        """The tensor that the module holds, without what is to be added to it."""
        tensor: Tensor = self._slots[name][0]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)


def effective_weights(module: nn.Module, adapters: bool = True) -> EffectiveWeights:
    """{name without peft: tensor} that `module` computes with; without `adapters`, pristine ones.

    Right for active, weighted, disabled and fused adapters: what the module's forward would use.
    Raises HcfError where adapters sit on adapters and, on reading, for one that has no merged form.
    """
    return EffectiveWeights(module, adapters)


def clean_module(module: nn.Module) -> nn.Module:
    """A second `module` without peft, with the effective weights, whose calls are torch's own.

    Layers that no adapter touches are shared with the first one, which is not changed.
    """
    clean = _without_tuners(module, "", EffectiveWeights(module), {})
    clean = copy.copy(module) if clean is module else clean
    for name in ("peft_config", "_hf_peft_config_loaded", "_hcf_routes"):
        clean.__dict__.pop(name, None)
    for name, value in list(clean.__dict__.items()):
        # a forward that leads to an engine, or a method that `watch` put there
        if isinstance(value, types.FunctionType | types.MethodType) and hasattr(type(clean), name):
            del clean.__dict__[name]
    return clean


def tuner_kind() -> Any:
    """peft's class of adapted layers; None where peft was never imported, so there are none."""
    return getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)


def _slots(
    module: nn.Module, prefix: str = "", tuner: Any = None
) -> Iterator[tuple[str, Tensor, Any]]:
    """(name without peft, tensor, tuner or None) of everything a state dict would have."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter, tuner
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer, None
    for name, child in module._modules.items():
        if child is not None:
            plain, around = _plain(child)
            yield from _slots(plain, f"{prefix}{name}.", around)


def _plain(module: nn.Module) -> tuple[nn.Module, Any]:
    """What stands in `module`'s place without peft, and the tuner around it (or None)."""
    kind = tuner_kind()
    if kind is not None and isinstance(module, kind):
        base = module.base_layer
        if isinstance(base, kind):
            raise HcfError(
                f"a {type(module).__name__} adapter sits on a {type(base).__name__} adapter",
                fix="fuse the first one (pipe.fuse_lora) and unload it before loading the other",
            )
        assert isinstance(base, nn.Module)
        return base, module
    if "modules_to_save" in module._modules:  # layers that an adapter replaces as a whole
        wrapper: Any = module
        active = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
        if active and not wrapper.disable_adapters:
            return wrapper.modules_to_save[active[0]], None
        return wrapper.original_module, None
    return module, None


def _pending(tuner: Any, adapters: bool) -> tuple[list[str], list[str]]:
    """Adapters to add to the base weight and to take out of it, as the tuner's forward would."""
    if tuner is None:
        return [], []
    if tuner.disable_adapters or not adapters:
        return [], list(tuner.merged_adapters)
    if tuner.merged:
        return [], []  # then the base weight is all that counts
    available = tuner._get_available_adapters()
    return [name for name in tuner.active_adapters if name in available], []


@torch.no_grad()
def _merged(name: str, tuner: Any, adapters: bool) -> dict[str, Tensor]:
    """{"weight": (O, I, ...), "bias": (O,)} of a tuner's base layer with the adapters in it.

    O outputs, I inputs. peft merges into a copy that stands in the layer meanwhile.
    """
    added, removed = _pending(tuner, adapters)
    parameters = {key: p for key, p in tuner.get_base_layer()._parameters.items() if p is not None}
    before = {key: parameter.data for key, parameter in parameters.items()}
    merged, caches = tuner.merged_adapters, dict(getattr(tuner, "_caches", {}))
    tuner.merged_adapters = list(merged)
    try:
        for parameter in parameters.values():
            kind = torch.float32 if parameter.dtype in HALF else parameter.dtype
            parameter.data = parameter.data.to(kind, copy=True)
        if removed:
            tuner.unmerge()
        if added:
            tuner.merge(adapter_names=added)
        return {key: parameter.data for key, parameter in parameters.items()}
    except Exception as error:
        raise HcfError(
            f"{name}: adapter {', '.join(added + removed)} cannot be merged into it: {error}",
            fix="unload it (pipe.unload_lora_weights()), or load the pipeline with engine='eager'",
        ) from error
    finally:
        for key, parameter in parameters.items():
            parameter.data = before[key]
        tuner.merged_adapters = merged
        if hasattr(tuner, "_caches"):
            tuner._caches = caches


def _without_tuners(
    module: nn.Module, prefix: str, weights: EffectiveWeights, done: dict[int, nn.Module]
) -> nn.Module:
    """`module` itself, or where there are tuners in it a copy without them."""
    if id(module) in done:
        return done[id(module)]
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        children[name] = child and _without_tuners(
            _plain(child)[0], f"{prefix}{name}.", weights, done
        )
    own = [key for key in module._parameters if prefix + key in weights.touched]
    clean = module
    if own or any(children[name] is not child for name, child in module._modules.items()):
        clean = copy.copy(module)
        clean._modules = children
        clean._parameters = dict(module._parameters)
        for key in own:
            clean._parameters[key] = nn.Parameter(weights[prefix + key], requires_grad=False)
    done[id(module)] = clean
    return clean
