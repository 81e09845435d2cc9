"""What all splits of a labelled or retrieval set share, in CLIP_benchmark's layout.

classnames.txt  zeroshot_classification_templates.txt  dataset_type.txt
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from upath import UPath

from clip_data.atomic import write_text
from clip_data.errors import DataError

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
DATASET_TYPE = "dataset_type.txt"

DEFAULT_TEMPLATES = ("a photo of a {c}.",)


def read_lines(path: Path | UPath) -> list[str]:
    """The lines of a UTF-8 text file. A blank line is one of them: an empty name is a class.

    Raises:
        DataError: there is no such file, it is empty or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: expected a UTF-8 text file, a name on each line ({error})"
        ) from error
    if not text:
        raise DataError(f"{path}: empty; expected a name on each line")
    return text.removesuffix("\n").split("\n")


def choose_class_names(output: UPath, given: Path | None, found: Sequence[str]) -> list[str]:
    """The class names in order: as given, else those of the set that is there, else as found.

    Raises:
        DataError: there are none, or one twice.
    """
    file = given or output / CLASS_NAMES
    names = read_lines(file) if given or file.exists() else list(found)
    if not names:
        raise DataError(f"{output}: no row of the source has a class name; expected one for each")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise DataError(f"{file}: {name!r} is there {times} times; expected a name for each class")
    return names


def choose_templates(output: UPath, given: Path | None) -> list[str]:
    """The prompt templates: as given, else those of the set that is there, else the usual one.

    Raises:
        DataError: a template has no place for the class name.
    """
    if given is None and not (output / TEMPLATES).exists():
        return list(DEFAULT_TEMPLATES)
    file = given or output / TEMPLATES
    templates = read_lines(file)
    for line in templates:
        if "{c}" not in line:
            raise DataError(f"{file}: {line!r} has no {{c}}, the place of the class name")
    return templates


def write_set_files(
    output: UPath, class_names: list[str] | None, templates: list[str] | None
) -> None:
    """Write the files of a set for classification, or for retrieval where there are no classes.

    Raises:
        DataError: the set that is there differs; nothing is written then.
    """
    wanted: dict[str, str | None] = {CLASS_NAMES: None, TEMPLATES: None, DATASET_TYPE: None}
    if class_names is None or templates is None:
        wanted[DATASET_TYPE] = "retrieval\n"
    else:
        wanted[CLASS_NAMES] = "".join(f"{name}\n" for name in class_names)
        wanted[TEMPLATES] = "".join(f"{template}\n" for template in templates)
    for name, text in wanted.items():
        path = output / name
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise DataError(
                f"{path}: differs from what this build would write, and all splits of a set share "
                "it; build into another set, or delete the file if it is no longer wanted"
            )
    for name, text in wanted.items():
        if text is not None:
            write_text(output / name, text)
