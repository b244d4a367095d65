import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from taiji.text.sandwich import SandwichTextEncoder, bert_to_sandwich, sublayer_order

TINY = {"vocab_size": 40, "width": 16, "heads": 2, "ffn_width": 32, "max_length": 12}


def test_order_keeps_the_number_of_sublayers() -> None:
    assert sublayer_order(4, 0) == "sfsfsfsf"
    assert sublayer_order(4, 2) == "sssfsfff"
    with pytest.raises(ValueError, match="sandwich_k=5"):
        sublayer_order(4, 5)


def test_reordering_does_not_change_the_parameter_count() -> None:
    plain = SandwichTextEncoder(**TINY, layers=3, sandwich_k=0)
    sandwich = SandwichTextEncoder(**TINY, layers=3, sandwich_k=2)
    assert plain.num_parameters() == sandwich.num_parameters()


def bert_settings(**changes: Any) -> BertConfig:
    sizes = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 12,
    }  # fmt: skip
    return BertConfig(**sizes | changes)


def assert_same_states(ours: SandwichTextEncoder, bert: BertModel) -> None:
    ids = torch.randint(1, 40, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    expected = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(ours(ids, mask)[mask.bool()], expected[mask.bool()], atol=1e-6)


def test_without_sandwich_it_is_bert() -> None:
    torch.manual_seed(0)
    bert = BertModel(bert_settings()).eval()
    ours = SandwichTextEncoder(**TINY, layers=3, sandwich_k=0, sandwich_norm=False).eval()
    ours.load_state_dict(bert_to_sandwich(bert.state_dict()))
    assert_same_states(ours, bert)


@pytest.mark.parametrize("head", [BertModel, BertForMaskedLM])
def test_a_bert_folder_is_read_key_for_key(head: Any, tmp_path: Path) -> None:
    """RoBERTa-wwm is published as a BERT with a masked-language head; shards are read as one."""
    torch.manual_seed(0)
    model = head(bert_settings()).eval()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = SandwichTextEncoder.from_bert(tmp_path)
    assert ours.config["sandwich_k"] == 0 and not ours.config["sandwich_norm"]
    encoder = getattr(model, "bert", model)
    saved = {k: v for k, v in encoder.state_dict().items() if not k.startswith("pooler")}
    assert ours.num_parameters() == sum(t.numel() for t in saved.values())
    assert_same_states(ours, encoder)
    ours.save_pretrained(tmp_path / "sandwich")
    assert_same_states(SandwichTextEncoder.from_pretrained(tmp_path / "sandwich").eval(), encoder)


def test_names_of_older_checkpoints_are_read(tmp_path: Path) -> None:
    bert = BertModel(bert_settings()).eval()
    bert.save_pretrained(tmp_path)
    leaves = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        for new, old in leaves.items():
            name = name.replace(new, old)
        renamed[f"bert.{name}"] = tensor
    save_file(renamed, tmp_path / "model.safetensors")
    assert_same_states(SandwichTextEncoder.from_bert(tmp_path), bert)


def test_what_is_no_bert_folder_is_refused(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SandwichTextEncoder.from_bert(tmp_path)

    refused("has no config.json")
    settings = bert_settings().to_dict()
    for key, value in (("model_type", "roberta"), ("hidden_act", "relu")):
        (tmp_path / "config.json").write_text(json.dumps({**settings, key: value}))
        refused(f"{key} is '{value}'")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused("pickles are not read")
    save_file({"embeddings.LayerNorm.weight": torch.ones(16)}, tmp_path / "model.safetensors")
    refused("does not fit its config.json")


def test_unknown_tensor_is_named() -> None:
    with pytest.raises(KeyError, match="decoder.weight"):
        bert_to_sandwich({"decoder.weight": torch.zeros(1)})


def test_padding_does_not_reach_the_text() -> None:
    model = SandwichTextEncoder(**TINY, layers=2, sandwich_k=1).eval()
    ids = torch.tensor([[2, 5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    other = ids.clone()
    other[:, 3:] = 9
    assert torch.equal(model(ids, mask)[:, :3], model(other, mask)[:, :3])


def backward(model: SandwichTextEncoder) -> tuple[int, list[Tensor]]:
    """How many tensors wait for the backward pass, and its gradients."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    ids = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, torch.ones(2, 7)).square().mean()
    loss.backward()
    return len(kept), [p.grad for p in model.parameters() if p.grad is not None]


def test_checkpointed_layers_have_the_same_gradients() -> None:
    model = SandwichTextEncoder(**TINY, layers=3, sandwich_k=1)
    plain, expected = backward(model)
    model.zero_grad(set_to_none=True)
    model.enable_gradient_checkpointing()
    checkpointed, found = backward(model)
    assert checkpointed < plain / 3
    for gradient, again in zip(expected, found, strict=True):
        assert torch.equal(gradient, again)


def test_depth_of_parameters() -> None:
    model = SandwichTextEncoder(**TINY, layers=3, sandwich_k=1)
    depth = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert depth["word.weight"] == depth["norm.bias"] == 0
    assert depth["sublayers.0.norm_in.weight"] == depth["sublayers.1.norm_out.bias"] == 1
    assert depth["sublayers.5.branch.up.weight"] == depth["final_norm.weight"] == 3


def largest_sum(norm: str, factor: float) -> float:
    """Largest magnitude among x + branch, in half precision, over 24 layers whose branches have
    `factor` times their weights; inf when one overflows."""
    torch.manual_seed(0)
    model = SandwichTextEncoder(**TINY, layers=24, sandwich_k=0, sandwich_norm=norm == "sandwich")
    with torch.no_grad():
        for sublayer in model.sublayers:
            for linear in (m for m in sublayer.branch.modules() if isinstance(m, nn.Linear)):
                linear.weight.mul_(factor)
    largest = [0.0]

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        largest.append(float((inputs[0] if norm == "post" else output).abs().max()))

    for sublayer in model.sublayers:
        # post: what the norm is given is the sum; sandwich: the sum is what the sublayer returns
        watched = sublayer.norm_out if norm == "post" else sublayer
        watched.register_forward_hook(record)
    ids = torch.randint(1, 40, (2, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.half()(ids, torch.ones(2, 10))
    return max(largest)


def test_sandwich_norm_bounds_what_is_added_in_half_precision() -> None:
    """CogView's claim: with a norm on every branch the sums do not depend on the branches' size,
    where BERT's grow with it."""
    calm = {norm: largest_sum(norm, 1.0) for norm in ("post", "sandwich")}
    wild = {norm: largest_sum(norm, 60.0) for norm in ("post", "sandwich")}
    assert wild["post"] > 100 * calm["post"]
    assert wild["sandwich"] < 2 * calm["sandwich"] < 100


def test_a_lengthened_encoder_repeats_its_positions() -> None:
    torch.manual_seed(0)
    short = SandwichTextEncoder(**TINY, layers=3, sandwich_k=1).eval()
    long = short.lengthened(30)
    assert long.config.max_length == 30 and short.config.max_length == 12 and not long.training
    ids = torch.randint(1, 40, (2, 24))
    first = torch.ones_like(ids)
    first[:, 12:] = 0
    expected = short(ids[:, :12], first[:, :12])
    assert torch.allclose(long(ids, first)[:, :12], expected, atol=1e-6)
    # the second half alone stands at copies of the same positions
    half = torch.cat([ids[:, :12], ids[:, :12]], dim=1)
    assert torch.allclose(long(half, 1 - first)[:, 12:], expected, atol=1e-6)
    with pytest.raises(ValueError, match="max_length=11 is below the encoder's 12 tokens"):
        short.lengthened(11)
