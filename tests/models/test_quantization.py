"""A base in 8 or in 4 bits: near the whole one, trained and drawn alike, small, and refused where it has no place."""

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
from pixrl.models.memory.estimate import part_sizes
from pixrl.models.memory.plan import Base, MemoryPlan
from pixrl.models.memory.quantization import Int8Linear, dense_weight, linear_layers, quantize
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.models.sdxl import SDXLPolicy
from pixrl.models.slots import merge
from pixrl.report.export import export

KINDS = [Base.INT8, Base.NF4]
FULL = Precision(torch.float32, None)
CPU = torch.device("cpu")
WIDEST = {Base.INT8: 0.5 / 127, Base.NF4: 0.15191}
"""Half the widest gap between the values of a kind, as a share of the largest value with the same scale.

NF4's is from -1 to -0.6962 (QLoRA, appendix E).
"""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a red owl\ntwo blue snails\n")
    return file


def policies(ref: str | Path, base: Base, lora: Path | None = None) -> list[FlowPipelinePolicy]:
    """The model as it is, and with a quantized base; with a LoRA merged."""
    plans = (None, MemoryPlan(base=base))
    found = [models.load(ref, device="cpu", dtype="float32", lora=lora, plan=plan) for plan in plans]
    assert all(isinstance(one, FlowPipelinePolicy) for one in found)
    return found  # type: ignore[return-value]


def distance(near: Tensor, exact: Tensor) -> float:
    return float((near.detach() - exact.detach()).norm() / exact.detach().norm())


def within(near_OI: Tensor, exact_OI: Tensor, base: Base) -> bool:
    """Whether no value is farther than half the widest gap, at the scale of its row, or of its 64 values in NF4."""
    shape = exact_OI.shape if base is Base.INT8 else (-1, 64)
    most = exact_OI.reshape(shape).abs().amax(1, keepdim=True)
    off = (near_OI - exact_OI).reshape(shape).abs()
    return bool((off <= (WIDEST[base] + rounding(torch.float32, 4)) * most).all())


def is_packed(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and not layer.weight.is_floating_point()


def unpacked(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return dense_weight(layer)


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("ref", ["toy:sd3", "toy:flux"])
def test_only_linear_weights_change_and_by_no_more_than_the_format(ref: str, base: Base) -> None:
    exact, near = policies(ref, base)
    names = linear_layers(exact.denoiser, "x", base)
    assert len(names) > 8
    weights = dict(exact.denoiser.named_parameters())
    for name, x in near.denoiser.named_parameters():
        layer = name.removesuffix(".weight")
        if layer in names:
            assert not x.is_floating_point()
            dense = unpacked(near.denoiser, layer)
            assert within(dense, weights[name], base), name
            assert distance(dense, weights[name]) > WIDEST[base] / 10
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


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize(("ref", "checkpointing"), [("toy:sd3", True), ("toy:flux", False)])
def test_velocities_and_gradients_are_those_of_the_unpacked_weights(
    ref: str, checkpointing: bool, base: Base
) -> None:
    """The oracle: the model in float32 with the weights that the packed ones stand for."""
    exact, near = policies(ref, base)
    with torch.no_grad():
        for name, layer in linear_layers(exact.denoiser, "x", base).items():
            layer.weight.copy_(unpacked(near.denoiser, name))
    x, t_B = exact.initial_noise([1, 2]), torch.tensor([0.3, 0.8])
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
            drawn = policy.velocity(x, t_B, rows)
        velocity = policy.velocity(x, t_B, rows)
        velocity.square().mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in policy.lora.parameters() if p.grad is not None])
        found.append((velocity.detach(), gradients))
        # the ratio of policies is exp of a difference of the two
        assert distance(drawn, velocity) < rounding(torch.float32, MODEL)
        assert {p.dtype for p in policy.lora.parameters()} == {torch.float32}
    (velocity, gradients), (near_velocity, near_gradients) = found
    assert gradients.norm() > 0
    assert distance(near_velocity, velocity) < rounding(torch.float32, MODEL)
    assert distance(near_gradients, gradients) < rounding(torch.float32, 3 * MODEL)


