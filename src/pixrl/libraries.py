"""Checks of libraries that may be missing, or installed in a way that breaks others; errors say what to type."""

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from pixrl.errors import InputError, RunError

CHECKOUT = Path(__file__).parents[2]
"""The root of the repository, where this package was not installed as a wheel."""


def in_checkout(module: str) -> bool:
    """Return whether a module that lies beside src/ in the repository, and that no wheel carries, is there."""
    return (CHECKOUT / module.partition(".")[0] / "__init__.py").is_file()


def from_checkout(module: str, purpose: str, command: str) -> ModuleType:
    """Import and return a module that lies beside src/ in the repository and that no wheel carries.

    Args:
        module: its name, such as `studies.command`.
        purpose: what needs it, as the beginning of a sentence in the plural.
        command: what was typed, without its arguments.

    Raises:
        InputError: this is an installed package without the repository; says what to type.
    """
    if not in_checkout(module):
        raise InputError(
            f"{purpose} need a checkout of the repository, and pixrl is installed here without it. In a checkout, "
            f"type: pip install -e . && {command} ..."
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.append(str(CHECKOUT))
    return importlib.import_module(module)


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import and return a library that only some jobs need.

    Args:
        module: name of the library in Python, such as `spacy`.
        extra: extra of pixrl that installs it.
        purpose: what needs it, as the beginning of a sentence.

    Raises:
        RunError: it is not installed, or cannot be imported; says which extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RunError(
            f"{purpose} needs {module}, which cannot be imported ({error}). Type: pip install 'pixrl[{extra}]'"
        ) from error


def bitsandbytes(purpose: str) -> Any:
    """Import and return bitsandbytes, which keeps a base in 4 bits and an optimizer's moments in 8; see `require`."""
    return require("bitsandbytes", "quantized", purpose)


def check_torchvision() -> None:
    """Check that torchvision is absent, as pixrl wants it, or can be imported.

    diffusers, transformers and peft ask the package's metadata whether it is there, and then fail to import half of
    their models, with messages about anything but torchvision: its compiled part must be built for the very torch
    that is installed (a CUDA wheel beside a CPU torch is the usual way to break it).

    Raises:
        RunError: it is installed and cannot be imported.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, ImportError, OSError, AttributeError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise RunError(
            f"torchvision {_version('torchvision')} does not match torch {_version('torch')} ({said}); while it is "
            "installed, diffusers and transformers cannot load their models. pixrl does not need it: "
            "pip uninstall torchvision, or install the build that belongs to this torch."
        ) from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
