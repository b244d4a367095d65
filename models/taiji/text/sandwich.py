"""The Sandwich text encoder: a BERT-family transformer with two public meanings of "sandwich".

(a) `sandwich_k`: sublayer order s^k (sf)^(n-k) f^k (Press, Smith, Levy, "Improving Transformer
    Models by Reordering their Sublayers", arXiv 1911.03864); the parameter count does not change.
(b) `sandwich_norm`: a LayerNorm before and after every branch (Ding et al., "CogView",
    arXiv 2105.13290), which keeps activations small in half precision.

With `sandwich_k=0` and `sandwich_norm=False` it is BERT exactly, and `bert_to_sandwich` maps a BERT
checkpoint's tensors onto it.

B batch, S text tokens, D width, N heads, K head dim.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, S, D), mask (B, 1, 1, S) bool, True = attend -> (B, S, D)"""
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.query, self.key, self.value)
        )
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.down(gelu(self.up(x)))


class Sublayer(nn.Module):
    """x + f(x) with BERT's norm after the sum, or CogView's norms around the branch."""

    def __init__(self, branch: nn.Module, width: int, sandwich_norm: bool) -> None:
        super().__init__()
        self.branch = branch
        self.norm_in = nn.LayerNorm(width, eps=1e-12) if sandwich_norm else None
        self.norm_out = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.norm_in is None:
            return self.norm_out(x + self.branch(x, mask))
        return x + self.norm_out(self.branch(self.norm_in(x), mask))


def sublayer_order(layers: int, sandwich_k: int) -> str:
    """'s' self-attention, 'f' feed-forward: s^k (sf)^(n-k) f^k."""
    if not 0 <= sandwich_k <= layers:
        raise ValueError(f"sandwich_k={sandwich_k} must lie in 0..layers={layers}")
    return "s" * sandwich_k + "sf" * (layers - sandwich_k) + "f" * sandwich_k


class SandwichTextEncoder(ModelMixin, ConfigMixin):
    """input_ids (B, S) int64, attention_mask (B, S) -> hidden states (B, S, D)."""

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 21128,
        width: int = 1024,
        layers: int = 24,
        heads: int = 16,
        ffn_width: int = 4096,
        max_length: int = 512,
        sandwich_k: int = 6,
        sandwich_norm: bool = True,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} must be divisible by heads={heads}")
        self.word = nn.Embedding(vocab_size, width, padding_idx=0)
        self.position = nn.Embedding(max_length, width)
        self.token_type = nn.Embedding(2, width)  # BERT's; a prompt is always type 0
        self.norm = nn.LayerNorm(width, eps=1e-12)
        branches: list[nn.Module] = [
            SelfAttention(width, heads) if kind == "s" else FeedForward(width, ffn_width)
            for kind in sublayer_order(layers, sandwich_k)
        ]
        self.sublayers = nn.ModuleList(Sublayer(b, width, sandwich_norm) for b in branches)
        self.final_norm = nn.LayerNorm(width, eps=1e-12) if sandwich_norm else nn.Identity()
        for embedding in (self.word, self.position, self.token_type):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.word(input_ids) + self.position(positions) + self.token_type.weight[0]
        x = self.norm(x)
        mask = attention_mask[:, None, None, :].bool()
        for sublayer in self.sublayers:
            x = sublayer(x, mask)
        return self.final_norm(x)


def bert_to_sandwich(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a `transformers` BertModel renamed for SandwichTextEncoder (k=0, no extra norm).

    Raises KeyError for a key that is neither an encoder tensor nor the pooler or a buffer.
    """
    attention = {"query": "query", "key": "key", "value": "value"}
    out: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("bert.")
        parts = name.split(".")
        if parts[0] in ("pooler", "cls") or name.endswith("position_ids"):
            continue
        if parts[0] == "embeddings":
            table = {
                "word_embeddings": "word",
                "position_embeddings": "position",
                "token_type_embeddings": "token_type",
                "LayerNorm": "norm",
            }
            out[f"{table[parts[1]]}.{parts[2]}"] = tensor
            continue
        if parts[:2] != ["encoder", "layer"]:
            raise KeyError(f"not a BERT encoder tensor: {name}")
        i, rest, leaf = int(parts[2]), parts[3:-1], parts[-1]
        s, f = f"sublayers.{2 * i}", f"sublayers.{2 * i + 1}"
        target = {
            **{f"attention.self.{k}": f"{s}.branch.{v}" for k, v in attention.items()},
            "attention.output.dense": f"{s}.branch.out",
            "attention.output.LayerNorm": f"{s}.norm_out",
            "intermediate.dense": f"{f}.branch.up",
            "output.dense": f"{f}.branch.down",
            "output.LayerNorm": f"{f}.norm_out",
        }[".".join(rest)]
        out[f"{target}.{leaf}"] = tensor
    return out
