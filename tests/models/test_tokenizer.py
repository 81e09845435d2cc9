"""Tokens against open_clip's tokenizer."""

import open_clip
import torch
from clip_models import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

THEIRS = open_clip.get_tokenizer("ViT-B-32")
OURS = Tokenizer()

TEXTS = [
    "",
    " ",
    "a photo of a cat",
    "It's   don'T we'LL 'ſ",
    "Hello &amp;amp; world &lt;b&gt;",
    "😀 grinning face 👩‍🚀",
    "Zürich 北京 ½ ³ İstanbul ǅ ß",
    "‘quoted’ “x” ï¿½ Ã©",
    "a\x1cb\u0085c\u3000d\u200be",
    "12345 6.7 --- !!! ###",
    "<start_of_text> hi <END_OF_TEXT>",
    "!<start_of_text><ſtart_of_text>",
    "word " * 200,
    "x" * 400,
]


def test_known_texts() -> None:
    assert torch.equal(OURS(TEXTS), THEIRS(TEXTS))
    assert torch.equal(OURS(TEXTS[2]), THEIRS(TEXTS[2]))


@settings(max_examples=1000, deadline=None)
@given(st.text(max_size=60))
def test_any_text(text: str) -> None:
    assert torch.equal(OURS(text), THEIRS(text))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*TEXTS, "&", ";", "#38", "'s", "<", ">", "\n"])).map("".join))
def test_joined_pieces(text: str) -> None:
    assert torch.equal(OURS(text), THEIRS(text))


def test_shorter_context() -> None:
    assert torch.equal(Tokenizer(8)(TEXTS), THEIRS(TEXTS, context_length=8))
