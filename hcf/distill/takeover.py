"""Weights of a smaller U-Net from those of its teacher: which layer, and which channels of it.

Every parameter of the teacher runs over axes of channels: the residual stream of a stage, what a
residual block or a feed-forward network has inside, attention heads, two streams side by side where
a skip comes in. A narrower student keeps the channels of each axis that the largest weights read
and write: as many from each group of a group norm, so that a group of the student is a part of the
teacher's; whole attention heads where their number divides, else channels of each head.

C channels, T width of the time embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hcf.errors import RecipeError

LAYER = re.compile(
    r"(?P<block>down_blocks\.(?P<down>\d+)|up_blocks\.(?P<up>\d+)|mid_block)\."
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<layer>\d+)\."
)
TIMESTEPS = 1000  # that the embeddings are fitted on
TRANSFORMER = re.compile(r"transformer_blocks\.(\d+)\.")


@dataclass(frozen=True)
class Axis:
    """Channels of the teacher of which a student keeps `kept` of `size`: as many from each of
    `parts` equal pieces, or whole pieces."""

    name: str
    size: int
    kept: int
    parts: int = 1
    whole: bool = False


Dims = list[tuple[Axis, ...]]  # of each dimension of a parameter: axes side by side, () if whole


@dataclass(frozen=True)
class Plan:
    """Where a student's weights come from: `source` of each by the student's names, the `axes` of
    the teacher's parameters that are cut, and the channels (kept,) `chosen` of each axis."""

    source: Mapping[str, str]
    axes: Mapping[str, Dims]
    chosen: Mapping[Axis, Tensor]


def plan(teacher: Any, student: Any) -> Plan:
    """Depends on the teacher's weights and the student's shapes alone."""
    weights, before, after = teacher.state_dict(), teacher.config, student.config
    source, axes = {}, {}
    for name, value in student.state_dict().items():
        source[name] = own = source_name(name, before, after)
        if weights[own].shape == value.shape or _is_time_input(own, before):
            continue
        axes[own] = channel_axes(own, before, after)
        for along, size in zip(axes[own], weights[own].shape, strict=False):
            if along and sum(a.size for a in along) != size:
                raise _unknown(own)
    return Plan(source, axes, strongest(weights, axes))


def taken_over(teacher: Any, student: Any) -> dict[str, Tensor]:
    """The student's weights by its own names, each from the teacher's layer in the same role."""
    found, weights, taken = plan(teacher, student), teacher.state_dict(), {}
    for name, source in found.source.items():
        taken[name] = weights[source].clone()
        for dim, own in enumerate(found.axes.get(source, ())):
            if own:
                taken[name] = taken[name].index_select(dim, _index(own, found.chosen))
        if source in found.axes and ".to_q." in source:
            taken[name] *= _logit_scale(found.axes[source][0][0])
    _read_fewer_sinusoids(taken, teacher, student)
    return taken


def kept_channels(teacher: Any, student: Any) -> list[Tensor]:
    """Of each of the student's stages the teacher's channels (C',) that its own stand for."""
    chosen = plan(teacher, student).chosen
    stages = range(len(student.config["block_out_channels"]))
    axes = [_stream(i, teacher.config, student.config) for i in stages]
    return [chosen.get(axis, torch.arange(axis.kept)) for axis in axes]


