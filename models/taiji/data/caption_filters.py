"""What is wrong or telling about a caption: language, length, a normal form to compare by.

Languages are told by script, which is enough to tell Chinese from what a Chinese model must not be
trained on; kana means Japanese even between Han characters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

# RE2 classes; a Latin or Cyrillic word counts as one, like one Han character
SCRIPTS = {
    "zh": r"\p{Han}",
    "ja": r"[\p{Hiragana}\p{Katakana}]",
    "ko": r"\p{Hangul}",
    "latin": r"\p{Latin}+",
    "cyrillic": r"\p{Cyrillic}+",
    "arabic": r"\p{Arabic}+",
    "thai": r"\p{Thai}+",
}
BROKEN = r"[\x{FFFD}\x{0000}-\x{0008}\x{000E}-\x{001F}]"  # what a failed decoding leaves behind
IGNORED = r"[\p{P}\p{S}\p{Z}\p{C}]+"


class CaptionFilter(BaseModel):
    """Writes `caption_ok`, `caption_language`, `characters`, `words` and `caption_key`."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def normal_form(captions: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """NFKC, lower case, without punctuation, symbols and spaces: "一只 猫。" -> "一只猫"."""
    folded = pc.utf8_lower(pc.utf8_normalize(captions, form="NFKC"))
    return pc.replace_substring_regex(folded, pattern=IGNORED, replacement="")


def text_keys(texts: Iterable[str]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """64-bit BLAKE2b of each text: (N,) uint64"""
    digests = [hashlib.blake2b(t.encode(), digest_size=8).digest() for t in texts]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def languages(captions: pa.Array) -> pa.Array:
    """The script with the most characters or words; "none" where there is no letter."""
    counts = {
        name: pc.count_substring_regex(captions, pattern=pattern)
        for name, pattern in SCRIPTS.items()
    }
    matrix = np.stack([column.to_numpy(zero_copy_only=False) for column in counts.values()])
    names = np.array([*counts, "none"])
    best = matrix.argmax(0)
    ja, zh = list(counts).index("ja"), list(counts).index("zh")
    best[(matrix[ja] > 0) & (matrix[ja] * 4 >= matrix[zh])] = ja
    best[matrix.max(0) == 0] = len(counts)
    return pa.array(names[best])


def caption_columns(captions: pa.ChunkedArray) -> dict[str, pa.Array]:
    """captions (N) -> columns of N rows; null, blank and badly decoded ones are not ok"""
    text = pc.fill_null(captions.combine_chunks(), "")
    normal = normal_form(text)
    blank = pc.equal(normal, "")
    broken = pc.match_substring_regex(text, pattern=BROKEN)
    return {
        "caption_ok": pc.and_(pc.invert(blank), pc.invert(broken)),
        "caption_language": languages(text),
        "characters": pc.utf8_length(normal),
        "words": pc.count_substring_regex(text, pattern=r"[^\s]+"),
        "caption_key": pa.array(text_keys(normal.to_pylist())),
    }
