"""The card of a personalize run says that plain pipelines show no references; its code draws with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pixrl
from pixrl import models
from pixrl.data.pictures import read_picture, to_tensors
from pixrl.models.flux import FluxPolicy, Preset
from pixrl.models.lora.files import read_lora
from pixrl.report.export import Format, export
from pixrl.report.model_card import in_unos_code
from pixrl.runs import checkpoint
from tests.personalize.test_job import recipe
from tests.tolerance import PICTURE, agree


@pytest.fixture(scope="module")
def run(flux_folder: Path, subjects: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = recipe(
        flux_folder,
        subjects,
        steps=1,
        optimizer={"lr": 0.05, "ema": None},
        references={"count": 1, "side": 48, "preset": "kontext", "shift": "uno"},
        resolution="48x32",
    )
    return pixrl.personalize(made, out=tmp_path_factory.mktemp("runs") / "rex").run


def blocks(card: Path) -> list[str]:
    parts = card.read_text().split("## Use")[1].split("\n## ")[0].split("```python\n")[1:]
    return [part.split("```")[0] for part in parts]


def test_comfyui_shows_no_references(run: Path, tmp_path: Path) -> None:
    card = export(run, out=tmp_path, layout=Format.COMFYUI).card
    assert "ComfyUI draws with these weights, but shows the model no reference pictures" in card.read_text()
    assert (
        "`pixrl export RUN --format diffusers` writes to `RUN/export/diffusers/README.md`" in card.read_text()
    )
    assert blocks(card) == []


def test_the_card_counts_what_was_evaluated_and_shows_the_subject(
    flux_folder: Path, subjects: Path, tmp_path: Path
) -> None:
    """The recipe asks for 16 prompts, the folder has three; the evaluation's are those of training."""
    rex = subjects / "rex"
    made = recipe(
        flux_folder, rex, steps=1, evaluation={"prompts": 16, "per_prompt": 2, "source": f"{rex}/."}
    )
    run = pixrl.personalize(made, out=tmp_path / "run").run
    card = export(run, out=tmp_path / "card").card.read_text()
    assert (
        "Means over 6 pictures of 3 prompts of `" in card and "that training saw too, from the same" in card
    )
    assert "training file" not in card and "trained to draw rex (dog)" in card
    assert "| prompt | subject | before | after |" in card
    assert "| ![reference](images/0000-reference.png) rex (dog) |" in card
    assert (tmp_path / "card/images/0000-reference.png").is_file()


def test_subjects_that_were_only_evaluated_are_not_said_to_be_trained_on(
    flux_folder: Path, subjects: Path, tmp_path: Path
) -> None:
    evaluation = {"prompts": 2, "source": str(subjects / "tom")}
    made = recipe(flux_folder, subjects / "rex", steps=1, evaluation=evaluation)
    done = pixrl.personalize(made, out=tmp_path / "run")
    card = export(done.run).card.read_text()
    assert "trained to draw rex (dog)." in card and "/tom` that training did not see" in card
    assert "-reference.png) tom (cat) |" in card
    assert "personalized on rex (dog)</span></h1>" in done.report.read_text()


