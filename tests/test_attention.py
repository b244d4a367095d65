"""Attention: the CPU form, and the kernel for short texts in the interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcf_kernels.attention import attention, attention_ref
from hcf_kernels.gpu.attention import candidates, default_config, launch, takes
from hcf_kernels.testing import assert_as_close_as_torch

# (B, N, L, S, K): ones, primes, then SD 1.5's, SDXL's, Kolors' and Taiji's heads and texts
SHAPES = [
    (1, 1, 2, 1, 1),
    (1, 3, 37, 13, 7),
    (2, 2, 64, 77, 40),
    (1, 2, 40, 77, 160),
    (1, 2, 96, 77, 64),
    (1, 1, 70, 180, 64),
    (1, 1, 33, 256, 64),
]


def arguments(
    batch: int, heads: int, tokens: int, keys: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def heads_of(length: int) -> Tensor:
        # as a projection gives them: (B, L, N * K), seen head by head
        flat = torch.randn(batch, length, heads * width, generator=generator).to(dtype)
        return flat.view(batch, length, heads, width).transpose(1, 2)

    return heads_of(tokens), heads_of(keys), heads_of(keys)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_for_short_texts_in_the_interpreter(shape: tuple[int, ...]) -> None:
    batch, heads, tokens, keys, width = shape
    for dtype in (torch.float32, torch.float16):
        q, k, v = arguments(batch, heads, tokens, keys, width, dtype)
        assert takes(q.half(), k.half())  # of float32 some would not fit on a GPU
        found = launch(q, k, v)
        assert found.transpose(1, 2).is_contiguous()
        assert_as_close_as_torch(found, attention_ref, q, k, v)
        bias = torch.zeros(batch, keys).to(dtype)
        bias[:, keys // 2 + 1 :] = -1e4
        assert_as_close_as_torch(launch(q, k, v, bias, 0.3), attention_ref, q, k, v, bias, 0.3)


def test_every_candidate_computes_the_same() -> None:
    q, k, v = arguments(1, 2, 100, 20, 16, torch.float32)
    tried = candidates(1, 2, 100, 20, 16)
    assert tried[0] == default_config(1, 2, 100, 20, 16)
    for config in tried:
        assert_as_close_as_torch(launch(q, k, v, config=config), attention_ref, q, k, v)


def test_long_keys_and_wide_heads_are_the_librarys() -> None:
    q, k, _ = arguments(1, 1, 300, 257, 8, torch.float32)
    assert not takes(q, k) and takes(q, k[:, :, :256]) and not takes(q, k[:, :, :0])
    wide, keys, _ = arguments(1, 1, 8, 200, 160, torch.float16)
    assert not takes(wide, keys) and takes(wide, keys[:, :, :77])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_operator_on_the_cpu(dtype: torch.dtype) -> None:
    q, k, v = arguments(2, 3, 19, 7, 8, dtype)
    bias = torch.randn(2, 7).to(dtype)
    for made in ((q, k, v), (q, k, v, bias, 0.5), (q.contiguous(), k.contiguous(), v)):
        assert_as_close_as_torch(attention(*made), attention_ref, *made)
        torch.library.opcheck(attention, made)


def test_strided_heads_are_taken_as_they_are_seen() -> None:
    q, k, v = arguments(1, 2, 24, 9, 16, torch.float32)
    made = q[:, :, ::2], k[:, :, :, ::2].repeat(1, 1, 1, 2), v.flip(2)
    assert_as_close_as_torch(launch(*made), attention_ref, *made)
    halves = q[..., ::2], k[..., ::2], v[..., ::2]
    assert_as_close_as_torch(launch(*halves), attention_ref, *halves)


def test_it_compiles_without_a_graph_break() -> None:
    q, k, v = arguments(1, 2, 12, 5, 8, torch.float32)
    compiled = torch.compile(lambda x: attention(x, k, v) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), attention(q, k, v) * 2)


def test_what_does_not_fit_is_refused_with_its_shape() -> None:
    q, k, v = arguments(1, 2, 12, 5, 8, torch.float32)
    with pytest.raises(ValueError, match=r"not \(1, 2, 12, 8\), \(1, 1, 5, 8\)"):
        attention(q, k[:, :1], v)
    with pytest.raises(ValueError, match=r"key_bias is \(1, 4\), \(B, S\) is \(1, 5\)"):
        attention(q, k, v, torch.zeros(1, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    real = [
        (2, 8, 4096, 77, 40),
        (2, 10, 4096, 77, 64),
        (2, 20, 1024, 180, 64),
        (2, 8, 64, 77, 160),
    ]
    for batch, heads, tokens, keys, width in [*SHAPES, *real]:
        q, k, v = (t.cuda() for t in arguments(batch, heads, tokens, keys, width, dtype))
        assert_as_close_as_torch(attention(q, k, v), attention_ref, q, k, v)
        assert_as_close_as_torch(attention(q, q, q), attention_ref, q, q, q)
