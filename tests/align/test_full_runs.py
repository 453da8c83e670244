"""`train: full` as a run: resumed, sharded, drawn, exported, estimated; what is refused before work begins."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

import pixrl
from pixrl import api, cli, models
from pixrl.algorithms.optim import adamw, moments, restore_moments
from pixrl.algorithms.world import BUCKET, Team
from pixrl.device import Precision
from pixrl.doctor.trained import FLOAT, bytes_on_process
from pixrl.errors import CheckpointError, ConfigError, InputError
from pixrl.models.memory.estimate import PeakMeter
from pixrl.models.memory.plan import Base, MemoryPlan
from pixrl.models.memory.sharding import gathered_bytes, transformer_blocks, whole
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.models.sd3 import SD3Policy
from pixrl.models.slots import Slot
from pixrl.report.export import Format, export
from pixrl.runs.config import load_recipe
from pixrl.runs.measure import open_run, sample
from pixrl.runs.planner import trial
from tests.align.launching import Launch
from tests.align.parts import GRPO, final, recipe, with_reward
from tests.align.test_doctor import NEAR
from tests.align.test_full import ALL, OWL, load, slots_of
from tests.align.test_processes import EPS
from tests.align.test_sharding import FULL, NONE, is_divided, write_recipe
from tests.tolerance import (
    GRADIENT,
    MODEL,
    STORES,
    agree,
    agree_after_adam,
    agree_in_norm,
    rounding,
)


def full(made: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The recipe, with all weights trained."""
    return {name: value for name, value in made.items() if name != "lora"} | {"train": "full"} | changes


