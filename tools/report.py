"""The quickstart's results as a table on the terminal and as one self-contained page.

python tools/report.py OUT        reads the files that tools/quickstart.sh left in OUT
"""

import base64
import html
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

STYLES = {
    "twemoji": "style trained on",
    "openmoji": "style partly seen: its outlines are trained on",
    "noto": "style never seen",
}


def read(out: Path, name: str) -> list[dict[str, Any]]:
    """The JSON lines of a step."""
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def with_interval(share: float, interval: list[float]) -> str:
    return f"{percent(share)} ({percent(interval[0])} to {percent(interval[1])})"


def results(out: Path) -> list[tuple[str, str, str]]:
    """(what, figure, chance) for every figure of the run."""
    rows: list[tuple[str, str, str]] = []
    for split, which in (("test", ""), ("test-no-flags", ", without flags")):
        for row in read(out, f"zeroshot-{split}.jsonl"):
            rows.append(
                (
                    f"zero-shot category{which}, {Path(row['dataset']).name}",
                    with_interval(row["acc1"], row["acc1_ci95"]),
                    percent(row["majority_class_share"]),
                )
            )
    pixels = read(out, "log/pixels.json")[0]["full"]
    for row in read(out, "probe.jsonl"):
        rows.append(
            (
                f"linear probe on twemoji, {Path(row['dataset']).name}",
                with_interval(row["acc1"], row["acc1_ci95"]),
                percent(row["majority_class_share"]),
            )
        )
    rows.append(
        (
            "the same probe on raw pixels, twemoji",
            percent(pixels["acc1"]),
            percent(pixels["majority_class_share"]),
        )
    )
    for split, which in (("all", "all concepts"), ("heldout", "held-out concepts")):
        for row in read(out, f"retrieval-{split}.jsonl"):
            for way, arrow in (("text", "image to text"), ("image", "text to image")):
                for k in (1, 5):
                    name = f"{way}_retrieval_recall@{k}"
                    style = Path(row["dataset"]).name.removesuffix("-names")
                    rows.append(
                        (
                            f"{arrow} Recall@{k}, {which}, {style}",
                            with_interval(row["metrics"][name], row["interval_95"][name]),
                            percent(row["chance"][name]),
                        )
                    )
    for point in curve_points(out):
        alpha, test = point["alpha"], point["test"]
        if alpha in (0, 1) or point["chosen"]:
            name = {0: "zero-shot end", 1: "fine-tuned end"}.get(alpha, f"chosen alpha {alpha:g}")
            figure = f"{percent(test['id'])} / {percent(test['ood'])}"
            rows.append((f"fine-tuning, {name}: twemoji / mean of the others", figure, ""))
    return rows


def curve_points(out: Path) -> Iterable[dict[str, Any]]:
    curve = json.loads((out / "curve" / "curve.json").read_text())
    for point in sorted(curve["points"], key=lambda point: point["alpha"]):
        yield {**point, "chosen": point["alpha"] == curve["chosen"]["alpha"]}


def table(rows: list[tuple[str, str, str]]) -> str:
    width, middle = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"{'':<{width}}  {'figure (95% interval)':<{middle}}  chance"]
    lines += [
        f"{what:<{width}}  {figure:<{middle}}  {chance}".rstrip() for what, figure, chance in rows
    ]
    return "\n".join(lines)


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def hit_picture(shards: Path, hit: dict[str, Any]) -> bytes:
    """A hit's picture, by the offset index that clip-data writes beside each shard."""
    shard = shards / hit["shard"]
    index = json.loads(shard.with_suffix(".index.json").read_text())
    offset, size = index["members"]["png"][index["keys"].index(hit["key"])]
    with shard.open("rb") as tar:
        tar.seek(offset)
        return tar.read(size)


