"""Noticing that the effective weights of a component have changed, and telling which they are.

`weights_token` is asked on every forward and says that something may have changed; `weights_hash`
then says what the weights are, and is equal for equal weights. Three traces are read: what
`peft_config` holds, torch's version counter of every parameter, and the tuners' lists of merged
adapters, which are replaced by lists that note being written to (peft fuses through `.data`, which
torch does not count). `watch` adds the methods that leave no trace of their own. Not noticed are
writes through `.data` that pass by all of these, such as merging by a `PeftModel` that is unloaded
again between two calls: `touch` says so.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import types
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, SupportsIndex
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hcf.lora.effective import EffectiveWeights, tuner_kind

# Methods that can write through `.data`; True: also tensors that are no adapter's.
WRITERS = {
    "load_lora_adapter": False,
    "load_adapter": False,
    "add_adapter": False,
    "load_state_dict": True,
    "resize_token_embeddings": True,
    "set_input_embeddings": True,
}


def weights_token(module: nn.Module) -> Hashable:
    """Differs from an earlier one whenever the effective weights can have changed since.

    Equal tokens of one module mean equal weights. Cheap enough for every forward.
    """
    state = _STATES.get(module)
    if state is None:
        state = _STATES.setdefault(module, _State())
        _list(module, state)
    if _identity(getattr(module, "peft_config", None)) != state.configs:
        _list(module, state)
    versions = 0
    for owner, name, parameter in state.parameters:
        if owner.get(name) is not parameter:
            _list(module, state)
            return weights_token(module)
        versions += parameter._version
    if not state.tuners:
        return state.generation, state.log.writes, versions
    if any(type(tuner.merged_adapters) is not _MergeLog for tuner in state.tuners):
        _list(module, state)
    layers = tuple(
        (
            tuner._disable_adapters,
            names if isinstance(names := tuner._active_adapter, str) else tuple(names),
            # tensors after diffusers' enable_lora_hotswap
            tuple((name, float(value)) for name, value in getattr(tuner, "scaling", {}).items()),
        )
        for tuner in state.tuners
    )
    return state.generation, state.log.writes, versions, layers


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of the effective weights.

    The digests of tensors that no adapter touches are kept while the module is watched, so that
    after a swap of adapters only the layers they touch are computed and read again.
    """
    weights_token(module)  # finds layers that have been replaced
    state = _STATES[module]
    for name in state.log.stale if state.watched else list(state.digests):
        state.digests.pop(name, None)
    state.log.stale.clear()
    weights = EffectiveWeights(module)
    held = {name: weights.base(name) for name in weights if name not in weights.touched}
    missing = [name for name, tensor in held.items() if not state.knows(name, tensor)]
    with ThreadPoolExecutor() as pool:  # hashlib computes without the interpreter's lock
        for name, digest in zip(
            missing, pool.map(lambda name: _digest(held[name].detach()), missing), strict=True
        ):
            state.digests[name] = (held[name], _stamp(held[name]), digest)
    total = hashlib.sha256()
    for name in sorted(weights):
        digest = state.digests[name][2] if name in held else _digest(weights[name])
        total.update(f"{name} {digest}\n".encode())
    return total.hexdigest()


def watch(module: nn.Module) -> None:
    """From now on the methods that change weights without a trace are noticed too."""
    weights_token(module)
    state = _STATES[module]
    if not state.watched:
        state.watched = True
        state.digests.clear()
    for name in WRITERS:
        if callable(getattr(type(module), name, None)) and name not in module.__dict__:
            # a bound method: a deep copy of the module gets its own
            module.__dict__[name] = types.MethodType(_noticed(type(module), name), module)


def unwatch(module: nn.Module) -> None:
    """Takes back what `watch` and `weights_token` added to the module."""
    for name in WRITERS:
        if hasattr(module.__dict__.get(name), "_hcf_noticed"):
            del module.__dict__[name]
    state = _STATES.pop(module, None)
    for tuner in state.tuners if state else ():
        tuner.merged_adapters = list(tuner.merged_adapters)


