"""One step of a distillation's method on the meta device: what is alive at its peak, and its FLOPs.

Forward and backward of the real networks run without storage, so activations are those of the true
graph: what gradient checkpointing drops is dropped, a view counts once, the low-precision copies of
the weights that autocast keeps are there. Where the meta device differs from the one that is asked
about (autocast, normalisation, attention), its operators are replaced for the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hcf.settings import ConsistencyConfig, DistillConfig, DistributionMatchingConfig
from hcf.trace import CONCATENATED, call_denoiser

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Networks(nn.Module):
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


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside that are alive, at their highest; and of those how many
    are gradients of parameters."""

    def __init__(self, networks: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = self.gradients = self._accumulated = 0
        self._known = {t.untyped_storage()._cdata for t in tensors_of(networks)}
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


def run_step(networks: Networks, device: str) -> LiveBytes:
    """Takes the step, as `device` ("cpu", "cuda") would; nothing is left in the networks but the
    replaced operators."""
    from taiji.train.attention import ShortAttention, short_attention

    low = networks.config.precision == "bf16"
    for norm in networks.modules():
        if isinstance(norm, nn.GroupNorm | nn.LayerNorm):
            norm.forward = partial(_normalised, norm, low and device == "cuda")  # type: ignore[method-assign]
    networks.autocast = _Autocast(networks) if low else nullcontext()
    in_float = low and device == "cpu" and isinstance(short_attention(networks), ShortAttention)
    with _flash_attention(in_float), LiveBytes(networks) as live:
        networks.step()
    return live


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
def _flash_attention(short_in_float: bool) -> Iterator[None]:
    """The meta device would keep the whole matrix of attention."""
    from taiji.train.attention import MOST_KEYS

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **given: Any) -> Tensor:
        if short_in_float and k.shape[-2] <= MOST_KEYS:
            return _Flash.apply(q.float(), k.float(), v.float()).to(q.dtype)  # type: ignore[no-untyped-call]
        return _Flash.apply(q, k.to(q.dtype), v.to(q.dtype))  # type: ignore[no-untyped-call]

    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