def source_name(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The teacher's (`before`) name for the student's (`after`) parameter `name`."""
    found = LAYER.match(name)
    if found is None:
        return name
    stage, extra = _stage(found, after), 1 if found["up"] else 0
    block, kind, layer = found["block"], found["kind"], int(found["layer"])
    if found["up"]:
        gone = len(before["block_out_channels"]) - len(after["block_out_channels"])
        block = f"up_blocks.{int(found['up']) + gone}"
    if kind in ("resnets", "attentions") and block != "mid_block":
        total, own = (
            per_stage(c["layers_per_block"], stage + 1)[stage] + extra for c in (before, after)
        )
        layer = kept(total, own)[layer]
    rest = name[found.end() :]
    inner = TRANSFORMER.match(rest)
    if inner is not None:
        total, own = (
            per_stage(c["transformer_layers_per_block"], stage + 1)[stage] for c in (before, after)
        )
        rest = f"transformer_blocks.{kept(total, own)[int(inner[1])]}.{rest[inner.end() :]}"
    return f"{block}.{kind}.{layer}.{rest}"


def kept(total: int, count: int) -> list[int]:
    """Which `count` of `total` layers stay: the first, the last, and evenly spread between."""
    return [i * (total - 1) // max(count - 1, 1) for i in range(count)]


def channel_axes(source: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Dims:
    """What each dimension of the teacher's parameter runs over: axes side by side, () if whole.

    Raises RecipeError for a parameter that is not understood.
    """
    if source.startswith(("conv_in.", "conv_norm_out.")):
        return [(_stream(0, before, after),)]
    if source.startswith("conv_out."):
        return [(), (_stream(0, before, after),)] if source.endswith("weight") else [()]
    found = LAYER.match(source)
    if found is None:
        raise _unknown(source)
    stage, rest = _stage(found, before), source[found.end() :]
    here, path = _stream(stage, before, after), source[: found.end()]
    if found["kind"] == "attentions":
        return _attention_axes(path, rest, here, stage, before, after)
    into: tuple[Axis, ...] = (here,)
    if found["kind"] == "resnets":
        first, last = int(found["layer"]) == 0, False
        outer = _stream(max(stage - 1, 0), before, after)
        if found["up"]:  # what comes from below, and behind it the skip
            last = int(found["layer"]) == per_stage(before["layers_per_block"], stage + 1)[stage]
            below = min(stage + 1, len(before["block_out_channels"]) - 1)
            into = (_stream(below, before, after) if first else here, outer if last else here)
        elif found["down"] and first:
            into = (outer,)
    hidden = Axis(f"{path}hidden", here.size, here.kept, here.parts)
    time = 2 if before["resnet_time_scale_shift"] == "scale_shift" else 1
    rules: dict[str, Dims] = {
        "norm1": [into], "conv1": [(hidden,), into], "time_emb_proj": [(hidden,) * time],
        "norm2": [(hidden,)], "conv2": [(here,), (hidden,)], "conv_shortcut": [(here,), into],
        "conv": [(here,), (here,)],
    }  # fmt: skip
    return _found(rules, rest, source)


def _stream(stage: int, before: Mapping[str, Any], after: Mapping[str, Any]) -> Axis:
    """The residual stream of a teacher's stage; stages of equal width share one, since nothing but
    a sum lies between them. Raises RecipeError where a student would make it wider."""
    widths, narrower = before["block_out_channels"], after["block_out_channels"]
    first = stage
    while first and widths[first - 1] == widths[stage]:
        first -= 1
    narrow = narrower[min(stage, len(narrower) - 1)]
    if narrow > widths[stage]:
        raise RecipeError(
            f"stage {stage} of {widths[stage]} channels is taken away, and what it fed would get "
            f"{narrow} from the stage before it",
            fix="keep that stage: distill.structure.stages",
        )
    return Axis(f"stage {first}", widths[stage], narrow, before["norm_num_groups"] or 1)


def _attention_axes(
    path: str,
    rest: str,
    here: Axis,
    stage: int,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> Dims:
    """Those of a Transformer2DModel, or of the one attention of a "simple" block."""
    inner = Axis(f"{path}inner", here.size, here.kept)
    heads, own = (per_stage(c["attention_head_dim"], stage + 1) for c in (before, after))
    block = TRANSFORMER.match(rest)
    if block is None and not rest.startswith(("norm.", "proj_in.", "proj_out.")):
        number = here.size // heads[stage]  # there it is the width of a head
        head = Axis(f"{path}heads", here.size, here.kept, number, whole=True)
        simple: dict[str, Dims] = {
            "group_norm": [(here,)], "norm_cross": [()], "to_out.0": [(here,), (head,)],
            **{name: [(head,), (here,)] for name in ("to_q", "to_k", "to_v")},
            **{name: [(head,), ()] for name in ("add_k_proj", "add_v_proj")},
        }  # fmt: skip
        return _found(simple, rest, path)
    rules: dict[str, Dims] = {
        "norm": [(here,)], "proj_in": [(inner,), (here,)], "proj_out": [(here,), (inner,)],
    }  # fmt: skip
    if block is None:
        return _found(rules, rest, path)
    path, rest = path + block[0], rest[block.end() :]
    fewer = own[stage] < heads[stage]
    ff = Axis(f"{path}ff", 4 * here.size, 4 * here.kept)
    rules = {
        "norm1": [(inner,)], "norm2": [(inner,)], "norm3": [(inner,)],
        "ff.net.0.proj": [(ff, ff), (inner,)],  # GEGLU: values, then gates
        "ff.net.2": [(inner,), (ff,)],
    }  # fmt: skip
    for name in ("attn1", "attn2"):
        head = Axis(f"{path}{name}", here.size, here.kept, heads[stage], whole=fewer)
        context = (inner,) if name == "attn1" else ()
        rules |= {f"{name}.to_q": [(head,), (inner,)], f"{name}.to_out.0": [(inner,), (head,)]}
        rules |= {f"{name}.{x}": [(head,), context] for x in ("to_k", "to_v")}
    return _found(rules, rest, path)


def strongest(weights: Mapping[str, Tensor], axes: Mapping[str, Dims]) -> dict[Axis, Tensor]:
    """The channels (kept,) of each axis with the largest L2 norm over all weights that have it."""
    power: dict[Axis, Tensor] = {}
    for source, dims in axes.items():
        # in bfloat16, so that a teacher frozen in it has the same channels
        value = weights[source].bfloat16().double().square()
        for dim, own in enumerate(dims):
            if value.ndim < 2 or not own:
                continue
            sums = value.movedim(dim, 0).flatten(1).sum(1).split([a.size for a in own])
            for axis, part in zip(own, sums, strict=True):
                power[axis] = power.get(axis, torch.zeros_like(part)) + part
    return {axis: _most(axis, found) for axis, found in power.items()}


def _most(axis: Axis, power: Tensor) -> Tensor:
    """power (size,) -> the indices (kept,), ascending"""
    pieces = power.view(axis.parts, -1)
    each = pieces.shape[1]
    if axis.whole:
        piece = pieces.sum(1).topk(axis.kept // each).indices.sort().values
        return (piece[:, None] * each + torch.arange(each)).flatten()
    inside = pieces.topk(axis.kept // axis.parts, dim=1).indices.sort(dim=1).values
    return (torch.arange(axis.parts)[:, None] * each + inside).flatten()


def _index(own: Sequence[Axis], chosen: Mapping[Axis, Tensor]) -> Tensor:
    starts = [sum(a.size for a in own[:i]) for i in range(len(own))]
    return torch.cat([start + chosen[a] for start, a in zip(starts, own, strict=True)])


def _logit_scale(head: Axis) -> float:
    """Narrower heads divide their products by the root of a smaller width: the queries make up."""
    return 1.0 if head.whole else float((head.kept / head.size) ** 0.5)


@torch.no_grad()
def _read_fewer_sinusoids(taken: dict[str, Tensor], teacher: Any, student: Any) -> None:
    """First layers of the timestep embeddings, W (T, C): W' e'(t) nearest to W e(t) over all t.

    Neighbouring slow sinusoids hardly differ, so their smallest directions are left out: with them
    the error is little smaller and the weights are a hundred times as large.
    """
    time = torch.arange(TIMESTEPS)
    seen, fewer = (net.time_proj(time).double() for net in (teacher, student))
    for module in ("time_embedding", "class_embedding"):
        name = f"{module}.linear_1.weight"
        if name not in taken or not _is_time_input(name, teacher.config):
            continue
        old = teacher.get_parameter(name).double()
        if old.shape == student.get_parameter(name).shape:
            continue
        new = (torch.linalg.pinv(fewer, rtol=3e-2) @ (seen @ old.T)).T
        taken[name] = new.to(taken[name].dtype)
        added = f"{module}.cond_proj.weight"
        if added in taken:
            told = torch.linalg.pinv(new) @ (old @ teacher.get_parameter(added).double())
            taken[added] = told.to(taken[added].dtype)


def _is_time_input(source: str, config: Mapping[str, Any]) -> bool:
    """Whether `source` reads the sinusoids of the timestep, as many as stage 0 has channels."""
    if source in ("time_embedding.linear_1.weight", "time_embedding.cond_proj.weight"):
        return True
    return source == "class_embedding.linear_1.weight" and config["class_embed_type"] == "timestep"


def per_stage(value: Any, count: int) -> list[Any]:
    """A setting of diffusers, one for all or one a stage, as one a stage."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def _stage(found: re.Match[str], config: Mapping[str, Any]) -> int:
    deepest = len(config["block_out_channels"]) - 1
    if found["down"]:
        return int(found["down"])
    return deepest - int(found["up"]) if found["up"] else deepest


def _found(rules: Mapping[str, Dims], rest: str, source: str) -> Dims:
    name, _, kind = rest.rpartition(".")
    if name not in rules:
        raise _unknown(source if rest in source else source + rest)
    return rules[name] if kind == "weight" else rules[name][:1]


def _unknown(source: str) -> RecipeError:
    return RecipeError(
        f"the channels of {source} are of a kind that width does not know",
        fix="leave distill.structure.width at 1: depth alone",
    )
