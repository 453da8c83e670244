"""Each way of saving memory does save it, and the pictures and gradients stay what they were."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tests import tiny
from tests.tolerance import PICTURE, agree
from torch import Tensor

from pixrl import models
from pixrl.algorithms import optim as optimizers
from pixrl.config import load as load_config
from pixrl.errors import CheckpointError, ConfigError, InputError, RunError
from pixrl.models.memory.placement import Placement, stream_weights, unstream_weights
from pixrl.models.memory.plan import MemoryPlan, Offload
from pixrl.models.sd3 import SD3Policy
from pixrl.models.sdxl import SDXLPolicy
from pixrl.runs.config import AlignConfig, MachineSettings

OWL, SNAIL = "a photo of an owl", "a photo of a snail"
CPU = torch.device("cpu")


def trained(policy: SD3Policy) -> tuple[Tensor, list[Tensor]]:
    """A velocity, and the gradients of LoRA's up projections."""
    assert policy.lora is not None
    x = policy.initial_noise([1, 2])
    velocity = policy.velocity(x, torch.tensor([0.3, 0.8]), policy.encode([OWL, SNAIL]))
    velocity.square().mean().backward()
    return velocity.detach(), [p.grad for p in policy.lora.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_streamed_layers_give_the_same_velocity_and_gradients(sd3_folder: Path, checkpointing: bool) -> None:
    results = []
    for streamed in (False, True):
        policy = models.load(sd3_folder, device="cpu", dtype="float32")
        assert isinstance(policy, SD3Policy)
        policy.attach_lora(rank=2, alpha=4, seed=3)
        if checkpointing:
            policy.checkpoint_gradients()
        if streamed:
            stream_weights(policy.denoiser, CPU)
            places = {n: p.device.type for n, p in policy.denoiser.named_parameters()}
            assert {place for name, place in places.items() if "lora_" not in name} == {"meta"}
            assert {place for name, place in places.items() if "lora_" in name} == {"cpu"}
        results.append(trained(policy))
    (plain, plain_gradients), (streamed_velocity, gradients) = results
    assert torch.equal(plain, streamed_velocity)
    assert len(gradients) == len(plain_gradients) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain_gradients, gradients, strict=True))


def test_streaming_ends_as_it_began(sd3: SD3Policy) -> None:
    before = {name: x.clone() for name, x in sd3.denoiser.state_dict().items()}
    stream_weights(sd3.denoiser, CPU)
    unstream_weights(sd3.denoiser)
    after = sd3.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_a_streamed_unet_draws_the_same(sdxl: SDXLPolicy) -> None:
    sdxl.settings = replace(sdxl.settings, guidance=4.0)
    expected = sdxl.sample(sdxl.encode([OWL, SNAIL]), [1, 2])
    sdxl.offload = Offload.SEQUENTIAL
    stream_weights(sdxl.denoiser, CPU)
    assert {p.device.type for p in sdxl.denoiser.parameters()} == {"meta"}
    assert agree(sdxl.sample(sdxl.encode([OWL, SNAIL]), [1, 2]), expected, PICTURE)


@pytest.mark.parametrize("offload", ["parts", "sequential"])
def test_offload_needs_a_gpu(offload: str, sd3_folder: Path, sdxl_folder: Path) -> None:
    for folder in (sd3_folder, sdxl_folder):
        with pytest.raises(InputError, match=f"offload={offload} has no effect on a CPU"):
            models.load(folder, device="cpu", plan=MemoryPlan(offload=offload))


@pytest.mark.parametrize("family", ["sd3", "sdxl"])
def test_slicing_decodes_one_picture_at_a_time(family: str, sd3_folder: Path, sdxl_folder: Path) -> None:
    folder = sd3_folder if family == "sd3" else sdxl_folder
    batches: dict[bool, list[int]] = {}
    pictures = {}
    for sliced in (False, True):
        renderer = models.load(folder, device="cpu", dtype="float32", plan=MemoryPlan(vae_slicing=sliced))
        assert isinstance(renderer, SD3Policy | SDXLPolicy)
        seen: list[int] = []
        renderer.vae.decoder.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(len(given[0])))
        pictures[sliced] = renderer.sample(renderer.encode([OWL, SNAIL, OWL]), [1, 2, 3])
        batches[sliced] = seen
    assert batches == {False: [3], True: [1, 1, 1]}
    assert agree(pictures[False], pictures[True], PICTURE)


