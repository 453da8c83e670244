"""Recipes: frozen pydantic models filled from YAML and from `--set a.b=c`.

A recipe is a YAML file, given as a path or as a name under `recipes/` (`toy/fuse`). Its optional first key `kind`
says which job it is for. Unknown keys, repeated keys and settings given twice are errors, with the dotted path.
"""

import math
import re
import shlex
import typing
from collections.abc import Hashable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticSerializationError

from pixrl.errors import ConfigError, InputError, did_you_mean
from pixrl.text import read_text, require_name, require_path, require_text
from pixrl.untrusted import plain

PACKAGE = Path(__file__).resolve().parent
SUFFIXES = (".yaml", ".yml")
DEEPEST, LARGEST = 32, 100_000
"""Most levels of a YAML document, and most values with every alias written out."""
MOST_YAML = 2**20
"""Most characters of a YAML document."""
KINDS = {"int": "number", "float": "number", "timestamp": "date", "bool": "truth value"}
"""Words for YAML's tags in messages."""
MOST = 10**6
"""Upper limit of everything that a recipe counts."""
MOST_GUIDANCE = 1000
"""Upper limit of a guidance scale."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""Seed of everything random, in the range that every generator and every file format here can hold."""
Count = Annotated[int, Field(ge=1, le=MOST)]
"""Number of steps, pictures, prompts and the like."""
MOST_SIDE = 16384
Side = Annotated[int, Field(ge=1, le=MOST_SIDE)]
"""Side of a square picture in pixels."""
_WIDTH_BY_HEIGHT = re.compile(r"([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,4}))?")


def parse_resolution(given: object) -> tuple[int, int]:
    """Return the (width, height) in pixels of a resolution: 1024 is a square, 832x1216 is 832 wide and 1216 high.

    Raises:
        InputError: it is neither one number nor two with an x between them, or a side is above 16384.
    """
    is_text = isinstance(given, int | str) and not isinstance(given, bool)
    found = _WIDTH_BY_HEIGHT.fullmatch(str(given)) if is_text else None
    sides = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < max(sides) <= MOST_SIDE:
        raise InputError(
            f"{given!r} is no size of pictures: give pixels from 1 to {MOST_SIDE}, one number for a square (1024), or "
            "width x height (832x1216)."
        )
    return sides


def plain_resolution(given: object) -> int | str:
    """Return a resolution as recipes and records write it: a square as its side, others as WIDTHxHEIGHT.

    Raises:
        InputError: as `parse_resolution` does.
    """
    width, height = parse_resolution(given)
    return width if width == height else f"{width}x{height}"


Resolution = Annotated[int | str, BeforeValidator(plain_resolution)]
"""Size of a picture in pixels: the side of a square, or WIDTHxHEIGHT."""


