"""A base in 4 bits: near the whole one, trained and drawn alike, small, and refused where it has no place."""

import sys
from pathlib import Path

import pytest
import torch
from tests.align.parts import GRPO, recipe
from tests.tolerance import MODEL, rounding
from torch import Tensor, nn

import pixrl
from pixrl import api, models
from pixrl.device import Precision
from pixrl.errors import ConfigError, InputError, RunError
from pixrl.models.estimate import part_sizes
from pixrl.models.memory_plan import Base, MemoryPlan
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.models.quantization import dense_weight, linear_layers, quantize
from pixrl.models.sdxl import SDXLRenderer
from pixrl.models.slots import merge
from pixrl.report.export import export

NF4 = MemoryPlan(base=Base.NF4)
FULL = Precision(torch.float32, None)
CPU = torch.device("cpu")
LARGEST_GAP = 0.15191
"""Half the widest gap of NF4's 16 values, from -1 to -0.6962 (QLoRA, appendix E), as a share of a block's largest."""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a red owl\ntwo blue snails\n")
    return file


def policies(ref: str | Path, lora: Path | None = None) -> list[FlowPipelinePolicy]:
    """The model as it is, and with a base in 4 bits; with a LoRA merged."""
    found = [models.load(ref, device="cpu", dtype="float32", lora=lora, plan=plan) for plan in (None, NF4)]
    assert all(isinstance(one, FlowPipelinePolicy) for one in found)
    return found  # type: ignore[return-value]


def distance(near: Tensor, exact: Tensor) -> float:
    return float((near.detach() - exact.detach()).norm() / exact.detach().norm())


def within_nf4(near: Tensor, exact: Tensor) -> bool:
    """Whether no value is farther than half NF4's widest gap, at the scale of its block of 64."""
    values = nn.functional.pad(exact.flatten(), (0, -exact.numel() % 64)).view(-1, 64)
    most = values.abs().amax(1, keepdim=True)
    off = nn.functional.pad((near - exact).flatten(), (0, -exact.numel() % 64)).view(-1, 64).abs()
    return bool((off <= LARGEST_GAP * most).all())


@pytest.mark.parametrize("ref", ["toy:sd3", "toy:flux"])
def test_only_linear_weights_change_and_by_no_more_than_the_format(ref: str) -> None:
    exact, near = policies(ref)
    layers = dict(near.transformer.named_modules())
    assert len(linear_layers(exact.transformer, "x")) > 8
    weights = dict(exact.transformer.named_parameters())
    packed = {f"{name}.weight" for name in linear_layers(exact.transformer, "x")}
    for name, x in near.transformer.named_parameters():
        if name in packed:
            assert x.dtype is torch.uint8
            layer = layers[name.removesuffix(".weight")]
            assert isinstance(layer, nn.Linear)
            assert within_nf4(dense_weight(layer), weights[name]), name
            assert distance(dense_weight(layer), weights[name]) > 0.01
        else:
            assert torch.equal(x, weights[name]), name
    for part in ("vae", "text_encoder"):
        same = zip(
            near.pipeline.components[part].parameters(),
            exact.pipeline.components[part].parameters(),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in same)
    assert near.fingerprint() != exact.fingerprint()


@pytest.mark.parametrize("ref", ["toy:sd3", "toy:flux"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_velocities_and_gradients_are_those_of_the_unpacked_weights(ref: str, checkpointing: bool) -> None:
    """The oracle: the model in float32 with the weights that the 4 bits stand for."""
    exact, near = policies(ref)
    kept = dict(near.transformer.named_modules())
    with torch.no_grad():
        for name, layer in linear_layers(exact.transformer, "x").items():
            own = kept[name]
            assert isinstance(own, nn.Linear)
            layer.weight.copy_(dense_weight(own))
    x = exact.initial_noise([1, 2])
    found = []
    for policy in (exact, near):
        policy.attach_lora(rank=2, alpha=4, seed=3)
        assert policy.lora is not None
        if checkpointing:
            policy.checkpoint_gradients()
        for parameter in policy.lora.parameters():
            parameter.data += 0.02
        rows = policy.encode(["a photo of an owl", "a photo of a bee"])
        with torch.inference_mode():
            drawn = policy.velocity(x, torch.tensor([0.3, 0.8]), rows)
        velocity = policy.velocity(x, torch.tensor([0.3, 0.8]), rows)
        velocity.square().mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in policy.lora.parameters() if p.grad is not None])
        found.append((velocity.detach(), gradients))
        assert (
            distance(drawn, velocity.detach()) < 1e-5
        )  # the ratio of policies: exp of a difference of the two
        assert {p.dtype for p in policy.lora.parameters()} == {torch.float32}
    (velocity, gradients), (near_velocity, near_gradients) = found
    assert gradients.norm() > 0
    assert distance(near_velocity, velocity) < 1e-4
    assert distance(near_gradients, gradients) < 1e-3


