"""References in their own shapes, as UNO shows them: laid out, held in one conditioning, and one shape a pass."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import pixrl
from pixrl import api, models
from pixrl.algorithms.exploration import SHOWN, Group, NoiseOnly, prepare, shown_pictures
from pixrl.errors import ConfigError, InputError, ShapeError
from pixrl.models.base import Conditioning
from pixrl.models.flux import FluxPolicy
from pixrl.models.references import ReferenceShape, TokenReferences, in_own_shape
from pixrl.runs.config import load_recipe
from pixrl.runs.loaded import load_run
from pixrl.runs.planner import require_equal_shares
from tests import tiny_language
from tests.align.parts import final, same
from tests.personalize.test_job import recipe
from tests.tolerance import GRADIENT, MODEL, agree

SIZES = {"rex": (40, 64), "tom": (64, 56)}
"""Rows and columns of the subjects' pictures."""


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects, whose pictures have different shapes."""
    root = tmp_path_factory.mktemp("subjects")
    for seed, (name, size) in enumerate(SIZES.items()):
        (root / name).mkdir()
        pixels = (picture(*size, seed=seed).permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels).save(root / name / "0.png")
        (root / name / "class.txt").write_text("dog\n")
        (root / name / "prompts.txt").write_text("a dog in snow\na red dog\n")
    return root


def groups(*sizes: tuple[int, int]) -> list[Group]:
    shown = [{SHOWN: (picture(*size, seed=place),)} for place, size in enumerate(sizes)]
    return [Group(place, 0, place, f"a dog {place}", one) for place, one in enumerate(shown)]


MIXED = ((40, 64), (64, 40), (40, 64), (32, 32))


@pytest.fixture
def own(policy: FluxPolicy) -> FluxPolicy:
    policy.place(shape=ReferenceShape.OWN)
    return policy


@pytest.mark.parametrize(
    ("size", "longest", "expected"),
    [
        ((512, 512), 512, (512, 512)),
        ((600, 800), 512, (384, 512)),
        ((800, 600), 320, (320, 240)),
        ((333, 1000), 512, (160, 512)),  # 170.496 is 170 is 160
        ((100, 200), 512, (256, 512)),
    ],
)
def test_sizes_are_those_of_uno(size: tuple[int, int], longest: int, expected: tuple[int, int]) -> None:
    """bytedance/UNO's `preprocess_ref`: the longer side is given, the other rounded down to 16 pixels."""
    assert in_own_shape(torch.zeros(3, *size), longest, 16).shape[1:] == expected


def test_the_middle_is_kept() -> None:
    image = picture(40, 64)
    assert torch.equal(in_own_shape(image, 64, 16), image[:, 4:36])
    with pytest.raises(InputError, match=r"300 x 10 pixels, scaled to 64 .* thinner than a token, 16 pixels"):
        in_own_shape(picture(10, 300), 64, 16)


def test_a_batch_of_several_shapes_is_each_row_alone(own: FluxPolicy) -> None:
    """Velocity and its gradient, whatever stands beside a row, and in any order."""
    anchor = prepare(NoiseOnly(), own, groups(*MIXED)).anchor
    assert anchor.sizes_BN2 is not None and anchor.sizes.tolist() == [[[4, 8]], [[8, 4]], [[4, 8]], [[8, 8]]]
    x_t, t_B = own.initial_noise([1, 2, 3, 4]), torch.tensor([0.9, 0.6, 0.4, 0.2])
    together = own.velocity(x_t, t_B, anchor)
    assert own.lora is not None
    weights = own.lora.parameters()
    gradients = torch.autograd.grad(together.square().sum(), weights)
    rows, alone_gradients = [], [torch.zeros_like(one) for one in weights]
    for place, group in enumerate(groups(*MIXED)):
        alone = prepare(NoiseOnly(), own, [replace(group, place=0)]).anchor
        assert alone.sizes_BN2 is None, "one shape needs no filling"
        rows.append(own.velocity(x_t[[place]], t_B[[place]], alone))
        for total, one in zip(
            alone_gradients, torch.autograd.grad(rows[-1].square().sum(), weights), strict=True
        ):
            total += one
    assert agree(together, torch.cat(rows), MODEL)
    scale = max(one.abs().max().item() for one in alone_gradients)
    assert all(agree(a, b, GRADIENT, scale=scale) for a, b in zip(gradients, alone_gradients, strict=True))
    order = [3, 0, 2, 1]
    turned = own.velocity(x_t[order], t_B[order], anchor[order])
    assert agree(turned, together[order], MODEL)
    assert not agree(together[0], together[2], MODEL)


