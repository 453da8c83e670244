"""What the doctor says of a recipe, against what happens when it runs."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

import pixrl
from pixrl import api, cli, models
from pixrl.algorithms.optim import adamw
from pixrl.device import Precision
from pixrl.doctor import estimate as doctor
from pixrl.doctor import needs as doctor_needs
from pixrl.doctor.diagnosis import Diagnosis, Need
from pixrl.errors import CheckpointError, ConfigError
from pixrl.hub import Remote
from pixrl.models import loading
from pixrl.models.memory.estimate import Cost, PartSize, PeakMeter, imagined
from pixrl.models.memory.plan import MemoryPlan
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.models.references import TokenReferences
from pixrl.runs.planner import trial
from tests import tiny
from tests.align.parts import recipe

REWARDS = [{"name": "clip_text", "options": {"model": "toy:clip"}}]
NEAR = 1.1
"""What was estimated and the tensors that torch's operators made may differ by this factor."""
FULL = {"device": "cpu", "dtype": "float32"}


def toy(**changes: Any) -> dict[str, Any]:
    return {"kind": "align", "model": "toy:sd3", "rewards": REWARDS, "machine": FULL} | changes


def needs(found: Diagnosis) -> dict[Need, str]:
    return {problem.need: problem.message for problem in found.problems}


def load(ref: str | Path, dtype: str = "float32", **options: Any) -> FlowPipelinePolicy:
    policy = models.load(ref, device="cpu", dtype=dtype, **options)
    assert isinstance(policy, FlowPipelinePolicy)
    return policy


def test_weights_lora_and_optimizer_are_exact() -> None:
    found = api.examine(toy(lora={"rank": 6, "alpha": 6}))
    policy = load("toy:sd3")
    for name, part in found.parts.items():
        tensors = policy.pipeline.components[name].state_dict().values()
        assert part.bytes == sum(x.nbytes for x in tensors), name
        assert part.parameters == sum(x.numel() for x in tensors), name
    slots = policy.attach_lora(rank=6, alpha=6)
    optimizer = adamw(slots.parameters(), lr=1e-3)
    for parameter in slots.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert found.trained is not None
    assert found.trained.parameters == sum(p.numel() for p in slots.parameters())
    assert found.trained.slots == sum(x.nbytes for x in slots.state().values()) == found.trained.saved
    assert found.trained.gradients == sum(p.nbytes for p in slots.parameters())
    moments = [x.nbytes for state in optimizer.state.values() for x in state.values()]
    assert found.trained.optimizer == sum(moments)
    weights = dict(policy.denoiser.named_parameters())
    before = {name: x.data_ptr() for name, x in weights.items()}
    with policy.folded():
        copies = [x.nbytes for name, x in weights.items() if x.data_ptr() != before[name]]
    assert found.trained.folded == sum(copies) > 0


def made(act: Callable[[], object]) -> int:
    """The most bytes of tensors that operators had made and that were alive at a time."""
    with PeakMeter() as meter:
        act()
    return meter.peak