def test_a_merged_lora_is_that_of_the_whole_base_within_the_format() -> None:
    torch.manual_seed(5)
    before = nn.Sequential(nn.Linear(128, 192), nn.ReLU(), nn.Linear(192, 64))
    lora = {"0": (torch.randn(4, 128) * 0.2, torch.randn(192, 4) * 0.2)}
    packed = nn.Sequential(nn.Linear(128, 192), nn.ReLU(), nn.Linear(192, 64))
    packed.load_state_dict(before.state_dict())
    quantize(packed, "a model", CPU, FULL)
    unpacked = [dense_weight(packed[place]) for place in (0, 2)]  # type: ignore[arg-type]
    merge(before, lora, "a LoRA")
    merge(packed, lora, "a LoRA")
    assert packed[0].weight.dtype is torch.uint8
    down, up = lora["0"]
    assert within_nf4(dense_weight(packed[0]), unpacked[0] + up @ down)  # type: ignore[arg-type]
    assert torch.equal(dense_weight(packed[2]), unpacked[1])  # type: ignore[arg-type]
    whole = before[0].weight
    assert isinstance(whole, Tensor)
    assert distance(dense_weight(packed[0]), whole) < 2 * LARGEST_GAP  # type: ignore[arg-type]
    assert distance(unpacked[0], whole) > 2 * LARGEST_GAP  # the LoRA is much more than what rounding does


def test_a_layer_of_odd_inputs_keeps_its_dtype() -> None:
    """bitsandbytes 0.50.2 would unpack it with scales of other blocks on a CPU."""
    model = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 8))
    quantize(model, "a model", CPU, FULL)
    assert model[0].weight.dtype is torch.float32
    assert model[1].weight.dtype is torch.uint8


def test_a_renderer_draws_from_a_base_in_4_bits(sdxl_folder: Path) -> None:
    drawn = []
    for plan in (None, NF4):
        renderer = models.load(sdxl_folder, device="cpu", dtype="float32", plan=plan)
        assert isinstance(renderer, SDXLRenderer)
        drawn.append(renderer.sample(renderer.encode(["a photo of an owl"]), [1]))
    assert not torch.equal(*drawn)
    assert distance(drawn[1], drawn[0]) < 0.5


def test_the_estimate_is_the_bytes_of_the_tensors() -> None:
    policy = policies("toy:sd3")[1]
    real = 0
    largest = 0
    for layer in policy.transformer.modules():
        for x in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            real += x.nbytes
        if isinstance(layer, nn.Linear) and layer.weight.dtype is torch.uint8:
            state = layer.weight.quant_state  # type: ignore[union-attr]
            real += state.absmax.nbytes  # type: ignore[union-attr]
            largest = max(largest, layer.in_features * layer.out_features * 4)
    sizes = part_sizes(policy.checkpoint, FULL, base=Base.NF4)
    whole = part_sizes(policy.checkpoint, FULL)
    assert sizes["transformer"].bytes == pytest.approx(real + largest, rel=1e-6)
    assert sizes["transformer"].bytes < 0.5 * whole["transformer"].bytes
    assert {name: x for name, x in sizes.items() if name != "transformer"} == {
        name: x for name, x in whole.items() if name != "transformer"
    }


