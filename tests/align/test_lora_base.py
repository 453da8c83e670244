"""A run on top of a LoRA that others trained: aligned, evaluated, resumed, exported, and examined before it starts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import pixrl
from pixrl import api, cli, models
from pixrl.errors import CheckpointError, ConfigError
from pixrl.models.lora.files import read_lora
from pixrl.models.sd3 import SD3Policy
from pixrl.models.slots import Slot, added, slot_lora
from pixrl.report.export import Format, export
from pixrl.runs import checkpoint
from pixrl.runs.config import LoraSettings, load_recipe
from pixrl.runs.measure import open_run
from tests import tiny
from tests.align.parts import recipe
from tests.tiny_lora import TARGETS, peft_folder, tensors
from tests.tolerance import PICTURE, agree

OWL, SNAIL = "a red owl", "two blue snails"
MODULES = 2 * len(TARGETS) - 1
"""Of two blocks; SD3's last one has no to_add_out."""


@pytest.fixture(scope="module")
def adapter(sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT folder as Flow-GRPO publishes one: rank 32, alpha 64, the attention."""
    folder = tmp_path_factory.mktemp("published") / "lora"
    peft_folder(folder, sd3_folder, r=32, lora_alpha=64)
    return folder


def on_top(adapter: Path, sd3_folder: Path, prompt_file: Path, **changes: Any) -> dict[str, Any]:
    lora = {"base": str(adapter), "rank": 3, "alpha": 12, "targets": ["attn.to_q", "ff.net.2"]}
    settings = {"steps": 1, "optimizer": {"lr": 0.05, "ema": None}, "lora": lora} | changes
    return recipe(sd3_folder, prompt_file, **settings)


@pytest.fixture(scope="module")
def run(adapter: Path, sd3_folder: Path, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = on_top(adapter, sd3_folder, prompt_file)
    return pixrl.align(made, out=tmp_path_factory.mktemp("runs") / "continued").run


def fresh(folder: Path, lora: Path | None = None) -> SD3Policy:
    found = models.load(folder, device="cpu", dtype="float32", lora=lora)
    assert isinstance(found, SD3Policy)
    return found


def latents(policy: SD3Policy) -> Tensor:
    """What is drawn, before the decoder clamps it."""
    with torch.no_grad():
        return policy._integrate(policy.encode([OWL, SNAIL]), [1, 2])


def test_a_published_adapter_is_trained_on(run: Path, adapter: Path, sd3_folder: Path) -> None:
    """The reference of the run is the model with the adapter, and its slot moved away from that."""
    shop = open_run(run)
    with shop.policy.slot(Slot.REFERENCE):
        begun = latents(shop.policy)
    assert agree(begun, latents(fresh(sd3_folder, adapter)), PICTURE)
    base = latents(fresh(sd3_folder))
    assert (begun - base).norm() > 0.05 * base.norm()
    with shop.policy.slot(Slot.CURRENT):
        assert (latents(shop.policy) - begun).norm() > 1e-3 * begun.norm()
    start = json.loads((run / "start.json").read_text())
    assert len(start["merged"]) == 1
    said = next(note for note in start["notes"] if note.startswith("merged into the model: "))
    assert f"{adapter}: {MODULES} LoRA modules of rank 32 and strength 2, by adapter_config.json" in said
    assert f"on top of {adapter}" in (run / "report.html").read_text()


def test_a_published_adapter_is_evaluated(
    adapter: Path, sd3_folder: Path, prompt_file: Path, run: Path
) -> None:
    """The evaluation before the first step is of the adapter: other scores than those of the bare model."""
    plain = pixrl.align(recipe(sd3_folder, prompt_file, steps=1), out=run.parent / "plain")
    first = api.AlignResult(run).evaluations[0]
    assert first["step"] == plain.evaluations[0]["step"] == 0
    assert first["python/mean"] != plain.evaluations[0]["python/mean"]


@pytest.mark.parametrize("layout", [Format.DIFFUSERS, Format.COMFYUI])
def test_an_export_holds_both_and_comes_back(
    run: Path, adapter: Path, sd3_folder: Path, tmp_path: Path, layout: Format
) -> None:
    done = export(run, out=tmp_path, layout=layout)
    saved = checkpoint.latest(run)
    assert saved is not None
    state = {key.removeprefix("slots/"): x for key, x in checkpoint.load(saved)[0].items() if "slots/" in key}
    wanted = added([read_lora(adapter, "sd3"), slot_lora(state, "current", 12 / 3)])
    found = read_lora(done.file, "sd3")
    for module, (down, up) in found.items():
        change = (
            wanted[module][1] @ wanted[module][0] if module in wanted else torch.zeros(len(up), down.shape[1])
        )
        assert agree(up @ down, change, 8 * 35, scale=8.0), module
    assert found.keys() >= wanted.keys()
    shop = open_run(run)
    with shop.policy.slot(Slot.CURRENT):
        assert agree(latents(fresh(sd3_folder, done.file)), latents(shop.policy), PICTURE)


def test_an_export_has_one_rank_and_says_what_it_was_checked_with(
    run: Path, sd3_folder: Path, tmp_path: Path
) -> None:
    """Modules of rank 32, 35 and 3 in the run."""
    import diffusers

    done = export(run, out=tmp_path)
    assert {len(x) for key, x in load_file(done.file).items() if "lora_A" in key} == {35}
    with safe_open(done.file, "pt") as opened:
        header = opened.metadata()
    assert header["checked_with"] == f"diffusers {diffusers.__version__}"
    said = json.loads(header["lora_adapter_metadata"])
    assert said["transformer.r"] == said["transformer.lora_alpha"] == 35
    card = done.card.read_text()
    assert (
        f"was checked with diffusers {diffusers.__version__}" in card and "has rank 35 and strength 1" in card
    )
    other = fresh(sd3_folder)
    other.pipeline.load_lora_weights(str(tmp_path), weight_name=done.file.name)
    shop = open_run(run)
    with shop.policy.slot(Slot.CURRENT):
        assert agree(latents(other), latents(shop.policy), PICTURE)


def test_an_export_that_reads_back_as_something_else_is_removed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixrl.report import export as exporting

    def doubled(lora: Any, kind: str) -> dict[str, Tensor]:
        return {key: 2 * x if "lora_B" in key else x for key, x in to_diffusers(lora, kind).items()}

    to_diffusers = exporting.to_diffusers
    monkeypatch.setattr(exporting, "to_diffusers", doubled)
    with pytest.raises(CheckpointError, match="as another change than was written, so it was removed"):
        export(run, out=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_another_adapter_below_is_noticed(run: Path, adapter: Path, sd3_folder: Path, tmp_path: Path) -> None:
    """Neither export nor resume mixes a run with another adapter at the same place."""
    copied, own = (
        Path(shutil.copytree(run, tmp_path / "run")),
        Path(shutil.copytree(adapter, tmp_path / "lora")),
    )
    for name in ("recipe.yaml", "start.json"):
        text = (copied / name).read_text()
        (copied / name).write_text(text.replace(str(adapter), str(own)))
    assert export(copied).file.is_file()
    config = own / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 64', '"lora_alpha": 32'))
    with pytest.raises(CheckpointError, match=r"is not the LoRA that .* was trained on top of"):
        export(copied, out=tmp_path / "again")
    with pytest.raises(CheckpointError, match="is another model"):
        api.resume(copied, ["steps=2"], live=False)


def test_resumed_it_goes_on_from_the_same_base(
    adapter: Path, sd3_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    made = on_top(adapter, sd3_folder, prompt_file, evaluation={"prompts": 1})
    whole = pixrl.align(made | {"steps": 2}, out=tmp_path / "whole").run
    half = pixrl.align(made, out=tmp_path / "half").run
    api.resume(half, ["steps=2"], live=False)
    ends = [checkpoint.latest(one) for one in (whole, half)]
    assert ends[0] is not None and ends[1] is not None
    one, two = (checkpoint.load(end)[0] for end in ends if end is not None)
    assert all(torch.equal(one[key], two[key]) for key in one if key.startswith("slots/"))


def test_the_doctor_says_what_will_be_merged(
    adapter: Path, sd3_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    found = api.examine(on_top(adapter, sd3_folder, prompt_file))
    assert found.can_run, found.problems
    said = f"lora.base {adapter}: {MODULES} LoRA modules of rank 32 and strength 2, by adapter_config.json; merged"
    assert any(note.startswith(said) for note in found.notes)
    other = tiny.sd3(tmp_path / "other", with_t5=True, card=tiny.SD3_CARD)
    save_file(tensors("transformer_blocks.7.attn.to_q"), tmp_path / "x.safetensors")
    for file, message in (
        (
            tmp_path / "x.safetensors",
            "does not fit this transformer: transformer_blocks.7.attn.to_q is missing",
        ),
        (tmp_path / "no.safetensors", "There is no LoRA file or folder"),
    ):
        wrong = api.examine(on_top(file, other, prompt_file))
        assert not wrong.can_run
        assert [message in one.message for one in wrong.problems] == [True]


@pytest.mark.parametrize("command", ["align", "doctor", "selfcheck"])
@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("adapter_model.bin", "is a pickle (torch.save)"),
        ("x" * 5000, "cannot be looked for: File name too long"),
        ("jieliu/SD3.5M", "hf download jieliu/SD3.5M --local-dir jieliu/SD3.5M"),
    ],
    ids=["pickle", "long", "hub"],
)
def test_the_commands_end_in_one_sentence(
    command: str,
    base: str,
    message: str,
    sd3_folder: Path,
    prompt_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.save(tensors(), tmp_path / "adapter_model.bin")
    made = tmp_path / "recipe.yaml"
    made.write_text(json.dumps({"kind": "align", **recipe(sd3_folder, prompt_file)}))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, [command, str(made), "--set", f"lora.base={base}"])
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert isinstance(done.exception, SystemExit)
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "runs").exists()


def test_the_former_name_of_the_setting() -> None:
    def read(kind: str = "personalize", **settings: Any) -> LoraSettings:
        return load_recipe({"kind": kind, "rewards": [{"name": "geneval"}], **settings}).lora

    former = read(references={"lora": "uno.safetensors"}, lora={"rank": 8})
    assert former == read(lora={"base": "uno.safetensors", "rank": 8})
    assert (former.base, former.rank) == ("uno.safetensors", 8)
    assert read(references={"lora": None}).base is None
    with pytest.raises(ConfigError, match=r"references\.lora \(a\) is the former name of lora\.base \(b\)"):
        read(references={"lora": "a"}, lora={"base": "b"})
    with pytest.raises(ConfigError, match=r"Unknown setting references"):
        read("align", references={"lora": "a"})


def test_flow_grpos_targets_are_what_a_run_trains_too() -> None:
    assert sorted(TARGETS) == sorted(SD3Policy.lora_targets)
