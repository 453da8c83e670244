"""Pictures as concepts: shown to the model, compared with themselves, and refused where there is no place for them."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pixrl import api, conformance, models
from pixrl.conformance import ConformanceError
from pixrl.errors import CheckpointError, ConfigError, InputError, PixrlError
from pixrl.fusion.config import FuseConfig
from pixrl.fusion.world import FusionWorld, mixing_of, read_concept, render, require_mixing
from pixrl.hub import Card, Presence
from pixrl.jobs import check, draw
from pixrl.jobs import fuse as fuse_job
from pixrl.models.base import Conditioning, on_canvas
from pixrl.models.flux import FluxPolicy
from pixrl.models.sd3 import SD3Policy
from pixrl.report.fuse import command_line, python_lines, write_fuse_report
from tests import tiny
from tests.fuse.test_job import same_run
from tests.fuse.world import FakeScorer
from tests.tolerance import PICTURE, rounding

CARD = Card(presence=Presence(threshold=0.3, balance=0.1))
SEEDS = [3, 4]


class PooledScorer(FakeScorer):
    """The synthetic scorer on pictures of any size."""

    def features(self, images_BCHW: Tensor) -> Tensor:
        return super().features(F.adaptive_avg_pool2d(images_BCHW, 8))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> FluxPolicy:
    found = models.load(tiny.flux(tmp_path_factory.mktemp("model") / "flux"), device="cpu", dtype="float32")
    assert isinstance(found, FluxPolicy)
    return found


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture wider than high, of no particular thing."""
    levels = np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    Image.fromarray(levels).save(path)
    return path


def config(*concepts: str | Path, **settings: Any) -> FuseConfig:
    small = {"budget": 8, "batch": 4, "pool": 4, "exemplars": 2, "model": "tiny", "device": "cpu"}
    return FuseConfig(**{"concepts": list(map(str, concepts)), **small, **settings})


def test_a_picture_is_named_by_its_file_and_a_word_by_itself(photo: Path) -> None:
    alone = config("owl", photo)
    assert alone.concepts == ("owl", "photo.png") and alone.pictures == {"photo.png": str(photo)}
    with_word = config(f"crab = {photo}", "owl")
    assert with_word.concepts == ("crab", "owl") and with_word.pictures == {"crab": str(photo)}
    for one in (alone, with_word):
        assert FuseConfig.model_validate(one.model_dump(mode="json")) == one, "a run's recipe is read again"
        assert FuseConfig(**{**one.model_dump(), "concepts": one.typed, "pictures": {}}) == one
    words = config("owl", "a photo of a jpg")
    assert words.pictures == {} and "pictures" not in words.model_dump(), "recipes of words stay as they were"


def test_predictions_are_mixed_unless_a_mixing_is_given(photo: Path) -> None:
    assert config("owl", photo).mixed_by.kind == "velocity"
    assert config("owl", photo, mixing={"kind": "spatial"}).mixed_by.kind == "spatial"
    assert config("owl", "snail").mixed_by.kind == "columns"


def test_the_checkpoints_own_mixing_is_taken_where_none_is_given(photo: Path) -> None:
    assert config("owl", "snail").with_mixing("regions").mixed_by.kind == "regions"
    assert config("owl", "snail").with_mixing(None).mixed_by.kind == "columns"
    assert config("owl", "snail", mixing="tokens").with_mixing("regions").mixed_by.kind == "tokens"
    assert config("owl", "snail", pooled="average").with_mixing("regions").mixed_by.kind == "columns"
    assert config("owl", photo).with_mixing("regions").mixed_by.kind == "velocity"


def test_a_run_records_where_the_picture_lies(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photo.parent)
    assert config("owl", "photo.png").with_full_paths().pictures == {"photo.png": str(photo)}


@pytest.mark.parametrize("kind", ["steps", "velocity", "spatial"])
@pytest.mark.parametrize("word", ["", "crab="])
def test_all_the_weight_on_a_concept_draws_that_concept(
    flux: FluxPolicy, photo: Path, kind: str, word: str
) -> None:
    mixing = mixing_of(flux, CARD, config("owl", f"{word}{photo}", mixing={"kind": kind}))
    owl, shown = torch.eye(2).unsqueeze(2)
    both = render(flux, mixing, torch.stack((owl, shown)), SEEDS)
    words = flux.encode(["A photo of owl", "A photo of crab" if word else ""])
    (square,) = flux.laid_out([read_concept(str(photo))])
    alone = [words[[0]], flux.with_references(words[[1]], [square[None]])]
    near = rounding(torch.float32, PICTURE)
    for number, row in enumerate(alone):
        assert (flux.sample(row, [SEEDS[number]])[0] - both[number]).abs().max() <= near
    assert (flux.sample(words[[1]], [SEEDS[1]])[0] - both[1]).abs().max() > 100 * near, "it is shown"
    half = render(flux, mixing, torch.full((2, 2, 1), 0.5), SEEDS)
    assert (half - both).abs().flatten(1).max(dim=1).values.min() > 100 * near