class Settings(BaseModel):
    """Base of every settings model: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


ModelT = TypeVar("ModelT", bound=BaseModel)


def load(
    model_cls: type[ModelT],
    source: Path | str | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    *,
    values: Mapping[str, Any] | None = None,
    kind: str | None = None,
) -> ModelT:
    """Fill in the settings `model_cls` from a recipe, then `values`, then `--set` overrides.

    Args:
        model_cls: the model to fill in.
        source: a YAML file, a name under recipes/, or a table; None: no recipe.
        overrides: texts such as `a.b=c`.
        values: values by dotted path.
        kind: the job that the caller does; a recipe of another kind is refused.

    Raises:
        ConfigError: the recipe cannot be read, or a setting is unknown, wrong or given twice.
    """
    data, origin = _read(source)
    found = data.pop("kind", None) if "kind" not in model_cls.model_fields else None
    if kind is not None and found is not None and found != kind:
        command = "study" if str(found).endswith("-study") else found
        raise ConfigError(f"{origin} is a recipe for {found!r}, not for {kind!r}. Type: pixrl {command} ...")
    wanted = list((values or {}).items())
    for text in overrides:
        path, equals, written = text.partition("=")
        path = path.strip()
        if not equals or not path or not all(path.split(".")):
            raise ConfigError(
                f"--set {text!r}: write a dotted name, an equals sign and a value, as in --set rmler.alpha=5"
            )
        # bytes that are no text: a path of such a name
        is_name = any("\udc80" <= letter <= "\udcff" for letter in written)
        wanted.append((path, written if is_name else parse_yaml(written, f"the value of --set {text!r}")))
    given: dict[str, Any] = {}
    for path, value in wanted:
        if path in given and given[path] != value:
            raise ConfigError(f"{path} is given twice: {given[path]!r} and {value!r}. Give it once.")
        for other in given:
            if other.startswith(f"{path}.") or path.startswith(f"{other}."):
                raise ConfigError(
                    f"{other} and {path} are both given, and one contains the other. Give one of them."
                )
        given[path] = value
        _put(data, path, value)
    _require_texts(data, origin)
    try:
        return model_cls.model_validate(data)
    except ValidationError as error:
        lines = [_explain(model_cls, detail) for detail in error.errors(include_url=False)]
        counted = [f"{len(lines)} mistakes in {origin}:", *lines]
        raise ConfigError(lines[0] if len(lines) == 1 else "\n  ".join(counted)) from None


def refuse_infinite(settings: object, path: str = "") -> None:
    """Raise ValueError, with the dotted path, where a setting of a run is nan or infinite."""
    if isinstance(settings, BaseModel):
        settings = dict(settings)
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            refuse_infinite(value, f"{path}.{name}" if path else str(name))
    elif isinstance(settings, list | tuple):
        for place, value in enumerate(settings):
            refuse_infinite(value, f"{path}.{place}")
    elif isinstance(settings, float) and not math.isfinite(settings):
        raise ValueError(f"{path} is {settings}: give a finite number")


def kind_of(source: Path | str | Mapping[str, Any]) -> str | None:
    """Return the job that a recipe says it is for; None where it does not say."""
    found = _read(source)[0].get("kind")
    return None if found is None else str(found)


def dump(model: BaseModel) -> str:
    """Return all settings of a model, defaults included, as YAML that `load` reads back to an equal model.

    Raises:
        ConfigError: a setting that was given in Python is nothing that a recipe can say.
    """
    try:
        return yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    except (PydanticSerializationError, yaml.YAMLError) as error:
        raise ConfigError(
            f"The settings hold something that recipe.yaml cannot: {' '.join(str(error).split())}. Give text, numbers, "
            "lists and tables of them; of functions only rewards=[f]."
        ) from None


def find_recipe(name: Path | str) -> Path:
    """Return the file of a recipe: a path, or a name under `recipes/` of the source tree or of the installed package.

    Raises:
        ConfigError: there is none.
    """
    direct = Path(require_path(str(name), "the name of a recipe"))
    if direct.is_file():
        return direct
    for folder in _recipe_folders():
        for candidate in (folder / name, *(folder / f"{name}{suffix}" for suffix in SUFFIXES)):
            if candidate.is_file():
                return candidate
    if direct.is_dir():
        typed = shlex.quote(str(name))
        raise ConfigError(
            f"{str(name)!r} is a folder, not a recipe. A subject's folder is given as --subject {typed}; "
            f"a run is finished by: pixrl resume {typed}"
        )
    names = recipe_names()
    listed = ", ".join(names) if names else "none is installed"
    raise ConfigError(
        f"No recipe {str(name)!r}: neither a file nor a name under recipes/.{did_you_mean(str(name), names)} "
        f"Recipes: {listed}."
    )


def recipe_names() -> list[str]:
    """Return the names that `find_recipe` knows, such as `toy/fuse`."""
    files = (
        file.relative_to(folder).with_suffix("").as_posix()
        for folder in _recipe_folders()
        for file in folder.rglob("*")
        if file.suffix in SUFFIXES
    )
    return sorted(set(files))


def _recipe_folders() -> list[Path]:
    root = PACKAGE.parents[1]
    in_tree = [root / "recipes"] if (root / "pyproject.toml").is_file() else []
    return [folder for folder in (*in_tree, PACKAGE / "recipes") if folder.is_dir()]


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, in which a key that is given twice is an error instead of a silent choice.

    So is what YAML takes for a number or a date and Python cannot make one of, what is nested too deeply, and what
    aliases blow up.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def get_single_node(self) -> yaml.Node | None:
        """Return the document; one that holds itself, or more than LARGEST with its aliases written out, is refused."""
        root: yaml.Node | None = super().get_single_node()
        sizes: dict[int, int] = {}

        def size(node: yaml.Node, above: tuple[int, ...]) -> int:
            if id(node) in above:
                raise yaml.constructor.ConstructorError(None, None, "it holds itself", node.start_mark)
            if id(node) not in sizes:
                parts = (
                    [part for pair in node.value for part in pair]
                    if isinstance(node, yaml.MappingNode)
                    else []
                )
                parts = list(node.value) if isinstance(node, yaml.SequenceNode) else parts
                sizes[id(node)] = 1 + sum(size(part, (*above, id(node))) for part in parts)
            return sizes[id(node)]

        if root is not None and (found := size(root, ())) > LARGEST:
            problem = f"it holds {found} values with its aliases written out, and {LARGEST} are allowed"
            raise yaml.constructor.ConstructorError(None, None, problem, root.start_mark)
        return root

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > DEEPEST:
            problem = f"it is nested more than {DEEPEST} levels deep"
            raise yaml.constructor.ConstructorError(None, None, problem, self.get_mark())
        try:
            node: yaml.Node | None = super().compose_node(parent, index)
        finally:
            self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            found = super().construct_object(node, deep=deep)
        except (
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
        ) as error:  # PyYAML lets them through
            tag = str(node.tag).rpartition(":")[2]
            value = node.value if isinstance(node.value, str) else "a collection"
            given = plain(value, 40) + (f" ({len(value)} characters)" if len(value) > 40 else "")
            said = str(error).partition(";")[0]  # without advice for programmers behind a semicolon
            problem = f"{given} is no {KINDS.get(tag, tag)} ({said}); text is written in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None
        if isinstance(found, str):
            try:
                found.encode("utf-8", "surrogateescape")  # bytes of a file's name may be no UTF-8
            except UnicodeEncodeError:
                problem = f"{plain(found, 40)!r} holds half a character, which is no Unicode"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None
        return found

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:bool":  # a key is a name: `on: ray` does not say yes
                key_node.tag = "tag:yaml.org,2002:str"
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


@lru_cache(maxsize=16)
def _loaded(text: str) -> Any:
    """Parse a text, and the last few only once: a run's recipe is read several times, each a thirtieth of a second."""
    return yaml.load(text, _StrictLoader)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse one YAML document; `origin` names it in the error.

    Raises:
        ConfigError: it is none, repeats a key, holds what is no number or date, or is too deep or too large.
    """
    if len(text) > MOST_YAML:
        raise ConfigError(f"{origin} has {len(text)} characters of YAML; at most {MOST_YAML} are read.")
    try:
        return deepcopy(_loaded(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"{origin} is not valid YAML{place}: {error.problem}.") from None
    except (yaml.YAMLError, TypeError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{origin} is not valid YAML: {said}") from None


def _read(source: Path | str | Mapping[str, Any] | None) -> tuple[dict[str, Any], str]:
    if source is None:
        return {}, "the settings"
    if isinstance(source, Mapping):
        copied: dict[str, Any] = _copied(source)
        if not all(isinstance(key, str) for key in copied):
            raise ConfigError(f"Settings have names that are text, got {[*source]!r}.")
        return copied, "the settings"
    if not isinstance(source, str | Path):
        raise ConfigError(
            f"A recipe is a YAML file, a name such as toy/e2po, or a table of settings, not {source!r}."
        )
    path = find_recipe(source)
    try:
        text = read_text(path)
    except InputError as error:
        raise ConfigError(f"Cannot read the recipe: {error}") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{path} must be a mapping of settings (`budget: 128`), not {type(data).__name__}.")
    return data, str(path)


def _copied(given: Any) -> Any:
    """Copy tables and lists, so that overrides change nothing of the caller's; what they hold stays as it is."""
    if isinstance(given, Mapping):
        return {key: _copied(value) for key, value in given.items()}
    return [_copied(value) for value in given] if isinstance(given, list) else given


