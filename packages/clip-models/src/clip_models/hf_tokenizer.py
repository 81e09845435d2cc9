"""A Hugging Face tokenizer, token for token as open_clip's HFTokenizer calls it."""

# N texts, L context length

import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from clip_models.errors import ModelError
from clip_models.tokenizer import CLEANERS

_FILES = ("tokenizer.json", "tokenizer_config.json")


class HFTokenizer:
    """Text to token ids, by a tokenizer of transformers.

    Attributes:
        context_length: L; longer texts are cut, shorter ones padded as the tokenizer pads.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        context_length: int = 77,
        *,
        clean: str = "whitespace",
        strip_sep_token: bool = False,
        language: str | None = None,
    ) -> None:
        """Read tokenizer files; code that comes with them is never run.

        Args:
            source: a directory with tokenizer files, or a hub's name.
            context_length: L.
            clean: what happens to a text first: whitespace, lower or canonicalize (lower case and
                no punctuation: SigLIP).
            strip_sep_token: separators become 0 (CLIPA).
            language: of the texts, for a tokenizer that marks it (NLLB).

        Raises:
            ModelError: no tokenizer there, or one that cannot do what is asked.
        """
        if clean not in CLEANERS:
            raise ModelError(f"tokenizer_kwargs: clean {clean!r}; known: {', '.join(CLEANERS)}")
        self.context_length = context_length
        self.clean = clean
        self.strip_sep_token = strip_sep_token
        self.backend = _read(str(source))
        if self.backend.pad_token_id is None:
            raise ModelError(f"{source}: a tokenizer without a padding token")
        if language is not None:
            if not hasattr(self.backend, "src_lang") or language not in self.backend.get_vocab():
                raise ModelError(f"tokenizer_kwargs: {source} does not know language {language!r}")
            # open_clip's set_src_lang_special_tokens is undone by transformers 5 at the next call
            self.backend.src_lang = language

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> int64 [N, L], padded."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens_NL: Tensor = self.backend(
            [CLEANERS[self.clean](text) for text in texts],
            return_tensors="pt",
            max_length=self.context_length,
            padding="max_length",
            truncation=True,
        ).input_ids
        if self.strip_sep_token:
            return torch.where(tokens_NL == self.backend.sep_token_id, 0, tokens_NL)
        return tokens_NL

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files into a directory, from which it loads offline."""
        # else they hold the last call's padding too, and depend on whether there was one
        self.backend.backend_tokenizer.no_padding()
        self.backend.backend_tokenizer.no_truncation()
        self.backend.save_pretrained(path)


def has_tokenizer(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds tokenizer files."""
    return any((Path(path) / name).is_file() for name in _FILES)


def reason_of(error: Exception) -> str:
    """transformers explains itself over many lines; one is enough."""
    return shorten(str(error) or type(error).__name__, 240).rstrip(".")


def _read(source: str) -> Any:
    # said outright, tokenizers does not warn when a loader forks; as open_clip says it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        backend: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the Rust library raises nothing more special for a broken file
        raise ModelError(
            f"tokenizer {source!r} cannot be read: {reason_of(error)}; it belongs into the model "
            f"directory ({', '.join(_FILES)}), or into what hf_tokenizer_name names"
        ) from error
    # where its file is missing, transformers makes up a vocabulary of special tokens (T5: and "▁")
    if len(backend) <= len(backend.get_added_vocab()) + 1:
        raise ModelError(f"tokenizer {source!r} has no vocabulary; put its {_FILES[0]} there")
    return backend
