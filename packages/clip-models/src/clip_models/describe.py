"""What a model directory holds, for people and for scripts."""

import json
import os
from pathlib import Path
from typing import Any

from clip_models.heads import list_heads, load_head
from clip_models.model_dir import load_model
from clip_models.profiles import profile


def describe_model(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Configuration, size, provenance and heads of a model directory, every file of it read.

    Raises:
        ModelError: the directory does not load, or a head of it does not.
    """
    loaded = load_model(path)
    figures = profile(loaded.config)
    figures["image_parameters"] = sum(p.numel() for p in loaded.model.visual.parameters())
    figures["parameters"] = sum(p.numel() for p in loaded.model.parameters())
    heads = {name: load_head(path, name) for name in list_heads(path)}
    return {
        "model": str(Path(path)),
        "fingerprint": loaded.fingerprint,
        **figures,
        "model_cfg": loaded.config.to_dict(),
        "provenance": loaded.provenance,
        "heads": {
            name: {"kind": head.kind, "classes": len(head.class_names), "feature": head.feature}
            for name, head in heads.items()
        },
    }


def format_description(description: dict[str, Any]) -> str:
    """The same as aligned lines."""
    lines: list[str] = []
    for name, value in description.items():
        if isinstance(value, int):
            text = f"{value:,}"
        elif name == "heads":
            text = "\n    ".join(
                f"{head}: {about['kind']}, {about['classes']} classes"
                for head, about in value.items()
            )
            text = f"\n    {text}" if text else "none"
        elif isinstance(value, dict):
            text = "\n" + "\n".join(f"    {k}: {json.dumps(v)}" for k, v in value.items())
        else:
            text = str(value)
        lines.append(f"{name.replace('_', ' ')}: {text}")
    return "\n".join(lines)
