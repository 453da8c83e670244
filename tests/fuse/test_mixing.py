"""What is mixed: coefficients mean the same for every mixing, and a concept with the whole share is alone."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixrl import config as recipes
from pixrl.algorithms import MIXINGS, SAMPLERS, make_mixing
from pixrl.algorithms.fusion.mixing import (
    MASK_SIDE,
    Pooled,
    Shape,
    Spatial,
    SpatialSettings,
    StepOrder,
    Steps,
    StepsSettings,
    bands,
    shares,
    turns,
)
from pixrl.errors import CheckpointError, ConfigError, InputError
from pixrl.fusion.config import FuseConfig
from pixrl.fusion.world import FusionSession
from pixrl.jobs.fuse import go_on, start
from pixrl.models.base import Conditioning, Mixture
from pixrl.runs.log import load_coefficients
from tests.fuse.test_job import config
from tests.tolerance import agree, rounding

S, L, D, E = 6, 3, 5, 4
STEPS = 4
"""Of `toy:turbo`."""
SOURCES = Conditioning(torch.randn(3, L, D), torch.randn(3, E))
ALL = [
    {"kind": "columns"},
    {"kind": "tokens"},
    *({"kind": "steps", "order": order} for order in StepOrder),
    {"kind": "velocity"},
    *({"kind": kind, "shape": shape} for kind in ("spatial", "regions") for shape in Shape),
]


def made(settings: dict[str, object], sources: Conditioning = SOURCES, steps: int = S):
    found = recipes.load(FuseConfig, {"concepts": ["a", "b"], "mixing": settings})
    return make_mixing(found.mixing, sources, steps, Pooled.WEIGHT)


def weights_of(mixed: Mixture) -> list[Tensor]:
    return [w.mean(dim=(2, 3)) for w in mixed.weights_S]


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_a_concept_with_the_whole_share_is_alone(settings: dict[str, object]) -> None:
    mixing = made(settings)
    for concept in range(3):
        alone = torch.zeros(2, *mixing.features_ND.shape)
        alone[:, concept] = 1
        mixed = mixing.mix(alone)
        if isinstance(mixed, Conditioning):
            one_hot = torch.eye(3)[[concept] * 2]
            if mixed.regions_BNHW is None:
                assert agree(mixed.tokens_BLD, SOURCES.tokens_BLD[[concept] * 2], 8)
            else:
                assert torch.equal(
                    mixed.regions_BNHW, one_hot[:, :, None, None].expand_as(mixed.regions_BNHW)
                )
            assert agree(mixed.pooled_BE, SOURCES.pooled_BE[[concept] * 2], 8)
        else:
            one_hot = torch.eye(3)[[concept] * 2]
            assert all(torch.equal(w, one_hot[:, :, None, None].expand_as(w)) for w in mixed.weights_S)


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_weights_sum_to_one_everywhere(settings: dict[str, object]) -> None:
    mixing = made(settings)
    mixed = mixing.mix(torch.rand(4, *mixing.features_ND.shape).softmax(dim=1))
    if isinstance(mixed, Mixture):
        assert len(mixed.weights_S) == S
    regions = () if isinstance(mixed, Mixture) or mixed.regions_BNHW is None else (mixed.regions_BNHW,)
    for weights in mixed.weights_S if isinstance(mixed, Mixture) else regions:
        assert agree(weights.sum(dim=1), torch.ones_like(weights[:, 0]), 8)
        assert bool((weights >= 0).all())


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_a_larger_share_never_weighs_less(settings: dict[str, object]) -> None:
    mixing = made(settings, SOURCES[:2])
    low, high = 0.3, 0.6
    columns = mixing.features_ND.shape[1]
    rows = [torch.tensor([a, 1 - a])[:, None].expand(2, columns) for a in (low, high)]
    mixed = mixing.mix(torch.stack(rows))
    if isinstance(mixed, Conditioning) and mixed.regions_BNHW is not None:
        area_BN = mixed.regions_BNHW.mean(dim=(2, 3))
        assert area_BN[1, 0] > area_BN[0, 0] + 0.2
        assert bool((mixed.regions_BNHW[1, 0] >= mixed.regions_BNHW[0, 0]).all())
    elif isinstance(mixed, Conditioning):
        first, second = (mixed.tokens_BLD[i] for i in (0, 1))
        expected = (high - low) * (SOURCES.tokens_BLD[0] - SOURCES.tokens_BLD[1])
        assert agree(second - first, expected, 16)
    else:
        total = sum(w.mean(dim=(2, 3)) for w in mixed.weights_S)
        assert total[1, 0] > total[0, 0] + 0.5
        assert all(bool((w[1, 0] >= w[0, 0]).all()) for w in mixed.weights_S) or settings.get("order") == (
            StepOrder.ALTERNATE
        )


def test_steps_come_in_order_and_the_border_step_is_shared() -> None:
    mixing = Steps(StepsSettings(), SOURCES[:2], steps=4, pooled=Pooled.WEIGHT)
    weights = weights_of(mixing.mix(torch.tensor([[[0.5], [0.5]], [[0.4], [0.6]]])))
    assert [w[0].tolist() for w in weights] == [[1, 0], [1, 0], [0, 1], [0, 1]]
    first = torch.stack(weights)[:, 1, 0]
    # 0.4 (1 + 1/4) - 1/8 is the middle of the second step
    assert agree(first, torch.tensor([1, 0.5, 0, 0]), 16)


def test_turns_are_taken_as_often_as_the_shares_say() -> None:
    shares_BN = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.25, 0.25], [0.0, 0.125, 0.875]])
    turns_BNS = turns(shares_BN, 8)
    assert torch.equal(turns_BNS.sum(dim=2), shares_BN * 8)
    assert torch.equal(turns_BNS.sum(dim=1), torch.ones(3, 8))
    assert turns_BNS[0, 0].tolist() == [1, 0] * 4


def test_bands_are_as_wide_as_their_shares() -> None:
    shares_BN = torch.tensor([[0.25, 0.5, 0.25]])
    places_P = (torch.arange(1000) + 0.5) / 1000
    hard = bands(shares_BN, places_P, 0.001)
    assert torch.equal(hard.argmax(dim=1)[0], torch.tensor([0] * 250 + [1] * 500 + [2] * 250))
    even = bands(torch.tensor([[0.5, 0.5]]), places_P, 1.0)[0, 0]  # a gradient over the whole
    assert agree(even, 1 - places_P, 8)


def test_shapes_lie_where_their_names_say() -> None:
    def mask(shape: Shape) -> Tensor:
        settings = SpatialSettings(shape=shape, soft=0.01)
        mixing = Spatial(settings, SOURCES[:2], steps=S, pooled=Pooled.WEIGHT)
        return mixing.masks(torch.tensor([[[0.5], [0.5]]]))[0, 0]

    half = MASK_SIDE // 2
    top, left, disc = mask(Shape.TOP_DOWN), mask(Shape.LEFT_RIGHT), mask(Shape.INSIDE_OUT)
    assert top[: half - 1].min() == 1 and top[half + 1 :].max() == 0
    assert torch.equal(left, top.T)
    assert disc[half, half] == 1 and disc[0, 0] == 0
    assert float(disc.mean()) == pytest.approx(0.5, abs=0.01)  # a border as wide as `soft`


def test_every_cell_of_a_grid_has_its_place() -> None:
    mixing = made({"kind": "spatial", "shape": "grid", "cells": 2}, SOURCES[:2])
    coefficients_BND = torch.zeros(4, 2, 4)
    coefficients_BND[:, 1] = 1
    for cell in range(4):
        coefficients_BND[cell, :, cell] = torch.tensor([1.0, 0.0])
    masks_BHW = mixing.masks(coefficients_BND)[:, 0]
    corners = [(0, 0), (0, -1), (-1, 0), (-1, -1)]
    for cell, (row, column) in itertools.product(range(4), corners):
        assert masks_BHW[cell, row, column] == float(corners[cell] == (row, column))


def test_regions_hold_every_concepts_tokens_and_pooled_features_by_area() -> None:
    mixed = made({"kind": "regions", "shape": "left_right", "soft": 0.01}).mix(
        torch.tensor([[[0.25], [0.5], [0.25]], [[0.0], [0.125], [0.875]]])
    )
    assert isinstance(mixed, Conditioning) and mixed.regions_BNHW is not None
    assert mixed.tokens_BLD.shape == (2, 3 * L, D)
    assert all(torch.equal(row, SOURCES.tokens_BLD.flatten(0, 1)) for row in mixed.tokens_BLD)
    areas_BN = mixed.regions_BNHW.mean(dim=(2, 3))
    assert torch.allclose(areas_BN, torch.tensor([[0.25, 0.5, 0.25], [0.0, 0.125, 0.875]]), atol=0.01)
    assert agree(mixed.pooled_BE, areas_BN @ SOURCES.pooled_BE, 8)
    columns = mixed.regions_BNHW[0, :, 0].argmax(dim=0)
    assert columns.tolist() == [0] * 16 + [1] * 32 + [2] * 16
    masked = replace(SOURCES, mask_BL=torch.rand(3, L) < 0.5)
    own = made({"kind": "regions"}, masked).mix(torch.full((2, 3, 1), 1 / 3)).mask_BL
    assert torch.equal(own, masked.mask_BL.flatten().expand(2, -1))


def test_masks_begin_at_their_step() -> None:
    mixing = made({"kind": "spatial", "start": 4})
    sizes = [w.shape[-1] for w in mixing.mix(torch.full((1, 3, 1), 1 / 3)).weights_S]
    assert sizes == [1] * 4 + [MASK_SIDE] * 2


def test_coefficients_outside_the_simplex_still_make_masks() -> None:
    """The published policy's are unbounded."""
    assert torch.equal(shares(torch.tensor([[[1.7], [-0.7]]])), torch.tensor([[1.0, 0.0]]))
    mixed = made({"kind": "spatial"}, SOURCES[:2]).mix(torch.tensor([[[1.7], [-0.7]]]))
    assert bool((mixed.weights_S[-1][:, 0] == 1).all())
    grid = made({"kind": "regions", "shape": "grid", "cells": 2}, SOURCES[:2])
    cells_BNC = torch.tensor([[[1.7, 0.5, -0.2, 1.0], [-0.7, 0.5, 1.2, 0.0]]])
    regions = grid.mix(cells_BNC).regions_BNHW
    assert regions is not None and regions.min() == 0 and agree(regions.sum(dim=1), torch.ones(1, 64, 64), 8)
    corners = [regions[0, 0, row, column] for row in (0, -1) for column in (0, -1)]
    assert torch.stack(corners).tolist() == [1, 0.5, 0, 1]


