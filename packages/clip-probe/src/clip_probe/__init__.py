"""Zero-shot and linear-probe evaluation of CLIP models.

Names are imported when first used, so that `--help` costs no import of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_probe.errors import ProbeError
    from clip_probe.evaluate import evaluate_heads, zeroshot
    from clip_probe.solver import fit_grid
    from clip_probe.sweeps import sweep

_MODULES = {
    "ProbeError": "errors",
    "evaluate_heads": "evaluate",
    "fit_grid": "solver",
    "sweep": "sweeps",  # a module of that name would take its place
    "zeroshot": "evaluate",
}

__all__ = ["ProbeError", "evaluate_heads", "fit_grid", "sweep", "zeroshot"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