def touch(module: nn.Module) -> None:
    """Says that weights were written in a way that leaves no trace, such as through `.data`."""
    if (state := _STATES.get(module)) is not None:
        state.digests.clear()
        _list(module, state)


@dataclass
class _Writes:
    """What the lists of merged adapters of one module have seen."""

    writes: int = 0
    stale: set[str] = field(default_factory=set)  # names whose kept digests no longer hold


class _MergeLog(list[str]):
    """A tuner's `merged_adapters` that notes every change; a copy is an ordinary list.

    `names` are the tensors of the layer that adapters are merged into.
    """

    def __init__(self, merged: Iterable[str], names: Sequence[str], log: _Writes) -> None:
        super().__init__(merged)
        self._names, self._log = tuple(names), log

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return list, (list(self),)


def _noting(name: str) -> Callable[..., Any]:
    original = getattr(list, name)

    def method(self: _MergeLog, *args: Any) -> Any:
        self._log.writes += 1
        self._log.stale.update(self._names)
        return original(self, *args)

    return method


for _name in ("append", "extend", "insert", "pop", "remove", "clear", "__setitem__", "__delitem__"):
    setattr(_MergeLog, _name, _noting(_name))

_GENERATIONS = itertools.count()


@dataclass
class _State:
    """What was seen of one module. `generation` is unique over all modules and listings.

    Parameters are held, with the dict that has them, so that a replaced one is noticed: its
    successor could otherwise have its address. So are the adapters' configurations.
    """

    generation: int = -1
    configs: tuple[Any, ...] = ()
    held: tuple[Any, ...] = ()
    tuners: list[Any] = field(default_factory=list)
    parameters: list[tuple[dict[str, Any], str, nn.Parameter]] = field(default_factory=list)
    log: _Writes = field(default_factory=_Writes)
    watched: bool = False
    digests: dict[str, tuple[Tensor, Hashable, str]] = field(default_factory=dict)

    def knows(self, name: str, tensor: Tensor) -> bool:
        """Whether the kept digest is that of `tensor` as it is now."""
        held, stamp, _ = self.digests.get(name, (None, None, ""))
        return held is tensor and stamp == _stamp(tensor)


_STATES: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()


def _list(module: nn.Module, state: _State) -> None:
    """Finds the module's parameters and tuners anew; the next token differs from all before."""
    configs = getattr(module, "peft_config", None)
    state.generation = next(_GENERATIONS)
    state.configs = _identity(configs)
    state.held = (configs, *(configs or {}).values())
    state.parameters = [
        (child._parameters, name, parameter)
        for child in module.modules()
        for name, parameter in child._parameters.items()
        if parameter is not None and not parameter.is_inference()
    ]
    state.tuners = []
    if (kind := tuner_kind()) is None:
        return
    for path, tuner in module.named_modules():
        if not isinstance(tuner, kind):
            continue
        merging: Any = tuner
        state.tuners.append(merging)
        if type(merging.merged_adapters) is not _MergeLog:
            names = [f"{path}.{name}" for name in merging.get_base_layer()._parameters]
            # it may have been merged and unmerged before this list was there to see it
            state.log.stale.update(names)
            merging.merged_adapters = _MergeLog(merging.merged_adapters, names, state.log)


def _identity(configs: Mapping[str, Any] | None) -> tuple[Any, ...]:
    if not configs:
        return ()
    return (id(configs), *((name, id(config)) for name, config in configs.items()))


def _noticed(owner: type[nn.Module], name: str) -> Callable[..., Any]:
    """Method `name` of `owner`; afterwards the module's token differs."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            if (state := _STATES.get(self)) is not None:
                if WRITERS[name]:
                    state.digests.clear()
                # lists new tuners now: fused and unloaded next, they would leave no trace
                _list(self, state)

    method.__dict__["_hcf_noticed"] = True
    return method


def _stamp(tensor: Tensor) -> Hashable:
    return (0 if tensor.is_inference() else tensor._version), tensor.dtype, tensor.shape


def _digest(tensor: Tensor) -> str:
    """Hash of type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    row = tensor.contiguous().cpu().reshape(-1)  # scalars have no bytes to view
    digest.update(row.view(torch.uint8).numpy().data)
    return digest.hexdigest()
