"""Is what lies at OUT the result of this very command? Then nothing is left to do."""

from pathlib import Path
from typing import Any, cast

from clip_finetune.errors import FinetuneError


def refuse_other(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises FinetuneError where `theirs`, recorded at `path`, differs in any key of `ours`."""
    if any(theirs.get(key) != ours[key] for key in ours):
        raise FinetuneError(
            f"{path} exists and is another run's ({_difference(theirs, ours)}); "
            "choose another OUT or remove it"
        )


def refuse_other_kind(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises FinetuneError where the config of the model at `path` is not `ours`."""
    if theirs != ours:
        raise FinetuneError(
            f"{path} is another kind of model ({_difference(theirs, ours)}); "
            "expected two states of one model, the base and what was fine-tuned from it"
        )


def _difference(theirs: Any, ours: Any, name: str = "") -> str:
    """The first value that differs, by name: 'arguments.lr is 1e-05 there, 0.0001 here'."""
    if isinstance(theirs, list) and isinstance(ours, list):
        theirs = dict(enumerate(cast(list[Any], theirs)))
        ours = dict(enumerate(cast(list[Any], ours)))
    if isinstance(theirs, dict) and isinstance(ours, dict):
        there, here = cast(dict[Any, Any], theirs), cast(dict[Any, Any], ours)
        for key in here:
            if there.get(key) != here[key]:
                return _difference(there.get(key), here[key], f"{name}.{key}".lstrip("."))
    return f"{name} is {theirs} there, {ours} here"
