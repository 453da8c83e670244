"""The study of personalizations: what it refuses, what its tables and figures say, and a whole one on a tiny FLUX."""

import json
import math
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tests.personalize.test_job import SHAPING, recipe, rewards
from tests.studies.command import main

from pixrl import config as recipes
from pixrl.algorithms.exploration import prepare
from pixrl.data.pictures import to_tensors
from pixrl.data.prompts import Prompt, PromptSet
from pixrl.errors import ConfigError, RunError
from pixrl.jobs import align as align_job
from pixrl.metrics.diversity import DiversityMeter, pixel_features
from pixrl.runs.config import load_recipe
from pixrl.runs.loaded import load_run
from studies import runs as align_study
from studies.config import PersonalizeStudyConfig, budget_of, spread_over_subjects
from studies.figures import (
    INDEPENDENT,
    colours_of,
    conflict,
    crossed_tradeoff,
    marks_of,
    subject_figures,
    tradeoff,
    write_figures,
)
from studies.pictures import GAP, HEAD, TILE, WORDS, write_gallery
from studies.runs_tables import (
    conflict_rows,
    expected_conflict,
    orderings,
    sections,
)

REDNESS = {**rewards()[1], "name": "red", "held_out": True}
T_OF_THREE = 4.302653
"""Student's t(0.975) with two degrees of freedom."""