def test_the_cards_code_draws_with_references(
    run: Path, flux_folder: Path, subjects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    card = export(run, out=tmp_path).card
    assert "A plain FluxPipeline draws with these weights, but shows the model no ref" in card.read_text()
    plain, shown = blocks(card)
    assert 'FluxPipeline.from_pretrained("' in plain and ", height=32, width=48)" in plain
    shown = shown.replace('models.load("', 'models.load(dtype="float32", ref="')
    filled = shown.replace('"FOLDER"', repr(str(tmp_path))).replace('"PROMPT"', "'a dog in snow'")
    variables: dict[str, object] = {}
    exec(filled.replace('"PICTURES"', repr(str(subjects / "rex"))), variables)
    drawn, policy = variables["images"], variables["policy"]
    assert isinstance(drawn, torch.Tensor) and isinstance(policy, FluxPolicy)
    assert (policy.preset, policy.reference_side, policy.settings.steps) == (Preset.KONTEXT, 48, 3)
    trained = in_slot(run, flux_folder, policy, variables["conditioning"])
    bare = policy.sample(policy.encode(["a dog in snow"]), [0])
    assert agree(drawn, trained, PICTURE)  # the LoRA is merged into the weights here, beside them there
    assert not agree(drawn, bare, 2 * PICTURE)
    with Image.open(tmp_path / "picture.png") as saved:
        assert saved.size == (48, 32)


def test_the_cards_code_draws_what_the_report_shows(
    flux_folder: Path, subjects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same seed, the last evaluation's picture; Euler steps draw another one."""
    monkeypatch.chdir(tmp_path)
    made = recipe(
        flux_folder,
        subjects / "rex",
        steps=1,
        sampling={"steps": 4, "solver": "dpm"},
        loss={"kind": "nft", "timesteps": 2},
        optimizer={"lr": 0.05, "ema": None},
        resolution=32,
    )
    run = pixrl.personalize(made, out="rex").run
    shown = json.loads((run / "samples/gallery.json").read_text())[0]
    code = blocks(export(run).card)[1].replace("[0], solver", f"[{shown['seed']}], solver")
    for name, value in {
        "FOLDER": run / "export/diffusers",
        "PROMPT": shown["prompt"],
        "PICTURES": subjects / "rex",
    }.items():
        code = code.replace(f'"{name}"', repr(str(value)))
    variables: dict[str, Any] = {}
    exec(code.replace('models.load("', 'models.load(dtype="float32", ref="'), variables)
    policy, drawn = variables["policy"], read_picture(tmp_path / "picture.png")
    expected = to_tensors([read_picture(run / "samples/step-000001/0000.png")])[0]
    assert (to_tensors([drawn])[0] - expected).abs().mean() < 1e-3
    euler = policy.sample(variables["conditioning"], [shown["seed"]])[0]
    assert (euler - expected).abs().mean() > 5e-3


def in_slot(run: Path, flux_folder: Path, other: FluxPolicy, conditioning: object) -> torch.Tensor:
    """What the run's own slot draws of a conditioning."""
    policy = models.load(flux_folder, dtype="float32", steps=3, resolution="48x32")
    assert isinstance(policy, FluxPolicy)
    policy.place(preset=other.preset, shift=other.shift, side=other.reference_side)
    slots = policy.attach_lora(rank=4, alpha=8)
    saved = checkpoint.latest(run)
    assert saved is not None
    tensors, _ = checkpoint.load(saved)
    slots.load_state({k.removeprefix("slots/"): x for k, x in tensors.items() if k.startswith("slots/")})
    with policy.slot("current"):
        return policy.sample(conditioning, [0])


def test_unos_layout_is_the_same_change(run: Path, tmp_path: Path) -> None:
    """The file that UNO's code and `lora.base` read adds what diffusers' file adds, module by module."""
    uno, plain = (
        export(run, out=tmp_path / layout, layout=layout) for layout in (Format.UNO, Format.DIFFUSERS)
    )
    assert uno.file.name == "dit_lora.safetensors" and "lora.base" in uno.card.read_text()
    found, expected = read_lora(uno.file, "flux"), read_lora(plain.file, "flux")
    assert expected and all(not up.any() for name, (_, up) in found.items() if name not in expected)
    for module, (down, up) in expected.items():
        change = up @ down
        assert change.abs().max() > 0
        assert agree(found[module][1] @ found[module][0], change, 8 * len(down)), module


def test_the_card_says_what_unos_code_needs(run: Path, tmp_path: Path) -> None:
    done = export(run, out=tmp_path, layout=Format.UNO)
    card, file = done.card.read_text(), load_file(done.file)
    assert {len(x) for name, x in file.items() if ".down." in name} == {12}
    assert {x.shape[1] for name, x in file.items() if ".up." in name} == {12}
    assert "has rank 12, where its `app.py` sets 512" in card and "`lora_rank=12`" in card
    assert "its code takes it" not in card and "UNO's own code needs a change for it" in card
    processors = {"qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2"}
    keys = {f"double_blocks.0.processor.{name}" for name in processors}
    keys |= {f"single_blocks.0.processor.{name}" for name in ("qkv_lora", "proj_lora")}
    assert file.keys() == {f"{key}.{side}.weight" for key in keys for side in ("down", "up")}
    plain = export(run, out=tmp_path / "plain").card.read_text()
    assert "lora_rank" not in plain


def test_a_file_of_unos_rank_loads_as_it_is() -> None:
    assert "has rank 512, the rank that its `app.py` sets" in in_unos_code("lora.safetensors", 512)