def allocated(act: Callable[[], object]) -> int:
    """The most bytes that torch's allocator has given out at a time, beyond those before: workspaces of kernels too.

    `act` was done before, so that what is made once is not counted.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        act()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(("dtype", "checkpointing"), [("float32", False), ("bfloat16", True)])
def test_activations_are_near_what_the_allocator_gives_out(dtype: str, checkpointing: bool) -> None:
    """They are what operators make. Kernels, which differ by processor, may hold copies of what they work on.

    The estimate computes with zeros in float32, since the model is small, and by shapes alone in bfloat16.
    """
    machine = {"device": "cpu", "dtype": dtype, "gradient_checkpointing": checkpointing}
    small = {"resolution": "64x64"}  # most processors imitate bfloat16, and slowly
    found = api.examine(toy(**small, machine=machine, lora={"rank": 6, "alpha": 6}))
    policy = load("toy:sd3", dtype, **small)
    policy.attach_lora(rank=6, alpha=6)
    if checkpointing:
        policy.checkpoint_gradients()
        plain = api.examine(toy(**small, machine=machine | {"gradient_checkpointing": False}))
        assert found.training.each < 0.3 * plain.training.each  # type: ignore[union-attr]
        assert found.needed < plain.needed  # type: ignore[operator]
    condition = policy.encode(["a photo of an owl"])
    assert found.training is not None
    assert found.drawing is not None
    weights = sum(part.bytes for part in found.parts.values())
    for count in (1, 2):
        for cost, train in ((found.drawing, False), (found.training, True)):
            attempt = trial(policy, condition, train=train, decode=not train)

            def act(attempt: Callable[[int], None] = attempt, count: int = count) -> None:
                attempt(count)
                for parameter in policy.denoiser.parameters():
                    parameter.grad = None

            paper, real, given = cost.bytes(count), made(act), allocated(act)
            assert real / NEAR <= paper <= real * NEAR, (train, count, paper, real)
            assert paper / NEAR <= given <= 2 * paper + weights, (train, count, paper, given)


@pytest.mark.parametrize(
    ("side", "pixels", "dtype", "computed"),
    [
        (8, 256**2, torch.float32, True),
        (8, 256**2 + 1, torch.float32, False),
        (8, 256**2, torch.bfloat16, False),
        (2**13, 1, torch.float32, False),
    ],
)
def test_small_models_at_small_sizes_alone_compute(
    side: int, pixels: int, dtype: torch.dtype, computed: bool
) -> None:
    with torch.device("meta"):
        layer = torch.nn.Linear(side, side, dtype=dtype)
    with imagined(layer, pixels=pixels):
        assert isinstance(layer.weight, FakeTensor) != computed
        assert layer(torch.zeros(1, side, dtype=dtype)).shape == (1, side)


def test_the_pixels_of_references_count() -> None:
    policy = load("toy:flux")
    assert isinstance(policy, TokenReferences)
    row = policy.blank()
    assert doctor.pixels_of(policy, row) == 128**2
    shown = replace(row, references=(policy.blank_reference(),) * 2)
    assert doctor.pixels_of(policy, shown) == 3 * 128**2


def test_nothing_is_loaded(sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **more: object) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(loading, "load_pipeline", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("torch.nn.Module.load_state_dict", refuse)
    assert api.examine(toy(model=str(sd3_folder))).can_run


def test_the_batches_are_those_of_the_run(sd3_folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    made = recipe(sd3_folder, prompt_file, steps=1)
    found = api.examine(made)
    run = pixrl.align(made, out=tmp_path / "run").run
    planned = json.loads((run / "start.json").read_text())["micro_batches"]
    assert found.batches is not None
    assert planned == {"rollout": found.batches.rollout, "train": found.batches.train}
    two = api.examine(made, processes=2)
    assert two.batches is not None
    assert two.batches.rollout == 3
    assert two.place.processes == 2


def test_pictures_and_epochs(prompt_file: Path, sd3_folder: Path) -> None:
    work = api.examine(recipe(sd3_folder, prompt_file, steps=7)).work
    assert (work.prompts, work.images_per_step, work.steps_per_epoch, work.images_per_epoch) == (5, 6, 3, 15)
    assert work.images_in_all == 42
    assert work.is_lower_bound
    assert work.seconds_per_epoch == pytest.approx(3 * work.seconds_per_step)  # type: ignore[operator]


def test_time_as_an_earlier_run_measured_it(
    prompt_file: Path, sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = recipe(sd3_folder, prompt_file, steps=3)
    rows = pixrl.align(made, out=tmp_path / "runs/before").metrics
    work = api.examine(made | {"steps": 50}).work
    spent = [sum(x for name, x in row.items() if name.startswith("seconds/")) for row in rows[1:]]
    assert work.seconds_per_step == pytest.approx(sum(spent) / 2)
    assert work.known_from == "measured in runs/before"
    assert not work.is_lower_bound
    other = api.examine(made | {"lora": {"rank": 5, "alpha": 8}}).work
    assert other.is_lower_bound


def test_batches_that_a_gpu_would_take() -> None:
    cost = Cost(first=1000, each=600)
    gpu = torch.device("cuda")
    assert doctor._most(gpu, cost, 10_000, 1, None)[0] == (8000 - 400) // 600
    assert doctor._most(gpu, cost, 100, 1, None)[0] == 1
    assert doctor._most(gpu, cost, 10_000, 1, 5) == (5, "the recipe says so")
    assert doctor._most(torch.device("cpu"), cost, 10, 32, None)[0] == 32


def test_what_lies_on_the_device_by_plan() -> None:
    sizes = {"transformer": 100, "text_encoder": 20, "text_encoder_2": 30, "vae": 7}
    parts = {name: PartSize(count, count) for name, count in sizes.items()}
    assert doctor.on_device(parts, MemoryPlan()) == 157
    assert doctor.on_device(parts, MemoryPlan(), text_dropped=True) == 107
    assert doctor.on_device(parts, MemoryPlan(offload="parts")) == 150
    assert doctor.on_device(parts, MemoryPlan(offload="parts"), text_dropped=True) == 107
    assert doctor.on_device(parts, MemoryPlan(offload="sequential")) == 50


@pytest.mark.parametrize(
    ("changes", "need", "message"),
    [
        ({"model": "nobody/nothing"}, Need.WEIGHTS, "hf download nobody/nothing"),
        ({"model": "nobody/nothing@v2"}, Need.WEIGHTS, "--revision v2"),
        ({"model": "./nowhere"}, Need.WEIGHTS, "does not exist"),
        ({"rewards": [{"name": "clip_text", "options": {"model": "a/b"}}]}, Need.WEIGHTS, "hf download a/b"),
        (
            {"rewards": [{"name": "clip_text", "options": {"modle": "toy:clip"}}]},
            Need.SETTING,
            "Did you mean 'model'",
        ),
        ({"prompts": {"source": "nowhere.txt"}}, Need.DATA, "nowhere.txt"),
        ({"machine": {"device": "cpu", "dtype": "float16"}}, Need.DEVICE, "needs a GPU"),
        ({"machine": FULL | {"offload": True}}, Need.SETTING, "offload=parts has no effect on a CPU"),
        ({"machine": FULL | {"vae_tiling": 32}}, Need.SETTING, "no effect on pictures of 32"),
        ({"lora": {"targets": ["attn.to_x"]}}, Need.SETTING, "attn.to_x"),
        ({"resolution": 30}, Need.SETTING, "multiple of"),
        ({"t5": False}, Need.SETTING, "no T5 encoder"),
    ],
)
def test_what_is_missing(changes: dict[str, Any], need: Need, message: str, sd3_folder: Path) -> None:
    found = api.examine(toy(**{"model": str(sd3_folder)} | changes))
    assert not found.can_run
    assert message in needs(found)[need]
    assert any(line.startswith(f"MISSING     {need.value}: ") for line in found.lines())


def test_a_package_memory_and_disk_that_are_missing(
    sd3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(doctor, "free_bytes", lambda device: 10_000)
    monkeypatch.setattr(doctor_needs, "free_bytes", lambda path: 1000)
    found = needs(api.examine(toy(model=str(sd3_folder), optimizer={"eight_bit": True})))
    assert "pip install 'pixrl[quantized]'" in found[Need.PACKAGE]
    assert "9.8 KiB are free" in found[Need.MEMORY]
    assert "machine.gradient_checkpointing=true" in found[Need.MEMORY]
    assert "output.images_every" in found[Need.DISK]


def test_a_download_that_is_gated_or_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(ref: str) -> Remote:
        raise CheckpointError(f"{ref} is gated, and no token is set")

    monkeypatch.setattr(doctor_needs, "ask", gated)
    assert "no token" in needs(api.examine(toy(model="owner/name")))[Need.TOKEN]
    monkeypatch.setattr(doctor_needs, "ask", lambda ref: Remote(10**18))
    found = api.examine(toy(model="owner/name"))
    assert "of weights" in needs(found)[Need.DISK]
    monkeypatch.setattr(doctor_needs, "ask", lambda ref: Remote(1))
    found = api.examine(toy(model="owner/name"))
    assert found.can_run
    assert found.needed is None
    assert "will be downloaded" in found.notes[0]


def test_other_kinds_of_recipes(tmp_path: Path) -> None:
    sdxl = tiny.sdxl(tmp_path / "sdxl")
    fuse = {
        "kind": "fuse",
        "model": str(sdxl),
        "clip": "toy:clip",
        "segmenter": "toy:segmenter",
        "device": "cpu",
    }
    found = api.examine(fuse)
    assert found.can_run
    assert set(found.parts) == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert found.trained is None
    assert found.rewards.keys() == {"toy:clip", "toy:segmenter"}
    assert "unicorn" in needs(api.examine("toy/fuse", ["concepts=[owl, unicorn]"]))[Need.SETTING]
    flux = tiny.flux(tmp_path / "flux")
    one = {"kind": "personalize", "model": str(flux), "rewards": REWARDS, "machine": FULL}
    found = api.examine(one)
    assert found.can_run
    more = api.examine(one | {"references": {"count": 2}})
    assert more.training is not None
    assert found.training is not None
    assert more.training.each > found.training.each
    wrong = api.examine(toy(kind="personalize") | {"references": {"lora": "uno.safetensors"}})
    assert "takes no reference pictures" in needs(wrong)[Need.SETTING]
    assert "hf download bytedance-research/UNO" in needs(wrong)[Need.WEIGHTS]
    with pytest.raises(ConfigError, match="not for one run"):
        api.examine("toy/fuse-study")


Shows = Callable[..., Diagnosis]


@pytest.fixture(scope="module")
def shows(tmp_path_factory: pytest.TempPathFactory) -> Shows:
    """Return what is found of a tiny FLUX with so many references, of the side of its pictures unless it is given."""
    model = str(tiny.flux(tmp_path_factory.mktemp("shows") / "flux"))
    fixed = {"kind": "personalize", "model": model, "rewards": REWARDS, "machine": FULL}

    def found(count: int | None, side: int | None = None) -> Diagnosis:
        return api.examine(fixed | {"references": {"count": count, "side": side}})

    return found


@pytest.fixture
def weighed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a picture costs is found out once for each number and size of references, not for each size of memory."""
    weigh, known = doctor.Estimate.costs, dict[tuple[object, ...], Any]()

    def costs(self: doctor.Estimate, references: int) -> Any:
        shapes = [tuple(one.shape) for one in self._condition.references[:references]]
        key = (*shapes, self.policy.denoiser.is_gradient_checkpointing)
        if key not in known:
            known[key] = weigh(self, references)
        return known[key]

    monkeypatch.setattr(doctor.Estimate, "costs", costs)
    monkeypatch.setattr(doctor, "operations_of", lambda program: 0)