@pytest.fixture(scope="module")
def run(sd3_folder: Path, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a large learning rate, so that the slots differ from the base and from each other."""
    made = full(recipe(sd3_folder, prompt_file, steps=2, optimizer={"lr": 5e-3, "ema": 0.5}))
    return pixrl.align(made, out=tmp_path_factory.mktemp("runs") / "bright").run


def weights(run: Path, slot: str) -> dict[str, Tensor]:
    return slots_of({name.removeprefix("slots/"): x for name, x in final(run).items()}, slot)


SAME = rounding(torch.float32, MODEL, scale=10)
"""How far velocities of equal weights that lie elsewhere may be apart: theirs are up to ten."""


def test_the_first_update_is_on_policy_and_begins_at_the_base(run: Path) -> None:
    first, second = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    checks = {name: x for name, x in first.items() if name.startswith("on_policy_deviation/")}
    ((name, deviation),) = checks.items()
    assert "/float32/" in name and deviation <= SAME
    for name in ("kl", "old_distance"):
        assert first[name] <= SAME**2 < second[name]
    assert first["gradient_disagreement"] == 0


def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped(
    run: Path, sd3_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    made = full(recipe(sd3_folder, prompt_file, steps=1, optimizer={"lr": 5e-3, "ema": 0.5}))
    stopped = pixrl.align(made, out=tmp_path / "run").run
    assert {name.split("/")[1] for name in final(stopped) if name.startswith("slots/")} == {
        "current",
        "old",
        "ema",
    }
    api.resume(stopped, ["steps=2"])
    one, other = final(run), final(stopped)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def alike(one: Path, other: Path, base: Path) -> None:
    """But for rounding, two runs ended with the same weights and moments."""
    start = {name: x.detach() for name, x in load(base).denoiser.named_parameters()}
    for slot in ("current", "old", "ema"):
        assert agree_after_adam(weights(one, slot), weights(other, slot), start, GRADIENT), slot
    rest = [{k: x for k, x in final(run).items() if k.startswith("optimizer/")} for run in (one, other)]
    assert agree_after_adam(*rest, {name: torch.zeros_like(x) for name, x in rest[0].items()}, GRADIENT)


@pytest.mark.slow
def test_sharded_whole_and_alone_end_alike_though_the_number_of_processes_changes(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, launch: Launch
) -> None:
    """Two processes with shards, one without, two with shards, against two that each hold all weights."""
    made = full(recipe(sd3_folder, prompt_file, optimizer={"lr": 1e-3, "eps": EPS}))
    made["machine"] |= {"train_batch": 2}
    file = write_recipe(tmp_path, made)
    mixed, whole = tmp_path / "mixed", tmp_path / "whole"
    assert launch(2, "align", file, "--out", str(mixed), "--steps", "1", *FULL) == [0, 0]
    assert is_divided(mixed)
    assert launch(1, "resume", str(mixed), "--set", "steps=2", *NONE) == [0]
    assert launch(2, "resume", str(mixed), "--set", "steps=3", *FULL) == [0, 0]
    assert launch(2, "align", file, "--out", str(whole), "--steps", "3", *NONE) == [0, 0]
    assert not is_divided(whole)
    alike(mixed, whole, sd3_folder)
    metrics = [json.loads(line) for line in (mixed / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["gradient_disagreement"] == 0 and metrics[0]["kl"] <= SAME**2


@pytest.mark.slow
def test_shards_bear_a_process_whose_pictures_all_fail(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, launch: Launch
) -> None:
    made = full(recipe(sd3_folder, prompt_file, **(GRPO | with_reward("fails_on_the_first_process"))))
    made |= {"steps": 2}
    made["optimizer"] |= {"eps": EPS, "ema": 0.5}
    made["machine"] |= {"train_batch": 1}
    file = write_recipe(tmp_path, made)
    runs = [tmp_path / name for name in ("full", "none")]
    for run, how in zip(runs, (FULL, NONE), strict=True):
        assert launch(2, "align", file, "--out", str(run), *how) == [0, 0]
    start = {name: x.detach() for name, x in load(sd3_folder).denoiser.named_parameters()}
    for slot in ("current", "ema"):
        assert agree_after_adam(weights(runs[0], slot), weights(runs[1], slot), start, GRADIENT)
    assert {name.split("/")[1] for name in final(runs[0]) if name.startswith("slots/")} == {"current", "ema"}


def test_each_process_holds_a_part_and_each_host_a_copy(sd3_folder: Path, launch: Launch) -> None:
    assert launch(2, str(sd3_folder), "part", act=_hold) == [0, 0]


@pytest.mark.slow
def test_two_hosts_of_two_hold_a_copy_each(sd3_folder: Path, launch: Launch) -> None:
    assert launch(4, str(sd3_folder), "host", act=_hold) == [0, 0, 0, 0]


def _hold(folder: str, what: str) -> None:
    import os

    if what == "host":
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    team = Team("cpu")
    mesh = team.mesh(trained=True)
    assert mesh.ndim == (2 if what == "host" else 1)
    policy = load(Path(folder))
    whole = load(Path(folder))
    bytes_of = sum(x.nbytes for x in whole.denoiser.parameters())
    slots, same = policy.attach_full(ALL, mesh), whole.attach_full(ALL)
    for denoiser in slots.modules:
        assert all(isinstance(x, DTensor) for x in denoiser.parameters())
        own = sum(x.to_local().nbytes for x in denoiser.parameters())  # type: ignore[attr-defined]
        assert own < 0.6 * bytes_of
    most, seen = gathered_bytes(whole.denoiser, torch.float32), []
    for block in transformer_blocks(policy.denoiser):
        block.register_forward_pre_hook(
            lambda *of_call: seen.append(
                sum(x.nbytes for x in policy.denoiser.parameters() if not isinstance(x, DTensor))
            )
        )
    row = policy.encode([OWL])
    ends = []
    for one in (policy, whole):
        x = one.initial_noise([team.rank])
        loss = one.velocity(x, x.new_full((1,), 0.5), row).square().mean()
        loss.backward()
        assert one.slots is not None
        ends.append([p.grad for p in one.slots.parameters()])
    for part, own in zip(*ends, strict=True):
        assert isinstance(part, DTensor) and own is not None
        assert agree(
            part.full_tensor(), team.sum(own), GRADIENT, scale=1e-30 + float(team.sum(own).abs().max())
        )
    assert 0 < max(seen) < most
    assert all(isinstance(x, DTensor) for x in policy.denoiser.parameters()), "nothing stays gathered"
    optimizer = adamw(slots.parameters(), lr=1e-3)
    optimizer.step()
    saved, state = moments(optimizer), slots.state()
    with (
        torch.no_grad(),
        policy.slot("old"),
    ):  # nothing of the pass may be there when the weights have changed
        policy.velocity(x, x.new_full((1,), 0.5), row)
    same.load_state(state)
    for one in (slots, same):
        one.blend("old", "current", 0.5)
    again = adamw(slots.parameters(), lr=1e-3)
    restore_moments(again, saved)
    for name, x in moments(again).items():
        assert torch.equal(x, saved[name]), name
    for slot in Slot:
        with torch.no_grad(), policy.slot(slot), whole.slot(slot):
            x = policy.initial_noise([5])
            found = [one.velocity(x, x.new_full((1,), 0.5), row) for one in (policy, whole)]
            assert agree(*found, GRADIENT)
    slots.load_state(state)
    assert all(torch.equal(x, state[name]) for name, x in slots.state().items())
    assert slots.state(keep=False) == {} and moments(optimizer, keep=False) == {}


def test_shards_are_gathered_in_the_dtype_of_matrix_products(sd3_folder: Path, launch: Launch) -> None:
    assert launch(2, str(sd3_folder), act=_compute_in_half) == [0, 0]


def _compute_in_half(folder: str) -> None:
    """In bfloat16 a pass is one without shards but for rounding, the same in every slot; gradients are float32."""
    ends = []
    for mesh in (Team("cpu").mesh(trained=True), None):
        policy = models.load(folder, device="cpu", dtype="bfloat16")
        assert isinstance(policy, SD3Policy)
        slots = policy.attach_full(ALL, mesh)
        row, x, seen = policy.encode([OWL]), policy.initial_noise([3]), set[torch.dtype]()
        block = transformer_blocks(policy.denoiser)[0]
        block.register_forward_pre_hook(
            lambda of, given, seen=seen: seen.update(p.dtype for p in of.parameters())
        )
        velocity = policy.velocity(x, x.new_full((1,), 0.5), row)
        assert seen == {torch.float32 if mesh is None else torch.bfloat16}
        for slot in ALL:
            with torch.no_grad(), policy.slot(slot):
                assert torch.equal(policy.velocity(x, x.new_full((1,), 0.5), row), velocity)
        velocity.square().mean().backward()
        gradients = [p.grad for p in slots.parameters() if p.grad is not None]
        assert {g.dtype for g in gradients} == {torch.float32} == {p.dtype for p in slots.parameters()}
        scale = 1 if mesh is not None else 2  # both processes made the same pass
        ends.append((velocity.detach(), scale * torch.cat([whole(g).flatten() for g in gradients])))
    for sharded, alone in zip(*ends, strict=True):
        assert agree_in_norm(sharded, alone, STORES, dtype=torch.bfloat16)


def pictures(policy: FlowPipelinePolicy) -> Tensor:
    return policy.sample(policy.encode([OWL, "a cat"]), [1, 2])


@pytest.mark.parametrize("slot", ["current", "ema"])
def test_diffusers_loads_the_exported_folder(slot: str, run: Path, sd3_folder: Path, tmp_path: Path) -> None:
    done = export(run, out=tmp_path / "out", slot=Slot(slot))
    assert (done.what, done.file, done.slot.value) == ("All weights", tmp_path / "out/model_index.json", slot)
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "out", text_encoder_3=None, tokenizer_3=None
    )
    expected = weights(run, slot)
    for name, x in pipeline.transformer.named_parameters():
        assert torch.equal(x, expected[name]), name
    base = load(sd3_folder)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        state = getattr(pipeline, part).state_dict()
        assert all(
            torch.equal(state[name], x) for name, x in base.pipeline.components[part].state_dict().items()
        )
    trained = load(sd3_folder)
    trained.denoiser.load_state_dict(expected, strict=False)
    drawn = pictures(load(tmp_path / "out"))  # with the card's settings
    assert torch.equal(drawn, pictures(trained)) and (drawn - pictures(base)).abs().mean() > 1e-3


def test_the_weights_are_one_file_and_the_cards_code_loads_either(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = weights(run, "ema")
    for layout in ("weights", "diffusers"):
        words = ["export", str(run), "--format", layout, "--out", str(tmp_path / layout)]
        said = CliRunner().invoke(cli.app, words)
        assert said.exit_code == 0 and said.output.startswith("All weights (ema, step 2): ")
        card = (tmp_path / layout / "README.md").read_text()
        assert "All weights of the denoiser of" in card and "these weights derive from it" in card
        assert "LoRA" not in card.split("## Recipe")[0]
        code = card.split("## Use")[1].split("```python\n")[1].split("```")[0]
        code = code.replace('"FOLDER', f'"{tmp_path / layout}').replace('"PROMPT"', f'"{OWL}"')
        variables: dict[str, Any] = {}
        exec(code, variables)
        assert (tmp_path / "picture.png").is_file()
        denoiser = variables["pipeline"].transformer
        assert all(torch.equal(x, expected[name]) for name, x in denoiser.named_parameters())
    file = tmp_path / "weights/weights.safetensors"
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["slot"] == "ema"
    assert load_file(file).keys() == variables["pipeline"].transformer.state_dict().keys()


def test_an_export_that_is_read_as_something_else_is_removed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "equal", lambda one, other: False)
    for layout in (Format.WEIGHTS, Format.DIFFUSERS):
        with pytest.raises(CheckpointError, match="read back as something else than was written"):
            export(run, out=tmp_path / layout, layout=layout)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    for layout in (Format.COMFYUI, Format.UNO):
        with pytest.raises(ConfigError, match=r"train: full.*not exported as.*--format diffusers \| weights"):
            export(run, layout=layout)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="something else than an exported pipeline"):
        export(run, out=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    other = shutil.copytree(run, tmp_path / "other")
    lora = (other / "recipe.yaml").read_text().replace("train: full", "train: lora")
    (other / "recipe.yaml").write_text(lora)
    with pytest.raises(
        ConfigError, match=r"a LoRA, which is not exported as weights. Type: --format diffusers"
    ):
        export(other, layout=Format.WEIGHTS)


def test_a_run_is_drawn_with_its_evaluated_weights(run: Path, sd3_folder: Path, tmp_path: Path) -> None:
    drawn = api.draw(run, OWL, n=2, out=tmp_path / "drawn")
    rows = [json.loads(line) for line in (tmp_path / "drawn/manifest.jsonl").read_text().splitlines()]
    assert len(drawn) == 2 and {row["slot"] for row in rows} == {"ema"}
    loaded = open_run(run)
    with loaded.policy.slot("ema"):
        expected = sample(loaded.policy, loaded.policy.encode([OWL]), [rows[0]["seed"]], solver="dpm")
    from pixrl.runs.folder import png_bytes

    assert (tmp_path / "drawn/0000.png").read_bytes() == png_bytes(expected[0])
    plain = load(sd3_folder)
    base = sample(plain, plain.encode([OWL]), [rows[0]["seed"]], solver="dpm")
    assert (base - expected).abs().mean() > 1e-3


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "lora": (
        {"lora": {"rank": 8, "alpha": 8}},
        r"lora.rank and lora.alpha would have no effect: leave them out",
    ),
    "targets": ({"lora": {"targets": ["attn.to_q"]}}, "lora.targets would have no effect: leave it out"),
    "base": ({"machine": {"base": "nf4"}}, "machine.base=nf4 are rounded.*take base: dtype"),
    "offload": (
        {"machine": {"offload": "sequential", "gradient_checkpointing": True}},
        "sequential streams frozen weights.*take machine.offload=parts",
    ),
    "dtype": ({"machine": {"dtype": "float16"}}, "underflow in float16; take machine.dtype=bfloat16"),
    "eight_bit": (
        {"machine": {"shard": "full"}, "optimizer": {"eight_bit": True}},
        "moments cannot be divided among processes.*leave one of them out",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_means_nothing_or_cannot_be_is_refused(name: str) -> None:
    changes, said = MISTAKES[name]
    rewards = [{"name": "clip_text", "options": {"model": "toy:clip"}}]
    made = {"kind": "align", "rewards": rewards}
    with pytest.raises(ConfigError, match=said):
        load_recipe(made | {"train": "full"} | changes)
    load_recipe(made | changes)
    load_recipe(made | {"train": "full", "lora": {"base": "published"}})


def test_frozen_forms_of_weights_cannot_be_trained(sd3_folder: Path) -> None:
    policy = models.load(sd3_folder, device="cpu", dtype="float32", plan=MemoryPlan(base=Base.INT8))
    assert isinstance(policy, SD3Policy)
    with pytest.raises(InputError, match="base=int8: such weights cannot be trained"):
        policy.attach_full(())
    half = load(sd3_folder)
    half.precision = Precision(torch.float16, torch.float16)
    with pytest.raises(InputError, match=r"float16.*take dtype=bfloat16"):
        half.attach_full(())


REWARDS = [{"name": "clip_text", "options": {"model": "toy:clip"}}]


def alive(act: Callable[[], object]) -> int:
    with PeakMeter() as meter:
        act()
    return meter.peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_is_that_of_the_tensors(dtype: str) -> None:
    made = {"kind": "align", "model": "toy:sd3", "rewards": REWARDS, "train": "full"}
    machine = {"device": "cpu", "dtype": dtype, "rollout_batch": 1, "train_batch": 1}
    found = api.examine(made | {"machine": machine})
    assert found.trained is not None and found.training is not None and found.needed is not None
    policy = models.load("toy:sd3", device="cpu", dtype=dtype)
    assert isinstance(policy, SD3Policy)
    loaded = sum(x.nbytes for part in policy.pipeline.components.values() if isinstance(part, nn.Module)
                 for x in part.state_dict().values())  # fmt: skip
    before = sum(x.nbytes for x in policy.denoiser.parameters())
    slots = policy.attach_full(load_recipe(made).copies)
    parameters = slots.parameters()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = adamw(parameters, lr=1e-3)
    optimizer.step()
    trained = found.trained
    assert trained.parameters == sum(x.numel() for x in parameters)
    assert trained.slots == sum(x.nbytes for one in slots.modules for x in one.parameters())
    assert trained.saved == sum(x.nbytes for x in slots.state().values())
    assert trained.gradients == sum(x.nbytes for x in parameters)
    assert trained.optimizer == sum(x.nbytes for x in moments(optimizer).values())
    assert trained.replaced == before
    row = policy.encode([OWL])
    attempt = trial(policy, row, train=True, decode=False)
    peak = alive(lambda: attempt(1))
    assert found.training.first / NEAR <= peak <= found.training.first * NEAR
    rewards = sum(found.rewards.values())
    beside = trained.slots + trained.gradients + trained.optimizer - before
    drawing = found.drawing.first if found.drawing else 0
    expected = (
        loaded
        + rewards
        + beside
        + min(trained.gradients, FLOAT * BUCKET)
        + max(found.training.first, drawing)
    )
    assert found.needed == expected
    # what autocast keeps of float32 weights is gone where they are gathered in the computing dtype
    policy.denoiser.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    for parameter in policy.denoiser.parameters():
        parameter.grad = torch.zeros_like(parameter)
    peak = alive(lambda: attempt(1))
    assert (
        (found.training.first - trained.casts) / NEAR <= peak <= (found.training.first - trained.casts) * NEAR
    )
    assert (trained.casts > 0) is (dtype == "bfloat16")


def test_shards_divide_all_that_training_adds() -> None:
    """Blocks of 100, 64 and 36 numbers and 5 outside."""
    from pixrl.doctor.diagnosis import Trained

    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(side, side, bias=False) for side in (8, 10, 6))
    model.out = nn.Linear(5, 1, bias=False)
    trained = Trained(205, 4 * 820, 3 * 820, 820, 2 * 820 + 4, "all weights, x 4", replaced=820)
    whole = bytes_on_process(trained, model, 1, Precision(torch.float32, None))
    assert whole == 4 * 820 + 820 + 2 * 820 + 4 + 820 - 820
    gathered = (5 + 164) * 4 + 100 * 8
    assert gathered_bytes(model, torch.float32) == gathered
    assert gathered_bytes(model, torch.bfloat16) == (5 + 164) * 2 + 100 * 6
    divided = bytes_on_process(trained, model, 2, Precision(torch.float32, None))
    assert divided == (7 * 820 + 4) // 2 + gathered - 820


def test_the_doctor_says_what_is_trained_and_what_would_save_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pixrl.doctor import estimate as doctor
    from pixrl.models.memory.estimate import Cost

    monkeypatch.setattr(doctor.Estimate, "costs", lambda *given: (Cost(1000, 1000), Cost(3000, 3000)))
    monkeypatch.setattr(doctor, "operations_of", lambda program: 0)
    made = {"kind": "align", "model": "toy:sd3", "rewards": REWARDS, "train": "full",
            "machine": {"device": "cpu", "dtype": "float32"}}  # fmt: skip
    found = api.examine(made, processes=8)
    assert any("all weights, x 4" in line for line in found.lines()) and not found.sharded
    assert found.needed is not None
    sharded = api.examine(made | {"machine": made["machine"] | {"shard": "full"}}, processes=8)
    assert sharded.sharded and sharded.needed is not None and sharded.needed < found.needed
    monkeypatch.setattr(doctor, "free_bytes", lambda device: 8 * found.needed - 8)
    assert api.examine(made, processes=8).sharded
    alone = api.examine(made | {"optimizer": {"eight_bit": True}}, processes=8)
    assert not alone.sharded
    monkeypatch.setattr(doctor, "free_bytes", lambda device: 1000)
    said = next(one.message for one in api.examine(made).problems if "Save memory" in one.message)
    assert "train=lora" in said and "offload=sequential" not in said
