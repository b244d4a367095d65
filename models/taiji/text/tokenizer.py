"""A Chinese character-level tokenizer, built from a corpus, as a `transformers` fast tokenizer.

One token per character: Chinese prompts are short, the vocabulary is small and nothing has to be
segmented. Latin letters and digits are tokens of their own too.
"""

from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

PAD, UNK, CLS = "[PAD]", "[UNK]", "[CLS]"


def build_tokenizer(
    corpus: Iterable[str], *, max_length: int, min_count: int = 1
) -> PreTrainedTokenizerFast:
    """Character vocabulary of `corpus`, most frequent first; [CLS] stands before every text.

    Texts longer than `max_length` tokens (with [CLS]) are cut by the caller's `truncation=True`.
    """
    counts = Counter(ch for text in corpus for ch in text.lower() if not ch.isspace())
    chars = sorted((c for c, n in counts.items() if n >= min_count), key=lambda c: (-counts[c], c))
    vocab = {token: i for i, token in enumerate([PAD, UNK, CLS, *chars])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(" ", "")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A", special_tokens=[(CLS, vocab[CLS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        cls_token=CLS,
        model_max_length=max_length,
    )


def tokens(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int
) -> tuple[Tensor, Tensor]:
    """B texts -> ids and attention mask (B, length) int64, cut and padded to `length` tokens"""
    batch = tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return batch.input_ids, batch.attention_mask