@pytest.mark.usefixtures("weighed_once")
def test_how_many_references_fit(shows: Shows, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number that the doctor gives is one with which it finds that the run fits; one more does not."""
    needed = {count: shows(count).needed or 0 for count in (1, 2, 3, 4)}
    assert needed[1] < needed[2] < needed[3] < needed[4]
    for fit in (1, 3):
        room = (needed[fit] + needed[fit + 1]) // 2
        monkeypatch.setattr(doctor, "free_bytes", lambda device, room=room: room)
        for count in (4, None):
            said = needs(shows(count))[Need.MEMORY]
            assert f"references.count={fit} ({fit} of 4 fit), references.side=16," in said
        assert Need.MEMORY not in needs(shows(fit))
        assert Need.MEMORY in needs(shows(fit + 1))
    monkeypatch.setattr(doctor, "free_bytes", lambda device: needed[1] - 1)
    assert "references.count=1 (not enough alone), references.side=16," in needs(shows(2))[Need.MEMORY]
    alone = needs(shows(1))[Need.MEMORY]
    assert "references.count" not in alone
    assert "Save memory with references.side=16, machine.gradient_checkpointing=true" in alone
    assert Need.MEMORY not in needs(shows(1, side=16))
    monkeypatch.setattr(doctor, "free_bytes", lambda device: 1000)
    assert "references." not in needs(shows(1, side=8))[Need.MEMORY], "nothing smaller than one token"


def test_a_single_file_and_half_precision(tmp_path: Path) -> None:
    from pixrl.hub import locate
    from pixrl.models.memory.estimate import part_sizes
    from tests import published

    folder = tiny.sd3(tmp_path / "model", card=tiny.SD3_CARD, with_t5=True)
    file = published.sd3(folder, tmp_path / "model.safetensors")
    half = Precision(torch.float16, torch.float16)
    one, whole = part_sizes(locate(file), half), part_sizes(locate(folder), half)
    assert {name: part.parameters for name, part in one.items()} == {
        name: part.parameters for name, part in whole.items()
    }
    assert whole["transformer"].bytes == 2 * whole["transformer"].parameters
    assert whole["text_encoder_3"].bytes > 2 * whole["text_encoder_3"].parameters  # T5 keeps some in float32
    without = part_sizes(locate(folder), half, t5=False)
    assert without.keys() == whole.keys() - {"text_encoder_3"}


def test_the_command_prints_one_object_and_exits_1_when_it_cannot_run(
    sd3_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"kind": "align", **recipe(sd3_folder, prompt_file)}))
    run = CliRunner()
    good = run.invoke(cli.app, ["doctor", str(file), "--json"])
    assert good.exit_code == 0, good.output
    found = json.loads(good.stdout)
    assert found["can_run"] is True
    assert found["weights"] == sum(part["bytes"] for part in found["parts"].values())
    assert found["batches"]["rollout"] > 0
    words = run.invoke(cli.app, ["doctor", str(file), "--processes", "2"])
    assert words.exit_code == 0
    assert "cpu x 2" in words.stdout
    assert "It can run." in words.stdout
    bad = run.invoke(cli.app, ["doctor", str(file), "--json", "--set", "model=nobody/nothing"])
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)["problems"][0]["need"] == "weights"
    wrong = run.invoke(cli.app, ["doctor", str(file), "--set", "sted=3"])
    assert (wrong.exit_code, "Unknown setting" in wrong.stderr) == (2, True)