def _require_texts(data: Mapping[str, Any], origin: str) -> None:
    """Raise ConfigError where a key or value holds what is no text; in a value the name of a file may be none."""
    left, seen = list[Any]([data]), set[int]()
    try:
        while left:
            part = left.pop()
            if isinstance(part, str):
                require_name(part, f"{origin}: {part!r}")
            elif (
                isinstance(part, dict | list | tuple) and id(part) not in seen
            ):  # YAML may refer to a part again
                seen.add(id(part))
                left += part if isinstance(part, list | tuple) else part.values()
                for key in part if isinstance(part, dict) else ():
                    require_text(str(key), f"{origin}: {key!r}")
    except InputError as error:
        raise ConfigError(str(error)) from None


def _put(data: dict[str, Any], path: str, value: Any) -> None:
    """Set what a dotted name says; an entry of a list goes by its own name, as in rewards.identity.weight."""
    *parents, last = path.split(".")
    place: Any = data
    for depth, name in enumerate(parents):
        above = ".".join(parents[: depth + 1])
        if isinstance(place, dict):
            inner = place.setdefault(name, {})
        else:
            known = {one["name"]: one for one in place if isinstance(one, dict) and "name" in one}
            if name not in known:
                raise ConfigError(
                    f"Cannot set {path}: no entry there is named {name!r}.{did_you_mean(name, known)} "
                    f"Named are: {', '.join(known) or 'none'}."
                )
            inner = known[name]
        is_list_of_parts = isinstance(inner, list) and depth + 1 < len(parents)
        if not isinstance(inner, dict) and not is_list_of_parts:
            raise ConfigError(f"Cannot set {path}: {above} is {inner!r}, which has no parts{_named(inner)}.")
        place = inner
    place[last] = value


