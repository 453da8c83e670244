"""The pages lead where they say: links and paths exist, the tour has ten stops, nothing cites what a reader lacks."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer
import yaml
from pydantic import BaseModel

from pixrl.algorithms.e2po import PerturbedExploration
from pixrl.cli import app
from pixrl.fusion.config import FuseConfig

ROOT = Path(__file__).parents[2]
PAGES = [page for folder in (".", "docs", "docs/studies") for page in sorted((ROOT / folder).glob("*.md"))]
HISTORY = ROOT / "docs" / "log.md"
"""Tells of files as they were called then."""
PATHS = re.compile(r"`((?:src/pixrl|tests|tools|benchmarks|examples|recipes|docs)/[\w/.-]+)`")


def _name(page: Path) -> str:
    return f"studies/{page.name}" if page.parent.name == "studies" else page.name


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    if page != HISTORY:
        named = [path for path in PATHS.findall(text) if "NAME" not in path]
        missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_a_stop_of_the_tour_is_a_file() -> None:
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    stops = re.findall(r"^(\d+)\. \*\*[^*]+\*\* `([\w/.]+)`", text, flags=re.MULTILINE)
    assert [number for number, _ in stops] == [str(number) for number in range(1, 11)]
    places = [file if file.startswith(("src/", "examples/")) else f"src/pixrl/{file}" for _, file in stops]
    assert [place for place in places if not (ROOT / place).is_file()] == []
    assert len(set(places)) == 10


@pytest.mark.parametrize(
    ("page", "settings"), [("fuse.md", FuseConfig), ("exploration.md", PerturbedExploration)]
)
def test_tables_of_settings_give_their_defaults(page: str, settings: type[BaseModel]) -> None:
    """A value in the second column is the setting's; where nothing is the default, words say what that means."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    table = text[text.index("| setting | default |") :].split("\n\n")[0].splitlines()[2:]
    checked = 0
    for row in table:
        names, said = (cell.strip() for cell in row.split("|")[1:3])
        settings_of_row, values = re.findall(r"`(\w+)`", names), said.split(", ")
        if len(values) != len(settings_of_row):
            values = [said] * len(settings_of_row)
        for name, value in zip(settings_of_row, values, strict=True):
            default = settings.model_fields[name].get_default(call_default_factory=True)
            written = yaml.safe_load(value.strip("`"))
            if default in (None, (), {}):
                assert written is None or (isinstance(written, str) and not value.startswith("`")), row
            elif isinstance(default, BaseModel):  # of several settings
                assert name == "memory", row
            else:
                assert float(written) == default if isinstance(default, float) else written == default, row
                checked += 1
    assert checked > 10


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY], ids=_name)
def test_nothing_cites_what_a_reader_does_not_have(page: Path) -> None:
    assert "../shared" not in page.read_text(encoding="utf-8")


def test_the_reference_names_what_exists() -> None:
    """Pages of docs/api ask for modules and their members; the whole site is built by test_site.py."""
    missing = []
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            path = ROOT / "src" / name.replace(".", "/")
            module = path.with_suffix(".py").is_file() or path.is_dir()
            inside = path.parent.with_suffix(".py")
            if not module and not (
                inside.is_file()
                and re.search(rf"^(?:def|class) {path.name}\b", inside.read_text("utf-8"), re.M)
            ):
                missing.append(name)
    assert missing == []


def typed_commands(text: str) -> list[list[str]]:
    """The words behind `pixrl` of each command that a page gives, in a block of code or within a sentence."""
    fence = re.compile(r"^```\w*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
    lines = [
        line.strip() for block in fence.findall(text) for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += [" ".join(span.split()) for span in re.findall(r"`(pixrl [^`]+)`", fence.sub("", text))]
    bare = [line.removeprefix("$ ").removeprefix(".venv/bin/") for line in lines]
    return [shlex.split(line, comments=True)[1:] for line in bare if line.startswith("pixrl ")]


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY], ids=_name)
def test_commands_can_be_typed_as_they_stand(page: Path) -> None:
    """Every command and option exists, and so does every recipe; what stands for a run or a file is not looked at."""
    root = typer.main.get_command(app)
    for words in typed_commands(page.read_text(encoding="utf-8")):
        if "--help" in words:
            continue
        context, command = root.make_context("pixrl", list(words)), root
        while isinstance(command, click.Group):
            name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            assert command is not None, words
            context = command.make_context(name, rest, parent=context)
        recipes = [word for word in words if re.fullmatch(r"[\w.-]+/[\w.-]+", word)]
        places = [ROOT / "recipes" / f"{word}.yaml" for word in recipes]
        assert [place for place in places if place.parent.is_dir() and not place.is_file()] == [], words
