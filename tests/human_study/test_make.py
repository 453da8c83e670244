"""What a study asks, of whom, and that nothing in it tells which system drew what."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from pixrl import cli
from pixrl.errors import CheckpointError, InputError, PixrlError
from pixrl.human_study import make as sources
from pixrl.human_study.make import make
from pixrl.human_study.server import state_of, vote_page, write_bundle
from pixrl.human_study.study import (
    PRESETS,
    STUDY,
    Comparison,
    StudySettings,
    open_study,
    parse_criteria,
    plan,
    spoil,
    units,
)
from pixrl.human_study.votes import Votes
from pixrl.runs.folder import ManifestRow
from tests.human_study.conftest import PROMPTS, SYSTEMS, Make, write_system


def real(tasks: list[Comparison]) -> list[Comparison]:
    return [task for task in tasks if task.check is None]


@pytest.mark.parametrize("design", ["pairs", "best"])
@pytest.mark.parametrize("people", [1, 2, 5, 9])
def test_after_any_number_of_people_no_comparison_leads_by_more_than_one(
    made: Make, design: str, people: int
) -> None:
    study = made(design=design, comparisons=4).study
    asked = Counter(frozenset(task.pictures) for n in range(people) for task in real(plan(study, n)))
    total = len(units(study))
    assert len(asked) == min(total, 4 * people)
    if len(asked) == total:
        assert max(asked.values()) - min(asked.values()) <= 1
    prompts = Counter(task.item for n in range(people) for task in real(plan(study, n)))
    spread = 1 if design == "best" else 3
    assert max(prompts.values()) - min(prompts[n] for n in range(len(PROMPTS))) <= spread


@pytest.mark.parametrize("design", ["pairs", "best"])
def test_every_system_stands_at_every_place_equally_often(made: Make, design: str) -> None:
    folder = made(design=design, comparisons=15 if design == "pairs" else 5)
    study = folder.study
    size = len(study.sets[0])
    places = Counter(
        (study.pictures[name].system, place)
        for n in range(size)  # so many laps of the circle
        for task in real(plan(study, n))
        for place, name in enumerate(task.pictures)
    )
    assert len(places) == len(SYSTEMS) * size
    assert len(set(places.values())) == 1


def test_a_participant_sees_no_comparison_twice_and_an_order_of_their_own(made: Make) -> None:
    study = made(comparisons=15).study
    orders = [[frozenset(task.pictures) for task in real(plan(study, n))] for n in range(3)]
    assert all(len(set(order)) == len(order) == 15 for order in orders)
    assert orders[0] != orders[1]
    assert plan(study, 1) == plan(study, 1)


@pytest.mark.parametrize("design", ["pairs", "best"])
def test_a_check_shows_one_whole_picture_among_spoilt_ones_of_its_prompt(made: Make, design: str) -> None:
    study = made(design=design, checks=5).study
    checks = [task for n in range(4) for task in plan(study, n) if task.check is not None]
    assert len(checks) == 20
    places = Counter(task.pictures.index(task.check or "") for task in checks)
    assert len(places) == len(study.sets[0])
    for task in checks:
        assert study.pictures[task.check or ""].item == task.item
        others = [name for name in task.pictures if name != task.check]
        assert {study.pictures[study.spoilt[name]].item for name in others} == {task.item}


def test_a_spoilt_picture_keeps_its_size_and_is_another_one() -> None:
    picture = Image.radial_gradient("L").convert("RGB").resize((70, 50))
    found = spoil(picture, "seed")
    assert found.size == picture.size
    assert found.tobytes() != picture.tobytes() != spoil(picture, "other").tobytes()


def test_nothing_that_reaches_a_participant_tells_system_file_or_check(made: Make, tmp_path: Path) -> None:
    folder = made(("customized-grpo",))
    with Votes(folder.votes) as votes:
        who = votes.participants()[0]
    told = json.dumps(state_of(folder.study, who, [])) + vote_page(folder.study, static=False)
    write_bundle(folder, tmp_path / "bundle")
    files = [path for path in (tmp_path / "bundle").rglob("*") if path.is_file()]
    told += "".join(str(path.relative_to(tmp_path)) for path in files)
    told += "".join(path.read_text() for path in files if path.suffix in (".js", ".html"))
    for secret in (*SYSTEMS, "secret", str(tmp_path), '"check"', "spoilt", '"system"'):
        assert secret not in told
    tokens = [path.stem for path in (tmp_path / "bundle" / "plans").glob("*.js")]
    assert len(set(tokens)) == 3 and all(len(token) == 32 for token in tokens)
    assert {path.name for path in files if path.suffix == ".png"} == {f"{n}.png" for n in folder.study.names}


def test_pictures_lose_their_metadata_and_keep_their_pixels(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_system(tmp_path / name, 9, ("an owl",))
        exif = Image.Exif()
        exif[270] = f"drawn by {name}"
        with Image.open(tmp_path / name / f"{name}-0.png") as picture:
            picture.load()
            picture.save(tmp_path / name / f"{name}-0.png", exif=exif)
    settings = StudySettings(criteria=PRESETS["rmler"].criteria)
    place = {name: tmp_path / name for name in ("one", "two")}
    folder = make(place, settings, tmp_path / "study", participants=1)
    for name, picture in folder.study.pictures.items():
        assert b"drawn by" in Path(picture.source).read_bytes()
        assert b"drawn by" not in folder.file_of(name).read_bytes()
        with Image.open(folder.file_of(name)) as new, Image.open(picture.source) as old:
            assert new.tobytes() == old.convert("RGB").tobytes()


def test_prompts_match_by_their_words_and_several_pictures_in_order(tmp_path: Path) -> None:
    one = write_system(tmp_path / "one", 0, ("An  Owl", "an owl", "a cat"))
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a_cat", "an owl"):
        Image.new("RGB", (40, 40)).save(two / f"{name}.png")
    found = {"one": sources.read_system(one), "two": sources.read_system(two)}
    with pytest.raises(InputError, match=r"two lacks 1 of 3 .*\"an owl\", picture 2.*--only-matched"):
        sources.match(found, only_matched=False)
    matched = sources.match(found, only_matched=True)
    assert list(matched) == [("an owl", 0), ("a cat", 0)]
    assert matched["a cat", 0]["two"].file.name == "a_cat.png"


def test_a_fusion_gives_its_chosen_pictures_with_their_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        ManifestRow(
            index=n,
            step=0,
            concepts=("owl", "snail"),
            seed=n,
            scores={"reward": n / 2, "S/owl": None},
            file=f"{n}.png",
        )
        for n in range(4)
    ]

    class Run:
        path = tmp_path

        def manifest(self) -> list[ManifestRow]:
            return rows

    (best,) = sources._of_fusion(Run())  # type: ignore[arg-type]
    assert (best.file.name, best.prompt, best.scores) == ("3.png", "owl + snail", {"reward": 1.5})
    (tmp_path / "selection.json").write_text('{"indices": [2, 0]}')
    assert [one.file.name for one in sources._of_fusion(Run())] == ["2.png", "0.png"]  # type: ignore[arg-type]


def test_presets_say_what_the_papers_studied() -> None:
    assert {name: (len(one.criteria), one.ties) for name, one in PRESETS.items()} == {
        "e2po": (4, False),
        "rmler": (1, False),
        "customized-grpo": (2, True),
    }
    both = parse_criteria(["rmler", "humour=Which is funnier?"])
    assert [one.name for one in both.criteria] == ["harmony", "humour"]


def test_a_study_that_cannot_be_made_leaves_nothing(tmp_path: Path, systems: list[str]) -> None:
    (Path(systems[1]) / "base-secret-3.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    done = CliRunner().invoke(cli.app, ["human-study", "make", *systems, "--out", str(tmp_path / "study")])
    assert done.exit_code == 2
    assert "base-secret-3.png cannot be read" in " ".join(done.output.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(SYSTEMS)


def test_bad_folders_and_studies_are_told_in_a_sentence(
    made: Make, tmp_path: Path, systems: list[str]
) -> None:
    folder = made()
    before = (folder.path / STUDY).read_bytes()
    (tmp_path / "empty").mkdir()
    for given, words in (
        ([systems[0], str(tmp_path / "empty"), "--out", str(tmp_path / "new")], "holds no pictures"),
        ([*systems, "--out", str(folder.path)], "is a study already"),
        ([*systems, "--out", systems[0]], "is not empty"),
        ([*systems[:2], "--design", "best", "--out", str(tmp_path / "new")], "best of two is a pair"),
        ([*systems, "--prompts", "99", "--out", str(tmp_path / "new")], "there are 5 prompts"),
        ([*systems, "--criteria", "e2p", "--out", str(tmp_path / "new")], "Did you mean 'e2po'?"),
    ):
        done = CliRunner().invoke(cli.app, ["human-study", "make", *given])
        assert done.exit_code in (1, 2) and words in " ".join(done.output.split()), done.output
    assert (folder.path / STUDY).read_bytes() == before
    assert not (tmp_path / "new").exists()
    (folder.path / STUDY).write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"study\.json is damaged"):
        open_study(folder.path)
    assert issubclass(CheckpointError, PixrlError)
