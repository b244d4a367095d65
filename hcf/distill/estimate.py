"""What a distillation takes, computed before it starts: memory at the peak of a step, and work.

The step itself is `hcf.distill.meta_step`'s. Not counted: workspaces of convolutions and products,
and what an allocator loses; `SLACK` stands for them.

Work is counted on the meta device as well, its time an assumption (`MFU`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hcf.artifact import INDEX
from hcf.distill.meta_step import Networks, Shapes, run_step, tensors_of
from hcf.distill.student import frozen_in, make_student, trainable
from hcf.errors import HcfError, InvalidArtifact
from hcf.quantize.estimate import GIB, available_memory
from hcf.settings import DistillConfig

SLACK = 0.05  # of what was counted: workspaces and fragmentation, assumed
MFU = 0.27  # assumed, as `hcf train plan` does
BLOCK, SMALLEST = 256, 4096  # torchao's 8-bit moments: a scale a block; smaller tensors stay fp32
ACTIVATIONS = "activations"


@dataclass(frozen=True)
class Memory:
    """Bytes alive at the peak of a step, by what they are, and FLOPs of a step of the optimiser."""

    method: str
    device: str
    items: Mapping[str, int]
    flops: float
    steps: int

    @property
    def total(self) -> int:
        return int(sum(self.items.values()) * (1 + SLACK))

    @property
    def largest(self) -> str:
        return max(self.items, key=lambda name: self.items[name])

    def seconds(self, peak: float) -> float:
        """Of all steps, at the assumed share of `peak` FLOP/s."""
        return self.flops * self.steps / (peak * MFU)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.items.items() if size)
        where = "GPU memory" if self.device == "cuda" else "memory"
        return (
            f"{self.method}: about {self.total / GIB:.2f} GiB of {where} at the peak, estimated "
            f"({parts}, {SLACK:.0%} for workspaces); {self.flops / 1e12:.3g} TFLOP a step"
        )


def estimate(
    denoiser: Any, config: DistillConfig, rows: Shapes, *, guided: bool, size: tuple[int, int],
    device: str,
) -> Memory:  # fmt: skip
    """`denoiser` gives class and configuration alone; `rows` are the conditioning's shapes without
    the batch, `size` (h, w) that of a latent. Raises what `make_student` raises."""
    with torch.device("meta"):
        teacher: Any = type(denoiser).from_config(denoiser.config).requires_grad_(False).eval()
        student = make_student(teacher, config)
        fake = None
        if config.method == "distribution_matching":
            fake = trainable(type(denoiser).from_config(denoiser.config), config.student)
        networks = Networks(config, teacher, student, fake, rows, guided, size)
        flops = networks.flops()
        for module in (teacher, student, fake):
            if module is not None:
                frozen_in(module, config.precision)
        if config.gradient_checkpointing:
            from taiji.train.objective import enable_gradient_checkpointing

            enable_gradient_checkpointing(networks)
        live = run_step(networks, device)
    trained = networks.trained()
    average = sum(4 * p.numel() for p in trained[0])
    gradients = max(sum(p.nbytes for p in turn) for turn in trained)
    items: dict[str, int] = {
        "the student's weights": _bytes(student),
        "the teacher's": 0 if config.method == "trajectory" else _bytes(teacher),
        "the fake score's": sum(_bytes(m) for m in (fake, networks.head) if m is not None),
        "the optimiser's moments": sum(_moments(p, config.optimizer) for t in trained for p in t),
        "the average": average,
    }
    # the peaks of a step: forward and backward; the update, with all gradients; the average, on a
    # GPU of all weights at once, the gradients gone. On the processor also what is there before:
    # teacher and student as they are loaded, in float32
    loaded = sum(4 * p.numel() for m in (teacher, student) for p in m.parameters())
    more = max(loaded - sum(items.values()), 0) if device == "cpu" else 0
    peaks: tuple[dict[str, int], ...] = (
        {"gradients": live.gradients, ACTIVATIONS: live.peak - live.gradients},
        {"gradients": gradients},
        {"the average's update": average if device == "cuda" else 0},
        {"weights before they are lowered": more},
    )
    items |= sorted(peaks, key=_sum)[-1]
    return Memory(config.method, device, items, flops, config.train_steps)


def _sum(sizes: Mapping[str, int]) -> int:
    return sum(sizes.values())


def _moments(parameter: nn.Parameter, optimizer: str) -> int:
    """Bytes of both moments of Adam for one parameter."""
    count = parameter.numel()
    if optimizer == "adamw8bit" and count >= SMALLEST and count % BLOCK == 0:
        return 2 * (count + 4 * count // BLOCK + 4 * BLOCK)  # codes, scales, the code book
    return 8 * count


def _bytes(modules: nn.Module | list[nn.Module]) -> int:
    listed = modules if isinstance(modules, list) else [modules]
    return sum(t.nbytes for module in listed for t in tensors_of(module))


def device_memory(denoiser: nn.Module | None = None) -> tuple[str, int]:
    """Where a run trains, and the bytes that it can have there; on the processor the loaded
    `denoiser`, which becomes the teacher, is among them."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return "cuda", free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return "cpu", available_memory() + (_bytes(denoiser) if denoiser is not None else 0)


