"""The files that describe the shards of a folder together."""

from importlib.metadata import version

from clip_data.atomic import PARTIAL

MANIFEST = "manifest.json"  # counts, hashes and arguments; written last, it ends the work
MARKER = MANIFEST + PARTIAL  # there while the work is under way
SIZES = "sizes.json"  # samples of each tar, as open_clip reads it
NSHARDS = "nshards.txt"  # of a split in CLIP_benchmark's layout: 0.tar, 1.tar, … without a gap

TOOL = f"clip-data {version('clip-data')}"
