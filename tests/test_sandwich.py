import pytest
import torch
from transformers import BertConfig, BertModel

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


def test_without_sandwich_it_is_bert() -> None:
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=12,
        )
    ).eval()
    ours = SandwichTextEncoder(**TINY, layers=3, sandwich_k=0, sandwich_norm=False).eval()
    ours.load_state_dict(bert_to_sandwich(bert.state_dict()))
    ids = torch.randint(1, 40, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    expected = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(ours(ids, mask)[mask.bool()], expected[mask.bool()], atol=1e-6)


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
