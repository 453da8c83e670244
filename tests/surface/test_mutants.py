"""The tables of mutants fit the source: each stands for one place, compiles, and has tests that exist."""

import ast
import sys
import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from mutate_semantic import ALLOWED, Table, package_sources  # noqa: E402

TABLE = Table.read()


def test_every_mutant_applies_exactly_once_and_changes_the_program() -> None:
    sources = package_sources()
    found = []
    for mutant in TABLE.mutants:
        places = mutant.places(sources)
        if len(places) != 1:
            found.append(f"{mutant.area}: {mutant.name}: {len(places)} places of {mutant.before!r}")
            continue
        ast.parse(mutant.applied(sources[places[0]]))
        assert mutant.before.split() != mutant.after.split(), mutant
    assert not found, "\n".join(["tools/mutants_semantic.toml no longer fits src/pixrl:", *found])


def test_names_are_told_apart_and_there_are_enough() -> None:
    names = Counter((mutant.area, mutant.name) for mutant in TABLE.mutants)
    assert [name for name, count in names.items() if count > 1] == []
    assert len(names) >= 150


def test_every_area_has_tests() -> None:
    for test in (test for tests in TABLE.tests.values() for test in tests):
        file, _, function = test.partition("::")
        assert not function or f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), test
        assert (ROOT / file).is_file(), test
    assert all(TABLE.tests.values())


def test_explained_survivors_are_in_the_table() -> None:
    names = {(mutant.area, mutant.name) for mutant in TABLE.mutants}
    explained = tomllib.loads(ALLOWED.read_text(encoding="utf-8")).get("semantic", [])
    assert {(row["area"], row["name"]) for row in explained} <= names
    assert all(row["reason"] for row in explained)
