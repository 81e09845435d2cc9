"""CLIP's byte-pair tokenizer, token for token open_clip's.

Words are found by the `regex` library, whose Unicode tables open_clip uses too, and cut into tokens
by the Rust `tokenizers` library, once for each distinct word: captions repeat their words.
"""

# N texts, L context length

import gzip
import html
import os
import string
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING

import ftfy
import numpy as np
import regex
import torch
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from clip_models.config import ModelConfig
from clip_models.errors import ModelError

if TYPE_CHECKING:
    from clip_models.hf_tokenizer import HFTokenizer

VOCAB_SIZE = 49408
START, END = VOCAB_SIZE - 2, VOCAB_SIZE - 1
_SPECIAL = {"<start_of_text>": START, "<end_of_text>": END}
_WORD = regex.compile(
    "|".join(_SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


class Tokenizer:
    """Text to token ids, by CLIP's byte-pair merges.

    Attributes:
        context_length: L; longer texts are cut, and end in the end-of-text token all the same.
    """

    def __init__(self, context_length: int = 77) -> None:
        self.context_length = context_length

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without start, end, truncation or padding."""
        return [
            token for word in _WORD.findall(CLEANERS["lower"](text)) for token in _word_tokens(word)
        ]

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> int64 [N, L]: start, the tokens, end, zeros."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens_NL = np.zeros((len(texts), self.context_length), dtype=np.int64)
        for row, text in zip(tokens_NL, texts, strict=True):
            kept = [START, *self.encode(text)[: self.context_length - 2], END]
            row[: len(kept)] = kept
        return torch.from_numpy(tokens_NL)


def tokenizer_for(
    config: ModelConfig, path: str | os.PathLike[str] | None = None
) -> "Tokenizer | HFTokenizer":
    """The tokenizer of a model: CLIP's, or the Hugging Face one that `text_cfg` names.

    Args:
        config: of the model.
        path: its model directory, where the tokenizer's files are looked for first.

    Raises:
        ModelError: a tokenizer that cannot be found or that the configuration gets wrong.
    """
    text = config.text_cfg
    if text.hf_tokenizer_name is None:
        if text.hf_model_name is not None:
            raise ModelError(
                "text_cfg: hf_model_name without hf_tokenizer_name would feed a Hugging Face model "
                f'CLIP\'s tokens; add "hf_tokenizer_name": "{text.hf_model_name}"'
            )
        if text.tokenizer_kwargs:
            raise ModelError("text_cfg: tokenizer_kwargs are for a model with hf_tokenizer_name")
        return Tokenizer(text.context_length)
    from clip_models.hf_tokenizer import HFTokenizer, has_tokenizer

    options = text.tokenizer_kwargs or {}
    if unknown := options.keys() - {"clean", "strip_sep_token", "language"}:
        raise ModelError(
            f"text_cfg: tokenizer_kwargs {', '.join(sorted(unknown))}; "
            "known: clean, strip_sep_token, language"
        )
    source = path if path is not None and has_tokenizer(path) else text.hf_tokenizer_name
    return HFTokenizer(source, text.context_length, **options)


def repair(text: str) -> str:
    """OpenAI's cleaning, less the white space: mojibake repaired, HTML unescaped twice."""
    # printable ASCII without an entity is what ftfy and unescape return unchanged
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _canonicalize(text: str) -> str:
    """SigLIP's cleaning (big_vision): lower case, no punctuation."""
    kept = repair(text).replace("_", " ").translate(_NO_PUNCTUATION)
    return " ".join(kept.lower().split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

# What open_clip calls the `clean` function of a tokenizer; CLIP's own is `lower`.
CLEANERS: dict[str, Callable[[str], str]] = {
    "lower": lambda text: " ".join(repair(text).split()).lower(),
    "whitespace": lambda text: " ".join(repair(text).split()),
    "canonicalize": _canonicalize,
}


@lru_cache(maxsize=1 << 16)
def _word_tokens(word: str) -> tuple[int, ...]:
    # a text that spells out a special token gets that token, as in open_clip
    if word in _SPECIAL:
        return (_SPECIAL[word],)
    return tuple(_backend().encode(word, add_special_tokens=False).ids)


def vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """The words in the order of their ids, less the two special ones, and the merges."""
    raw = files("clip_models").joinpath("data/clip_bpe_merges.txt.gz").read_bytes()
    pairs = [line.split() for line in gzip.decompress(raw).decode().splitlines()]
    # OpenAI's order of the 256 byte symbols: the printable ones, then the rest
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in pairs]
    return words, [(left, right) for left, right in pairs]


@cache
def _backend() -> Backend:
    """The merges as a BPE model over bytes, words ending in `</w>`."""
    words, merges = vocabulary()
    backend = Backend(
        BPE({word: i for i, word in enumerate(words)}, merges, end_of_word_suffix="</w>")
    )
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    return backend
