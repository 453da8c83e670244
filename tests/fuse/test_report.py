"""Reports: self-contained, complete, and honest about what did not qualify. Charts and the terminal's display."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from pixrl.fusion.config import FuseConfig
from pixrl.jobs import fuse as fuse_job
from pixrl.jobs.fuse import select_again, start
from pixrl.metrics.fusion import figures
from pixrl.report import charts
from pixrl.report.fuse import command_line, write_fuse_report
from pixrl.report.page import inline
from pixrl.runs.display import Extent, LiveView, PlainLines, for_terminal, sparkline
from tests.fuse.world import fake_world
from tests.tolerance import rounding

PROPERTY = settings(deadline=None, max_examples=30, derandomize=True)


def run_of(tmp_path, **given):
    broken = given.pop("broken", frozenset())
    values = {"concepts": ("owl", "snail"), "budget": 32, "batch": 8, "exemplars": 2, **given}
    return start(FuseConfig(**values), tmp_path / "run", world=fake_world(broken=broken))


def text_of(run):
    return write_fuse_report(run).read_text(encoding="utf-8")


def test_the_page_needs_nothing_but_itself(tmp_path):
    page = text_of(run_of(tmp_path))
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert re.findall("<script[^>]*>", page) == ["<script>"]  # its own
    assert "@import" not in page and "url(http" not in page and "data-refresh=" not in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_shows_parents_children_charts_lineage_and_the_command(tmp_path):
    run = run_of(tmp_path, presence=-0.5, balance=3.0, seed=3)
    page = text_of(run)
    assert page.count('class="tile yes"') == 32 + 4  # all children and the four selected
    assert page.count("<svg") == 2
    best = run.rows[run.selection.indices[0]]
    for name in ("S/owl", "S/snail", "reward", "balance"):
        assert f"{best.scores[name]:.3f}" in page
    assert str(best.seed) in page
    assert (
        "pixrl fuse owl snail --budget=32 --exemplars=2 --seed=3 --presence=-0.5 --balance=3.0 --set=batch=8"
        in page
    )
    assert "pixrl.fuse([&#39;owl&#39;, &#39;snail&#39;], budget=32, seed=3" in page
    assert "a photo of owl" in page


def test_a_run_in_which_nothing_qualifies_says_so_and_by_how_much(tmp_path):
    run = run_of(tmp_path)
    chosen = select_again(run.folder.path, presence=0.99)
    page = text_of(chosen)
    assert "no picture qualifies" in page
    assert "is the nearest to qualifying, but it lacks" in page
    assert 'class="tile yes"' not in page


def test_failures_are_listed_with_their_reason(tmp_path):
    page = text_of(run_of(tmp_path, broken=frozenset({3, 9}), pool=0))
    assert "2 of 32 pictures have no score" in page
    assert "no foreground found (2)" in page


def test_three_concepts_show_presence_against_balance(tmp_path):
    page = text_of(run_of(tmp_path, concepts=("owl", "snail", "frog")))
    assert "Presence and balance" in page and "S<sub>3</sub>" in page


def test_a_page_for_pictures_none_of_which_was_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(fuse_job.FailureWatch, "check", lambda self, scores: None)
    page = text_of(run_of(tmp_path, broken=frozenset(range(32))))
    assert "No picture could be scored" in page


def test_concept_names_are_escaped(tmp_path, monkeypatch):
    world = fake_world()
    monkeypatch.setattr(type(world.renderer), "vocabulary", None)
    config = FuseConfig(concepts=("<b>owl</b>", "a/b & c"), budget=8, batch=8, exemplars=1)
    page = text_of(start(config, tmp_path / "run", world=world))
    assert "<b>owl</b>" not in page and "&lt;b&gt;owl" in page


def test_the_command_line_reads_back_to_the_recipe(tmp_path):
    run = run_of(tmp_path, sampler="rmler", options={"lr": 0.2}, alpha=3.0)
    command = command_line(run)
    assert "--alpha=3.0" in command and "--set=options.lr=0.2" in command


def test_small_pictures_stay_and_large_ones_shrink(tmp_path):
    for side, kind in ((64, "png"), (512, "webp")):
        Image.effect_noise((side, side), 50).convert("RGB").save(tmp_path / "p.png")
        assert inline(tmp_path / "p.png", 256).startswith(f"data:image/{kind}")


def test_a_page_tells_the_pool_from_the_pictures_that_were_learned_from(tmp_path):
    page = text_of(run_of(tmp_path))
    assert "32 pictures by <b>rmler</b>" in page and "All 32 children" in page
    assert "the last 8, the pool, were drawn when it had learned" in page
    assert ">pool</text>" in page
    without = text_of(run_of(tmp_path / "none", pool=0))
    assert "the pool" not in without and ">pool</text>" not in without


values = st.lists(st.one_of(st.floats(-10, 10), st.just(math.nan)), min_size=1, max_size=40)


@PROPERTY
@given(values)
def test_charts_are_valid_xml_for_any_numbers(rewards):
    ET.fromstring(charts.reward_chart(rewards, 8))
    points = [
        charts.Point(r, -r, 0.5, i == 0, 'a "b" <c>') for i, r in enumerate(rewards) if math.isfinite(r)
    ]
    ET.fromstring(charts.scatter_chart(points, "x", "y & z", [(0, 0), (1, 0), (1, 1)]))
    ET.fromstring(charts.sparkline(rewards))
    ET.fromstring(charts.lines_chart([charts.Curve("a<b", list(enumerate(rewards)), "k0")], "x", "y"))


@PROPERTY
@given(st.floats(-100, 100), st.floats(0.001, 200))
def test_ticks_are_few_round_and_inside(low, width):
    ticks = charts.Axis(low, low + width, 0, 100).ticks()
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-6 <= tick <= low + width + 1e-6 for tick in ticks)


@PROPERTY
@given(values)
def test_the_terminal_curve_has_a_sign_for_every_value(rewards):
    assert len(sparkline(rewards)) == len(rewards)
    assert all(
        (sign == "·") == math.isnan(value) for sign, value in zip(sparkline(rewards), rewards, strict=True)
    )


def step_metrics(best, failed=0.0):
    return {"reward/fusion/mean": best / 2, "reward/fusion/best": best, "failed_share": failed}


def test_progress_counts_and_names_the_best_and_the_time_left(capsys):
    plain = PlainLines()
    plain.begin("owl + snail, rmler", Extent(32, 8, in_pictures=True), [step_metrics(0.9)])
    assert plain.history.left() == ""
    plain.step(8, step_metrics(0.5, failed=0.25))
    line = capsys.readouterr().err.splitlines()[-1]
    assert "16/32 pictures  fusion 0.250" in line and "25% not scored" in line and "s left" in line
    assert "best reward 0.900" in line, "of the steps before the break too"
    assert sparkline(plain.history.values["reward/fusion/mean"]) == "█▁"


def test_a_terminal_gets_a_view_and_a_pipe_gets_lines(capsys):
    assert isinstance(for_terminal(), PlainLines)
    console = Console(force_terminal=True, width=100, record=True)
    view = LiveView(console)
    view.begin("owl + snail, rmler", Extent(16, in_pictures=True))
    view.step(8, step_metrics(0.25) | {"seconds/render": 1.0, "images_per_second": 8.0})
    view.end()
    shown = console.export_text()
    assert "owl + snail, rmler" in shown and "8/16" in shown and "best reward 0.250" in shown


def test_figures_by_hand():
    similarities_BN = torch.tensor([[0.8, 0.7], [0.6, 0.6], [torch.nan, torch.nan], [0.9, 0.2]])
    found = figures(similarities_BN, 5.0, 0.55, 0.2, (0,))
    assert found.reward == pytest.approx(
        ((1.5 - 0.5) + 1.2 + (1.1 - 3.5)) / 3, abs=rounding(torch.float32, 16, scale=5)
    )
    assert found.similarity == pytest.approx((0.75 + 0.6 + 0.55) / 3)
    assert found.balance == pytest.approx((0.1 + 0 + 0.7) / 3)
    assert found.candidate_rate == pytest.approx(2 / 4)
    assert found.best_total == pytest.approx(1.5)
    assert found.best_reward == pytest.approx(1.2)
    assert found.late_reward == pytest.approx(1.1 - 3.5)
    assert (found.selected_reward, found.selected_balance) == (pytest.approx(1.0), pytest.approx(0.1))
    assert found.failed == 0.25
    nothing = figures(torch.full((4, 2), torch.nan), 5.0, 0.5, 0.1)
    assert math.isnan(nothing.reward) and nothing.failed == 1.0 and nothing.to_json()["reward"] is None