def page(out: Path, rows: list[tuple[str, str, str]]) -> str:
    demo, run = out / "demo", read(out, "log/train.json")[0]
    splits = json.loads((demo / "splits.json").read_text())
    parts = [_HEAD, "<h1>A CLIP model, from pictures to figures</h1>"]
    parts.append(
        f"<p>{splits['concepts']:,} emoji concepts drawn by several artists; "
        f"{len(splits['held_out']):,} concepts, with all their siblings, and one artist "
        f"(noto) were held out of training. {run['samples']:,} pairs seen.</p>"
    )
    shown = splits["held_out"][:: max(1, len(splits["held_out"]) // 16)][:16]
    parts.append("<h2>Concepts never trained on</h2><div class=sheet>")
    for style, about in STYLES.items():
        test = read(demo, f"categories-{style}-test.jsonl")
        images = {row["concept"]: demo / row["image"] for row in test}
        pictures = "".join(
            f'<img src="{data_uri(images[concept].read_bytes())}" alt="{html.escape(concept)}">'
            for concept in shown
            if concept in images
        )
        parts.append(f"<figure><figcaption>{style}: {about}</figcaption>{pictures}</figure>")
    parts.append("</div><h2>Figures</h2><table><tr><th><th>figure (95% interval)<th>chance</tr>")
    parts += [
        f"<tr><td>{html.escape(what)}<td>{html.escape(figure)}<td>{chance}</tr>"
        for what, figure, chance in rows
    ]
    parts.append("</table><h2>Retrieval from the unseen artist's pictures</h2>")
    for answer in read(out, "query.jsonl"):
        query = answer["query"]
        if "image" in query:
            uri = data_uri(Path(query["image"]).read_bytes())
            parts.append(f'<h3>like <img class=query src="{uri}" alt=""> (twemoji)</h3>')
        else:
            parts.append(f"<h3>“{html.escape(query['text'])}”</h3>")
        parts.append("<ol>")
        for hit in answer["hits"]:
            uri = data_uri(hit_picture(out / "sets" / "noto-names" / "all", hit))
            caption = html.escape(hit["caption"])
            parts.append(
                f'<li><img src="{uri}" alt=""><span>{hit["similarity"]:.2f}</span> {caption}</li>'
            )
        parts.append("</ol>")
    parts.append("<h2>Plots</h2><div class=plots>")
    for file, title in (
        ("run/loss.png", "Training: loss, and zero-shot accuracy on twemoji, concepts never seen"),
        ("probe/shots.png", "Linear probes on frozen features, concepts never seen"),
        ("curve/curve.png", "Between the zero-shot and the fine-tuned model (WiSE-FT)"),
    ):
        uri = data_uri((out / file).read_bytes())
        parts.append(f"<figure><figcaption>{title}</figcaption><img src='{uri}' alt=''></figure>")
    parts.append(f"</div><footer>{CREDITS}</footer></main></html>\n")
    return "\n".join(parts)


CREDITS = (
    "Pictures, changed only in size and, for outlines, by leaving out colours: Twemoji, CC-BY 4.0; "
    "OpenMoji, CC-BY-SA 4.0; Noto Emoji, SIL OFL 1.1."
)

_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>clip-toolkit quickstart</title>
<style>
  body { margin: 0; background: #fafafa; color: #222; font: 15px/1.45 system-ui, sans-serif; }
  main { max-width: 1080px; margin: 0 auto; padding: 16px; }
  h1 { font-size: 26px; } h2 { margin-top: 36px; font-size: 20px; } h3 { margin: 16px 0 6px; }
  figure { margin: 8px 0; } figcaption { color: #666; font-size: 13px; }
  .sheet img { width: 56px; height: 56px; margin: 2px; background: #fff; }
  .query { width: 40px; height: 40px; vertical-align: middle; }
  table { border-collapse: collapse; background: #fff; }
  td + td { white-space: nowrap; }
  th, td { padding: 3px 14px 3px 8px; border-bottom: 1px solid #eee; text-align: left;
           font-variant-numeric: tabular-nums; }
  th { font-weight: 600; color: #666; }
  ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 8px;
       margin: 0; padding: 0; list-style: none; }
  li { background: #fff; border: 1px solid #e6e6e6; border-radius: 8px; padding: 8px;
       font-size: 12px; overflow-wrap: anywhere; }
  li img { display: block; width: 72px; height: 72px; margin: 0 auto 4px; }
  li span { color: #3b6fd4; }
  .plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 16px; }
  .plots img { width: 100%; background: #fff; }
  footer { margin: 32px 0; color: #777; font-size: 12px; }
</style>
<main>"""


@click.command()
@click.argument("out", type=click.Path(path_type=Path, exists=True))
def main(out: Path) -> None:
    """Write OUT/report.html from the quickstart's results, and print them as a table."""
    rows = results(out)
    temporary = out / ".report.html"
    temporary.write_text(page(out, rows), encoding="utf-8")
    temporary.rename(out / "report.html")
    click.echo(f"{table(rows)}\n\nReport with pictures: {out / 'report.html'}")


if __name__ == "__main__":
    main()