@pytest.fixture(params=[tiny_language.flux2_klein, tiny_language.qwen_edit], ids=["flux2", "qwen-edit"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny checkpoint of another model that takes references."""
    folder: Path = request.param(tmp_path / "other")
    return folder


def test_other_models_keep_shapes_too(other: Path) -> None:
    policy = models.load(other, device="cpu", dtype="float32")
    assert isinstance(policy, TokenReferences)
    policy.place(side=64, shape=ReferenceShape.OWN)
    given = groups(*MIXED[:3])
    anchor = prepare(NoiseOnly(), policy, given).anchor
    assert (
        anchor.sizes_BN2 is not None and len({tuple(size) for size in anchor.sizes.flatten(1).tolist()}) == 2
    )
    x_t, t_B = policy.initial_noise([1, 2, 3]), torch.tensor([0.9, 0.6, 0.4])
    with torch.no_grad():
        together = policy.velocity(x_t, t_B, anchor)
        for place, group in enumerate(given):
            alone = prepare(NoiseOnly(), policy, [replace(group, place=0)]).anchor
            assert agree(together[[place]], policy.velocity(x_t[[place]], t_B[[place]], alone), MODEL)


@pytest.mark.parametrize("dropped", [False, True])
def test_a_run_of_other_models_shows_them_so(
    other: Path, several: Path, tmp_path: Path, dropped: bool
) -> None:
    settings = recipe(
        other,
        several,
        steps=1,
        sampling={"steps": 2, "solver": "dpm"},
        loss={"kind": "nft", "timesteps": 1},
    )
    settings["machine"] |= {"drop_text_encoders": dropped}
    runs = [
        pixrl.personalize(settings | {"references": {"side": 64, "shape": shape}}, out=tmp_path / shape).run
        for shape in ("own", "square")
    ]
    drawn = [(run / "samples/step-000000/0000.png").read_bytes() for run in runs]
    assert drawn[0] != drawn[1], "what the model is shown differs"


def test_rows_keep_their_sizes(own: FluxPolicy) -> None:
    anchor = prepare(NoiseOnly(), own, groups(*MIXED)).anchor
    assert torch.equal(anchor[[1, 3]].sizes, anchor.sizes[[1, 3]])
    assert torch.equal(Conditioning.cat([anchor[:1], anchor[1:]]).sizes, anchor.sizes)
    assert torch.equal(anchor.to(dtype=torch.bfloat16).sizes, anchor.sizes)
    assert torch.equal(anchor.lerp(anchor, 0.3).sizes, anchor.sizes)
    for rows, part in anchor.by_shape():
        assert part.sizes_BN2 is None and len(part) == len(rows)
        assert torch.equal(part.sizes, anchor.sizes[rows])
    with pytest.raises(ShapeError, match="other shapes"):
        anchor.lerp(anchor[[1, 0, 2, 3]], 0.5)
    with pytest.raises(ShapeError, match="several shapes cannot be added up"):
        anchor.mix(torch.full((4,), 0.25))


def test_on_squares_nothing_changes(policy: FluxPolicy) -> None:
    anchor = prepare(NoiseOnly(), policy, groups(*MIXED)).anchor
    assert anchor.sizes_BN2 is None and anchor.references[0].shape == (4, 4, 8, 8)


def made(flux_folder: Path, several: Path, **changes: Any) -> dict[str, Any]:
    return recipe(flux_folder, several, references={"shape": "own"}, **changes)


def test_a_run_in_their_own_shapes_resumes_as_the_unbroken_one(
    flux_folder: Path, several: Path, tmp_path: Path
) -> None:
    whole = pixrl.personalize(made(flux_folder, several), out=tmp_path / "whole")
    first = pixrl.personalize(made(flux_folder, several, steps=1), out=tmp_path / "first").run
    api.resume(first, overrides=["steps=2"])
    assert same(final(whole.run), final(first))
    assert "in their own shape" in whole.report.read_text()
    square = recipe(flux_folder, several, steps=1)
    other = pixrl.personalize(square, out=tmp_path / "square").run
    pictures = [(run / "samples/step-000000/0000.png").read_bytes() for run in (whole.run, other)]
    assert pictures[0] != pictures[1], "what the model is shown differs"


def test_the_plan_is_made_for_the_largest_references(flux_folder: Path, several: Path) -> None:
    loaded = load_run(load_recipe(made(flux_folder, several), kind="personalize"))
    policy = loaded.policy
    assert isinstance(policy, FluxPolicy)
    areas = [
        policy.laid_out([one])[0][0].numel()
        for prompt in loaded.prompts.prompts
        for one in shown_pictures(prompt.metadata)
    ]
    (chosen,) = shown_pictures(loaded.largest_group().metadata)
    assert policy.laid_out([chosen])[0][0].numel() == max(areas) > min(areas)


def test_sharded_weights_refuse_them(flux_folder: Path, several: Path) -> None:
    config = load_recipe(made(flux_folder, several), kind="personalize")
    with pytest.raises(InputError, match=r"references\.shape=own: .*--set machine\.shard=none"):
        require_equal_shares(config, 2, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"references": {"shape": "own"}},
        {"references": {"side": 48}},
        {"resolution": "64x48"},
        {"resolution": "48x64", "references": {"side": 64}},
    ],
)
def test_rpo_refuses_references_unlike_its_pictures_before_anything_is_drawn(
    flux_folder: Path, several: Path, changes: dict[str, Any]
) -> None:
    """The doctor says so too; without its similarity loss it takes them."""
    rpo = {"kind": "rpo", "timesteps": 2}

    def asked(**more: Any) -> dict[str, Any]:
        method = {"exploration": {"kind": "noise", "noises": 2}, "advantage": {}, "loss": rpo}
        return recipe(flux_folder, several, **{**method, **more})

    said = "rpo's similarity loss needs references as large as the pictures"
    with pytest.raises(ConfigError, match=said):
        load_run(load_recipe(asked(**changes), kind="personalize"))
    found = api.examine(asked(**changes) | {"kind": "personalize"})
    assert any(said in one.message for one in found.problems)
    load_run(load_recipe(asked(**changes, loss=rpo | {"similarity": 0}), kind="personalize"))
    load_run(load_recipe(asked(), kind="personalize"))