def test_tiles_are_of_the_asked_size_and_blend() -> None:
    whole = models.load("toy:sd3", device="cpu", dtype="float32", steps=4)
    tiled = models.load("toy:sd3", device="cpu", dtype="float32", plan=MemoryPlan(vae_tiling=64))
    assert isinstance(whole, SD3Policy)
    assert isinstance(tiled, SD3Policy)
    sides: list[int] = []
    tiled.vae.decoder.register_forward_pre_hook(lambda _, given: sides.append(given[0].shape[-1]))
    with torch.no_grad():
        latents = whole._integrate(whole.encode(["a photo of an owl"]), [1])
        picture, other = tiled.decode(latents), whole.decode(latents)
    assert len(sides) == 9  # at a quarter's overlap
    assert max(sides) == latents.shape[-1] // 2
    assert picture.shape == other.shape
    assert 0 < (picture - other).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("side", "message"), [(32, "no effect on pictures of 32"), (10, "multiple of 4"), (4, "at least 8")]
)
def test_tiles_that_cannot_be(side: int, message: str, sd3_folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        models.load(sd3_folder, plan=MemoryPlan(vae_tiling=side))


def test_text_encoders_are_gone_after_caching(sd3: SD3Policy) -> None:
    sd3.settings = replace(sd3.settings, guidance=3.0)
    expected = sd3.sample(sd3.encode([OWL]), [1])
    sd3.drop_text([OWL, SNAIL, OWL])
    assert sd3.pipeline.text_encoder is None
    assert sd3.pipeline.text_encoder_2 is None
    assert len(sd3._cache) == 3
    assert torch.equal(sd3.sample(sd3.encode([OWL]), [1]), expected)
    with pytest.raises(InputError, match=r"'a cat' was not among.*drop_text_encoders=false"):
        sd3.encode(["a cat"])


def test_too_many_prompts_to_keep(sd3: SD3Policy) -> None:
    with pytest.raises(InputError, match=r"embeddings of 2 prompts need .*may be used"):
        sd3._cache.keep(["", OWL], room=100)
    assert sd3.encode([SNAIL]) is not None


def test_recipes_say_true_or_name_the_plan() -> None:
    assert MachineSettings(offload=True).offload is Offload.PARTS
    assert MachineSettings(offload=False).offload is Offload.NONE
    assert MachineSettings(offload="sequential").offload is Offload.SEQUENTIAL


RECIPE = {"rewards": [{"name": "clip_text", "options": {"model": "toy:clip"}}]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"machine.offload": "sequential"}, "add machine.gradient_checkpointing=true"),
        ({"machine.drop_text_encoders": True, "exploration.kind": "perturbed"}, "take machine.offload=parts"),
        ({"machine.offload": "all"}, "machine.offload"),
    ],
)
def test_plans_that_the_method_cannot_bear(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(AlignConfig, RECIPE, values=settings)


def test_the_eight_bit_optimizer_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        RunError, match=r"optimizer.eight_bit needs bitsandbytes.*pip install 'pixrl\[quantized\]'"
    ):
        optimizers.adamw_8bit([torch.nn.Parameter(torch.zeros(2))], lr=1e-3)


def test_the_eight_bit_optimizer_is_the_one_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    class AdamW8bit(torch.optim.SGD):
        def __init__(self, parameters: object, lr: float, **settings: object) -> None:
            super().__init__(parameters, lr=lr)  # type: ignore[arg-type]
            self.given = settings

    package = ModuleType("bitsandbytes")
    package.optim = ModuleType("optim")  # type: ignore[attr-defined]
    package.optim.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    made = optimizers.adamw_8bit([torch.nn.Parameter(torch.zeros(2))], lr=1e-3, betas=(0.9, 0.99))
    assert isinstance(made, AdamW8bit)
    assert made.given == {"betas": (0.9, 0.99)}


def steps(
    optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], first: int, count: int
) -> None:
    for step in range(first, first + count):
        for place, parameter in enumerate(parameters):
            parameter.grad = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(10 * step + place)
            )
        optimizer.step()


def two_parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.linspace(-1, 1, 8192).view(64, 128)), torch.nn.Parameter(torch.ones(4))]


@pytest.mark.parametrize("make", [optimizers.adamw, optimizers.adamw_8bit])
def test_moments_come_back(make: object) -> None:
    if make is optimizers.adamw_8bit:
        pytest.importorskip("bitsandbytes")
    settings = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    whole, broken = two_parameters(), two_parameters()
    one = make(whole, **settings)  # type: ignore[operator]
    steps(one, whole, 0, 4)
    two = make(broken, **settings)  # type: ignore[operator]
    steps(two, broken, 0, 2)
    saved = optimizers.moments(two)
    assert all(x.device.type == "cpu" for x in saved.values())
    shared = sum(x.nbytes for name, x in saved.items() if "qmap" in name)  # one table serves all parameters
    steps_in_bytes = sum(x.nbytes for name, x in saved.items() if name.endswith("/step"))
    counted = optimizers.moment_bytes([8192, 4], eight_bit=make is optimizers.adamw_8bit)
    found = sum(x.nbytes for x in saved.values())
    assert counted == (found - steps_in_bytes if shared else found)
    again = make(broken, **settings)  # type: ignore[operator]
    optimizers.restore_moments(again, saved)
    steps(again, broken, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, broken, strict=True))


def test_moments_of_another_optimizer() -> None:
    optimizer = optimizers.adamw(two_parameters(), lr=1e-3)
    with pytest.raises(CheckpointError, match="another optimizer"):
        optimizers.restore_moments(optimizer, {"0/state1": torch.zeros(3, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match="another optimizer"):
        optimizers.restore_moments(optimizer, {"7/exp_avg": torch.zeros(3)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", ["parts", "sequential"])
def test_offload_on_a_gpu_draws_the_same(offload: str, tmp_path: Path) -> None:
    folder = tiny.sd3(tmp_path, card=tiny.SD3_CARD)
    plain = models.load(folder, device="cuda", dtype="float32")
    saved = models.load(folder, device="cuda", dtype="float32", plan=MemoryPlan(offload=offload))
    expected = plain.sample(plain.encode([OWL]), [1])
    assert agree(saved.sample(saved.encode([OWL]), [1]), expected, PICTURE)


@pytest.mark.parametrize(("offload", "moved"), [("parts", ["cpu", "cuda"]), ("none", []), ("sequential", [])])
def test_the_denoiser_waits_while_text_encoders_read_for_good(offload: str, moved: list[str]) -> None:
    """By `offload: parts` alone, whose parts take turns anyway; both need never fit beside each other."""
    moves: list[str] = []
    denoiser: Any = SimpleNamespace(to=lambda device: moves.append(str(device)))
    plan = MemoryPlan(offload=Offload(offload))
    placement = Placement(SimpleNamespace(), denoiser, torch.device("cuda"), plan, placed=True)
    with placement.without_denoiser():
        assert moves == moved[:1]
    assert moves == moved
