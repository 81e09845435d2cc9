"""Memory of `clip-data build` for ever more rows, and seconds until `clip-data --help` answers.

uv run tools/bench/build_memory.py      10,000 and 200,000 rows, in order and shuffled

Every row is one of the same 100 small files, so that the rows alone grow. Memory is the sum, over
all processes of the command, of the largest resident size of each (VmHWM): no less than their peak
together. Shards are small enough for the fewer rows to give all the workers all they can hold.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import psutil
from interleaved import compare
from PIL import Image

COMMAND = Path(sys.executable).with_name("clip-data")
FILES = 100


def write_table(path: Path, rows: int) -> None:
    """A table that lists the files beside it over and over, with different captions."""
    with path.open("w") as file:
        for number in range(rows):
            row = {"image": f"{number % FILES}.jpg", "caption": f"picture {number}, seen from afar"}
            file.write(json.dumps(row) + "\n")


def peak_bytes(command: list[str]) -> int:
    """Run a command; the sum of what each of its processes had in memory at most."""
    peaks: dict[int, int] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            for one in [root, *root.children(recursive=True)]:
                try:
                    status = Path(f"/proc/{one.pid}/status").read_text()
                except (FileNotFoundError, ProcessLookupError):
                    continue  # it has just ended
                for line in status.splitlines():
                    if line.startswith("VmHWM:"):
                        peaks[one.pid] = int(line.split()[1]) * 1024
            time.sleep(0.02)
        if process.returncode:
            raise click.ClickException(f"{command}: {process.stderr.read().decode()[-2000:]}")
    return sum(peaks.values())


@click.command()
@click.option(
    "--rows", multiple=True, type=int, default=(10_000, 200_000), show_default=True,
    help="Of a source; to be given for each.",
)  # fmt: skip
@click.option("--workers", default=2, show_default=True, help="Processes.")
@click.option("--rounds", default=5, show_default=True, help="Timed calls of --help.")
def main(rows: tuple[int, ...], workers: int, rounds: int) -> None:
    """Weigh builds of few rows and of many; time --help."""
    report = compare(
        {"clip-data --help": lambda: subprocess.check_output([COMMAND, "--help"])},
        rounds=rounds,
        work=1,
        unit="answers",
        arguments=dict(click.get_current_context().params),
    )
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "in", Path(folder) / "out"
        source.mkdir()
        for number in range(FILES):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(source / f"{number}.jpg")
        for name, options in {"in order": [], "shuffled": ["--shuffle-seed", "0"]}.items():
            mib: dict[int, float] = {}
            for count in rows:
                write_table(source / "table.jsonl", count)
                command = [str(COMMAND), "build", str(source / "table.jsonl"), str(output)]
                command += ["--samples-per-shard", str(max(1, min(rows) // (4 * workers)))]
                start = time.perf_counter()
                mib[count] = peak_bytes([*command, "--workers", str(workers), *options]) / 2**20
                seconds = time.perf_counter() - start
                click.echo(f"{name}, {count} rows: {mib[count]:.0f} MiB, {seconds:.0f} s", err=True)
                shutil.rmtree(output)
            ratio = {"of": "most rows / fewest", "median": mib[max(rows)] / mib[min(rows)]}
            report[name] = {"peak_mib": mib, "ratio": ratio}
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