def require_fit(
    memory: Memory, available: int, denoiser: Any, config: DistillConfig, rows: Shapes, *,
    guided: bool, size: tuple[int, int],
) -> None:  # fmt: skip
    """HcfError where `memory` is more than `available` bytes: the largest item, and what would make
    it fit."""
    if memory.total <= available:
        return
    enough, tried = None, ""
    for changes in _savings(config):
        less = config.model_copy(update=changes)
        found = estimate(denoiser, less, rows, guided=guided, size=size, device=memory.device)
        tried = f"{_written(changes)} needs {found.total / GIB:.2f} GiB"
        if found.total <= available:
            enough = tried
            break
    raise HcfError(
        f"distillation by {memory.method} needs about {memory.total / GIB:.2f} GiB, and there is "
        f"{available / GIB:.2f}; the largest part is {memory.largest}, "
        f"{memory.items[memory.largest] / GIB:.2f} GiB",
        fix=enough
        or (f"even {tried}: " if tried else "")
        + "use a larger device; distill.check_memory=false starts all the same",
    )


def _savings(config: DistillConfig) -> Iterator[dict[str, Any]]:
    """Settings that need less, each with those before it: what costs least first."""
    changes: dict[str, Any] = {}
    for name, value in (
        ("micro_batches", config.batch_size),
        ("gradient_checkpointing", True),
        ("optimizer", "adamw8bit"),
        ("student", config.student.model_copy(update={"kind": "lora"})),
    ):
        if getattr(config, name) != value:
            changes = {**changes, name: value}
            yield changes


def _written(changes: Mapping[str, Any]) -> str:
    """As `--set` takes them."""
    return " ".join(
        "--set distill.student.kind=lora" if name == "student"
        else f"--set distill.{name}={json.dumps(value).strip(chr(34))}"
        for name, value in changes.items()
    )  # fmt: skip


def shapes_of(rows: Mapping[str, Tensor]) -> Shapes:
    return {name: (tuple(value.shape[1:]), value.dtype) for name, value in rows.items()}


def forecast(model: Path, config: DistillConfig) -> dict[str, Any]:
    """What `hcf distill --dry-run` says of memory and time on this machine."""
    from taiji.train.throughput import peak_flops

    if config.method == "decoder":
        return {"memory": "not estimated: no denoiser is trained"}
    device, available = device_memory()
    try:
        memory = described(model, config, device)
    except InvalidArtifact as error:
        return {"memory": f"not estimated: {error.args[0]}"}
    peak, source = peak_flops(torch.device(device), config.precision)
    hours = memory.seconds(peak) / 3600
    return {
        "memory": f"{memory}; there are {available / GIB:.2f} GiB",
        "time": f"about {hours:.2g} h, estimated: {memory.steps} steps at {MFU:.0%} of "
        f"{peak / 1e12:.4g} TFLOP/s ({source})",
    }


def described(model: Path, config: DistillConfig, device: str) -> Memory:
    """The estimate for a pipeline folder of which only the configurations are read: text as long as
    its tokenizers allow, latents as large as the denoiser's own.

    Raises InvalidArtifact for a folder without a denoiser's configuration.
    """
    from taiji.train.plan import unet_inputs

    denoiser = read_denoiser(model)
    settings = dict(denoiser.config)
    size = settings["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    lengths = [
        int(json.loads(path.read_text(encoding="utf-8")).get("model_max_length", 77))
        for path in model.glob("tokenizer*/tokenizer_config.json")
    ]
    tokens = max((n for n in lengths if n < 10_000), default=77)
    inputs = unet_inputs(settings, grid=1, tokens=tokens, batch=1)
    inputs.pop("sample")
    return estimate(
        denoiser, config, shapes_of(inputs), guided=config.guidance_scale != 1,
        size=(height, width), device=device,
    )  # fmt: skip


def read_denoiser(model: Path) -> Any:
    """The U-Net of a pipeline folder on the meta device, from its configuration alone."""
    import diffusers

    import taiji.unet

    index, path = model / INDEX, model / "unet" / "config.json"
    if not (index.is_file() and path.is_file()):
        raise InvalidArtifact(
            f"{model} has no {INDEX} with a unet/config.json: its memory cannot be estimated",
            fix="give the folder of a U-Net pipeline",
        )
    name = json.loads(index.read_text(encoding="utf-8"))["unet"][1]
    kind: Any = getattr(diffusers, name, None) or getattr(taiji.unet, name)
    with torch.device("meta"):
        return kind.from_config(json.loads(path.read_text(encoding="utf-8")))
