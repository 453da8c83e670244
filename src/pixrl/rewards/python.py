"""A reward that is the user's Python function: `f(images, prompts, metadata) -> list[float | None]`."""

import ast
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from numbers import Real
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pixrl import plugins
from pixrl.errors import ConfigError, Failure, did_you_mean
from pixrl.rewards.base import Options, Reward
from pixrl.rewards.preprocess import require_images, to_grey_levels
from pixrl.rewards.set import Caller
from pixrl.rewards.settings import import_path, is_importable
from pixrl.rewards.weights import describe_function, source_of
from pixrl.types import RewardBatch, Scores

Function = Callable[[list[Image.Image], list[str], list[dict[str, object]]], Sequence[float | None]]
"""A function from PIL images, prompts and metadata to one score, or None, per image."""
EXAMPLE = "my_module:f or path/to/file.py:f"


class PythonReward(Reward):
    """Scores from the user's function `f(images, prompts, metadata) -> list[float | None]`, higher is better.

    It gets a list of RGB PIL images, the prompts and one metadata dict per image (empty where there is none), and gives
    one number per image, in the same order. None, nan or inf for an image is a failed score of that image; an
    exception, an answer of the wrong length or kind, or no answer within `time_limit` fails every image of the call.
    A picture that is not finite fails without being shown.

    Args:
        function: an import path (`my_module:f`, or `path/to/file.py:f` for a file that is on no path), or the function.
        time_limit: seconds a call may take; None: no limit of its own (a `RewardSet` has one for every reward).

    Raises:
        ConfigError: the module or file cannot be imported, has no such function, or it does not take three arguments.
    """

    name = "python"
    runs_functions = True
    examples: ClassVar[Mapping[str, object]] = {"function": "my_module:f"}

    def __init__(self, function: str | Function, time_limit: float | None = None) -> None:
        if not isinstance(function, str) and not callable(function):
            raise ConfigError(f"{function!r} is no import path of a function. Type {EXAMPLE}.")
        self.function: Function = import_function(function) if isinstance(function, str) else function
        about = describe_function(
            self.function, function if isinstance(function, str) else import_path(function)
        )
        label = about["model"].rpartition(" (")[0]
        try:
            inspect.signature(self.function).bind([], [], [])
        except ValueError:
            pass  # a built-in without a signature
        except TypeError as error:
            raise ConfigError(
                f"{label} must take three arguments, f(images, prompts, metadata), but is "
                f"f{inspect.signature(self.function)} ({error})."
            ) from None
        self._caller: Caller[object] = Caller(time_limit)
        is_kept = isinstance(function, str) or is_importable(function)
        source = {} if is_kept else {"source": source_of(self.function)}
        self.provenance: Mapping[str, str] = {**about, **source, "preprocessing": "8-bit; PIL"}

    @classmethod
    def examine(cls, options: Options) -> None:
        """Check the function by reading its file; none of the user's code is executed."""
        if callable(options["function"]):
            super().examine(options)
        else:
            find_function(options["function"])

    @classmethod
    def notes(cls, options: Options, *, announced: bool) -> Iterator[str]:
        function = options["function"]
        if not callable(function):
            if not announced:
                yield f"is Python code, which the command that trains executes: {find_function(function)}"
        elif not is_importable(function):
            yield (
                "is a function that no import leads to again: its source is kept, but pixrl resume cannot go on with "
                "the run. Define it at the top of a module for that."
            )

    def score(self, batch: RewardBatch) -> Scores:
        require_images(batch.images_BCHW)
        finite_B = batch.images_BCHW.isfinite().flatten(1).all(dim=1)
        shown = finite_B.nonzero().flatten().tolist()
        values_B = torch.full((len(finite_B),), torch.nan)
        reasons: list[str | None] = [None if ok else "the picture is not finite" for ok in finite_B.tolist()]
        numbers = self._asked(batch, shown) if shown else []
        for place, row in enumerate(shown):
            if isinstance(numbers, Failure):
                reasons[row] = numbers.reason
            else:
                values_B[row], reasons[row] = _as_score(numbers[place])
        return Scores.checked(values_B, reasons, self.provenance)

    def rehearse(self, batch: RewardBatch) -> Scores | Failure:
        numbers = self._asked(batch, range(len(batch.images_BCHW)))
        return numbers if isinstance(numbers, Failure) else self.score(batch)

    def _asked(self, batch: RewardBatch, rows: Sequence[int]) -> list[object] | Failure:
        """Return what the function gives for some pictures, one object each."""
        images = to_pil(batch.images_BCHW[list(rows)])
        prompts = [batch.prompts[row] for row in rows]
        metadata = [dict(batch.metadata[row]) if batch.metadata else {} for row in rows]
        answer = self._caller.call(lambda: self.function(images, prompts, metadata))
        if isinstance(answer, Failure):
            return answer
        listed = answer.tolist() if isinstance(answer, Tensor | np.ndarray) else answer
        if not isinstance(listed, list | tuple):
            return Failure(f"the function gave {_short(answer)}, not a list of {len(rows)} numbers")
        if len(listed) != len(rows):
            return Failure(f"the function gave {len(listed)} scores for {len(rows)} pictures")
        return list(listed)