def test_rows_with_and_without_references_keep_what_is_theirs() -> None:
    few, many = torch.rand(1, 4, 2, 2), (torch.rand(2, 4, 4, 2), torch.rand(2, 4, 2, 2))
    parts = [
        Conditioning(torch.rand(1, 3, 5)),
        Conditioning(torch.rand(2, 3, 5), references=many),
        Conditioning(torch.rand(1, 3, 5), references=(few,)),
    ]
    rows = Conditioning.cat(parts)
    assert rows.sizes.tolist() == [[[0, 0], [0, 0]], *[[[4, 2], [2, 2]]] * 2, [[2, 2], [0, 0]]]
    found = {tuple(at.tolist()): part.references for at, part in rows.by_shape()}
    assert {at: len(kept) for at, kept in found.items()} == {(0,): 0, (1, 2): 2, (3,): 1}
    assert all(torch.equal(a, b) for a, b in zip(found[1, 2], many, strict=True))
    assert torch.equal(found[(3,)][0], few)
    turned = Conditioning.cat([rows[[3]], rows[[0]]])
    assert [len(part.references) for _, part in turned.by_shape()] in ([1, 0], [0, 1])


def test_a_model_that_leaves_the_picture_out_of_a_batch_does_not_conform(flux: FluxPolicy) -> None:
    conformance.check_renderer(flux)

    class Blind(FluxPolicy):
        """Shows pictures to a batch in which all rows have one, and to no other."""

        def sample(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
            absent = conditioning.sizes_BN2 is not None and bool((conditioning.sizes_BN2 == 0).any())
            return super().sample(
                replace(conditioning, references=(), sizes_BN2=None) if absent else conditioning, seeds
            )

    blind = models.load(flux.checkpoint.folder, device="cpu", dtype="float32")
    blind.__class__ = Blind
    with pytest.raises(ConformanceError) as caught:
        conformance.check_renderer(blind)
    assert caught.value.check == "pictures"


def test_children_are_compared_with_the_picture_itself(flux: FluxPolicy, photo: Path) -> None:
    world = FusionWorld(flux, PooledScorer(), CARD)
    drawn, own = world.exemplars("owl", 3), world.exemplars("photo.png", 3, str(photo))
    assert (len(drawn.images_MCHW), len(drawn.seeds), len(own.images_MCHW), own.seeds) == (3, 3, 1, ())
    assert torch.equal(own.images_MCHW[0], on_canvas(read_concept(str(photo)), 32, 32))
    assert (own.images_MCHW[0, :, 0] > 0.99).all(), "nothing is cut off: white above and below"
    similarities_BN = world.scorer.similarities(own.images_MCHW, [drawn.features_ME, own.features_ME])
    assert similarities_BN.similarities_BN[0, 1] == pytest.approx(1, abs=rounding(torch.float32, 32))


@pytest.mark.parametrize(
    ("mixing", "says"),
    [
        ("columns", "mixing=columns mixes what the model makes of words, where photo.png has no place"),
        ("tokens", "take --mixing steps or velocity or spatial"),
        ("regions", "mixing=regions mixes"),
    ],
)
def test_a_mixing_of_words_has_no_place_for_a_picture(photo: Path, mixing: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        require_mixing(FluxPolicy, "tiny", config("owl", photo, mixing={"kind": mixing}))
    assert "\n" not in str(caught.value)


def test_a_model_that_reads_words_alone_is_told_so(photo: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"tiny takes no picture for a concept: .*SD3Policy.*--model toy:flux"
    ):
        require_mixing(SD3Policy, "tiny", config("owl", photo))
    model = str(tiny.sd3(tmp_path / "sd3", card=tiny.SD3_CARD))
    with pytest.raises(PixrlError, match="takes no picture for a concept"):
        api.fuse(["owl", str(photo)], model=model, budget=4, batch=2, out=tmp_path / "run", live=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["nosuch.png", "photo.heic"])
def test_a_picture_that_cannot_be_read_is_named_before_work_begins(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name.endswith("heic"):
        file.write_bytes(b"\0\0\0 ftypheic")
    with pytest.raises(InputError, match=name) as caught:
        require_mixing(FluxPolicy, "tiny", config("owl", file))
    assert "\n" not in str(caught.value)


def test_concepts_and_pictures_belong_together(photo: Path) -> None:
    with pytest.raises(InputError, match=r"'photo\.png' is given twice"):
        api.fuse([str(photo), str(photo)])
    with pytest.raises(ConfigError, match="pictures names 'crab', which is none of the concepts owl, snail"):
        api.fuse(["owl", "snail"], pictures={"crab": str(photo)})


def test_the_doctor_counts_what_the_picture_takes(flux: FluxPolicy, photo: Path) -> None:
    given = {"kind": "fuse", "model": str(flux.checkpoint.folder), "clip": "toy:clip", "device": "cpu"}
    # in bfloat16 the transformer takes more than the decoder; in float32, which auto may be, the decoder of so tiny a
    # model takes most, with a picture as without
    given |= {"segmenter": "toy:segmenter", "mixing": {"kind": "velocity"}, "dtype": "bfloat16"}
    words, shown = (api.examine(given | {"concepts": ["owl", other]}) for other in ("snail", str(photo)))
    assert shown.can_run and words.drawing is not None and shown.drawing is not None
    assert shown.drawing.each > 1.1 * words.drawing.each


@pytest.fixture(scope="module")
def finished(flux: FluxPolicy, photo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing broke off, of a picture that lies beside it."""
    folder = tmp_path_factory.mktemp("whole")
    own = Path(shutil.copy(photo, folder / "own.png"))
    fuse_job.start(of_folder(flux, "owl", own), folder / "run", world=world_of(flux))
    return folder / "run"


def of_folder(flux: FluxPolicy, *concepts: str | Path) -> FuseConfig:
    return config(*concepts, model=str(flux.checkpoint.folder), dtype="float32")


def world_of(flux: FluxPolicy) -> FusionWorld:
    return FusionWorld(flux, PooledScorer(), CARD, clip="fake", segmenter="fake")


def test_a_run_holds_the_picture_and_says_how_to_make_it_again(finished: Path, photo: Path) -> None:
    assert check.check(finished).findings == ()
    run = fuse_job.open_finished(finished)
    assert set(run.rows[0].scores) == {"S/owl", "S/own.png", "reward", "balance"}
    assert [file.name for file in fuse_job.exemplar_files(run.folder, "own.png")] == ["own.png-00.png"]
    own = str(finished.parent / "own.png")
    assert command_line(run).startswith(f"pixrl fuse owl {own} ")
    assert f"['owl', {own!r}]" in python_lines(run)
    write_fuse_report(run)
    page = run.folder.report_path.read_text(encoding="utf-8")
    assert "own.png" in page and "velocity" in page
    assert json.loads((finished / "world.json").read_text())["prompts"]["own.png"] == ""


def test_broken_off_it_ends_the_same(finished: Path, flux: FluxPolicy, tmp_path: Path) -> None:
    class Stops(PooledScorer):
        def similarities(self, images_BCHW: Tensor, exemplars: Sequence[Tensor]) -> Any:
            if self.scored >= 4:
                raise KeyboardInterrupt
            return super().similarities(images_BCHW, exemplars)

    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        broken = FusionWorld(flux, Stops(), CARD, clip="fake", segmenter="fake")
        fuse_job.start(of_folder(flux, "owl", finished.parent / "own.png"), path, world=broken)
    fuse_job.go_on(path, world=world_of(flux))
    same_run(finished, path)


def test_a_child_is_drawn_again(finished: Path, tmp_path: Path) -> None:
    drawn = draw.draw(finished, draw.DrawRequest(child=5, count=1), tmp_path / "drawn")
    before = Image.open(finished / str(fuse_job.open_finished(finished).rows[5].file))
    (file,) = drawn
    assert np.abs(np.asarray(before).astype(int) - np.asarray(Image.open(file)).astype(int)).max() <= 1


def test_another_picture_is_refused(finished: Path, flux: FluxPolicy, tmp_path: Path) -> None:
    own, run = Path(shutil.copy(finished.parent / "own.png", tmp_path)), tmp_path / "run"
    fuse_job.start(of_folder(flux, "owl", own), run, world=world_of(flux))
    Image.new("RGB", (64, 64), "red").save(own)
    for act in (
        lambda: fuse_job.go_on(run, world=world_of(flux)),
        lambda: draw.draw(run, draw.DrawRequest(child=0, count=1), tmp_path / "drawn"),
    ):
        with pytest.raises(
            CheckpointError, match=r"own\.png changed or gone since the run .* began. Put it back"
        ):
            act()
    own.unlink()
    with pytest.raises(CheckpointError, match=r"own\.png changed or gone"):
        draw.draw(run, draw.DrawRequest(child=0, count=1), tmp_path / "drawn")
    with pytest.raises(PixrlError, match=r"own\.png"):
        fuse_job.go_on(run, world=world_of(flux))