def test_half_precision_computes_in_half_and_follows_autocast() -> None:
    """One rounding of each unpacked weight, and one of each result; biases and scales too."""
    torch.manual_seed(2)
    layer = nn.Linear(96, 160)
    x = torch.randn(3, 96)
    with torch.no_grad():
        layer.weight[7] = 0  # a row without a scale
    made = Int8Linear(layer, CPU)
    exact = made(x)
    assert torch.equal(exact[:, 7], layer.bias[7].expand(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = made(x)
    half = Int8Linear(layer.bfloat16(), CPU)(x.bfloat16())
    for found in (cast, half):
        assert found.dtype is torch.bfloat16
        assert 1e-4 < distance(found.float(), exact) < 0.02


@pytest.mark.parametrize("base", KINDS)
def test_a_merged_lora_is_that_of_the_whole_base_within_the_format(base: Base) -> None:
    torch.manual_seed(5)
    before = nn.Sequential(nn.Linear(128, 192), nn.ReLU(), nn.Linear(192, 64))
    lora = {"0": (torch.randn(4, 128) * 0.2, torch.randn(192, 4) * 0.2)}
    packed = nn.Sequential(nn.Linear(128, 192), nn.ReLU(), nn.Linear(192, 64))
    packed.load_state_dict(before.state_dict())
    quantize(packed, "a model", base, CPU, FULL)
    dense = [unpacked(packed, name) for name in ("0", "2")]
    with torch.no_grad():
        merge(before, lora, "a LoRA")
        merge(packed, lora, "a LoRA")
    assert is_packed(packed[0])
    down, up = lora["0"]
    assert within(unpacked(packed, "0"), dense[0] + up @ down, base)
    assert torch.equal(unpacked(packed, "2"), dense[1])
    assert distance(unpacked(packed, "0"), unpacked(before, "0")) < 2 * WIDEST[base]
    assert distance(dense[0], unpacked(before, "0")) > 0.5  # the LoRA is much more than what rounding does


def test_a_layer_of_odd_inputs_keeps_its_dtype_in_nf4() -> None:
    """bitsandbytes 0.50.2 would unpack it with scales of other blocks on a CPU."""
    for base, first in ((Base.NF4, False), (Base.INT8, True)):
        model = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 8))
        quantize(model, "a model", base, CPU, FULL)
        assert [is_packed(one) for one in model] == [first, True]


@pytest.mark.parametrize("base", KINDS)
def test_a_renderer_draws_from_a_quantized_base(sdxl_folder: Path, base: Base) -> None:
    drawn = []
    for plan in (None, MemoryPlan(base=base)):
        renderer = models.load(sdxl_folder, device="cpu", dtype="float32", plan=plan)
        assert isinstance(renderer, SDXLPolicy)
        drawn.append(renderer.sample(renderer.encode(["a photo of an owl"]), [1]))
    assert not torch.equal(*drawn)
    assert distance(drawn[1], drawn[0]) < 0.5


@pytest.mark.parametrize("base", KINDS)
def test_the_estimate_is_the_bytes_of_the_tensors(base: Base) -> None:
    policy = policies("toy:sd3", base)[1]
    real = largest = 0
    for layer in policy.denoiser.modules():
        real += sum(x.nbytes for x in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)))
        if is_packed(layer):
            largest = max(largest, layer.in_features * layer.out_features * 4)  # type: ignore[operator]
        if is_packed(layer) and base is Base.NF4:
            real += layer.weight.quant_state.absmax.nbytes  # type: ignore[union-attr, operator]
    sizes = part_sizes(policy.checkpoint, FULL, base=base)
    whole = part_sizes(policy.checkpoint, FULL)
    assert sizes["transformer"].bytes == pytest.approx(real + largest, rel=1e-6)
    share = {Base.INT8: 0.5, Base.NF4: 0.9}[
        base
    ]  # NF4 packs blocks of 64 columns, and most layers here have 160
    assert sizes["transformer"].bytes < share * whole["transformer"].bytes
    assert {name: x for name, x in sizes.items() if name != "transformer"} == {
        name: x for name, x in whole.items() if name != "transformer"
    }