def _named(given: Any) -> str:
    """Say how to set a part of a list's entry, where its entries have names."""
    names = (
        [one["name"] for one in given if isinstance(one, dict) and "name" in one]
        if isinstance(given, list)
        else []
    )
    return f" of its own; name the entry: {', '.join(map(str, names))}" if names else ""


def _explain(model_cls: type[BaseModel], detail: ErrorDetails) -> str:
    """Say what is wrong with a setting, where, and what was meant or is allowed."""
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        *parents, key = detail["loc"]
        allowed = fields_at(model_cls, parents)
        return f"Unknown setting {path}.{did_you_mean(str(key), allowed)} Allowed here: {', '.join(allowed)}."
    if detail["type"] == "unknown_setting":
        listed = detail["ctx"]["allowed"]
        meant = did_you_mean(str(detail["loc"][-1]), listed.split(", "))
        return f"Unknown setting {path}.{meant} Allowed here: {listed}."
    if detail["type"] == "kind_missing":
        return f"{path}.kind is missing: give {detail['msg']}."
    if detail["type"] == "missing":
        return f"{path} is missing."
    if detail["type"] == "union_tag_not_found":
        kinds = " or ".join(str(_tag(model)) for model in _models_at(model_cls, detail["loc"]))
        return f"{path}.kind is missing: give {kinds}."
    if detail["type"] == "value_error":  # raised by the model itself, which knows what to say
        message = detail["msg"].removeprefix("Value error, ")
        return f"{path}: {message}" if path else message
    choices = re.findall(r"'([^']+)'", detail["msg"]) if detail["type"] in {"enum", "literal_error"} else []
    return f"{path}: {detail['msg']}; given {detail['input']!r}.{did_you_mean(str(detail['input']), choices)}"


def fields_at(model_cls: type[BaseModel], loc: Iterable[int | str]) -> list[str]:
    """Return the settings that are allowed at a place of the tree."""
    return sorted({name for model in _models_at(model_cls, loc) for name in model.model_fields})


def _models_at(model_cls: type[BaseModel], loc: Iterable[int | str]) -> list[type[BaseModel]]:
    """Return the models at a place of the tree; list positions, union tags and the like are stepped over."""
    models = [model_cls]
    for part in loc:
        inner = [
            model
            for outer in models
            if part in outer.model_fields
            for model in _models_in(outer.model_fields[str(part)].annotation)
        ]
        models = inner or [model for model in models if part in (model.__name__, _tag(model))] or models
    return models


def _tag(model: type[BaseModel]) -> Any:
    """Return what tells a model apart in a union: the only value of its `kind`."""
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the settings models named in a type: itself, or inside Optional, unions, lists and mappings."""
    parts = typing.get_args(annotation)
    if not parts:
        return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
    return [model for part in parts for model in _models_in(part)]
