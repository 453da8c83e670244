"""Recipes: round trip, order of precedence, and errors that name the place and the remedy."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from pixrl import config
from pixrl.errors import ConfigError


class Inner(config.Settings):
    alpha: float = 5.0
    policy: Literal["paper", "compact"] = "paper"


class Outer(config.Settings):
    budget: int = Field(default=128, gt=0)
    concepts: tuple[str, ...] = ()
    rmler: Inner = Inner()
    extra: Inner | None = None
    table: dict[str, Inner] = Field(default_factory=dict)


def test_defaults_mapping_values_and_overrides_in_this_order() -> None:
    assert config.load(Outer) == Outer()
    loaded = config.load(
        Outer,
        {"budget": 3, "concepts": ["owl"]},
        ["rmler.alpha=1e-3"],
        values={"concepts": ("no", "1"), "budget": 4},
    )
    assert loaded == Outer(budget=4, concepts=("no", "1"), rmler=Inner(alpha=1e-3))


def test_the_source_mapping_is_left_alone() -> None:
    source = {"rmler": {"alpha": 1.0}}
    config.load(Outer, source, ["rmler.alpha=2"])
    assert source == {"rmler": {"alpha": 1.0}}


def test_dump_and_load_are_a_round_trip(tmp_path: Path) -> None:
    model = Outer(
        concepts=("owl", "köln: a, b", "yes"), rmler=Inner(alpha=1e-5), table={"a": Inner(alpha=float("inf"))}
    )
    path = tmp_path / "r.yaml"
    path.write_text("kind: fuse\n" + config.dump(model), encoding="utf-8")
    assert config.load(Outer, path) == model
    assert config.load(Outer, str(path), kind="fuse") == model


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Outer().budget = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ({"buget": 3}, [], r"Unknown setting buget\. Did you mean 'budget'\? Allowed here: budget, concepts"),
        (
            {},
            ["rmler.alfa=3"],
            r"Unknown setting rmler\.alfa\. Did you mean 'alpha'\? Allowed here: alpha, policy\.",
        ),
        ({"extra": {"polcy": "x"}}, [], r"Unknown setting extra\.polcy\. Did you mean 'policy'"),
        ({"table": {"a": {"alphas": 1}}}, [], r"Unknown setting table\.a\.alphas\. Did you mean 'alpha'"),
        ({}, ["budget=many"], r"budget: Input should be a valid integer.*given 'many'"),
        ({}, ["rmler.policy=papr"], r"rmler\.policy: .*given 'papr'\. Did you mean 'paper'"),
        ({}, ["budget=0"], r"budget: Input should be greater than 0; given 0"),
        ({"budget": 0, "buget": 1}, [], r"2 mistakes in the settings:\n  budget.*\n  Unknown setting buget"),
        ({}, ["budget"], r"--set 'budget': write a dotted name, an equals sign and a value"),
        ({}, ["=3"], r"write a dotted name"),
        ({}, ["rmler..alpha=3"], r"write a dotted name"),
        ({}, ["budget=[1"], r"the value of --set 'budget=\[1' is not valid YAML"),
        ({}, ["rmler.alpha=3", "rmler={}"], r"rmler\.alpha and rmler are both given"),
        ({"budget": 3}, ["budget.size=3"], r"Cannot set budget\.size: budget is 3, which has no parts"),
        ({}, ["rmler={}", "rmler.alpha=3"], r"rmler and rmler\.alpha are both given"),
        ({}, ["budget=3", "budget=4"], r"budget is given twice: 3 and 4"),
    ],
)
def test_mistakes_are_named(source: dict[str, object], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(Outer, source, overrides)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "my dog"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"is a folder, not a recipe.*--subject '.*my dog'"):
        config.load(Outer, folder)


def test_a_missing_setting_is_named() -> None:
    class Needs(config.Settings):
        model: str

    with pytest.raises(ConfigError, match="model is missing"):
        config.load(Needs)


class Judge(config.Settings):
    name: str
    weight: float = 1.0


class Soft(config.Settings):
    kind: Literal["soft"] = "soft"
    beta: float = 1.0


class Hard(config.Settings):
    kind: Literal["hard"] = "hard"
    clip: float = 1.0


class Judged(config.Settings):
    rewards: tuple[Judge, ...] = ()
    loss: Annotated[Soft | Hard, Field(discriminator="kind")] = Soft()


JUDGES: dict[str, object] = {"rewards": [{"name": "identity"}, {"name": "preference", "weight": 3}]}


def test_an_entry_of_a_list_is_set_by_its_name() -> None:
    found = config.load(Judged, JUDGES, ["rewards.preference.weight=2", "rewards.identity.weight=0.5"])
    assert [(one.name, one.weight) for one in found.rewards] == [("identity", 0.5), ("preference", 2.0)]
    assert JUDGES["rewards"] == [{"name": "identity"}, {"name": "preference", "weight": 3}]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards.1.weight=2", r"no entry there is named '1'.*Named are: identity, preference\."),
        ("rewards.identiti.weight=2", r"Did you mean 'identity'"),
        ("rewards.weight=2", r"which has no parts of its own; name the entry: identity, preference"),
        ("loss.clip=2", r"Unknown setting loss\.soft\.clip\. Allowed here: beta, kind\."),
    ],
)
def test_what_a_list_or_one_of_several_kinds_does_not_have(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(Judged, {**JUDGES, "loss": {"kind": "soft"}}, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budget: 3\nbudget: 4\n", "'budget' is given twice"),
        ("rmler: {alpha: 1, alpha: 2}\n", "'alpha' is given twice"),
        ("- budget\n", "must be a mapping"),
        ("3: 4\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("budget: [\n", "is not valid YAML"),
        ("budget: !!python/object:os.system {}\n", "is not valid YAML"),
        ("kind: align\n", "is a recipe for 'align', not for 'fuse'"),
    ],
)
def test_a_bad_recipe_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(Outer, path, kind="fuse")
    assert "bad.yaml" in str(caught.value)


def test_a_recipe_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="Cannot read"):
        config.load(Outer, path)


def test_recipes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "pixrl"
    for folder, budget in ((tmp_path / "recipes/toy", 7), (package / "recipes/toy", 8)):
        folder.mkdir(parents=True)
        (folder / "fuse.yaml").write_text(f"budget: {budget}\n")
    monkeypatch.setattr(config, "PACKAGE", package)
    assert config.load(Outer, "toy/fuse").budget == 8, "a folder called recipes somewhere above is not ours"
    (tmp_path / "pyproject.toml").touch()
    assert config.load(Outer, "toy/fuse").budget == 7
    assert config.load(Outer, "toy/fuse.yaml").budget == 7
    assert config.recipe_names() == ["toy/fuse"]
    with pytest.raises(ConfigError, match=r"No recipe 'toy/fus'.*Did you mean 'toy/fuse'.*Recipes: toy/fuse"):
        config.load(Outer, "toy/fus")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2024-13-45", "2024-13-45 is no date (month must be in 1..12); text is written in quotes"),
        ("2024-01-01T99:00:00", "is no date"),
        ("0x_", "0x_ is no number"),
        ("0b_", "0b_ is no number"),
        ("9" * 5000, "(5000 characters) is no number"),
        ("!!bool x", "x is no truth value"),
        ("!!timestamp x", "x is no date"),
        ("!!float x", "x is no number"),
        ("[" * 5000 + "]" * 5000, "more than 32 levels deep"),
        ("[" * 5000, "more than 32 levels deep"),
        ("{a: " * 40 + "1" + "}" * 40, "more than 32 levels deep"),
        ("a: &a [*a]", "it holds itself"),
        ('"\\ud83d"', "half a character"),
        ("? [1]\n: 2", "unhashable"),
        ("*x", "undefined alias 'x'"),
        (f"a: {'x' * 2**20}", "at most 1048576 are read"),
        (
            "a: &a [x, x, x, x]\n"
            + "".join(f"k{n}: &k{n} [*{'a' if not n else f'k{n - 1}'}{', *a' * 9}]\n" for n in range(9)),
            None,
        ),
        (
            "a: &a [x, x, x, x]\n"
            + "".join(
                f"b{n}: &b{n} [{', '.join(['*' + ('a' if not n else f'b{n - 1}')] * 9)}]\n" for n in range(9)
            ),
            "with its aliases written out",
        ),
    ],
)
def test_yaml_that_is_none(text: str, said: str | None) -> None:
    if said is None:
        config.parse_yaml(text, "it")
        return
    with pytest.raises(ConfigError) as caught:
        config.parse_yaml(text, "it")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
