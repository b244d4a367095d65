"""What a distillation takes, computed before it starts: memory at the peak of a step, and work.

One step of the method runs on the meta device, forward and backward of the real networks without
storage, while every storage that would be alive is counted. So activations are those of the true
graph: what gradient checkpointing drops is dropped, a view counts once, the low-precision copies of
the weights that autocast keeps are there. Not counted: workspaces of convolutions and products, and
what an allocator loses; `SLACK` stands for them.

Work is counted on the meta device as well, its time an assumption (`MFU`).
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hcf.artifact import INDEX
from hcf.distill.student import frozen_in, make_student, trainable
from hcf.errors import HcfError, InvalidArtifact
from hcf.quantize.estimate import GIB, available_memory
from hcf.settings import ConsistencyConfig, DistillConfig, DistributionMatchingConfig
from hcf.trace import CONCATENATED, call_denoiser

SLACK = 0.05  # of what was counted: workspaces and fragmentation, assumed
MFU = 0.27  # assumed, as `hcf train plan` does
BLOCK, SMALLEST = 256, 4096  # torchao's 8-bit moments: a scale a block; smaller tensors stay fp32
ACTIVATIONS = "activations"
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


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
        networks = _Networks(config, teacher, student, fake, rows, guided, size)
        flops = networks.flops()
        for module in (teacher, student, fake):
            if module is not None:
                frozen_in(module, config.precision)
        if config.gradient_checkpointing:
            from taiji.train.objective import enable_gradient_checkpointing

            enable_gradient_checkpointing(networks)
        low = config.precision == "bf16"
        norms_in_float = low and device == "cuda"
        for norm in networks.modules():
            if isinstance(norm, nn.GroupNorm | nn.LayerNorm):
                norm.forward = partial(_normalised, norm, norms_in_float)  # type: ignore[method-assign]
        networks.autocast = _Autocast(networks) if low else nullcontext()
        with _flash_attention(), _Live(networks) as live:
            networks.step()
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


class _Networks(nn.Module):
    """The networks of a method and the calls of one of its steps, as its objective makes them."""

    def __init__(
        self, config: DistillConfig, teacher: nn.Module, student: nn.Module,
        fake: nn.Module | None, rows: Shapes, guided: bool, size: tuple[int, int],
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.guided, self.size, self.rows = config, guided, size, rows
        self.teacher, self.student, self.fake = teacher, student, fake
        self.head: nn.Module | None = None
        self.autocast: Any = nullcontext()
        self.features: list[Tensor] = []
        settings = config.distribution_matching or DistributionMatchingConfig()
        middle: Any = getattr(fake, "mid_block", None)
        if fake is not None and settings.gan_weight and middle is not None:
            from hcf.distill.distribution_matching import DiscriminatorHead

            last = middle.resnets[-1]
            self.head = DiscriminatorHead(last.out_channels, last.norm2.num_groups)
            middle.register_forward_hook(lambda module, args, out: self.features.append(out))

    def trained(self) -> list[list[nn.Parameter]]:
        """What each turn's optimiser updates."""
        second = [m for m in (self.fake, self.head) if m is not None]
        turns = [[self.student], second] if second else [[self.student]]
        return [[p for m in turn for p in m.parameters() if p.requires_grad] for turn in turns]

    @torch.no_grad()
    def flops(self) -> float:
        """Of a step of the optimiser, all pieces: a backward pass costs two forward ones."""
        from taiji.train.throughput import FlopCounter

        def forward(network: nn.Module, told: bool) -> float:
            counter = FlopCounter()
            with counter:
                self._call(network, told=told, count=1)
            return float(counter.flops)

        config, guided = self.config, 2 if self.guided else 1
        student, teacher = forward(self.student, True), forward(self.teacher, False)
        trained = 4 if config.gradient_checkpointing else 3
        if config.method == "distribution_matching":
            settings = config.distribution_matching or DistributionMatchingConfig()
            head = 1 if settings.gan_weight else 0
            before = (config.steps - 1) / 2  # of the student's own steps, on average
            turn = (before + trained) * student + (guided + 1 + 2 * head) * teacher
            fake_turn = (before + 1) * student + trained * (1 + head) * teacher
            return config.batch_size * (turn / settings.fake_updates + fake_turn)
        skip = (config.consistency or ConsistencyConfig()).skip
        calls = {"consistency": skip, "progressive": 2, "guidance": 1, "structure": 1}
        own = trained + (1 if config.method == "consistency" and skip == 1 else 0)
        taught = calls.get(config.method, 0) * (1 if config.method == "structure" else guided)
        return config.batch_size * (own * student + taught * teacher)

    def step(self) -> None:
        """Every turn of a step; of several pieces two, so that one finds gradients there."""
        pieces = min(self.config.micro_batches, 2)
        for turn in ("student", *(("fake",) if self.fake is not None else ())):
            for _ in range(pieces):
                with self.autocast:
                    loss = self._student_turn() if turn == "student" else self._fake_turn()
                loss.backward()
                del loss
            self.zero_grad()

    def _student_turn(self) -> Tensor:
        if self.config.method != "distribution_matching":
            self._taught()
            return self._call(self.student, told=True).square().mean()
        made = self._call(self.student, told=True)
        with torch.set_grad_enabled(self.head is not None):
            says, score = self._scored(made)
        self._taught()
        loss = (made - (made - says).detach()).square().mean()
        return loss if self.head is None else loss + self.head(score).mean()

    def _fake_turn(self) -> Tensor:
        with torch.no_grad():
            made = self._call(self.student, told=True)
        says, score = self._scored(made)
        loss = (says - made).square().mean()
        if self.head is not None:
            _, real = self._scored(made)
            loss = loss + self.head(score).mean() + self.head(real).mean()
        return loss

    def _scored(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.features.clear()
        assert self.fake is not None
        out = self._call(self.fake, x=x)
        return out, self.features.pop() if self.features else out

    @torch.no_grad()
    def _taught(self) -> None:
        """The teacher's call. Of twice the rows and with nothing kept it is the peak only where the
        student's activations are not kept either."""
        if self.config.gradient_checkpointing and self.config.method != "trajectory":
            self._call(self.teacher, count=self._rows() * (2 if self.guided else 1))

    def _rows(self) -> int:
        return self.config.batch_size // self.config.micro_batches

    def _call(
        self, network: nn.Module, *, told: bool = False, x: Tensor | None = None, count: int = 0
    ) -> Tensor:
        """network(x) of `count` rows, of a piece's where it is 0; float32, as objectives take it"""
        config, rows, count = self.config, self.rows, count or self._rows()
        cond = {n: torch.zeros(count, *s, dtype=d) for n, (s, d) in rows.items()}
        if told and config.guidance_embedding is not None:
            cond["timestep_cond"] = torch.zeros(count, config.guidance_embedding.width)
        if x is None:
            settings: Any = network.config
            given = rows[CONCATENATED][0][0] if CONCATENATED in rows else 0
            x = torch.zeros(count, settings.in_channels - given, *self.size)
        return call_denoiser(network, x, torch.zeros(count, dtype=torch.long), cond).float()


class _Live(TorchDispatchMode):
    """Bytes of the storages made inside that are alive, at their highest; and of those how many
    are gradients of parameters."""

    def __init__(self, networks: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = self.gradients = self._accumulated = 0
        self._known = {t.untyped_storage()._cdata for t in _tensors(networks)}
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._accumulate)
            for p in networks.parameters()
            if p.requires_grad
        ]
        self._with_gradient: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        weakref.finalize(storage, self._gone, key, size)
        if self.alive > self.peak:
            self.peak, self.gradients = self.alive, self._accumulated

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size

    def _accumulate(self, parameter: Tensor) -> None:
        if id(parameter) not in self._with_gradient:
            self._with_gradient.add(id(parameter))
            self._accumulated += parameter.nbytes

    def __exit__(self, *said: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*said)  # type: ignore[no-untyped-call]