def test_the_doctor_counts_a_packed_denoiser(sd3_folder: Path, prompts: Path) -> None:
    found = []
    for base in ("dtype", "nf4"):
        made = recipe(sd3_folder, prompts)
        made["machine"] |= {"base": base}
        found.append(api.examine(made))
    sizes = [one.parts["transformer"].bytes for one in found]
    needed = [(one.needed or 0) - one.trained.folded for one in found if one.trained is not None]
    assert [one.trained.folded > 0 for one in found if one.trained is not None] == [True, False]
    assert all(one.can_run for one in found)
    assert sizes[0] > sizes[1]
    assert [x - needed[0] for x in needed] == [x - sizes[0] for x in sizes]


@pytest.mark.parametrize("base", KINDS)
def test_a_run_is_on_policy_goes_on_as_if_unbroken_and_its_export_fits_either_base(
    sd3_folder: Path, prompts: Path, tmp_path: Path, base: Base
) -> None:
    made = recipe(sd3_folder, prompts, steps=2, **GRPO)
    made["machine"] |= {"base": base}
    made["optimizer"] |= {"updates": 1}
    made["loss"] = {"kind": "clipped", "kl": 0.04}
    made["lora"] |= {"targets": ["ff.net.2"]}  # of a tiny model's layers only these are 64 wide
    whole = pixrl.align(made, out=tmp_path / "whole")
    for row in whole.metrics:
        assert row["ratio_mean"] == pytest.approx(1, abs=rounding(torch.float32, MODEL))
    (deviation,) = (
        x for name, x in whole.metrics[0].items() if name.startswith("on_policy_deviation/float32/")
    )
    assert deviation < rounding(torch.float32, MODEL)
    pixrl.align({**made, "steps": 1}, out=tmp_path / "run")
    api.resume(tmp_path / "run", ["steps=2"])
    folders = [tmp_path / name / "checkpoints/step-000002" for name in ("whole", "run")]
    whole_files, files = (sorted(folder.glob("*.safetensors")) for folder in folders)
    assert len(files) > 0
    assert [file.read_bytes() for file in whole_files] == [file.read_bytes() for file in files]
    lora = export(tmp_path / "run", out=tmp_path / "lora").file
    exact, near = policies(sd3_folder, base)
    merged = policies(sd3_folder, base, lora)
    for name in linear_layers(exact.denoiser, "x", base):
        before, after, packed, packed_after = (
            unpacked(one.denoiser, name) for one in (exact, merged[0], near, merged[1])
        )
        assert within(packed_after, packed + (after - before), base)
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
        quantize(nn.Conv2d(3, 3, 1), "a model", Base.NF4, CPU, FULL)
    with pytest.raises(
        InputError, match=r"base=int8 has no effect on a model: its Conv2d has no linear layers\."
    ):
        quantize(nn.Conv2d(3, 3, 1), "a model", Base.INT8, CPU, FULL)
    for base in KINDS:
        for settings, said in (
            ({"offload": "sequential"}, f"{base} layers cannot be streamed"),
            ({"shard": "full"}, f"machine.shard=full: weights of machine.base={base} cannot be divided"),
        ):
            made = recipe(sd3_folder, prompts)
            made["machine"] |= {"base": base, "gradient_checkpointing": True, **settings}
            with pytest.raises(ConfigError, match=said):
                api.examine(made)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    said = r"base=nf4 needs bitsandbytes.*pip install 'pixrl\[quantized\]'"
    with pytest.raises(RunError, match=said):
        models.load("toy:sd3", device="cpu", plan=MemoryPlan(base=Base.NF4))
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
        models.load(f"{tmp_path}/mine.py:Mine@{sd3_folder}", plan=MemoryPlan(base=Base.NF4))