@pytest.mark.parametrize("kind", [*MIXINGS.entries])
@pytest.mark.parametrize("sampler", [*SAMPLERS.entries])
def test_any_sampler_acts_on_any_mixing(kind: str, sampler: str) -> None:
    from pixrl.algorithms.fusion.base import Feedback, FusionTask
    from pixrl.fusion.config import resolve_options, sampler_of

    mixing = made({"kind": kind})
    task = FusionTask(mixing.features_ND, seed=0, budget=16, batch=8)
    chosen = sampler_of(sampler)(task, resolve_options(sampler, {}))
    for step in range(2):
        proposal = chosen.ask(8, step)
        assert proposal.coefficients_BND.shape == (8, *mixing.features_ND.shape)
        assert len(mixing.mix(proposal.coefficients_BND)) == 8
        chosen.tell(proposal, Feedback.of(torch.rand(8, 3), 5.0))


def test_tokens_mix_token_by_token() -> None:
    mixing = made({"kind": "tokens"}, SOURCES[:2])
    coefficients_BND = torch.zeros(1, 2, L)
    coefficients_BND[0, 0, 0] = coefficients_BND[0, 1, 1] = coefficients_BND[0, 1, 2] = 1
    mixed = mixing.mix(coefficients_BND)
    assert torch.equal(mixed.tokens_BLD[0, 0], SOURCES.tokens_BLD[0, 0])
    assert torch.equal(mixed.tokens_BLD[0, 1:], SOURCES.tokens_BLD[1, 1:])
    third = SOURCES.pooled_BE[0] / 3 + SOURCES.pooled_BE[1] * 2 / 3
    assert agree(mixed.pooled_BE[0], third, 8)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "blend"}, "'columns', 'tokens', 'steps', 'velocity', 'spatial'"),
        ({"kind": "spatial", "shape": "grid", "soft": 0.5}, "soft has no effect with shape=grid"),
        ({"kind": "spatial", "cells": 3}, "cells has no effect with shape=top_down"),
        ({"kind": "spatial", "shape": "star"}, "top_down"),
        ({"kind": "velocity", "start": 3}, "start"),
        ({"kind": "regions", "start": 3}, "start"),
        ({"kind": "regions", "shape": "grid", "soft": 0.5}, "soft has no effect with shape=grid"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipes.load(FuseConfig, {"concepts": ["owl", "snail"], "mixing": settings})


def test_pooled_is_refused_where_no_embedding_is_mixed() -> None:
    with pytest.raises(ConfigError, match="pooled=average has no effect with mixing=velocity"):
        recipes.load(FuseConfig, {"concepts": ["owl", "snail"], "mixing": "velocity", "pooled": "average"})


def test_a_mixing_that_does_not_fit_the_model_is_refused(world) -> None:
    with pytest.raises(InputError, match="two or more sampling steps; this model takes 1"):
        FusionSession(world, config(mixing={"kind": "steps"}))
    with pytest.raises(InputError, match=r"mixing.start=2 leaves no step"):
        FusionSession(world, config(mixing={"kind": "spatial"}))
    with pytest.raises(InputError, match="fake cannot attend by region: its adapter FakeRenderer takes one"):
        FusionSession(world, config(mixing={"kind": "regions"}))


def test_a_name_alone_stands_for_its_defaults() -> None:
    named = recipes.load(FuseConfig, {"concepts": ["owl", "snail"], "mixing": "spatial"})
    assert named.mixing == SpatialSettings()
    assert recipes.load(FuseConfig, named.model_dump()).mixing == SpatialSettings()


def test_velocity_weighs_the_same_at_every_step() -> None:
    mixed = made({"kind": "velocity"}, SOURCES[:2]).mix(torch.tensor([[[0.3], [0.7]]]))
    for weights in mixed.weights_S:
        assert weights.flatten().tolist() == pytest.approx([0.3, 0.7], abs=rounding(torch.float32, 4))
    assert mixed.passes == 2 * S


OWN = """
from typing import Literal
from pixrl.algorithms.fusion.mixing import Mixing, MixingSettings
from pixrl.models.base import Conditioning


class HalvesSettings(MixingSettings):
    swap: bool = False


class Halves(Mixing[HalvesSettings]):
    Settings = HalvesSettings

    def __init__(self, settings, sources, *, steps, pooled):
        super().__init__(settings, sources, steps=steps, pooled=pooled)
        self.features_ND = self._positions(1)

    def mix(self, coefficients_BND):
        first, second = (1, 0) if self.settings.swap else (0, 1)
        rows = len(coefficients_BND)
        return self.sources[[first] * rows].lerp(self.sources[[second] * rows], 0.5)
"""


def test_a_mixing_of_yours_runs_and_is_checked(tmp_path: Path, world) -> None:
    file = tmp_path / "halves.py"
    file.write_text(OWN)
    kind = f"{file}:Halves"
    with pytest.raises(ConfigError, match=r"mixing.swop.* unknown|swop"):
        recipes.load(FuseConfig, {"concepts": ["owl", "snail"], "mixing": {"kind": kind, "swop": True}})
    run = start(config(mixing={"kind": kind, "swap": True}), tmp_path / "run", world=world)
    assert len(run.rows) == run.config.budget
    file.write_text(OWN + "# changed")
    with pytest.raises(CheckpointError, match=r"Code of yours has changed since the run .* began"):
        go_on(tmp_path / "run", world=world)


def test_a_run_records_what_it_mixed_and_what_it_cost(tmp_path: Path) -> None:
    velocity = {"mixing": "velocity", "budget": 4, "batch": 2, "exemplars": 1, "keep": 1, "pool": 0}
    run = start(recipes.load(FuseConfig, {"concepts": ["owl", "snail"], **velocity}), tmp_path / "run")
    assert run.folder.recipe()["mixing"] == {"kind": "velocity"}
    assert load_coefficients(run.folder, 0).shape == (2, 2, 1)
    steps = run.folder.metrics()
    assert [row["network_passes"] for row in steps] == [2 * 2 * STEPS] * 2


def test_regions_cost_a_pass_a_step_however_many_concepts(tmp_path: Path) -> None:
    regions = {"mixing": "regions", "budget": 4, "batch": 2, "exemplars": 1, "keep": 1, "pool": 0}
    run = start(recipes.load(FuseConfig, {"concepts": ["owl", "snail", "cat"], **regions}), tmp_path / "run")
    assert load_coefficients(run.folder, 0).shape == (2, 3, 1)
    assert [row["network_passes"] for row in run.folder.metrics()] == [2 * STEPS] * 2
