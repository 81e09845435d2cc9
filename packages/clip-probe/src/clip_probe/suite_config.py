"""The TOML file of a suite: which models, which sets, what to measure.

    [models]                          # any names
    small = "runs/small/model"

    [probe]                           # options of `clip-probe sweep`, for every probe
    shots = [1, 2, 4, 8, 16]

    [[sets]]
    path = "sets/twemoji"             # as in the commands: a directory, wds/NAME, hf-hub:...
    name = "twemoji"                  # CLIP_benchmark's name, for the paper's averages
    split = "test"
    probe = { val_split = "val" }     # true, or options of this set; without it no probe

    [averages]                        # besides the paper's
    emoji = ["twemoji", "noto"]

    [robustness]
    base = "twemoji"
    shifted = ["noto"]
    baseline = ["small", "other"]     # optional: models that say what is usual

    [retrieval]
    results = ["retrieval.jsonl"]     # lines of `clip-retrieval eval`

Paths are relative to the file.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from clip_probe.errors import ProbeError
from clip_probe.hub import hub_name

PROBE_KEYS_OF_SUITE = (
    *("model", "dataset", "head_name", "output", "test_split", "options"),
    *("templates", "classnames"),  # the set's, for both tasks
)


@dataclass(frozen=True)
class SetConfig:
    """One set of the suite."""

    path: Path
    name: str
    split: str = "test"
    templates: str | None = None
    classnames: str | None = None
    probe: dict[str, Any] | None = None  # options of `sweep`; None: no probe


@dataclass(frozen=True)
class RobustnessConfig:
    """The sets that `robustness` compares."""

    base: str
    shifted: tuple[str, ...]
    baseline: tuple[str, ...] = ()


@dataclass(frozen=True)
class SuiteConfig:
    """A whole suite."""

    models: dict[str, Path]
    sets: tuple[SetConfig, ...]
    averages: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    robustness: RobustnessConfig | None = None
    retrieval: tuple[Path, ...] = ()


def read_suite(path: Path, probe_options: Sequence[str]) -> SuiteConfig:
    """Read and check the file.

    Args:
        path: the TOML file.
        probe_options: the names that a table of probe options may hold.

    Raises:
        ProbeError: no such file, no TOML, an unknown or missing key, a name given twice or unknown.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ProbeError(f"no suite at {path}: expected a TOML file (see suite --help)") from error
    except ValueError as error:  # no TOML, or no UTF-8
        raise ProbeError(f"{path} is no TOML: {error}") from error
    reader = _Reader(path, tuple(name for name in probe_options if name not in PROBE_KEYS_OF_SUITE))
    return reader.suite(tables)


class _Reader:
    def __init__(self, file: Path, probe_options: tuple[str, ...]) -> None:
        self.file = file
        self.probe_options = probe_options

    def suite(self, tables: dict[str, Any]) -> SuiteConfig:
        known = ("models", "sets", "probe", "averages", "robustness", "retrieval")
        self._check("the file", tables, known, ("models", "sets"))
        probe = self._table("[probe]", tables.get("probe", {}), self.probe_options)
        models = {
            name: self._path(self._text(f"[models] {name}", path))
            for name, path in self._table("[models]", tables["models"]).items()
        }
        if not isinstance(tables["sets"], list):
            raise self._wrong("the file: expected sets as [[sets]]")
        sets = tuple(self._set(table, probe) for table in cast(list[Any], tables["sets"]))
        names = [one.name for one in sets]
        if twice := [name for name in names if names.count(name) > 1]:
            raise self._wrong(f"two sets are called {twice[0]!r}; give one another `name`")
        averages = {
            name: self._texts(f"[averages] {name}", some)
            for name, some in self._table("[averages]", tables.get("averages", {})).items()
        }
        robust = None
        if "robustness" in tables:
            keys = ("base", "shifted", "baseline")
            table = self._table("[robustness]", tables["robustness"], keys, keys[:2])
            baseline = self._texts("[robustness] baseline", table.get("baseline", []), 0)
            shifted = self._texts("[robustness] shifted", table["shifted"])
            robust = RobustnessConfig(table["base"], shifted, baseline)
            self._known("[robustness]", (robust.base, *robust.shifted), names)
            self._known("[robustness]", baseline, models)
        for name, some in averages.items():
            self._known(f"[averages] {name}", some, names)
        results = self._table("[retrieval]", tables.get("retrieval", {}), ("results",))
        files = self._texts("[retrieval] results", results.get("results", []), 0)
        if not models or not sets:
            raise self._wrong("a suite needs a model and a set at least")
        return SuiteConfig(models, sets, averages, robust, tuple(map(self._path, files)))

    def _set(self, table: Any, common: dict[str, Any]) -> SetConfig:
        names = [f.name for f in fields(SetConfig)]
        table = self._table("[[sets]]", table, names, ("path",))
        probe: Any = table.get("probe", False)
        if isinstance(probe, dict):
            probe = {**common, **self._table("probe", probe, self.probe_options)}
        else:
            probe = dict(common) if probe else None
        texts = {
            name: self._text(f"[[sets]] {name}", table[name]) for name in table.keys() - {"probe"}
        }
        path = texts["path"]
        on_hub = path.startswith("wds/")
        return SetConfig(
            path=Path(path) if hub_name(path) else self._path(path),
            # CLIP_benchmark's name has the slash of wds/vtab/dtd
            name=texts.get("name", path.removeprefix("wds/") if on_hub else Path(path).name),
            split=texts.get("split", "test"),
            templates=self._list_file(texts.get("templates")),
            classnames=self._list_file(texts.get("classnames")),
            probe=probe,
        )

    def _text(self, where: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self._wrong(f"{where}: expected text, found {value!r}")
        return value

    def _texts(self, where: str, value: Any, least: int = 1) -> tuple[str, ...]:
        if not isinstance(value, list) or len(cast(list[Any], value)) < least:
            raise self._wrong(f"{where}: expected a list of names, found {value!r}")
        return tuple(self._text(where, one) for one in cast(list[Any], value))

    def _path(self, text: str) -> Path:
        return self.file.parent / text

    def _list_file(self, text: str | None) -> str | None:
        """A file beside the suite, or a list known by name."""
        return str(self._path(text)) if text and self._path(text).exists() else text

    def _table(
        self, where: str, table: Any, known: Sequence[str] = (), needed: Sequence[str] = ()
    ) -> dict[str, Any]:
        if not isinstance(table, dict):
            raise self._wrong(f"{where}: expected a table, found {table!r}")
        self._check(where, cast(dict[str, Any], table), known, needed)
        return cast(dict[str, Any], table)

    def _check(
        self, where: str, table: dict[str, Any], known: Sequence[str], needed: Sequence[str]
    ) -> None:
        if known and (unknown := sorted(table.keys() - set(known))):
            raise self._wrong(f"{where}: {unknown[0]!r} is unknown; known are {', '.join(known)}")
        if missing := [name for name in needed if name not in table]:
            raise self._wrong(f"{where}: {missing[0]!r} is missing")

    def _known(
        self, where: str, names: Sequence[str], known: Sequence[str] | dict[str, Any]
    ) -> None:
        for name in names:
            if name not in known:
                raise self._wrong(f"{where}: {name!r} is none of {', '.join(known)}")

    def _wrong(self, what: str) -> ProbeError:
        return ProbeError(f"{self.file}: {what}")
