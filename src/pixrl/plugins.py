"""Parts by name: pixrl's own, those of installed packages, and classes in files of yours.

A recipe names a part in one of three ways, and all three are found here:

* `clip_text`: an entry of pixrl's own table, or of an installed package's entry points in the table's group
  (`pixrl.rewards`, `pixrl.losses`, ...);
* `path/to/file.py:Name`: a class or function of a file that is on no path;
* `my_package.module:Name`: one of an importable module.

The last two execute code that the recipe names: a line on stderr says so before it runs (SECURITY.md).
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError, core_schema

from pixrl.config import ModelT, fields_at
from pixrl.errors import ConfigError, Failure, InputError, ServiceError, describe, did_you_mean
from pixrl.text import require_path
from pixrl.untrusted import plain

EXAMPLE = "my_module:Name or path/to/file.py:Name"
"""The two kinds of import paths, as messages show them."""


@dataclass(frozen=True)
class Registry:
    """The parts of one kind that a recipe can name.

    Args:
        what: word for an entry in messages, such as `reward`.
        group: group of entry points by which installed packages add to it, such as `pixrl.rewards`.
        entries: pixrl's own, `module:Name` by name.
    """

    what: str
    group: str
    entries: Mapping[str, str]

    def names(self) -> tuple[str, ...]:
        """Return every name that needs no path: pixrl's own first, then those of installed packages."""
        others = sorted(name for name in _installed(self.group, tuple(sys.path)) if name not in self.entries)
        return (*self.entries, *others)

    def require(self, name: str) -> str:
        """Return the name; raise InputError where no part has it. A path is looked up by `find` alone."""
        if is_path(name) or name in self.names():
            return name
        raise InputError(
            f"Unknown {self.what} {name!r}.{did_you_mean(name, self.names())} There are {', '.join(self.names())}; "
            f"one of your own is {EXAMPLE}."
        )

    def find(self, name: str) -> Any:
        """Return the class or function of a name.

        Raises:
            InputError: there is no part of that name.
            ConfigError: the module or file cannot be imported, or has no such class.
        """
        self.require(name)
        if is_path(name):
            return _found(name, self.checksum(name))
        if name in self.entries:
            module, _, attribute = self.entries[name].partition(":")
            return vars(importlib.import_module(module))[attribute]
        with Caught() as caught:
            return _installed(self.group, tuple(sys.path))[name].load()
        raise ConfigError(
            f"The {self.what} {name!r} of an installed package could not be loaded: {caught.reason}."
        )

    def checksum(self, name: str) -> str | None:
        """Return the SHA-256 of the file that holds a part of yours, for a resume to compare; None for others."""
        place, _, _ = name.rpartition(":")
        return (
            hashlib.sha256(_existing(Path(place)).read_bytes()).hexdigest() if place.endswith(".py") else None
        )


@dataclass(frozen=True, eq=False)  # by its identity, so that `Annotated[...] | None` can hash it
class PartOf:
    """The type of a setting whose `kind` says which part of a table it is: `Annotated[LossSettings, PartOf(LOSSES)]`.

    The part is a class whose attribute `Settings`, a model of the annotated type, checks the rest: pixrl's own by its
    name, an installed package's, or one in a file of yours (`pixrl.plugins`).

    Args:
        table: the parts to choose from.
        usual: kind of the part that is meant where none is given; None: `kind` must be given.
    """

    table: Registry
    usual: str | None = None

    def __get_pydantic_core_schema__(
        self, annotated: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(lambda given: self.settings(annotated, given))

    def settings(self, base: type[ModelT], given: Any) -> ModelT:
        """Return the settings that a table of a recipe describes; a name alone stands for the part's own defaults."""
        if isinstance(given, base):
            return given
        if isinstance(given, str):
            given = {"kind": given}
        if not isinstance(given, Mapping):
            raise PydanticKnownError("model_attributes_type")
        names = self.table.names()
        kind = given.get("kind", self.usual)
        if kind is None:
            raise PydanticCustomError("kind_missing", "{names}", {"names": " or ".join(names)})
        kind = str(kind)
        if not is_path(kind) and kind not in names:
            tags = {"discriminator": "'kind'", "tag": kind, "expected_tags": ", ".join(map(repr, names))}
            raise PydanticKnownError("union_tag_invalid", tags)
        model = self.model(base, kind)
        if kind == self.usual and "kind" not in model.model_fields:
            given = {key: value for key, value in given.items() if key != "kind"}
        try:
            return model.model_validate(given)
        except ValidationError as error:
            # the same mistakes at their places in the recipe, each unknown setting with what is allowed there
            below = () if is_path(kind) or kind == self.usual else (kind,)
            lines = []
            for detail in error.errors(include_url=False):
                mistake: str | PydanticCustomError = detail["type"]
                if mistake == "extra_forbidden":
                    allowed = ", ".join(fields_at(model, detail["loc"][:-1]))
                    mistake = PydanticCustomError("unknown_setting", "unknown", {"allowed": allowed})
                elif mistake == "unknown_setting":
                    mistake = PydanticCustomError("unknown_setting", "unknown", detail["ctx"])
                place, context = (*below, *detail["loc"]), detail.get("ctx", {})
                lines.append(InitErrorDetails(type=mistake, loc=place, input=detail["input"], ctx=context))
            raise ValidationError.from_exception_data(error.title, lines) from None

    def model(self, base: type[ModelT], kind: str) -> type[ModelT]:
        """Return the settings model of a part; raise ConfigError where what `kind` names has none."""
        found = self.table.find(kind)
        classes = found.__mro__ if isinstance(found, type) else ()
        model = next((vars(one)["Settings"] for one in classes if "Settings" in vars(one)), None)
        if not (isinstance(model, type) and issubclass(model, base)):
            raise ConfigError(
                f"{kind!r} is no {self.table.what}: it must be a class with a class Settings that is derived from "
                f"{base.__module__}.{base.__name__}."
            )
        return model


class Caught(AbstractContextManager["Caught"]):
    """A context that keeps what its block raises as a `failure`, `sys.exit()` included; a KeyboardInterrupt passes."""

    failure: Failure | None = None

    @property
    def reason(self) -> str:
        """The reason of the failure; empty where there is none."""
        return "" if self.failure is None else self.failure.reason

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception | SystemExit):
            return False
        self.failure = Failure(describe(error), error if isinstance(error, ServiceError) else None)
        return True


