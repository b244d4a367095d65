"""Short attention in training on a CPU: float32 kernels under bfloat16 autocast, nothing else."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from taiji.train.attention import MOST_KEYS, ShortAttention, short_attention

KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Kernels(TorchDispatchMode):
    """[(kernel, dtype of what it is given)] of attention."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in (KERNEL, BACKWARD):
            self.seen.append((func._overloadpacket, args[0].dtype))
        return func(*args, **(kwargs or {}))


def heads(keys, queries=8):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 2, queries, 16), (2, 2, keys, 16), (2, 2, keys, 16))
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


def run(inputs, **given):
    with Kernels() as kernels, torch.autocast("cpu", torch.bfloat16):
        out = attend(*inputs, **given)
        out.float().square().sum().backward()
    return out, [x.grad for x in inputs], kernels.seen


@pytest.mark.parametrize(
    ("keys", "expected"), [(12, torch.float32), (MOST_KEYS + 1, torch.bfloat16)]
)
def test_short_sequences_alone_are_in_float32(keys, expected):
    with ShortAttention():
        out, _, seen = run(heads(keys))
    assert out.dtype == torch.bfloat16  # what autocast gives, whatever it was computed in
    assert seen == [(KERNEL, expected), (BACKWARD, expected)]
    assert {dtype for _, dtype in run(heads(keys))[2]} == {torch.bfloat16}  # and outside, all


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_output_and_gradients_are_those_of_float32(mask):
    seen = (torch.arange(12) < 9).expand(8, 12)
    given = {
        None: {},
        "bool": {"attn_mask": seen},
        "float": {"attn_mask": torch.zeros(8, 12).masked_fill(~seen, -1e4).bfloat16()},
    }[mask]
    with ShortAttention():
        out, grads, _ = run(heads(12), **given)
    plain = heads(12)
    exact = attend(
        *plain, **{k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    )
    exact.bfloat16().float().square().sum().backward()
    assert torch.equal(out, exact.bfloat16())
    for grad, tensor in zip(grads, plain, strict=True):
        torch.testing.assert_close(grad, tensor.grad, rtol=2e-2, atol=2e-2)


def test_without_gradients_or_autocast_nothing_changes():
    inputs = heads(12)
    with ShortAttention(), Kernels() as kernels:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            attend(*inputs)
        assert torch.equal(attend(*inputs), attend(*[x.detach() for x in inputs]))
    assert [dtype for _, dtype in kernels.seen] == [torch.bfloat16, torch.float32, torch.float32]


def test_the_loop_trains_with_it(tmp_path, monkeypatch):
    from taiji.train import loop

    class Objective(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(16))

        def forward(self, x, generator):
            out = attend(x * self.weight, x, x)
            return out.float().square().mean(), {}

    config = loop.LoopConfig(
        steps=2, batch_size=2, learning_rate=1e-3, precision="bf16", log_every=1, warmup_steps=1
    )
    draw = lambda rng, size: {"x": torch.ones(size, 2, 12, 16)}  # noqa: E731
    with Kernels() as kernels:
        loop.run(Objective(), draw, config, tmp_path)
    assert kernels.seen and {dtype for _, dtype in kernels.seen} == {torch.float32}


def test_not_where_gradients_are_checkpointed():
    """The second forward pass, inside of backward, has to be of the first one's dtypes."""

    class Block(nn.Module):
        gradient_checkpointing = False

        def forward(self, *inputs):
            if self.gradient_checkpointing:
                return checkpoint(attend, *inputs, use_reentrant=False)
            return attend(*inputs)

    def dtypes(block, module):
        with short_attention(module), torch.autocast("cpu", torch.bfloat16), Kernels() as kernels:
            block(*heads(12)).float().square().sum().backward()
        return [dtype for _, dtype in kernels.seen]

    block = Block()
    module = nn.Sequential(nn.Linear(1, 1), block)
    assert dtypes(block, module) == [torch.float32] * 2
    block.gradient_checkpointing = True
    assert dtypes(block, module) == [torch.bfloat16] * 3
