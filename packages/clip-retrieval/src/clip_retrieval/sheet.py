"""Answers for people: a table for the terminal, a contact sheet for the browser."""

import base64
import html
from collections.abc import Callable, Iterator, Sequence

from clip_retrieval.pictures import media_type
from clip_retrieval.query import Answer, Query
from clip_retrieval.search import Hit

_CAPTION = 60  # characters of a caption shown in a table


def table(answers: Sequence[Answer]) -> str:
    """One aligned block per query: rank, similarity, row, key, caption."""
    blocks: list[str] = []
    for answer in answers:
        keys = max([3, *(len(hit.key) for hit in answer.hits)])
        lines = [
            _title(answer),
            f"{'rank':>4}  {'sim':>7}  {'row':>9}  {'key':<{keys}}  caption",
        ]
        lines += [
            f"{hit.rank:>4}  {hit.similarity:>z7.4f}  {hit.row:>9}  {hit.key:<{keys}}  "
            f"{_one_line(hit)[:_CAPTION]}".rstrip()
            for hit in answer.hits
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def contact_sheet(answers: Sequence[Answer], picture: Callable[[int], bytes]) -> str:
    """A self-contained page: every hit's picture (of its row, by `picture`) as a data URI."""
    return "".join(_page(answers, picture))


def _page(answers: Sequence[Answer], picture: Callable[[int], bytes]) -> Iterator[str]:
    yield _HEAD
    for answer in answers:
        yield "<section>\n<h2>"
        for term in answer.terms:
            if term.image is not None:
                yield f'<img class="query" src="{data_uri(term.image)}" alt="">'
        yield f"{html.escape(_title(answer))}</h2>\n<ol>\n"
        for hit in answer.hits:
            text = html.escape(_one_line(hit))
            yield (
                f'<li><img src="{data_uri(picture(hit.row))}" alt="{text}" loading="lazy">'
                f'<p class="caption">{text}</p>'
                f'<p class="facts"><b>{hit.similarity:z.3f}</b> {html.escape(hit.key)}</p></li>\n'
            )
        yield "</ol>\n</section>\n"
    yield "</main>\n</html>\n"


def data_uri(image: bytes) -> str:
    """An encoded picture as a data URI."""
    return f"data:{media_type(image)};base64,{base64.b64encode(image).decode()}"


def _title(answer: Answer) -> str:
    """“a cat” + image dog.png − “snow”."""
    titles = [("− " if term.weight < 0 else "+ ") + _name(term) for term in answer.terms]
    return " ".join(titles).removeprefix("+ ")


def _name(term: Query) -> str:
    if term.text is not None:
        return f"“{term.text}”"
    return f"{'embedding' if term.image is None else 'image'} {term.name}"


def _one_line(hit: Hit) -> str:
    same = f" (+{len(hit.duplicates)} alike)" if hit.duplicates else ""
    return " · ".join((hit.caption or "").splitlines()) + same


_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>clip-retrieval</title>
<style>
  body { margin: 0; background: #fafafa; color: #222; font: 15px/1.4 system-ui, sans-serif; }
  main { max-width: 1200px; margin: 0 auto; padding: 8px 16px 32px; }
  h2 { display: flex; align-items: center; gap: 12px; margin: 24px 0 12px; font-size: 20px;
       font-weight: 600; overflow-wrap: anywhere; }
  .query { width: 64px; height: 64px; object-fit: contain; border-radius: 6px; background: #fff;
           border: 2px solid #3b6fd4; }
  ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 12px;
       margin: 0; padding: 0; list-style: none; }
  li { background: #fff; border: 1px solid #e4e4e4; border-radius: 8px; overflow: hidden; }
  li img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff; }
  li p { margin: 4px 10px; font-size: 13px; overflow-wrap: anywhere; }
  .caption { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3;
             overflow: hidden; }
  .facts { color: #767676; }
  .facts b { color: #3b6fd4; font-variant-numeric: tabular-nums; }
</style>
<main>
"""
