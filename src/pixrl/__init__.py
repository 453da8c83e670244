"""pixrl trains image generators by reinforcement learning: fuse concepts, align models, personalize subjects.

    >>> import pixrl
    >>> result = pixrl.fuse(["owl", "snail"], budget=128)
    >>> result.images[result.selected[0]]

Importing pixrl is quick: torch is loaded when one of the names below is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pixrl.errors import PixrlError

if TYPE_CHECKING:
    from pixrl import equations, models, rewards
    from pixrl.api import AlignResult, FusionResult, align, draw, fuse, personalize

__version__ = "0.1.0"
__all__ = [
    "AlignResult",
    "FusionResult",
    "PixrlError",
    "__version__",
    "align",
    "draw",
    "equations",
    "fuse",
    "models",
    "personalize",
    "rewards",
]

_LAZY = {
    "AlignResult": "pixrl.api",
    "FusionResult": "pixrl.api",
    "align": "pixrl.api",
    "draw": "pixrl.api",
    "fuse": "pixrl.api",
    "personalize": "pixrl.api",
}
_SUBPACKAGES = {"equations", "models", "rewards"}


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"pixrl.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'pixrl' has no attribute {name!r}")
    value = vars(import_module(_LAZY[name]))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
