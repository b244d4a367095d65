"""Tokenizers of the text side: a character vocabulary built from a corpus, or BERT's of a folder.

The character tokenizer has one token per character: Chinese prompts are short, the vocabulary is
small and nothing has to be segmented. Latin letters and digits are tokens of their own too.
Chinese BERT does the same to Chinese characters and cuts other words into pieces.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

PAD, UNK, CLS, SEP = "[PAD]", "[UNK]", "[CLS]", "[SEP]"


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


def open_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in `folder`: a tokenizer.json, or the vocab.txt of a Chinese BERT.

    Raises ValueError when neither is there, or the vocabulary is not BERT's.
    """
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if not (folder / "vocab.txt").is_file():
        raise ValueError(f"{folder} has neither tokenizer.json nor vocab.txt: name a tokenizer's")
    vocab = set((folder / "vocab.txt").read_text(encoding="utf-8").split("\n"))
    missing = [token for token in (PAD, UNK, CLS, SEP) if token not in vocab]
    if missing:
        raise ValueError(f"{folder}/vocab.txt is not a BERT vocabulary: no {', '.join(missing)}")
    return BertTokenizerFast.from_pretrained(folder)


def tokens(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int
) -> tuple[Tensor, Tensor]:
    """B texts -> ids and attention mask (B, length) int64, cut and padded to `length` tokens"""
    batch = tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return batch.input_ids, batch.attention_mask


def overlong(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], length: int) -> int:
    """How many of the texts `tokens` would cut."""
    ids = tokenizer(list(texts), verbose=False).input_ids
    return sum(len(row) > length for row in ids)
