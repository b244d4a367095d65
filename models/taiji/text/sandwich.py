"""The Sandwich text encoder: a BERT-family transformer with two public meanings of "sandwich".

(a) `sandwich_k`: sublayer order s^k (sf)^(n-k) f^k (Press, Smith, Levy, "Improving Transformer
    Models by Reordering their Sublayers", arXiv 1911.03864); the parameter count does not change.
(b) `sandwich_norm`: a LayerNorm before and after every branch (Ding et al., "CogView",
    arXiv 2105.13290), which keeps activations small in half precision.

With `sandwich_k=0` and `sandwich_norm=False` it is BERT exactly, and `from_bert` reads a folder
with a BERT checkpoint, such as Chinese RoBERTa-wwm.

B batch, S text tokens, D width, N heads, K head dim.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file
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

    _supports_gradient_checkpointing = True

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
        self.gradient_checkpointing = False
        for embedding in (self.word, self.position, self.token_type):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.word(input_ids) + self.position(positions) + self.token_type.weight[0]
        x = self.norm(x)
        mask = attention_mask[:, None, None, :].bool()
        for sublayer in self.sublayers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(sublayer, x, mask)
            else:
                x = sublayer(x, mask)
        return self.final_norm(x)

    @classmethod
    def from_bert(cls, folder: Path) -> "SandwichTextEncoder":
        """The encoder of a BERT checkpoint (config.json, *.safetensors), key for key, no pooler.

        Raises ValueError for another architecture, and for weights that are missing or pickled.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise ValueError(f"{folder} has no config.json: name the folder of a BERT checkpoint")
        encoder = cls(**bert_config(json.loads(path.read_text())))
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"{folder} has no .safetensors weights, and pickles are not read: save the model "
                "again with transformers' save_pretrained"
            )
        tensors = {k: v for file in files for k, v in load_file(file).items()}
        try:
            encoder.load_state_dict(bert_to_sandwich(tensors))
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{folder} does not fit its config.json: {error}") from error
        return encoder.eval()

    def lengthened(self, max_length: int) -> "SandwichTextEncoder":
        """The same encoder for `max_length` tokens: its position embeddings are repeated, as
        Longformer does (Beltagy et al., arXiv 2004.05150, section 5), for copies of trained ones
        keep what attention has learned of near tokens and new ones would not.

        Raises ValueError for a length below its own.
        """
        position = self.position.weight
        if max_length < len(position):
            raise ValueError(
                f"max_length={max_length} is below the encoder's {len(position)} tokens: a text is "
                "cut where it is tokenized, the encoder needs no change"
            )
        settings = {k: v for k, v in self.config.items() if not k.startswith("_")}
        encoder = type(self)(**{**settings, "max_length": max_length})
        index = torch.arange(max_length) % len(position)
        encoder.load_state_dict({**self.state_dict(), "position.weight": position.detach()[index]})
        return encoder.to(position).train(self.training)

    def layer_of(self, name: str) -> int:
        """Depth of a parameter: 0 for the embeddings, then 1 for each two sublayers, to `layers`.
        What stands behind the last sublayer belongs to the last layer."""
        part, _, rest = name.partition(".")
        if part == "sublayers":
            return int(rest.split(".")[0]) // 2 + 1
        return int(self.config["layers"]) if part == "final_norm" else 0


def bert_config(config: dict[str, Any]) -> dict[str, Any]:
    """A BERT config.json as arguments of SandwichTextEncoder (k=0, no extra norm).

    Raises ValueError where the model computes something that BERT does not.
    """
    expected = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
        "position_embedding_type": "absolute",
    }
    for key, value in expected.items():
        found = config.get(key, value if key != "model_type" else None)
        if found != value:
            raise ValueError(
                f"not a BERT that Sandwich can take over: {key} is {found!r}, needed {value!r}"
            )
    return {
        "vocab_size": config["vocab_size"],
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "ffn_width": config["intermediate_size"],
        "max_length": config["max_position_embeddings"],
        "sandwich_k": 0,
        "sandwich_norm": False,
    }


_BERT_EMBEDDINGS = {
    "word_embeddings": "word",
    "position_embeddings": "position",
    "token_type_embeddings": "token_type",
    "LayerNorm": "norm",
}
_BERT_LAYER = {  # sublayer of the pair, module in it
    "attention.self.query": (0, "branch.query"),
    "attention.self.key": (0, "branch.key"),
    "attention.self.value": (0, "branch.value"),
    "attention.output.dense": (0, "branch.out"),
    "attention.output.LayerNorm": (0, "norm_out"),
    "intermediate.dense": (1, "branch.up"),
    "output.dense": (1, "branch.down"),
    "output.LayerNorm": (1, "norm_out"),
}
_TENSORFLOW_LEAVES = {"gamma": "weight", "beta": "bias"}  # of LayerNorm, in older checkpoints


def bert_to_sandwich(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a `transformers` BertModel renamed for SandwichTextEncoder (k=0, no extra norm).

    Pooler, heads and buffers are left out. Raises KeyError for any other key that is no encoder
    tensor.
    """
    out: dict[str, Tensor] = {}
    for full_name, tensor in state_dict.items():
        parts = full_name.removeprefix("bert.").split(".")
        if parts[0] in ("pooler", "cls") or parts[-1] == "position_ids":
            continue
        leaf = _TENSORFLOW_LEAVES.get(parts[-1], parts[-1])
        if parts[0] == "embeddings" and parts[1] in _BERT_EMBEDDINGS:
            out[f"{_BERT_EMBEDDINGS[parts[1]]}.{leaf}"] = tensor
            continue
        module = ".".join(parts[3:-1])
        if parts[:2] != ["encoder", "layer"] or module not in _BERT_LAYER:
            raise KeyError(f"not a BERT encoder tensor: {full_name}")
        offset, target = _BERT_LAYER[module]
        out[f"sublayers.{2 * int(parts[2]) + offset}.{target}.{leaf}"] = tensor
    return out
