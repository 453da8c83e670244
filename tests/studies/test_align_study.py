"""The align study: fair comparisons only, resumable, with intervals over seeds."""

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.align.parts import E2PO, GRPO, recipe
from tests.align.synthetic import settings as synthetic
from tests.studies.command import main
from tests.tolerance import agree

from pixrl import config as recipes
from pixrl.errors import ConfigError, ShapeError
from pixrl.jobs import align as align_job
from pixrl.metrics.diversity import DiversityMeter, pixel_features
from pixrl.metrics.intervals import student
from studies import runs as align_study
from studies.config import AlignStudyConfig
from studies.figures import over_seeds
from studies.pictures import mosaic, principal_plane, shift
from studies.runs import training_figures, training_record


@pytest.fixture
def study(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Two methods of three pictures a prompt, one step each, and the perturbed one at equal sizes."""
    monkeypatch.setattr(align_study, "load_meter", lambda *given: DiversityMeter(pixel_features))
    align_study._meter.cache_clear()
    files = {}
    changes = {
        "nft": {"exploration": {"kind": "noise", "noises": 4}},
        "e2po": E2PO,
        "grpo": {
            **GRPO,
            "loss": {"kind": "clipped"},
            "optimizer": {"lr": 1e-3},
            "exploration": {"kind": "noise", "noises": 4},
        },
    }
    for name, change in changes.items():
        files[name] = tmp_path / f"{name}.yaml"
        settings = recipe(sd3_folder, prompt_file, steps=2, **change)
        files[name].write_text(json.dumps({"kind": "align", **settings}))
    return {
        "variants": {name: {"recipe": str(file)} for name, file in files.items()},
        "seeds": [0, 1],
        "measuring": {"prompts": 2, "per_prompt": 2, "steps": 2, "segmenter": None, "features": "fake:eyes"},
        "differences": [["e2po", "nft"], ["nft", "base"]],
        "projection": {"variant": "e2po", "prompts": 1, "rounds": 2},
    }


def load(study: dict[str, Any], **changes: Any) -> AlignStudyConfig:
    return recipes.load(AlignStudyConfig, {**study, **changes})


def write(study: dict[str, Any], path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({"kind": "align-study", **study, **changes}))
    return path


def test_a_study_from_recipe_to_figures_and_again(
    tmp_path: Path, study: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {name: study["variants"][name] for name in ("nft", "e2po")}
    file, out = write(study, tmp_path / "study.yaml", variants=two), tmp_path / "out"
    started: list[Path] = []
    start = align_job.start

    def stop_at_third(config: Any, path: Path, **given: Any) -> Path:
        started.append(path)
        if len(started) == 3:
            raise KeyboardInterrupt
        return start(config, path, **given)

    monkeypatch.setattr(align_job, "start", stop_at_third)
    assert main([str(file), "--out", str(out)]) == 130
    assert main([str(file), "--out", str(out)]) == 0
    assert len(started) == 2 * 2 + 1  # nothing that was finished is done again
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert {(r["variant"], r["seed"]) for r in records} == {
        (v, s) for v in ("base", "nft", "e2po") for s in (0, 1)
    }
    of = {(r["variant"], r["seed"]): r for r in records}
    assert of["nft", 0]["images"] == of["e2po", 0]["images"] == 16
    assert of["nft", 0]["updates"] == 2 and len(of["nft", 0]["curves"]["group_std"]) == 2
    assert of["base", 0]["figures"]["reward/python"] != of["nft", 0]["figures"]["reward/python"]
    assert "group_std" not in of["base", 0]["figures"] and of["nft", 0]["figures"]["minutes"] > 0
    table = (out / "table.md").read_text()
    assert capsys.readouterr().out.endswith(table + "\n")
    assert "2 variants × 2 seed(s), 16 images and 2 updates a run" in table and "| e2po − nft |" in table
    summary = json.loads((out / "summary.json").read_text())
    means = [of["nft", s]["figures"]["reward/python"] for s in (0, 1)]
    assert summary["variants"]["nft"]["reward/python"]["mean"] == pytest.approx(sum(means) / 2)
    assert summary["variants"]["base"]["reward/python"]["seeds"] == 2
    assert (out / "runs/e2po/seed-1/report.html").is_file()
    for name in ("group-std", "zero-std-share", "reward-python", "training-python", "projection-1"):
        ET.parse(out / f"figures/{name}.svg")
    assert (out / "figures/variants-1.png").is_file()
    projection = json.loads((out / "projection.json").read_text())[0]
    assert projection["shift"] > 0 and projection["distance_perturbed"] > 0
    assert main([str(file), "--out", str(out), "--table"]) == 0 and len(started) == 5


def test_unequal_budgets_and_worlds_are_refused_with_their_sizes(study: dict[str, Any]) -> None:
    load(study).check()
    more = {**study["variants"]["e2po"], "settings": {"prompts.per_step": 3}}
    with pytest.raises(ConfigError, match="e2po: 24 images, 2 updates"):
        load(study, variants={**study["variants"], "e2po": more}).check()
    often = {**study["variants"]["e2po"], "settings": {"optimizer.updates": 2}}
    with pytest.raises(ConfigError, match="e2po: 16 images, 4 updates"):
        load(study, variants={**study["variants"], "e2po": often}).check()
    guided = {**study["variants"]["grpo"], "settings": {"guidance": 4.5}}
    with pytest.raises(
        ConfigError, match=r"guidance differs between variants: None in 'nft', 4\.5 in 'grpo'"
    ):
        load(study, variants={**study["variants"], "grpo": guided}).check()


def test_names_that_mean_nothing_are_refused(study: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'e2po'"):
        load(study, differences=[["e2p", "nft"]]).check()
    with pytest.raises(ConfigError, match="noise alone"):
        load(study, projection={"variant": "nft"}).check()
    with pytest.raises(ConfigError, match="no variant 'none'"):
        load(study, projection={"variant": "none"}).check()
    entry = study["variants"]["nft"]
    with pytest.raises(ConfigError, match="untrained model"):
        load(study, variants={"base": entry})
    with pytest.raises(ConfigError, match="same folder"):
        load(study, variants={"a b": entry, "a_b": entry})
    with pytest.raises(ConfigError, match="at least one variant"):
        load(study, variants={})


def test_the_settings_of_the_study_go_before_those_of_the_variant(study: dict[str, Any]) -> None:
    entry = {**study["variants"]["nft"], "settings": {"optimizer.lr": 0.5}}
    found = load(study, variants={"nft": entry}, settings={"optimizer.lr": 0.1, "steps": 7}).recipe(
        ("nft", 3)
    )
    assert (found.optimizer.lr, found.steps, found.seed) == (0.5, 7, 3)


def test_the_figures_of_training_are_means_over_all_of_it_and_over_its_end() -> None:
    rows = [{"step": n, "group_std": float(n), "zero_std_share": 0.5} for n in range(8)]
    rows[0]["group_std"] = math.nan
    found = training_figures(rows)
    assert found == {"group_std": 4.0, "group_std/end": 6.5, "zero_std_share": 0.5, "zero_std_share/end": 0.5}


def test_curves_run_over_pictures_drawn_and_minutes_over_phases() -> None:
    config = synthetic(steps=2)
    names = (
        "group_std",
        "zero_std_share",
        "diversity",
        "kl",
        "reward/geneval/mean",
        "reward/preference/mean",
    )
    rows = [dict.fromkeys(names, 0.1) | {"step": n, "seconds/a": 30.0, "seconds/b": 60.0} for n in (0, 1)]
    evaluated = [{"step": 0, "geneval/mean": 0.4, "preference/mean": None}]
    found = training_record(config, rows, evaluated)
    assert (found["images"], found["updates"], found["training"]["minutes"]) == (48, 2, 3.0)
    assert found["curves"]["group_std"] == [[24, 0.1], [48, 0.1]]
    assert found["curves"]["fixed/geneval"] == [[0, 0.4]] and found["curves"]["fixed/preference"] == []


def test_seeds_are_joined_where_all_of_them_have_a_point() -> None:
    assert over_seeds([[(0, 1.0), (1, 2.0)], [(1, 4.0), (2, 9.0)]]) == [(1, 3.0, 2.0, 4.0)]
    assert over_seeds([]) == []


def test_the_t_interval_worked_out_by_hand_and_its_coverage() -> None:
    found = student([1.0, 2.0, 3.0, math.nan])
    # t(0.975, 2) = 4.302653, s = 1, n = 3
    assert (found.mean, found.count) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)
    assert student([5.0]).text() == "5.000" and not student([5.0]).excludes_zero
    assert student([]).text() == "–"
    drawn = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inside = sum(one.low <= 0 <= one.high for one in map(student, drawn.tolist()))
    assert 0.935 < inside / 2000 < 0.965


def test_the_principal_plane_of_points_on_a_plane_keeps_their_distances() -> None:
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(20, 2, generator=generator) * torch.tensor([3.0, 1.0])
    basis, _ = torch.linalg.qr(torch.randn(5, 2, generator=generator))
    points, shares = principal_plane(flat @ basis.T + 7)
    assert shares.sum().item() == pytest.approx(1) and shares[0] > shares[1]
    assert agree(torch.cdist(points, points), torch.cdist(flat, flat), 64, dtype=torch.float32)
    again, _ = principal_plane(flat @ basis.T - 2)
    assert agree(points, again, 64, dtype=torch.float32, scale=10)
    alone, none = principal_plane(torch.ones(4, 3))
    assert not alone.any() and not none.any()
    with pytest.raises(ShapeError, match="plane"):
        principal_plane(torch.ones(2, 5))


def test_the_shift_compares_each_variant_with_the_prompt_at_the_same_noise() -> None:
    e = torch.eye(3)
    # one round of K = 2, G = 2: variant 0 is e0, e1; variant 1 is e0 (not moved) and e2 (moved)
    assert shift(torch.stack([e[0], e[1], e[0], e[2]]), noises=2, variants=2) == 0.5
    assert shift(torch.stack([e[0], e[1], e[0], e[1]]).repeat(3, 1), noises=2, variants=2) == 0


def test_a_mosaic_has_a_row_a_variant() -> None:
    images = torch.zeros(6, 3, 4, 4)
    images[5] = 0.5
    found = mosaic(images, 3)
    assert found.shape == (3, 4 * 2 + 2, 4 * 3 + 4)
    assert torch.equal(found[:, -4:, -4:], images[5]) and found[0, 4, 0] == 1


@pytest.mark.parametrize("name", ["toy/align-study", "toy/align-ablations"])
def test_the_committed_studies_are_fair_and_cover_what_the_issue_asks(name: str) -> None:
    study = recipes.load(AlignStudyConfig, name, kind="align-study")
    study.check()
    for task in study.tasks():
        study.recipe(task)
    needed = {"toy/align-study": 3, "toy/align-ablations": 2}
    assert len(study.seeds) >= needed[name]
