"""IDEFICS_SETUP: a function of the operator, called once in each process of a worker, such as the start of an SDK."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from config.settings import PREFIX

#: Kinds of parameters that one positional argument fits.
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def run(setup: str, process: str) -> None:
    """Call the function `module:name`, with the name of this process if it requires an argument.

    Exits with the cure where there is no such function, or where it raises.
    """
    if not setup:
        return
    try:
        function = _function(setup)
        function(*([process] if _requires_argument(function) else []))
    except Exception as error:
        sys.exit(
            f"{PREFIX}SETUP={setup} failed in the {process} process: {type(error).__name__}: {error}. Name a function "
            "as module:function that can be imported here (PYTHONPATH) and called without arguments, or with the "
            "process's name; or leave it empty."
        )


def _function(setup: str) -> Callable[..., Any]:
    module, _, name = setup.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{setup} is not a function")
    return function  # type: ignore[no-any-return]


def _requires_argument(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(each.kind in _POSITIONAL and each.default is each.empty for each in parameters)
