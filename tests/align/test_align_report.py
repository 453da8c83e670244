"""The report of an alignment: self-contained, complete, and usable before the run is."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pixrl.errors import CheckpointError, RunError
from pixrl.fusion.config import FuseConfig
from pixrl.metrics.intervals import Interval
from pixrl.report import charts
from pixrl.report.align import facts, write_align_report
from pixrl.report.figures import (
    Change,
    Panel,
    changes_of,
    movement,
    newest_group,
    panels,
    phases,
    reward_panels,
    scored_pairs,
    smooth,
    warnings,
    window_of,
)
from pixrl.runs.folder import RunFolder
from pixrl.runs.reading import SCORES, samples_of
from pixrl.runs.record import shape_of
from tests.align.synthetic import PROMPTS, run_folder, settings


def page_of(path: Path, done: int, evaluated: tuple[int, ...]) -> str:
    folder = run_folder(path, settings(steps=4), done=done, evaluated=evaluated)
    return write_align_report(folder.path).read_text(encoding="utf-8")


def test_the_page_needs_nothing_but_itself_and_shows_everything(tmp_path: Path) -> None:
    page = page_of(tmp_path / "run", 4, (0, 4))
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert re.findall("<script[^>]*>", page) == ["<script>"]  # its own
    assert "@import" not in page and "url(http" not in page and "data-refresh=" not in page
    for heading in ("geneval", "preference", "Group standard deviation", "Groups without a signal",
                    "KL to the reference", "Gradient norm", "Diversity", "Perturbations"):  # fmt: skip
        assert f"<h3>{heading}</h3>" in page, heading
    assert "Trained on." in page and "Never trained on." in page
    assert page.count('class="pair"') == len(PROMPTS) and 'badge good">finished' in page
    assert "4 noises × 3 semantic variants" in page and "variant 2" in page
    assert "update 26 s, 58 %" in page and "no GenEval metadata" in page
    run = tmp_path / "run"
    assert f"pixrl align {run}/recipe.yaml --out {run}-again" in page and "pixrl resume" not in page
    assert "per_step: 2" in page and "abc123" in page and "rollout: 2 x 12" in page
    for svg in re.findall(r"<svg.*?</svg>", page):
        ET.fromstring(svg)


@pytest.mark.parametrize(("done", "evaluated"), [(0, ()), (0, (0,)), (2, (0,)), (3, (0, 2))])
def test_an_unfinished_run_has_a_page_too(tmp_path: Path, done: int, evaluated: tuple[int, ...]) -> None:
    page = page_of(tmp_path / "run", done, evaluated)
    assert (
        f"in {done} of 4 steps" in page
        and "not finished" in page
        and f"pixrl resume {tmp_path / 'run'}" in page
    )
    assert ("No step is finished yet" in page) == (done == 0)
    assert page.count('class="pair"') == (len(PROMPTS) if len(evaluated) == 2 else 0)


def test_a_run_of_another_kind_is_refused(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", kind="fuse", recipe=FuseConfig(concepts=("owl", "snail")))
    with pytest.raises(RunError, match="'fuse', not 'align'"):
        write_align_report(tmp_path / "run")


def test_signs_of_reward_hacking_are_pointed_out_and_nothing_else() -> None:
    up = Change("a", "trained on", 0.4, 0.6)
    down = Change("b", "never trained on", 20.0, 19.0)
    alike = Change("diversity", "spread", 0.3, 0.2)
    assert [text.split(",")[0] for text in warnings([up, down])] == ["b"]
    assert "0.67 of the base's" in warnings([up, alike])[0]
    steady = Change("b", "never trained on", 20.0, 19.99)
    fallen = Change("a", "trained on", 0.4, 0.3)
    assert warnings([up, steady]) == warnings([fallen, down]) == []
    assert warnings([Change("diversity", "spread", 0.3, 0.25)]) == []
    chance = Change("b", "never trained on", 20.0, 19.0, Interval(-1.0, -3.0, 1.0, 9))
    assert warnings([up, chance]) == [] and not chance.fell
    assert warnings([Change("a", "trained on", 0.4, 0.6, Interval(0.2, -0.1, 0.5, 9)), down]) == []
    sure = Change("a", "trained on", 0.4, 0.6, Interval(0.2, 0.1, 0.3, 9))
    assert len(warnings([sure, down])) == 1 and (sure.css, chance.css, up.css) == ("up", "", "")


def scored(folder: RunFolder, step: int, **scores: list[float | None]) -> None:
    (samples_of(folder, step) / SCORES).write_text(json.dumps(scores))


def test_a_fall_is_told_from_chance(tmp_path: Path) -> None:
    config = settings(evaluation={"per_prompt": 2})
    folder = run_folder(tmp_path / "run", config, done=40, evaluated=(0, 40))
    page = write_align_report(folder.path).read_text(encoding="utf-8")
    assert "fell from 20.000 to 19.628 (how much of it is chance is not known)" in page

    before = [20.0 + n for n in range(12)]
    sure = [-0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.3, -0.4, -0.5, -0.6, -0.4, -0.2]
    scored(folder, 0, preference=before)
    scored(folder, 40, preference=[x + gain for x, gain in zip(before, sure, strict=True)])
    (change,) = [one for one in changes_of(folder, shape_of(config)) if one.name == "preference"]
    assert change.interval is not None and change.interval.count == len(PROMPTS)
    assert change.interval.mean == pytest.approx(sum(sure) / 12)
    assert (
        -0.55 < change.interval.low < change.interval.mean < change.interval.high < -0.15
    )  # two pictures' means
    page = write_align_report(folder.path).read_text(encoding="utf-8")
    assert (
        "(-0.372 [-0.4" in page and "over 6 prompts), while geneval rose" in page and 'class="n down"' in page
    )

    unsure = [gain * (9 if n < 6 else -6) for n, gain in enumerate(sure)]
    scored(folder, 40, preference=[x + gain for x, gain in zip(before, unsure, strict=True)])
    page = write_align_report(folder.path).read_text(encoding="utf-8")
    assert "fell from" not in page and 'class="n down"' not in page.split("diversity")[0]


def test_pictures_without_a_score_are_left_out_of_both(tmp_path: Path) -> None:
    config = settings(evaluation={"per_prompt": 2})
    folder = run_folder(tmp_path / "run", config, done=40, evaluated=(0, 40))
    scored(folder, 0, preference=[1.0, None, 1.0, 1.0, None, None] + [1.0] * 6)
    scored(folder, 40, preference=[2.0, 9.0, 4.0, None, 9.0, 9.0] + [2.0] * 6)
    interval = {one.name: one.interval for one in changes_of(folder, shape_of(config))}["preference"]
    assert interval is not None
    assert (interval.count, interval.mean) == (5, pytest.approx((1 + 3 + 1 + 1 + 1) / 5))
    scored(folder, 40, preference=[2.0] * 4)  # another evaluation: nothing to pair
    assert {one.name: one.interval for one in changes_of(folder, shape_of(config))}["preference"] is None
    (samples_of(folder, 40) / SCORES).write_text("{")
    with pytest.raises(CheckpointError, match=r"scores\.json is damaged"):
        write_align_report(folder.path)


def test_the_axis_of_a_share_does_not_go_below_0_and_the_plan_is_one_row(tmp_path: Path) -> None:
    rows = [
        {"step": n, "zero_std_share": float(n == 3), "reward_correlation": -0.5 + n / 8} for n in range(8)
    ]
    lowest = {}
    for panel in panels(rows, []):
        ticks = re.findall(r'<text[^>]*text-anchor="end"[^>]*>([-.0-9]+)</text>', panel.svg)
        lowest[panel.title] = min(float(tick) for tick in ticks)
        if panel.title == "Groups without a signal":
            bottom = charts.HEIGHT - charts.BOTTOM
            assert f",{float(bottom)} " in panel.svg  # 0 lies on the frame
    assert lowest["Groups without a signal"] == 0 and lowest["Do the rewards agree?"] < 0
    plan = [text for name, text in facts(settings(), {"notes": ["one", "two"]}) if name == "plan"]
    assert plan == ["one; two"]


def test_the_gallery_pairs_the_first_and_the_newest_pictures(tmp_path: Path) -> None:
    config = settings(steps=4)
    folder = run_folder(tmp_path / "run", config, done=1, evaluated=(0, 2, 4))
    pairs = scored_pairs(folder, shape_of(config))
    assert [(pair.prompt, pair.seed) for pair in pairs] == [(p, 100 + n) for n, p in enumerate(PROMPTS)]
    assert all(pair.before != pair.after for pair in pairs)


def test_the_page_shows_first_where_the_trained_reward_changed_most(tmp_path: Path) -> None:
    config = settings(steps=4)
    folder = run_folder(tmp_path / "run", config, done=4, evaluated=(0, 4))
    assert "changed most" not in write_align_report(folder.path).read_text(), "no scores were kept"
    before, after = [0.25] * len(PROMPTS), [0.25] * len(PROMPTS)
    before[0], after[1], after[2], after[3] = 1.0, 0.5, 1.0, 0.25  # one falls, two rise
    for step, values in ((0, before), (4, after)):
        (samples_of(folder, step) / SCORES).write_text(json.dumps({"geneval": values}))
    moved = movement(scored_pairs(folder, shape_of(config)), "geneval")
    assert moved is not None and (moved.rose, moved.fell, moved.same) == (2, 1, len(PROMPTS) - 3)
    assert [pair.number for pair in moved.most] == [2, 1, 0]
    page = write_align_report(folder.path).read_text()
    assert f"Of the evaluation's {len(PROMPTS)} pictures it rose for 2, fell for 1 and" in page
    assert f"stayed the same for {len(PROMPTS) - 3}." in page
    assert page.count('class="pair"') == len(PROMPTS) + 3
    assert page.index("changed most") < page.index("none chosen")
    assert '0.250 → <b class="up">1.000</b>' in page and '1.000 → <b class="down">0.250</b>' in page


def test_the_group_shown_is_the_newest_that_is_whole(tmp_path: Path) -> None:
    config = settings(steps=40)
    folder = run_folder(tmp_path / "run", config, done=12, evaluated=())
    manifest = folder.manifest()
    shown = newest_group(folder.path, shape_of(config), manifest, str)
    assert shown is not None and (shown.step, shown.columns) == (10, 4)
    assert [name for name, _ in shown.rows] == ["the prompt itself", "variant 1", "variant 2"]
    assert newest_group(folder.path, shape_of(config), manifest[:5], str) is None
    assert newest_group(folder.path, shape_of(config), [], str) is None


def test_phases_are_summed_over_steps_that_may_lack_some() -> None:
    rows = [{"step": 0, "seconds/a": 1.0, "seconds/b": 2.0}, {"step": 1, "seconds/a": 1.0}]
    assert phases(rows) == [("a", 2.0, 50.0), ("b", 2.0, 50.0)]
    assert phases([]) == []


def test_the_running_mean_keeps_lines_and_constants() -> None:
    line = [(float(x), 2.0 * x) for x in range(20)]
    assert [y for _, y in smooth(line)[5:15]] == pytest.approx([y for _, y in line[5:15]])
    assert smooth([(0.0, 1.0), (1.0, 3.0)], window=3) == [(0.0, 2.0), (1.0, 2.0)]
    assert smooth([]) == []


def test_short_runs_are_smoothed_less_and_the_captions_say_how() -> None:
    assert [window_of(steps) for steps in (0, 4, 14, 15, 24, 25, 40, 45, 500)] == [1, 1, 1, 3, 3, 5, 7, 9, 9]
    config = settings()

    def reward_panel(steps: int) -> Panel:
        rows = [
            {"step": n, "reward/geneval/mean": float(n % 2), "reward/geneval/std": 0.1} for n in range(steps)
        ]
        return reward_panels(shape_of(config), rows, [])[0]

    assert "the mean of 3 steps" in reward_panel(15).note
    short = reward_panel(8)
    assert "the mean of" not in short.note
    line = re.search(r'class="line faint" points="([^"]+)"', short.svg)
    assert line is not None and len({point.split(",")[1] for point in line[1].split()}) == 2  # not smoothed
    logged = [{"step": n, "group_std": float(n % 2), "diversity": 0.1} for n in range(15)]
    spread, diversity = panels(logged, [])
    assert "mean of 3" in spread.svg and "the mean of 3 steps" in diversity.note


def test_panels_of_figures_that_were_not_logged_are_left_out() -> None:
    assert panels([], []) == []
    rows = [
        {"step": n, "ratio_mean": 1.0, "ratio_min": 0.9, "ratio_max": 1.1, "kl": float("nan")} for n in (0, 1)
    ]
    assert [panel.title for panel in panels(rows, [])] == ["Policy ratio"]


def test_bands_are_well_formed() -> None:
    curve = charts.Curve("a <b>", [(0, 1), (1, 2)], "k0", [(0, 0, 2), (1, 1, 3), (2, float("nan"), 1)])
    chart = charts.lines_chart([curve], "step", "reward", legend=True)
    assert 'class="band k0"' in chart and "a &lt;b&gt;" in chart
    band = re.search(r'class="band k0" points="([^"]+)"', chart)
    assert band is not None and len(band[1].split()) == 4
    ET.fromstring(chart)


def test_ticks_are_exact_and_short() -> None:
    given = (0.0, 7680.0, 0.0125, 19.6225, 0.00015, -0.000125, 2e-7)
    found = [charts._tick(value) for value in given]
    assert found == ["0", "7680", "0.0125", "19.6225", "1.5e-4", "-1.25e-4", "2e-7"]
    assert [float(text) for text in found] == list(given)