def to_pil(images_BCHW: Tensor) -> list[Image.Image]:
    """Convert pictures [B, 3, H, W] in [0, 1] to RGB images of 8 bits, as they would be saved."""
    levels = (to_grey_levels(images_BCHW.detach().float().cpu()) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).contiguous().numpy()]


def import_function(path: str) -> Function:
    """Import the function of a path, `my_module:f` or `path/to/file.py:f`.

    Raises:
        ConfigError: there is no such module, file or function, or importing it fails.
    """
    found = plugins.import_path(path, example=EXAMPLE)
    if not callable(found):
        raise ConfigError(f"{path} is {found!r}, not a function.")
    function: Function = found
    return function


def find_function(path: object) -> str:
    """Find what would be imported in the file's syntax tree; nothing of it is executed.

    Returns:
        The function's name and its file, or its module where that has no Python file.

    Raises:
        ConfigError: there is no such module, file or function, or it does not take three arguments.
    """
    place, _, name = path.rpartition(":") if isinstance(path, str) else ("", "", "")
    if not place or not name:
        raise ConfigError(f"{path!r} is no import path of a function. Type {EXAMPLE}.")
    if place.endswith(".py"):
        file: Path | None = Path(place)
        if not Path(place).is_file():
            raise ConfigError(f"There is no file {str(file)!r} (looked in {Path.cwd()}). Type {EXAMPLE}.")
    else:
        file = _file_of(place)
    if file is None:
        return f"{name} of the module {place}"
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError) as error:
        raise ConfigError(f"{file} could not be read as Python: {error}.") from None
    # top-level names, with the definitions of functions; None among them: it may define more than is seen
    names: dict[str | None, ast.FunctionDef | ast.AsyncFunctionDef | None] = {}
    for statement in _top(tree.body):
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            own = None if statement.name == "__getattr__" else statement.name
            names[own] = None if statement.decorator_list else statement
        elif isinstance(statement, ast.ClassDef):
            names[statement.name] = None
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            imported = [(alias.asname or alias.name).partition(".")[0] for alias in statement.names]
            names |= {None if one == "*" else one: None for one in imported}
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            inner = [one for target in targets for one in ast.walk(target)]
            names |= {one.id: None for one in inner if isinstance(one, ast.Name)}
    if name not in names:
        if None in names:
            return f"{name} of {file}"
        functions = [key for key, node in names.items() if key and node and not key.startswith("_")]
        listed = ", ".join(functions) or "no function"
        raise ConfigError(f"{place} has no {name!r}.{did_you_mean(name, functions)} It has {listed}.")
    if (node := names[name]) is not None:
        given = node.args
        places = len(given.posonlyargs) + len(given.args)
        most = math.inf if given.vararg is not None else places
        must = any(default is None for default in given.kw_defaults)
        if not places - len(given.defaults) <= 3 <= most or must:
            raise ConfigError(
                f"{place}:{name} must take three arguments, f(images, prompts, metadata), but is "
                f"f({ast.unparse(given)})."
            )
    return f"{name} of {file}"


def _top(body: Sequence[ast.stmt]) -> list[ast.stmt]:
    """Return the statements that run when a module is imported, those in its if, try and with too."""
    found: list[ast.stmt] = []
    for node in body:
        found.append(node)
        for part in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found += _top(vars(node).get(part, []))
        if isinstance(node, ast.Try):
            found += [inner for handler in node.handlers for inner in _top(handler.body)]
    return found


def _file_of(module: str) -> Path | None:
    """Return a module's Python file, found without importing it or the packages above; None where it has none."""
    places: Sequence[str] | None = None
    spec = None
    for depth, _ in enumerate(parts := module.split("."), 1):
        name = ".".join(parts[:depth])
        try:
            spec = PathFinder.find_spec(name, places)
        except (ImportError, ValueError, OSError):
            spec = None
        if spec is None and (name in sys.builtin_module_names or (depth > 1 and places is None)):
            return None  # built in, or made by the module above, as os.path is
        if spec is None:
            raise ConfigError(
                f"The module {module!r} of a python reward could not be imported: there is no {name!r}. It must be "
                "installed or on PYTHONPATH; a file is given as path/to/file.py:f."
            )
        places = spec.submodule_search_locations
    file = None if spec is None or spec.origin is None else Path(spec.origin)
    return file if file is not None and file.suffix == ".py" and file.is_file() else None


def _as_score(number: object) -> tuple[float, str | None]:
    """Return the number, or nan and the reason why it is none."""
    if isinstance(number, Tensor) and number.numel() == 1:
        number = number.item()
    if number is None:
        return math.nan, "the function gave None"
    if not isinstance(number, Real):
        return math.nan, f"the function gave {_short(number)}, not a number"
    try:
        value = float(number)
    except OverflowError:
        value = math.inf
    if not abs(value) <= torch.finfo(torch.float32).max:
        return math.nan, f"the function gave {_short(number)}"
    return value, None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:60]}..."
