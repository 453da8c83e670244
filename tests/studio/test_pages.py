"""What the studio shows of a folder: the report's figures and charts, states, and sentences about what is damaged."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pixrl.errors import InputError
from pixrl.report.align import align_view
from pixrl.runs import place
from pixrl.runs.folder import MANIFEST, METRICS, JsonLines, ManifestRow, RunFolder
from pixrl.runs.process import attending
from pixrl.runs.reading import SIMILARITY, comparable_evaluations
from pixrl.studio.folders import RunData, Runs, State, plain, sentence
from pixrl.studio.pages import AT_ONCE, IN_ORDER, RunPage, duration, orders_of, run_list, what

SVG = re.compile(r"<svg class=\"chart\".*?</svg>", re.DOTALL)


def whole(data: RunData) -> str:
    page = RunPage()
    parts = (page.head(data), page.rewards(data), page.group(data), page.learning(data))
    return "\n".join([*parts, page.pairs(data, orders_of(data)[0], AT_ONCE)])


@pytest.mark.parametrize("name", ["done", "half"])
def test_every_figure_is_the_reports(root: Path, name: str) -> None:
    data, folder = Runs(root).look(name), RunFolder.open(root / name)
    assert list(map(repr, data.metrics)) == list(map(repr, folder.metrics()))
    assert list(data.manifest) == folder.manifest()
    assert list(data.evaluated) == comparable_evaluations(folder)
    report, page = align_view(folder), whole(data)
    charts = [panel.svg for panel in (*report["reward_panels"], *report["panels"])]
    assert len(charts) > 5 and SVG.findall(page) == charts
    for change in report["changes"]:
        row = re.search(rf"<b>{change.name}</b></td>.*?</tr>", page)
        assert row is not None and f"{change.after:.3f}" in row[0] and change.gain_text() in row[0]
    for cell in (cell for _, cells in report["group"].rows for cell in cells):
        assert cell.image in page
    for text in report["warnings"]:
        assert text in page
    assert all(picture in page for pair in report["pairs"] for picture in pair["pictures"])


def test_pairs_stand_in_the_order_of_their_change(root: Path) -> None:
    data = Runs(root).look("done")
    prompts = {
        order: re.findall(r'class="prompt">(.*?)<', RunPage().pairs(data, order, AT_ONCE))
        for order in orders_of(data)
    }
    drawn = prompts[IN_ORDER]
    assert prompts["geneval: most risen first"] == [drawn[n] for n in (2, 5, 1, 4, 0, 3)]
    assert prompts["geneval: most fallen first"] == [drawn[n] for n in (0, 3, 1, 4, 2, 5)]
    shown = RunPage().pairs(data, "geneval: most risen first", 2)
    assert (
        shown.count("<figure") == 2
        and "2 of 6 shown" in shown
        and "0.250 → 0.500" in shown
        and "+0.250" in shown
    )


def test_a_part_is_made_again_only_where_it_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, page = Runs(root), RunPage()
    first = runs.look("half")
    parts = [page.rewards(first), page.pairs(first, IN_ORDER, 3)]
    monkeypatch.setattr("pixrl.studio.pages.render", lambda *given: pytest.fail("made again"))
    again = runs.look("half")
    assert [page.rewards(again), page.pairs(again, IN_ORDER, 3)] == parts
    RunFolder.open(root / "half").log(12, {"reward/geneval/mean": 0.9})
    later = runs.look("half")
    assert later.version > again.version and later.evaluations_version == again.evaluations_version
    assert page.pairs(later, IN_ORDER, 3) == parts[1]
    with pytest.raises(pytest.fail.Exception):
        page.rewards(later)


def test_states(root: Path) -> None:
    runs = Runs(root)
    assert {name: runs.look(name).state for name in runs.names()} == {
        "done": State.FINISHED,
        "half": State.STOPPED,
    }
    with attending(root / "half"):
        data = runs.look("half")
        assert data.state is State.RUNNING
        seconds = 4.0 + 0.6 + 6.5 + 0.05
        assert data.seconds_left() == pytest.approx(
            seconds * 28
        ) and "about 5 min 12 s left" in RunPage().head(data)
        (root / "half" / place.STOP).write_bytes((root / "half" / place.PROCESS).read_bytes())
        assert runs.look("half").state is State.STOPPING
    assert runs.look("half").state is State.STOPPED and runs.look("half").seconds_left() is None


def test_runs_are_found_below_the_folder_by_their_places(root: Path) -> None:
    (root / "notes").mkdir()
    (root / "notes" / "recipe.yaml").write_text("kind: align")
    (root / ".hidden").mkdir()
    shutil.copytree(root / "done", root / ".hidden" / "done")
    shutil.copytree(root / "done", root / "old" / "deep" / "done")
    assert set(Runs(root).names()) == {"done", "half", "old/deep/done"}
    runs = Runs(root / "done")
    assert runs.names() == ["."] and "<h1>done</h1>" in RunPage().head(runs.look("."))
    with pytest.raises(InputError, match="There is no folder"):
        Runs(root / "nowhere")
    with pytest.raises(InputError, match="There is no run 'gone'"):
        Runs(root).look("gone")
    assert "pixrl align toy/e2po" in run_list([], None)


def spoil_metrics(run: Path) -> None:
    lines = (run / METRICS).read_bytes().splitlines(keepends=True)
    (run / METRICS).write_bytes(lines[0].replace(b"0", b"1", 1) + b"".join(lines[1:]))


def spoil_recipe(run: Path) -> None:
    (run / place.RECIPE).write_bytes(b"\xff\xfe: [")


def lose_environment(run: Path) -> None:
    (run / place.ENVIRONMENT).unlink()


def make_newer(run: Path) -> None:
    (run / place.MARKER).write_text(json.dumps({"made_by": "pixrl", "version": "999.1", "kind": "align"}))


def other_columns(run: Path) -> None:
    JsonLines(run / MANIFEST, run).append([{"index": 9999, "step": 1, "wings": 2}])


def spoil_start(run: Path) -> None:
    (run / "start.json").write_text(json.dumps({"shape": {"wings": 2}}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_metrics, "metrics.jsonl, line 1, does not match its checksum"),
        (spoil_recipe, "is no recipe of a run"),
        (lose_environment, "environment.json missing"),
        (make_newer, "made by pixrl 999.1"),
        (other_columns, "another version of pixrl"),
        (spoil_start, "another version of pixrl"),
    ],
)
def test_a_damaged_run_is_a_sentence_without_a_path(root: Path, spoil: object, said: str) -> None:
    spoil(root / "done")  # type: ignore[operator]
    runs = Runs(root)
    data = runs.look("done")
    assert data.state is State.DAMAGED and said in data.error and "\n" not in data.error
    page = whole(data) + run_list([data, runs.look("half")], "done")
    assert said in page and "damaged" in page and str(root.parent) not in page
    assert runs.look("half").state is State.STOPPED


def test_a_run_that_is_mended_is_shown_again(root: Path) -> None:
    runs = Runs(root)
    runs.look("half")
    good = (root / "half" / METRICS).read_bytes()
    (root / "half" / METRICS).write_bytes(good + good.replace(b"0", b"1", 3))
    assert runs.look("half").state is State.DAMAGED
    (root / "half" / METRICS).write_bytes(good)
    mended = runs.look("half")
    assert mended.state is State.STOPPED and len(mended.metrics) == 12 and not mended.error


def test_a_damaged_picture_is_a_frame(root: Path) -> None:
    step, number = 4, 2
    (root / "done" / f"samples/step-{step:06d}/{number:04d}.png").write_bytes(b"no picture")
    newest = next(row.file for row in Runs(root).look("done").manifest if row.file is not None)
    (root / "done" / newest).write_bytes(b"")
    page = whole(Runs(root).look("done"))
    assert page.count("damaged picture") == 2


@pytest.mark.parametrize(
    "file",
    [
        "recipe.yaml",
        "../half/samples/step-000000/0000.png",
        "samples/../recipe.yaml",
        "/etc/passwd",
        "x.png",
        "",
    ],
)
def test_only_pictures_of_the_run_are_given_out(root: Path, file: str) -> None:
    runs = Runs(root)
    assert runs.picture("done", "samples/step-000000/0003.png").is_file()
    with pytest.raises(InputError, match="not there any more"):
        runs.picture("done", file)
    with pytest.raises(InputError):
        runs.picture("../done", "samples/step-000000/0003.png")


def test_a_fusion_shows_its_newest_children_with_their_shares(tmp_path: Path) -> None:
    from pixrl.fusion.config import FuseConfig

    folder = RunFolder.create(
        tmp_path / "f", kind="fuse", recipe=FuseConfig(concepts=("owl", "snail"), budget=16)
    )
    import torch

    scores = {f"{SIMILARITY}owl": 0.7, f"{SIMILARITY}snail": 0.6, "balance": 0.1, "reward": 0.8}
    for step in range(2):
        files = folder.save_images(range(2 * step, 2 * step + 2), torch.rand(2, 3, 16, 16))
        extra = {"coefficients": {"share": {"owl": 0.25, "snail": 0.75}, "spread": 0.1}}
        folder.append_manifest(
            [
                ManifestRow(
                    index=2 * step + i,
                    step=step,
                    seed=i,
                    scores=scores,
                    file=file,
                    extra=extra,
                )
                for i, file in enumerate(files)
            ]
        )
        folder.log(step, {"reward/mean": 0.8, "seconds/render": 1.0})
    data = Runs(tmp_path).look("f")
    page = whole(data)
    assert (data.done, data.total, data.unit, data.state) == (4, 16, "pictures", State.STOPPED)
    assert what(data) == "owl + snail, by rmler on toy:turbo" and "4 of 16 pictures" in page
    assert page.count('<figure class="large"') == 2 and "batch 1" in page
    assert page.count('class="b0" style="width:25.0%"') == page.count('class="b1" style="width:75.0%"') == 2
    assert "0.700" in page and "R 0.800" in page


def test_words() -> None:
    assert [duration(s) for s in (0.4, 59, 61, 3600, 7500)] == [
        "0 s",
        "59 s",
        "1 min 01 s",
        "1 h 00 min",
        "2 h 05 min",
    ]
    run = Path.home() / "runs" / "owl"
    assert str(Path.home()) not in plain(f"{run}/recipe.yaml and {run.parent}/x and {Path.home()}/y", run)
    assert sentence(PermissionError(13, "Permission denied", str(run / "m.jsonl")), run) == (
        "m.jsonl cannot be read: Permission denied."
    )


@pytest.mark.parametrize(
    "code", ["import pixrl.studio.pages, pixrl.studio.processes", "from pixrl.cli import app"]
)
def test_neither_torch_nor_the_run_s_libraries_are_loaded(code: str) -> None:
    check = f"import sys; {code}; print(sorted({{'torch', 'diffusers', 'transformers', 'gradio'}} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", check], text=True).strip() == "[]"
