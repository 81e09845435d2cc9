"""Tokens against open_clip's tokenizer."""

import html.entities
import random
import unicodedata
from collections.abc import Callable

import open_clip
import pytest
import torch
from clip_models import Tokenizer
from hypothesis import HealthCheck, given, seed, settings
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


# 100,000 texts: hypothesis's 20,000, and eight kinds of 10,000 drawn here

CAPTIONS = """
photo of the a Dress women's Blue vintage 2017 Hand-made T-shirt iPhone® case for sale, Stock image
Royalty-Free £12.99 (100%) 4x6" wedding @home #art http://x.co/a_b.jpg naïve Café München сад don't
猫の写真 صورة फोटो 사진 we'll it's 1950s &amp; &quot;best&quot; - – —
"""
WORDS = CAPTIONS.split()
ENTITIES = [f"&{name}" for name in html.entities.html5] + ["&#{}", "&#x{};", "&amp;{};", "&"]
LETTERS = [chr(c) for c in range(0x2FFF) if unicodedata.category(chr(c))[0] != "C"]
MOJIBAKE = [
    ("“déjà vu” – naïve café, 100 €", "utf-8", "windows-1252"),
    ("Москва и Санкт-Петербург", "utf-8", "latin-1"),
    ("schöne Grüße 😀", "utf-8", "macroman"),
]


def caption(draw: random.Random) -> str:
    length = min(200, max(1, round(draw.lognormvariate(2.3, 0.6))))
    return draw.choice([" ", " ", "  ", "_", ", "]).join(draw.choices(WORDS, k=length))


def entities(draw: random.Random) -> str:
    found = [e.format(draw.randrange(0x300)) for e in draw.choices(ENTITIES, k=draw.randint(1, 8))]
    return draw.choice(["", " ", "x"]).join(found)


def code_points(draw: random.Random) -> str:
    """From all planes, without surrogates, which no UTF-8 file holds."""
    top = draw.choice([0x100, 0x3000, 0x10000, 0x110000])
    drawn = (draw.randrange(top) for _ in range(draw.randint(0, 40)))
    return "".join(chr(c) for c in drawn if not 0xD800 <= c < 0xE000)


def letters(draw: random.Random) -> str:
    return "".join(draw.choices([*LETTERS, " ", "'s", "\n"], k=draw.randint(1, 40)))


def emoji(draw: random.Random) -> str:
    parts = [*range(0x1F300, 0x1FAFF), 0x200D, 0xFE0F, 0x20E3, 0x1F3FB, 0x1F1E6, 0x20, 0x61]
    return "".join(map(chr, draw.choices(parts, k=draw.randint(1, 20))))


def mojibake(draw: random.Random) -> str:
    text, wrote, read = draw.choice(MOJIBAKE)
    cut = sorted(draw.choices(range(len(text) + 1), k=2))
    return caption(draw)[:30] + text[slice(*cut)].encode(wrote).decode(read, errors="replace")


def over_long(draw: random.Random) -> str:
    piece = "".join(map(chr, draw.choices(range(32, 127), k=draw.randint(4, 12))))
    return piece * draw.randint(20, 30)


def blank_and_special(draw: random.Random) -> str:
    blanks = " \t\n\r\x0b\x0c\x1c\x85\xa0\u2003\u2028\u3000\u200b\ufeff"
    parts = ["", *blanks, "<start_of_text>", "<END_OF_TEXT>", "<", "_", "'", "'S", "ſ", "0"]
    return "".join(draw.choices(parts, k=draw.randint(0, 10)))


KINDS = [caption, entities, code_points, letters, emoji, mojibake, over_long, blank_and_special]


def first_difference(texts: list[str]) -> str | None:
    differ = (OURS(texts) != THEIRS(texts)).any(dim=1)
    return texts[int(differ.long().argmax())] if differ.any() else None


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_of_a_kind(kind: Callable[[random.Random], str]) -> None:
    draw = random.Random(kind.__name__)
    assert first_difference([kind(draw) for _ in range(10_000)]) is None


@pytest.mark.slow
@seed(0)
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.lists(st.text(max_size=30), min_size=40, max_size=40))
def test_twenty_thousand_of_hypothesis(texts: list[str]) -> None:
    assert first_difference(texts) is None
