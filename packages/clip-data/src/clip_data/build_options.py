"""Options of the clip-data command, in the groups of the dataclasses that they fill."""

from collections.abc import Callable
from typing import Any

import click

Command = Callable[..., Any]


def _together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


workers_option = click.option(
    "--workers", type=click.IntRange(min=1), help="Processes.  [default: one per core]"
)

columns_options = _together(
    click.option("--image-column", help="Column of image paths.  [default: image]"),
    click.option("--url-column", help="Column of addresses to download.  [default: url or URL]"),
    click.option(
        "--caption-column",
        multiple=True,
        help="Column of captions, one or a list; repeatable.  [default: caption, TEXT or text]",
    ),
    click.option("--label-column", help="Column of class names."),
)

images_options = _together(
    click.option(
        "--image-size",
        type=click.IntRange(min=1),
        help="Resize larger images to this, in pixels.  [default: keep the bytes]",
    ),
    click.option(
        "--resize-mode",
        type=click.Choice(["shortest", "longest", "crop", "pad"]),
        default="shortest",
        show_default=True,
        help="The side that becomes --image-size; or crop or pad to a square of it.",
    ),
    click.option("--upscale", is_flag=True, help="Resize smaller images too."),
    click.option(
        "--encode",
        type=click.Choice(["jpg", "png", "webp"]),
        help="Store images in this format.  [default: as they are]",
    ),
    click.option(
        "--quality",
        type=click.IntRange(1, 100),
        default=95,
        show_default=True,
        help="Of JPEG and WebP.",
    ),
    click.option(
        "--min-image-size",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Leave out images whose shorter side has fewer pixels.",
    ),
    click.option(
        "--max-aspect-ratio",
        type=click.FloatRange(min=1),
        help="Leave out images that are longer than this many times their width.",
    ),
    click.option(
        "--max-pixels",
        type=click.IntRange(min=1),
        default=100_000_000,
        show_default=True,
        help="Leave out images of more pixels, width x height.",
    ),
)

downloads_options = _together(
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=10.0,
        show_default=True,
        help="Seconds for one try of a download.",
    ),
    click.option(
        "--retries",
        type=click.IntRange(min=0),
        default=2,
        show_default=True,
        help="Further tries of a download.",
    ),
    click.option(
        "--connections",
        type=click.IntRange(min=1),
        default=64,
        show_default=True,
        help="Downloads at a time, per process.",
    ),
    click.option(
        "--per-host",
        type=click.IntRange(min=1),
        default=8,
        show_default=True,
        help="Downloads at a time from one host, per process.",
    ),
    click.option(
        "--hash-column", help="Column of MD5, SHA-1 or SHA-256 sums that downloads must have."
    ),
    click.option(
        "--ignore-robots",
        is_flag=True,
        help="Download what robots.txt or an X-Robots-Tag of noai or noindex forbids.",
    ),
)