def test_the_doctor_counts_a_packed_denoiser(sd3_folder: Path, prompts: Path) -> None:
    found = []
    for base in ("nf4", "dtype"):
        made = recipe(sd3_folder, prompts)
        made["machine"] |= {"base": base}
        found.append(api.examine(made))
    small, large = found
    sizes = [one.parts["transformer"].bytes for one in found]
    assert small.can_run
    assert sizes[0] < sizes[1]
    assert small.needed is not None
    assert large.needed is not None
    assert large.needed - small.needed == sizes[1] - sizes[0]


def test_a_run_is_on_policy_goes_on_as_if_unbroken_and_its_export_fits_either_base(
    sd3_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    made = recipe(sd3_folder, prompts, steps=3, **GRPO)
    made["machine"] |= {"base": "nf4"}
    made["optimizer"] |= {"updates": 1}
    made["loss"] = {"kind": "clipped", "kl": 0.04}
    made["lora"] |= {"targets": ["ff.net.2"]}  # of a tiny model's layers only these are 64 wide
    whole = pixrl.align(made, out=tmp_path / "whole")
    for row in whole.metrics:
        assert row["ratio_mean"] == pytest.approx(1, abs=rounding(torch.float32, MODEL))
    assert whole.metrics[0]["on_policy_deviation/float32/batch_1"] < rounding(torch.float32, MODEL)
    pixrl.align({**made, "steps": 1}, out=tmp_path / "run")
    api.resume(tmp_path / "run", ["steps=3"])
    folders = [tmp_path / name / "checkpoints/step-000003" for name in ("whole", "run")]
    whole_files, files = (sorted(folder.glob("*.safetensors")) for folder in folders)
    assert len(files) > 0
    assert [file.read_bytes() for file in whole_files] == [file.read_bytes() for file in files]
    lora = export(tmp_path / "run", out=tmp_path / "lora").file
    exact, near = policies(sd3_folder)
    merged = policies(sd3_folder, lora)
    for name in linear_layers(exact.transformer, "x"):
        before, after, packed, packed_after = (
            dense_weight(one.transformer.get_submodule(name))  # type: ignore[arg-type]
            for one in (exact, merged[0], near, merged[1])
        )
        assert within_nf4(packed_after, packed + (after - before))
        assert torch.equal(after, before) == ("ff.net.2" not in name)
    x, t = exact.initial_noise([1]), torch.tensor([0.6])
    v, v_near, v_merged, v_near_merged = (
        one.velocity(x, t, one.encode(["a red owl"])) for one in (exact, near, *merged)
    )
    assert distance(v_merged, v) > 0
    assert distance(v_near_merged, v_merged) < 2 * distance(v_near, v)


def test_what_cannot_be_quantized(
    sd3_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InputError, match="base=nf4 has no effect on a model: its Conv2d has no linear layers of 64"
    ):
        quantize(nn.Conv2d(3, 3, 1), "a model", CPU, FULL)
    for settings, said in (
        ({"offload": "sequential"}, "nf4 layers cannot be streamed"),
        ({"shard": "full"}, "machine.shard=full: weights of machine.base=nf4 cannot be divided"),
    ):
        made = recipe(sd3_folder, prompts)
        made["machine"] |= {"base": "nf4", "gradient_checkpointing": True, **settings}
        with pytest.raises(ConfigError, match=said):
            api.examine(made)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    said = r"base=nf4 needs bitsandbytes.*pip install 'pixrl\[quantized\]'"
    with pytest.raises(RunError, match=said):
        models.load("toy:sd3", device="cpu", plan=NF4)
    made = recipe(sd3_folder, prompts)
    made["machine"] |= {"base": "nf4"}
    with pytest.raises(RunError, match=said):
        pixrl.align(made, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


PLUGIN = """
from pixrl.models.sd3 import SD3Policy
from pixrl.models.base import Renderer
class Mine(Renderer):
    vocabulary = None
    def __init__(self, checkpoint, **options): self.name = options["name"]
    def encode(self, prompts): raise NotImplementedError
    def sample(self, conditioning, seeds): raise NotImplementedError
    def fingerprint(self): return "0"
"""


def test_an_adapter_that_does_not_quantize_is_refused(sd3_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    with pytest.raises(InputError, match=r"base=nf4 has no effect on .*: its adapter Mine keeps its weights"):
        models.load(f"{tmp_path}/mine.py:Mine@{sd3_folder}", plan=NF4)
