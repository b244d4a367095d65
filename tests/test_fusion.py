import torch

from taiji.text.fusion import TextFusion

SIZES = {
    "clip_width": 8, "clip_projection": 6, "clip_tokens": 3,
    "sandwich_width": 10, "sandwich_tokens": 4, "context_width": 12,
}  # fmt: skip


def inputs() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 3, 8, generator=g), torch.randn(2, 6, generator=g),
        torch.tensor([[1, 1, 0], [0, 0, 0]]),
        torch.randn(2, 4, 10, generator=g), torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]]),
    ]  # fmt: skip


def test_masked_positions_hold_the_learned_padding() -> None:
    fusion = TextFusion(**SIZES)
    context, pooled = fusion(*inputs())
    assert context.shape == (2, 7, 12) and pooled.shape == (2, 16)
    assert torch.equal(context[0, 2], fusion.padding[2])
    assert torch.equal(context[1], fusion.padding)
    assert torch.isfinite(pooled).all()


def test_an_absent_encoder_gives_zero_in_its_half() -> None:
    _, pooled = TextFusion(**SIZES)(*inputs())
    assert pooled[0].abs().min() > 0
    assert torch.equal(pooled[1], torch.zeros(16))
