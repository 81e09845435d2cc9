"""What a sweep leaves in its folder, and how it continues there.

sweep.json           the result
sweep.md             its table
shots.png            accuracy versus shots
grid.png             accuracy of every setting, where something judged them
predictions.parquet  what the full-data probe says of each test image
partial.json         the shots done so far, of a sweep that was interrupted
"""

import json
from pathlib import Path
from typing import Any

from clip_probe.errors import ProbeError
from clip_probe.files import write_file, write_text
from clip_probe.plots import plot_grid, plot_shots
from clip_probe.sweep_table import judged_rows, table


class SweepFiles:
    """The folder of one sweep."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = settings
        self.predictions = folder / "predictions.parquet"

    def finished(self) -> dict[str, Any] | None:
        """The result, where it is there.

        Raises:
            ProbeError: the folder holds a sweep of other settings, whole or in part.
        """
        self._read("partial.json")
        return self._read("sweep.json")

    def rows(self) -> list[dict[str, Any]]:
        """The rows of few shots that are done."""
        found = self._read("partial.json")
        return found["few_shot"] if found else []

    def keep(self, rows: list[dict[str, Any]]) -> None:
        """Keep the rows done so far."""
        found = {**self.settings, "few_shot": rows}
        write_text(self.folder / "partial.json", json.dumps(found))

    def finish(self, result: dict[str, Any]) -> None:
        """Pictures and table, then the result, each whole or not at all."""
        write_file(self.folder / "shots.png", lambda to: plot_shots(result, to))
        if judged_rows(result):
            write_file(self.folder / "grid.png", lambda to: plot_grid(result, to))
        write_text(self.folder / "sweep.md", table(result))
        write_text(self.folder / "sweep.json", json.dumps(result, indent=1) + "\n")
        (self.folder / "partial.json").unlink(missing_ok=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        file = self.folder / name
        if not file.is_file():
            return None
        found: dict[str, Any] = json.loads(file.read_text())
        if differ := [key for key, value in self.settings.items() if found.get(key) != value]:
            raise ProbeError(
                f"{file} holds another sweep (it differs in {', '.join(differ)}): "
                "choose another --output or remove it"
            )
        return found
