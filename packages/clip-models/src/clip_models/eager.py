"""Functions that torch.compile leaves as they are."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def eager(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """As `torch.compiler.disable`, which imports torch's compiler; that takes seconds.

    Here it is imported only by those who compile.
    """
    disabled = torch._disable_dynamo(function)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    @wraps(function)
    def call(*args: _P.args, **options: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            return disabled(*args, **options)
        return function(*args, **options)

    return call