@pytest.fixture
def study(
    tmp_path: Path, flux_folder: Path, subjects: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Three methods of two training steps on a list of two subjects with target pictures."""
    monkeypatch.setattr(align_study, "load_meter", lambda *given: DiversityMeter(pixel_features))
    align_study._meter.cache_clear()
    for name in ("rex", "tom"):
        shutil.copytree(subjects / name, tmp_path / name)
    entries = [
        {
            "prompt": f"a {word} in {place}",
            "image_paths": [f"{name}/00.png"],
            "image_tgt_path": f"{name}/01.png",
        }
        for name, word in (("rex", "dog"), ("tom", "cat"))
        for place in ("snow", "rain", "fog")
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    plain = {"sampling": {"steps": 3}, "advantage": {}}
    changes: dict[str, dict[str, Any]] = {
        "ours": {"advantage": SHAPING, "loss": {"kind": "clipped"}},
        "sft": {**plain, "loss": {"kind": "sft", "timesteps": 2}},
        "rpo": {**plain, "loss": {"kind": "rpo", "timesteps": 2, "similarity": 0.0}},
    }
    variants = {}
    for name, change in changes.items():
        settings = recipe(flux_folder, tmp_path / "list.json", kind="personalize", **change)
        (tmp_path / f"{name}.yaml").write_text(json.dumps(settings))
        variants[name] = {"recipe": str(tmp_path / f"{name}.yaml")}
    return {
        "variants": variants,
        "seeds": [0],
        "identity": "identity",
        "prompt": "prompt",
        "measuring": {"per_subject": 2, "per_prompt": 2, "steps": 2, "features": "fake:eyes", "rewards": [REDNESS]},
        "tables": [{"title": "Table 2", "rows": ["base", "sft", "ours"]}],
        "crossed": [{"title": "Table 5", "corner": "α", "columns": {"up": {"0": "sft", "1": "ours"},
                                                                     "down": {"0": "sft", "1": "rpo"}}}],
        "orderings": [{"better": "ours", "worse": "base", "rewards": ["identity", "prompt"], "paper": "0.8 > 0.7"}],
        "spectrum": {"steps": 3, "per_subject": 1, "shown": 2},
        "gallery": {"variants": ["base", "rpo", "ours"], "subjects": 2},
    }  # fmt: skip


def load(study: dict[str, Any], **changes: Any) -> PersonalizeStudyConfig:
    return recipes.load(PersonalizeStudyConfig, {**study, **changes})


def legend_of(made: Figure) -> list[str]:
    return [text.get_text() for legend in made.legends for text in legend.get_texts()]


# --- a whole study ---------------------------------------------------------------------------------------------------


def test_a_study_from_recipe_to_gallery(
    tmp_path: Path, study: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(json.dumps({"kind": "personalize-study", **study}))
    assert main([str(file), "--out", str(out)]) == 0
    of = read_records(out)
    assert set(of) == {"base", "ours", "sft", "rpo"}
    for record in of.values():
        measured = record["measured"]
        assert (measured["prompts"], measured["per_prompt"]) == (4, 2)  # two subjects, two prompts of each
        red, prompt = (record["figures"][f"reward/{name}"] for name in ("red", "prompt"))
        assert red == pytest.approx(prompt)  # the study's own reward sees the same pictures
    assert of["ours"]["figures"]["reward/identity"] != of["base"]["figures"]["reward/identity"]
    assert of["ours"]["run"] == "runs/ours/seed-0" and of["base"]["run"] is None
    # pictures of sft are targets, those of rpo the base's: no figures of training are kept of them
    for name, own in (("ours", True), ("sft", False), ("rpo", False)):
        assert ("group_std" in of[name]["figures"]) is own
        assert ("reward/identity/mean" in of[name]["curves"]) is own
        assert len(of[name]["curves"]["fixed/identity"]) == 2 and of[name]["figures"]["minutes"] > 0
    table = (out / "table.md").read_text()
    assert capsys.readouterr().out.endswith(table + "\n")
    assert "all held-out subjects × 2 prompts of each × 2 pictures" in table
    assert "| sft | 16 | 4 targets, each with 4 noises; none drawn | 0 | 32 | 2 |" in table
    assert "red, held out ↑" in table and "diversity ↑" in table and "layouts" not in table.split("|", 1)[1]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["budgets"]["rpo"]["gradient_terms"] == 16 and set(summary["conflict"]) == {"ours"}
    assert [one["verdict"] for one in summary["orderings"]] == ["not decided"] * 2  # one seed decides nothing
    drawn = subject_figures(load(study), list(of.values()))
    for name, trained in (("curves-fixed", ["ours", "sft", "rpo"]), ("curves-training", ["ours"])):
        ET.parse(out / f"figures/{name}.svg")
        made = drawn[name]
        assert made is not None and legend_of(made) == trained
        assert [[line.get_label() for line in axes.lines] for axes in made.axes] == [trained] * 2
    check_spectrum(out)
    check_gallery(out)
    # another study takes the finished run of this one
    started: list[Path] = []
    monkeypatch.setattr(align_job, "start", lambda config, path, **given: started.append(path))
    more = {
        "reuse": str(out),
        "variants": {"the same": study["variants"]["ours"]},
        "gallery": None,
        "spectrum": None,
    }
    file.write_text(
        json.dumps(
            {"kind": "personalize-study", **study, **more, "tables": [], "crossed": [], "orderings": []}
        )
    )
    assert main([str(file), "--out", str(tmp_path / "other")]) == 0 and not started
    same = read_records(tmp_path / "other")["the same"]
    assert same["run"] == "../out/runs/ours/seed-0"
    assert same["figures"]["reward/identity"] == of["ours"]["figures"]["reward/identity"]


def read_records(out: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return {row["variant"]: row for row in rows}


def check_spectrum(out: Path) -> None:
    spectrum = json.loads((out / "spectrum.json").read_text())
    for band in ("low", "high"):
        assert spectrum[band]["share"][-1] == pytest.approx(1) and spectrum[band]["distance"][-1] == 0
        assert len(spectrum[band]["energy"]) == 3 and spectrum[band]["distance"][0] > 0
    with Image.open(out / "figures/denoising.png") as path:
        assert path.size == (3 * 32 + 2 * 2, 2 * 32 + 2)
    bands = [
        one for one in ET.parse(out / "figures/spectrum.svg").iter() if "FillBetween" in one.get("id", "")
    ]
    assert len(bands) == 4  # of two curves in two panels


def check_gallery(out: Path) -> None:
    """Reference, base, rpo and ours: nearly the same picture, since the noise is the same and training was short."""
    with Image.open(out / "figures/gallery.png") as picture:
        sheet = to_tensors([picture.convert("RGB")])[0]
    assert sheet.shape == (3, HEAD + 2 * (TILE + GAP), WORDS + 4 * (TILE + GAP))
    rows = [
        [
            sheet[:, HEAD + row * (TILE + GAP) :, WORDS + column * (TILE + GAP) :][:, :TILE, :TILE]
            for column in range(4)
        ]
        for row in range(2)
    ]
    for reference, base, rpo, ours in rows:
        assert 0 < (base - ours).abs().mean() < 0.05 and 0 < (base - rpo).abs().mean() < 0.05
        assert (base - reference).abs().mean() > 0.1
    assert (rows[0][1] - rows[1][1]).abs().mean() > 0.02  # another subject, another noise


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_what_cannot_be_compared_or_is_not_there(study: dict[str, Any]) -> None:
    load(study).check()
    sft = {**study["variants"]["sft"], "settings": {"prompts.per_step": 3}}
    with pytest.raises(ConfigError, match="sft: 24 images, 2 updates"):
        load(study, variants={**study["variants"], "sft": sft}).check()
    shown = {**study["variants"]["sft"], "settings": {"references.side": 16}}
    with pytest.raises(ConfigError, match="references differs between variants"):
        load(study, variants={**study["variants"], "sft": shown}).check()
    with pytest.raises(
        ConfigError, match=r"orderings names 'our', which is no variant\. Did you mean 'ours'"
    ):
        load(study, orderings=[{"better": "our", "worse": "base", "rewards": ["prompt"]}]).check()
    with pytest.raises(
        ConfigError, match=r"orderings names 'promt', which is no reward\. Did you mean 'prompt'"
    ):
        load(study, orderings=[{"better": "ours", "worse": "base", "rewards": ["promt"]}]).check()
    with pytest.raises(ConfigError, match="the table 'T' names 'grpo', which is no variant"):
        load(study, tables=[{"title": "T", "rows": ["grpo"]}]).check()
    with pytest.raises(ConfigError, match="gallery names 'none'"):
        load(study, gallery={"variants": ["none"]}).check()
    with pytest.raises(ConfigError, match="not trained and has none"):
        load(study, curves=["base"]).check()
    with pytest.raises(ConfigError, match="needs the same rows"):
        load(
            study,
            crossed=[{"title": "T", "corner": "α", "columns": {"a": {"0": "ours"}, "b": {"1": "ours"}}}],
        )
    with pytest.raises(ConfigError, match="same file"):
        load(study, tables=[{"title": name, "rows": ["ours"]} for name in ("a b", "A_b")]).check()
    with pytest.raises(ConfigError, match=r"'red' is only measured by: add held_out: true"):
        load(study, measuring={"rewards": [{**REDNESS, "held_out": False}]})
    with pytest.raises(ConfigError, match="which is no folder"):
        load(study, reuse="nowhere").check()
    aligned = {"recipe": "toy/e2po"}
    with pytest.raises(ConfigError, match="'e2po' has a recipe for align"):
        load(study, variants={"e2po": aligned}).check()
    many = {f"v{n}": study["variants"]["ours"] for n in range(10)}
    with pytest.raises(ConfigError, match="curves has 10 variants, and figures have 9 colours"):
        load(study, variants=many, tables=[], crossed=[], orderings=[], gallery=None).check()


def test_a_gallery_without_its_run_says_which(tmp_path: Path, study: dict[str, Any]) -> None:
    found = load(study, gallery={"variants": ["ours"]})
    with pytest.raises(RunError, match="the run of 'ours' with seed 0, and its folder is gone"):
        write_gallery(found, [], tmp_path)


# --- tables and figures from records ---------------------------------------------------------------------------------


def record(
    name: str, seed: int, identity: float, prompt: float, **curves: list[list[float]]
) -> dict[str, Any]:
    figures = {"reward/identity": identity, "reward/prompt": prompt, "diversity": 0.1}
    if "reward_correlation" in curves:
        figures |= {"conflict_share": curves["conflict_share"][0][1]}
        figures |= {"reward_correlation": curves["reward_correlation"][0][1]}
    return {"variant": name, "seed": seed, "figures": figures, "curves": curves, "measured": {"rewards": {}}}


@pytest.fixture
def records() -> list[dict[str, Any]]:
    """Three seeds: ours is better than the base by 0.10, 0.11 and 0.12 in identity, and as good by the prompt."""
    found = []
    for seed in range(3):
        found.append(record("base", seed, 0.60, 20.0 + seed))
        logs = {"conflict_share": [[16, 0.4], [32, 0.4]], "reward_correlation": [[16, 0.5], [32, 0.0]]}
        found.append(record("ours", seed, 0.70 + 0.01 * seed, 20.0 + seed + (-1) ** seed, **logs))
        found.append(record("sft", seed, 0.50, 20.0 + seed))
        found.append(record("rpo", seed, 0.65, 19.0))
    return found


def test_the_tables_have_the_rows_of_the_paper(study: dict[str, Any], records: list[dict[str, Any]]) -> None:
    parts = sections(load(study, seeds=[0, 1, 2]), records)
    by_title = {part: parts[place + 1] for place, part in enumerate(parts) if part.startswith("###")}
    rows = [line.split(" | ") for line in by_title["### Table 2"].splitlines()]
    assert [row[0] for row in rows[2:]] == ["| base", "| sft", "| ours"]
    assert rows[0][:3] == ["| variant", "identity, trained ↑", "prompt, trained ↑"]
    half = T_OF_THREE * 0.01 / math.sqrt(3)
    assert rows[4][1] == f"0.710 [{0.71 - half:.3f}, {0.71 + half:.3f}]"
    crossed = by_title["### Table 5"].splitlines()
    assert crossed[0] == "| α | up: identity ↑ | up: prompt ↑ | down: identity ↑ | down: prompt ↑ |"
    assert [line.split(" | ")[0] for line in crossed[2:]] == ["| 0", "| 1"]
    assert crossed[3].split(" | ")[3].startswith("0.650")  # row 1, column down: rpo


def test_orderings_hold_only_where_the_interval_excludes_zero(
    study: dict[str, Any], records: list[dict[str, Any]]
) -> None:
    claims = [
        {"better": "ours", "worse": "base", "rewards": ["identity", "prompt"]},
        {"better": "base", "worse": "ours", "rewards": ["identity"]},
    ]
    found = orderings(load(study, orderings=claims), records)
    assert [one["verdict"] for one in found] == ["holds", "not decided", "reversed"]
    assert found[0]["difference"].mean == pytest.approx(0.11) and found[0]["difference"].count == 3
    assert [one["verdict"] for one in orderings(load(study, orderings=claims), [])] == ["not measured"] * 3


def test_the_conflict_of_independent_rewards_is_a_half() -> None:
    assert expected_conflict(0) == 0.5 and expected_conflict(1) == 0 and expected_conflict(-1) == 1
    drawn = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rho in (-0.6, 0.3, 0.8):
        other = rho * drawn[:, 0] + math.sqrt(1 - rho**2) * drawn[:, 1]
        share = (drawn[:, 0] * other < 0).double().mean().item()
        assert share == pytest.approx(expected_conflict(rho), abs=0.005)


def test_conflict_stands_beside_the_correlation(study: dict[str, Any], records: list[dict[str, Any]]) -> None:
    found = conflict_rows(load(study), records)
    assert list(found) == ["ours"]  # the others did not train on their own pictures
    assert found["ours"]["expected_share"].mean == pytest.approx((1 / 3 + 1 / 2) / 2)  # arccos(0.5) = pi / 3
    assert found["ours"]["conflict_share"].mean == pytest.approx(0.4)


def test_figures_show_what_the_records_say(
    tmp_path: Path, study: dict[str, Any], records: list[dict[str, Any]]
) -> None:
    loaded = load(study, seeds=[0, 1, 2])
    (mark,) = marks_of(loaded, records, {"ours": ("ours", 4), "nobody": ("nobody", 5)})
    half = T_OF_THREE * 0.01 / math.sqrt(3)
    assert mark.y == pytest.approx((0.71, 0.71 - half, 0.71 + half)) and mark.x[0] == pytest.approx(64 / 3)
    assert colours_of(loaded, ["base", "sft", "ours"]) == {"base": 7, "sft": 1, "ours": 0}
    names = {path.name for path in write_figures(loaded, records, tmp_path)}
    assert names == {"tradeoff.svg", "tradeoff-table_2.svg", "tradeoff-table_5.svg", "reward-conflict.svg"}
    for name in names:
        ET.parse(tmp_path / "figures" / name)

    made = tradeoff(loaded, records, ["base", "sft", "ours"], "Table 2")
    assert made is not None and legend_of(made) == ["base", "sft", "ours"]
    (axes,) = made.axes
    assert axes.get_xlabel() == "prompt" and axes.get_title(loc="left") == "identity"
    places = {line.get_label(): line.get_xydata() for line in axes.lines if len(line.get_xdata()) == 1}
    means = {"base": (21, 0.6), "sft": (21, 0.5), "ours": (64 / 3, 0.71)}
    assert {name: tuple(place[0]) for name, place in places.items()} == {
        name: pytest.approx(mean) for name, mean in means.items()
    }
    assert not axes.yaxis_inverted() and not axes.xaxis_inverted()  # a better identity is higher up
    bars = [line for line in axes.lines if line.get_label() == "_ours"]
    assert [list(bar.get_ydata()) for bar in bars] == [
        pytest.approx([0.71, 0.71]),
        pytest.approx([0.71 - half, 0.71 + half]),
    ]

    crossed = crossed_tradeoff(loaded, records, loaded.crossed[0])
    assert crossed is not None and legend_of(crossed) == ["up", "down"]
    paths = {line.get_label(): line for line in crossed.axes[0].lines}
    for column, end in (("up", (64 / 3, 0.71)), ("down", (19, 0.65))):  # a path a column, a dot a row
        points = paths[column].get_xydata().tolist()
        assert points == [pytest.approx((21, 0.5)), pytest.approx(end)]
    captions = [text.get_text() for text in crossed.axes[0].texts]
    assert captions == ["0", "1"] * 2

    conflicting = conflict(loaded, records)
    assert conflicting is not None and legend_of(conflicting) == ["ours", INDEPENDENT]
    levels = [line for axes in conflicting.axes for line in axes.lines if line.get_label() == INDEPENDENT]
    assert [list(level.get_ydata()) for level in levels] == [[0.5, 0.5], [0, 0]]
    assert [list(level.get_xdata()) for level in levels] == [[16, 32]] * 2


# --- which pictures are measured -------------------------------------------------------------------------------------


def test_prompts_are_spread_over_subjects_and_differ_between_them() -> None:
    prompts = PromptSet("x", tuple(Prompt(f"{s} {n}", {"subject": s}) for s in "abcd" for n in range(5)))
    assert len(spread_over_subjects(prompts, None, None)) == 20
    two = [prompt.text for prompt in spread_over_subjects(prompts, None, 2)]
    assert two == ["a 0", "a 2", "b 1", "b 3", "c 2", "c 4", "d 3", "d 0"]
    assert [prompt.text for prompt in spread_over_subjects(prompts, 2, 1)] == ["a 0", "c 2"]
    assert len({prompt.text for prompt in spread_over_subjects(prompts, 9, 9)}) == 20


@pytest.mark.parametrize(
    "name",
    [
        "toy/personalize-study",
        "toy/personalize-ablations",
        "toy/personalize-long",
        "toy/personalize-long-parts",
    ],
)
def test_the_committed_studies_are_fair(name: str) -> None:
    study = recipes.load(PersonalizeStudyConfig, name, kind="personalize-study")
    study.check()
    assert len(study.seeds) >= 3
    assert [reward.name for reward in study.judged(study.configs()["customized"]).rewards] == [
        "identity",
        "preference",
        "dino",
        "clip_image",
        "clip_text",
        "object",
    ]


def test_the_committed_e2po_recipe_reaches_its_band() -> None:
    """On toy:flux, whose encoder leaves the published bound's perturbations at cosines of 0.94."""
    shop = load_run(load_recipe("toy/e2po-sars", ["prompts.per_step=2"]))
    variants = prepare(shop.method.exploration, shop.policy, shop.first_groups())
    assert variants.metrics["in_band_share"] == 1
    assert variants.metrics["anchor_cosine"] == pytest.approx(0.8, abs=0.01)
    assert variants.metrics["pairwise_cosine"] < 0.6


def test_both_committed_studies_share_their_common_runs() -> None:
    main_study, ablations = (
        recipes.load(PersonalizeStudyConfig, f"toy/personalize-{name}", kind="personalize-study")
        for name in ("study", "ablations")
    )
    for name in ("customized", "naive 1:1", "naive 1:1.5", "sft", "rpo"):
        assert main_study.recipe((name, 1)) == ablations.recipe((name, 1)), name


def test_budgets_say_what_a_method_learns_from() -> None:
    of = {
        name: budget_of(load_recipe(f"toy/{name}"))
        for name in ("customized-grpo", "sft", "rpo", "customized-nft")
    }
    images = 40 * 8 * 6
    assert {one.comparable for one in of.values()} == {(images, 40)}
    assert of["customized-grpo"].gradient_terms == images * 2  # 0.3 of the seven steps but the last
    assert of["customized-nft"].gradient_terms == of["sft"].gradient_terms == images * 2
    assert of["rpo"].gradient_terms == 40 * 8 * 3 * 2 and of["sft"].scores == 0
