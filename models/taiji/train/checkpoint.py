"""Checkpoints of a training run: safetensors + JSON, written beside and renamed, never a pickle.

The loop draws all randomness of step i from generators seeded by (seed, i), so weights, buffers,
EMA, optimiser moments and the JSON state are everything: a resumed run repeats the uninterrupted
one exactly. `checkpoints/00001000` is complete from the moment it has that name; one rename gives
it, so whatever kills a run leaves the one before. Tensors are whole, however the run divides them.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from taiji.train.parallel import fill, like, meet, rank, whole, world

Tensors = dict[str, Tensor]
_WORLDS = (
    "DeepSpeed's moments are of as many processes as wrote them, and of that mode; go on with the "
    "same, or remove the checkpoint to go on from the one before"
)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.name.isdigit())


def save_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    shadow: Sequence[Tensor],
    optimizers: Sequence[Optimizer],
    step: int,
    state: dict[str, Any],
    keep: int,
    own_moments: bool = False,
) -> None:
    """Writes `folder`/<step> and keeps the newest `keep`. Every process takes part; one writes.

    With `own_moments` an optimiser holds the moments of this process's share alone (DeepSpeed), and
    each process writes its own file of them.
    """
    target = folder / f"{step:08d}"
    temporary = target.with_name(target.name + ".tmp")
    if rank() == 0:
        _clear(folder)
        temporary.mkdir(parents=True)
    meet()
    first = rank() == 0
    _write(temporary / "model.safetensors", _trained(model), first)
    _write(temporary / "buffers.safetensors", _buffers(model), first)
    _write(temporary / "ema.safetensors", {str(i): t for i, t in enumerate(shadow)}, first)
    for i, optimizer in enumerate(optimizers):
        name = _moments_name(i, own_moments)
        _write(temporary / f"{name}.safetensors", _moments(optimizer), first or own_moments)
    meet()
    if not first:
        return
    (temporary / "state.json").write_text(json.dumps({"step": step, **state}))
    os.replace(temporary, target)
    for path in checkpoints(folder)[:-keep]:
        os.replace(path, path.with_name(path.name + ".old"))
    _clear(folder)


def _moments_name(number: int, own: bool) -> str:
    return f"optimizer_{number}" + (f".{rank()}-of-{world()}" if own else "")


def _clear(folder: Path) -> None:
    """What an earlier, interrupted write or removal left."""
    for path in [*folder.glob("*.tmp"), *folder.glob("*.old")]:
        shutil.rmtree(path)


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    shadow: Sequence[Tensor],
    optimizers: Sequence[Optimizer],
    own_moments: bool = False,
) -> None:
    """Restores in place. Raises ValueError when tensors do not fit, or a file is damaged; nothing
    has been changed then."""
    names = [_moments_name(i, own_moments) for i in range(len(optimizers))]
    if not all((path / f"{name}.safetensors").exists() for name in names):
        raise ValueError(f"{path} has no {names[0]}: {_WORLDS}")
    with _readable(path):
        moments = [load_file(path / f"{name}.safetensors") for name in names]
        files = {n: load_file(path / f"{n}.safetensors") for n in ("model", "buffers", "ema")}
    trained, buffers = _trained(model), _buffers(model)
    _check(path, files["model"], trained)
    _check(path, files["buffers"], buffers)
    for name, tensor in {**files["model"], **files["buffers"]}.items():
        fill({**trained, **buffers}[name], tensor)
    for number, tensor in files["ema"].items():
        fill(shadow[int(number)], tensor)
    for optimizer, saved in zip(optimizers, moments, strict=True):
        _load_moments(optimizer, saved)


def read_state(path: Path) -> dict[str, Any]:
    with _readable(path):
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, json.JSONDecodeError, FileNotFoundError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it to go on from the one before"
        ) from error


def changes(
    saved: dict[str, Any], now: dict[str, Any], accepted: Sequence[str], prefix: str = ""
) -> list[str]:
    """ "loop.seed: 0 -> 1" for every dotted key of both that differs and is not accepted."""
    found = []
    for key in sorted(saved.keys() & now.keys()):
        dotted, old, new = prefix + key, saved[key], now[key]
        if dotted in accepted or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, accepted, dotted + ".")
        else:
            found.append(f"{dotted}: {str(old)[:60]} -> {str(new)[:60]}")
    return found


def other_recipe(path: Path, differing: Sequence[str]) -> str:
    return (
        f"{path} was made by another recipe ({'; '.join(differing[:6])}): put these back, start in "
        "an empty work folder, or name them in loop.accept_changes"
    )


def kept_lines(text: str, step: int) -> str:
    """The lines of a log up to `step`; later ones, and a torn one, came after the checkpoint."""
    kept = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    return "".join(kept)


def _check(path: Path, saved: Tensors, expected: Tensors) -> None:
    odd = sorted(saved.keys() ^ expected.keys())
    odd += [n for n, t in saved.items() if n in expected and t.shape != expected[n].shape]
    if odd:
        raise ValueError(f"{path} holds another model: {odd[:3]} differ; start in an empty folder")


def _trained(model: nn.Module) -> Tensors:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def _buffers(model: nn.Module) -> Tensors:
    """Persistent buffers: running statistics, a codebook that is averaged."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict()
    return {n: t for n, t in state.items() if n not in parameters and isinstance(t, Tensor)}


def _moments(optimizer: Optimizer) -> Tensors:
    return {
        f"{i}.{key}": value
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def _load_moments(optimizer: Optimizer, saved: Tensors) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, Tensors] = {}
    for name, tensor in saved.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = like(tensor, parameters[int(index)])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _write(path: Path, tensors: Tensors, mine: bool) -> None:
    """Every process gathers, one tensor at a time; the one whose file it is keeps and writes."""
    kept = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if mine:
            kept[name] = value.detach().cpu().clone().contiguous()
    if mine:
        save_file(kept, path)


def save_component(component: Any, folder: Path) -> None:
    """`component.save_pretrained` beside `folder`, then in its place; by the first process only."""
    if rank() != 0:
        return
    staging = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    component.save_pretrained(staging)
    forget_origin(staging)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)


def forget_origin(folder: Path) -> None:
    """Takes the folder that a model was loaded from out of its configurations: it is of another
    machine for whoever reads them."""
    for name in ("config.json", "model_index.json"):
        for path in folder.rglob(name):
            settings = json.loads(path.read_text())
            if settings.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """To a temporary name, then renamed; by the first process only."""
    if rank() != 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
