"""CLIP's byte-pair tokenizer, token for token open_clip's.

Words are found by the `regex` library, whose Unicode tables open_clip uses too, and cut into tokens
by the Rust `tokenizers` library, once for each distinct word: captions repeat their words.
"""

# N texts, L context length

import gzip
import html
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.resources import files

import ftfy
import numpy as np
import regex
import torch
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

VOCAB_SIZE = 49408
START, END = VOCAB_SIZE - 2, VOCAB_SIZE - 1
_SPECIAL = {"<start_of_text>": START, "<end_of_text>": END}
_WORD = regex.compile(
    "|".join(_SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


class Tokenizer:
    """Text to token ids.

    Attributes:
        context_length: L; longer texts are cut, and end in the end-of-text token all the same.
    """

    def __init__(self, context_length: int = 77) -> None:
        self.context_length = context_length

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without start, end, truncation or padding."""
        return [token for word in _WORD.findall(clean(text)) for token in _word_tokens(word)]

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> int64 [N, L]: start, the tokens, end, zeros."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens_NL = np.zeros((len(texts), self.context_length), dtype=np.int64)
        for row, text in zip(tokens_NL, texts, strict=True):
            kept = [START, *self.encode(text)[: self.context_length - 2], END]
            row[: len(kept)] = kept
        return torch.from_numpy(tokens_NL)


def clean(text: str) -> str:
    """OpenAI's cleaning: repair mojibake, unescape HTML twice, fold white space, lower-case."""
    # printable ASCII without an entity is what ftfy and unescape return unchanged
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@lru_cache(maxsize=1 << 16)
def _word_tokens(word: str) -> tuple[int, ...]:
    # a text that spells out a special token gets that token, as in open_clip
    if word in _SPECIAL:
        return (_SPECIAL[word],)
    return tuple(_backend().encode(word, add_special_tokens=False).ids)


@cache
def _backend() -> Backend:
    """The merges as a BPE model over bytes, words ending in `</w>`."""
    raw = files("clip_models").joinpath("data/clip_bpe_merges.txt.gz").read_bytes()
    pairs = [line.split() for line in gzip.decompress(raw).decode().splitlines()]
    # OpenAI's order of the 256 byte symbols: the printable ones, then the rest
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in pairs]
    merges = [(left, right) for left, right in pairs]
    backend = Backend(
        BPE({word: i for i, word in enumerate(words)}, merges, end_of_word_suffix="</w>")
    )
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    return backend