@cache
def _found(path: str, checksum: str | None) -> Any:
    """Call `import_path` once a process for the same path and content."""
    return import_path(path)


def full_path(name: str) -> str:
    """Return the name with the whole path of a file of yours, so that a run finds it from any folder."""
    place, _, attribute = name.rpartition(":")
    return f"{Path(place).absolute()}:{attribute}" if place.endswith(".py") else name


def checksums(parts: Iterable[tuple[Registry, str]]) -> dict[str, str]:
    """Return the SHA-256 of the file of each part that is in a file of yours, by its name, for a run's record."""
    found = {name: table.checksum(name) for table, name in parts}
    return {name: checksum for name, checksum in found.items() if checksum is not None}


def changed_files(before: Mapping[str, str]) -> list[str]:
    """Return a line for each file that has changed since its `checksums` were taken."""
    changed = []
    for name, checksum in before.items():
        file = Path(name.rpartition(":")[0])
        now = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
        if now != checksum:
            changed.append(f"{name}: {checksum[:12]}, now {'gone' if now is None else now[:12]}")
    return changed


def is_path(name: str) -> bool:
    """Return whether a name says where its code lies, `file.py:Name` or `module:Name`, rather than being in a table."""
    return ":" in name


def import_path(path: str, *, example: str = EXAMPLE) -> Any:
    """Import what a path names: `my_module:Name`, or `path/to/file.py:Name` for a file that is on no path.

    Raises:
        ConfigError: there is no such module, file or name, or importing it fails.
    """
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise ConfigError(f"{path!r} is no import path. Type {example}.")
    # before anything of it runs, and wherever it is asked for: see SECURITY.md
    print(f"Running Python code that the recipe names: {plain(path)}", file=sys.stderr, flush=True)
    if place.endswith(".py"):
        module = _import_file(Path(place), example)
    else:
        with Caught() as caught:
            module = importlib.import_module(place)
        if caught.failure is not None:
            raise ConfigError(
                f"The module {place!r} could not be imported: {caught.reason}. It must be installed or on PYTHONPATH; "
                f"a file is given as {example.rpartition(' ')[2]}."
            )
    if name not in vars(module):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        listed = ", ".join(names) or "no function"
        raise ConfigError(f"{place} has no {name!r}.{did_you_mean(name, names)} It has {listed}.")
    return vars(module)[name]


@cache
def _installed(group: str, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Read the installed packages' entry points once for each `sys.path`: that takes tens of milliseconds."""
    return {point.name: point for point in entry_points(group=group)}


def _import_file(file: Path, example: str) -> ModuleType:
    """Run a file as a module of a name that follows from its path and content, once a process.

    A file that was changed is another module, so that a later run in the same process sees the change.
    """
    content = _existing(file, example).read_bytes()
    told_apart = str(file.resolve()).encode() + b"\0" + content
    name = f"pixrl_plugin_{hashlib.sha256(told_apart).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} cannot be imported as a Python file. Type {example}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as an import does, so that its classes find their module
    with Caught() as caught:
        spec.loader.exec_module(module)
    if caught.failure is not None:
        del sys.modules[name]
        raise ConfigError(f"{file} could not be imported: {caught.reason}.")
    return module


def _existing(file: Path, example: str = EXAMPLE) -> Path:
    if not Path(require_path(str(file), "the name of a file")).is_file():
        raise ConfigError(f"There is no file {str(file)!r} (looked in {Path.cwd()}). Type {example}.")
    return file
