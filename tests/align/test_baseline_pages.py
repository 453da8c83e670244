"""What the pages say of the baselines: SFT learns from no score, RPO from the frozen base's pictures."""

from pathlib import Path

from pixrl.report.align import align_view, method_parts, write_align_report
from pixrl.report.figures import changes_of
from pixrl.report.model_card import Facts, write_card
from pixrl.runs.config import AlignConfig, PersonalizeConfig
from pixrl.runs.folder import RunFolder
from pixrl.runs.record import shape_of
from tests.align.synthetic import run_folder, settings

NOISE = {"kind": "noise", "noises": 12}
FACTS = Facts("x.safetensors", "current", 4, "diffusers", "FluxPipeline")


def baseline(path: Path, kind: str) -> tuple[RunFolder, AlignConfig]:
    config = settings(steps=4, loss={"kind": kind, "timesteps": 2}, exploration=NOISE)
    return run_folder(path, config, done=4, evaluated=(0, 4)), config


def test_sft_learns_from_no_score_and_no_page_says_so(tmp_path: Path) -> None:
    folder, config = baseline(tmp_path / "run", "sft")
    page = write_align_report(folder.path).read_text()
    roles = {change.role for change in changes_of(folder, shape_of(config))}
    assert roles == {"only measured", "spread"}
    assert '<div class="soft small">Trained on' not in page and '<div class="soft small">Never' not in page
    assert "Only measured: no score is learned from." in page
    assert "the targets, which nobody drew" in page and "learning signal" not in page
    titles = [panel.title for panel in align_view(folder)["panels"]]
    assert "Gradient norm" in titles and "Groups without a signal" not in titles
    card = write_card(folder, config, FACTS, [])
    assert "supervised flow matching on target pictures (no score was learned from)" in card
    assert "reinforcement" not in card and "| geneval | only measured |" in card
    assert "weight 1" not in card and "taught nothing" not in card


def test_rpo_says_who_drew_its_candidates(tmp_path: Path) -> None:
    folder, _ = baseline(tmp_path / "run", "rpo")
    page = write_align_report(folder.path).read_text()
    assert (
        page.count("candidates drawn by the frozen base: they do not improve") == 3
    )  # two rewards, one group
    judged = [{"name": "a", "kind": "clip_text", "options": {"model": "toy:clip"}}]
    for shown, said in ((False, "without references"), (True, "with references")):
        loss = {"kind": "rpo", "timesteps": 2, "shown": shown}
        config = PersonalizeConfig.model_validate({"rewards": judged, "loss": loss})
        assert f"candidates drawn by the frozen base, {said}" in dict(method_parts(config))["loss"]