class _Autocast:
    """What `torch.autocast` to bfloat16 does, which the meta device lacks: products of bfloat16
    copies, those of trained weights kept until the block ends. A recomputation in the backward pass
    keeps nothing."""

    def __init__(self, networks: nn.Module) -> None:
        self.copies: dict[int, Tensor] | None = None
        for module in networks.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.forward = partial(self._forward, module)  # type: ignore[method-assign]

    def __enter__(self) -> None:
        self.copies = {}

    def __exit__(self, *said: object) -> None:
        self.copies = None

    def _low(self, parameter: Tensor | None) -> Tensor | None:
        if parameter is None or parameter.dtype == torch.bfloat16:
            return parameter
        if self.copies is None or not parameter.requires_grad:
            return parameter.bfloat16()
        if id(parameter) not in self.copies:
            self.copies[id(parameter)] = parameter.bfloat16()
        return self.copies[id(parameter)]

    def _forward(self, module: Any, x: Tensor, *rest: Any) -> Tensor:
        weight, bias = self._low(module.weight), self._low(module.bias)
        if isinstance(module, nn.Linear):
            return F.linear(x.bfloat16(), weight, bias)  # type: ignore[arg-type]
        return module._conv_forward(x.bfloat16(), weight, bias)


def _normalised(norm: Any, in_float: bool, x: Tensor) -> Tensor:
    """CUDA's autocast takes normalisations in float32, the processor's as they come."""
    weights = [t for t in (norm.weight, norm.bias) if t is not None]
    return _Norm.apply(x.float() if in_float else x, *weights)  # type: ignore[no-untyped-call]


class _Norm(torch.autograd.Function):
    """Keeps its input; the meta device's own is a hundred operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


class _Flash(torch.autograd.Function):
    """Keeps what a fused attention keeps: query, key, value, output and a sum a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@contextmanager
def _flash_attention() -> Iterator[None]:
    """The meta device would keep the whole matrix of attention."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **given: Any) -> Tensor:
        return _Flash.apply(q, k.to(q.dtype), v.to(q.dtype))  # type: ignore[no-untyped-call]

    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def _sum(sizes: Mapping[str, int]) -> int:
    return sum(sizes.values())


def _moments(parameter: nn.Parameter, optimizer: str) -> int:
    """Bytes of both moments of Adam for one parameter."""
    count = parameter.numel()
    if optimizer == "adamw8bit" and count >= SMALLEST and count % BLOCK == 0:
        return 2 * (count + 4 * count // BLOCK + 4 * BLOCK)  # codes, scales, the code book
    return 8 * count


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(modules: nn.Module | list[nn.Module]) -> int:
    listed = modules if isinstance(modules, list) else [modules]
    return sum(t.nbytes for module in listed for t in _tensors(module))


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
