"""Class names and prompt templates, as CLIP_benchmark keeps them beside a data set."""

import os
from pathlib import Path

from clip_models.errors import ModelError


def read_class_names(path: str | os.PathLike[str]) -> list[str]:
    """Class names in order, one a line; a blank line is a class.

    Args:
        path: the file, or a data set directory that holds `classnames.txt`.

    Raises:
        ModelError: no such file, or an empty one.
    """
    return _lines(path, "classnames.txt", "a class name")


def read_templates(path: str | os.PathLike[str]) -> list[str]:
    """Prompt templates, one a line, with `{c}` where the class name goes; blank lines are dropped.

    Args:
        path: the file, or a data set directory that holds `zeroshot_classification_templates.txt`.

    Raises:
        ModelError: no such file, or one without templates.
    """
    lines = _lines(
        path, "zeroshot_classification_templates.txt", "a prompt like `a photo of a {c}.`"
    )
    return [line for line in lines if line.strip()]


def _lines(path: str | os.PathLike[str], default: str, what: str) -> list[str]:
    file = Path(path)
    if file.is_dir():
        file = file / default
    if not file.is_file():
        raise ModelError(f"{file} does not exist; it should hold {what} on each line")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{file} is not UTF-8 ({error}); save it as UTF-8") from error
    lines = text.removesuffix("\n").split("\n")
    if lines == [""]:
        raise ModelError(f"{file} is empty; it should hold {what} on each line")
    return lines
