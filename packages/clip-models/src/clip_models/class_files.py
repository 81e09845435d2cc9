"""Class names and prompt templates: from files as CLIP_benchmark keeps them, or known by name."""

import os
from pathlib import Path

from clip_models.errors import ModelError
from clip_models.templates import CLASS_LISTS, TEMPLATE_SETS, named_class_names, named_templates

CLASS_NAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"


def read_class_names(source: str | os.PathLike[str]) -> list[str]:
    """Class names in order, one a line; a blank line is a class.

    Args:
        source: the file, or a data set directory that holds `classnames.txt`, or where neither
            exists a name: `imagenet`, which the open_clip package carries.

    Raises:
        ModelError: neither a file nor a known name, or an empty file.
    """
    if str(source) in CLASS_LISTS and not Path(source).exists():
        return named_class_names(str(source))
    return _lines(source, CLASS_NAMES_FILE, "a class name", CLASS_LISTS)


def read_templates(source: str | os.PathLike[str]) -> list[str]:
    """Prompt templates, one a line, with `{c}` where the class name goes.

    Args:
        source: the file, or a data set directory that holds
            `zeroshot_classification_templates.txt`, or where neither exists a name: `general`
            (our own), `openai-imagenet`, `simple-imagenet` (which the open_clip package carries).

    Raises:
        ModelError: neither a file nor a known name, an empty file, or one with a blank line
            between its templates.
    """
    if str(source) in TEMPLATE_SETS and not Path(source).exists():
        return named_templates(str(source))
    what = "a prompt like `a photo of a {c}.`"
    lines = _lines(source, TEMPLATES_FILE, what, TEMPLATE_SETS)
    while len(lines) > 1 and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ModelError(
                f"{source}, line {number}: an empty template; write {what} or remove the line"
            )
    return lines


def _lines(
    source: str | os.PathLike[str], default: str, what: str, names: tuple[str, ...]
) -> list[str]:
    file = Path(source)
    if file.is_dir():
        file = file / default
    if not file.is_file():
        raise ModelError(
            f"{file} does not exist; it should hold {what} on each line "
            f"(known by name: {', '.join(names)})"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{file} is not UTF-8 ({error}); save it as UTF-8") from error
    lines = text.removesuffix("\n").split("\n")
    if lines == [""]:
        raise ModelError(f"{file} is empty; it should hold {what} on each line")
    return lines
