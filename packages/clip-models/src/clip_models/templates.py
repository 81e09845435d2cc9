"""Prompt templates and class names known by name.

A few prompts of our own, and the lists that the open_clip package carries: these are read from it
where it is installed.
"""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from clip_models.errors import ModelError

DEFAULT_TEMPLATES = "general"
_GENERAL = (
    "a photo of a {c}.",
    "a picture that shows the {c}.",
    "the {c}, seen up close.",
    "a {c} seen from afar.",
    "an image of a {c} in its usual surroundings.",
    "{c}",
)
_TEMPLATES_OF_OPEN_CLIP = {
    "openai-imagenet": "OPENAI_IMAGENET_TEMPLATES",
    "simple-imagenet": "SIMPLE_IMAGENET_TEMPLATES",
}
TEMPLATE_SETS = (DEFAULT_TEMPLATES, *_TEMPLATES_OF_OPEN_CLIP)
CLASS_LISTS = ("imagenet",)


def named_templates(name: str) -> list[str]:
    """The prompts of one of `TEMPLATE_SETS`, with `{c}` where the class name goes.

    Raises:
        ModelError: a set of open_clip's, which is not installed.
    """
    if name == DEFAULT_TEMPLATES:
        return list(_GENERAL)
    return [fill("{c}") for fill in _of_open_clip(_TEMPLATES_OF_OPEN_CLIP[name], name)]


def named_class_names(name: str) -> list[str]:
    """The class names of one of `CLASS_LISTS`, in order.

    Raises:
        ModelError: open_clip, whose list it is, is not installed.
    """
    return list(_of_open_clip("IMAGENET_CLASSNAMES", name))


def _of_open_clip(variable: str, name: str) -> Any:
    """A table of open_clip's, from its file alone: importing open_clip takes seconds."""
    package = find_spec("open_clip")
    folders = (package and package.submodule_search_locations) or []
    for file in (Path(folder) / "zero_shot_metadata.py" for folder in folders):
        spec = spec_from_file_location("open_clip_zero_shot_metadata", file)
        if file.is_file() and spec and spec.loader:
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            return getattr(module, variable)
    raise ModelError(
        f"{name!r} is a list of the open_clip package, which is not installed; "
        "install open-clip-torch, or name a file"
    )
