"""What of the concepts is mixed, and how coefficients are read: a choice beside who chooses the coefficients.

Every mixing takes coefficients [B, N, D] that sum to one over the N concepts, so that any sampler acts on any of them;
D and its meaning differ:

| mixing   | one coefficient for each                  | network passes a picture |
|----------|-------------------------------------------|--------------------------|
| columns  | column of the text embedding              | S                        |
| tokens   | token of the text embedding               | S                        |
| steps    | picture (its share of the steps), or step | S to N S                 |
| velocity | picture                                   | N S                      |
| spatial  | picture (its share of the area), or cell  | N S                      |
| regions  | picture (its share of the area), or cell  | S                        |

S is the number of sampling steps. The first two mix what the network is conditioned on; `regions` gives it all concepts
at once and says what each place attends to; the others mix what it predicts for each concept (velocity, noise or
sample), by weights that sum to one everywhere. `columns` is RMLer's (Eq. 2); `velocity` averages predictions as
composable diffusion does (Liu et al. 2022), `spatial` by regions as MultiDiffusion does (Bar-Tal et al. 2023); `steps`
is known as prompt scheduling, `regions` as regional prompting, of which `pixrl.models.regions` has the details.
"""

from abc import ABC, abstractmethod
from enum import StrEnum
from typing import ClassVar, Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from pixrl.config import Count, Settings
from pixrl.equations import fuse
from pixrl.errors import InputError, ShapeError
from pixrl.models.base import Conditioning, Mixture

MASK_SIDE = 64
"""Rows and columns of a mask, whatever the latents' size: `Mixture` resizes it."""
SOFT, CELLS = 0.25, 4
"""The passage's width and the grid's rows of masks, where none are given."""


class Pooled(StrEnum):
    """The way in which the pooled text features are mixed, where the embedding is."""

    AVERAGE = "average"
    """1/N each, whatever the coefficients: the paper's code."""
    WEIGHT = "weight"
    """Each concept by the mean of its coefficients."""
    COLUMNS = "columns"
    """Column by column, with coefficients of their own."""


class MixingSettings(Settings):
    """The settings of a mixing; `kind` names it."""

    kind: str


MixingSettingsT = TypeVar("MixingSettingsT", bound=MixingSettings)


class Mixing(ABC, Generic[MixingSettingsT]):
    """A mixing, which turns coefficients into what a generator draws from.

    Attributes:
        features_ND: what the samplers see of the concepts, one column for each coefficient.
    """

    Settings: ClassVar[type[MixingSettings]]
    mixes_embeddings: ClassVar[bool] = False
    """Whether the text embedding is mixed, and with it the pooled features (`pooled` in a recipe)."""
    needs_regions: ClassVar[bool] = False
    """Whether the generator must attend by region (`Renderer.reads_regions`)."""
    takes_pictures: ClassVar[bool] = False
    """Whether a concept may be a picture that the generator is shown (`Renderer.reads_pictures`): true of what averages
    predictions, since a picture has no place in a text embedding."""
    features_ND: Tensor

    def __init__(
        self, settings: MixingSettingsT, sources: Conditioning, *, steps: int, pooled: Pooled
    ) -> None:
        """Prepare to mix.

        Args:
            settings: an instance of the class's `Settings`.
            sources: one row for each of the N concepts.
            steps: S, the generator's number of sampling steps.
            pooled: how pooled features are mixed; only read where `mixes_embeddings`.

        Raises:
            InputError: the settings do not fit the generator.
        """
        self.settings = settings
        self.sources = sources
        self.steps = steps
        self.pooled = pooled

    @abstractmethod
    def mix(self, coefficients_BND: Tensor) -> Conditioning | Mixture:
        """Return what the pictures of these coefficients are drawn from."""

    def _positions(self, columns: int) -> Tensor:
        """Return features [N, columns] for coefficients that belong to no embedding: the concepts' places in [-1, 1].

        Their mixture tells a policy which coefficients it used last.
        """
        return torch.linspace(-1, 1, len(self.sources))[:, None].repeat(1, columns)

    def _mixture(self, rows: int, weights_S: tuple[Tensor, ...]) -> Mixture:
        """Return the mixture of `rows` pictures, every one of all concepts."""
        parts = tuple(self.sources[[concept] * rows] for concept in range(len(self.sources)))
        return Mixture(parts, weights_S)


class ColumnsSettings(MixingSettings):
    """Mixing by columns has no further settings."""

    kind: Literal["columns"] = "columns"


class Columns(Mixing[ColumnsSettings]):
    """The paper's mixing: every column of the token embeddings has a coefficient of its own (RMLer, Eq. 2)."""

    Settings = ColumnsSettings
    mixes_embeddings = True

    def __init__(
        self, settings: ColumnsSettings, sources: Conditioning, *, steps: int, pooled: Pooled
    ) -> None:
        super().__init__(settings, sources, steps=steps, pooled=pooled)
        self.columns = sources.tokens_BLD.shape[2]
        self.features_ND = sources.mean_BD.cpu()
        if pooled is Pooled.COLUMNS:
            if sources.pooled_BE is None:
                raise InputError("This model has no pooled text features: leave out pooled=columns.")
            self.features_ND = torch.cat((self.features_ND, sources.pooled_BE.float().cpu()), dim=1)

    def mix(self, coefficients_BND: Tensor) -> Conditioning:
        tokens_NLD = self.sources.tokens_BLD
        coefficients_BND = coefficients_BND.to(tokens_NLD.device)
        tokens_BLD = torch.stack([fuse(tokens_NLD, a_ND[:, : self.columns]) for a_ND in coefficients_BND])
        own_BNE = coefficients_BND[:, :, self.columns :] if self.pooled is Pooled.COLUMNS else None
        pooled_BE = mix_pooled(self.sources, coefficients_BND, self.pooled, own_BNE)
        used_BN1 = (coefficients_BND[:, :, : self.columns] != 0).any(dim=2, keepdim=True)
        mask_BL = self.sources.mixed_mask(used_BN1)
        return Conditioning(tokens_BLD.to(tokens_NLD.dtype), pooled_BE, mask_BL=mask_BL)


class TokensSettings(MixingSettings):
    """Mixing by tokens has no further settings."""

    kind: Literal["tokens"] = "tokens"


class Tokens(Mixing[TokensSettings]):
    """Every token of the embedding has a coefficient, all its columns the same one."""

    Settings = TokensSettings
    mixes_embeddings = True

    def __init__(
        self, settings: TokensSettings, sources: Conditioning, *, steps: int, pooled: Pooled
    ) -> None:
        super().__init__(settings, sources, steps=steps, pooled=pooled)
        if pooled is Pooled.COLUMNS:
            raise InputError(
                "pooled=columns needs mixing=columns: tokens have no columns of their own to share."
            )
        self.features_ND = sources.tokens_BLD.float().mean(dim=2).cpu()

    def mix(self, coefficients_BND: Tensor) -> Conditioning:
        tokens_NLD = self.sources.tokens_BLD
        coefficients_BNL = coefficients_BND.to(tokens_NLD.device, torch.float32)
        tokens_BLD = torch.einsum("bnl,nld->bld", coefficients_BNL, tokens_NLD.float())
        return Conditioning(
            tokens_BLD.to(tokens_NLD.dtype),
            mix_pooled(self.sources, coefficients_BNL, self.pooled),
            mask_BL=self.sources.mixed_mask(coefficients_BNL != 0),
        )


class StepOrder(StrEnum):
    """The order in which concepts take their sampling steps."""

    SEQUENCE = "sequence"
    """The first concept's come first; the shares of the steps are the coefficients. The step at a border is shared."""
    ALTERNATE = "alternate"
    """The concepts take turns, each as often as its coefficient says."""
    FREE = "free"
    """Every step has coefficients of its own, by which the predictions are averaged."""


class StepsSettings(MixingSettings):
    """The division of the sampling steps among the concepts."""

    kind: Literal["steps"] = "steps"
    order: StepOrder = StepOrder.SEQUENCE


class Steps(Mixing[StepsSettings]):
    """One concept early and another late, or in turn: early steps settle the layout, late ones the surface."""

    Settings = StepsSettings
    takes_pictures = True

    def __init__(self, settings: StepsSettings, sources: Conditioning, *, steps: int, pooled: Pooled) -> None:
        super().__init__(settings, sources, steps=steps, pooled=pooled)
        if steps < 2:
            raise InputError(f"mixing=steps needs two or more sampling steps; this model takes {steps}.")
        self.features_ND = self._positions(steps if settings.order is StepOrder.FREE else 1)

    def mix(self, coefficients_BND: Tensor) -> Mixture:
        if self.settings.order is StepOrder.FREE:
            weights_BNS = coefficients_BND.float()
        elif self.settings.order is StepOrder.SEQUENCE:
            middles_S = (torch.arange(self.steps) + 0.5) / self.steps
            weights_BNS = bands(shares(coefficients_BND), middles_S, 1 / self.steps)
        else:
            weights_BNS = turns(shares(coefficients_BND), self.steps)
        weights_S = tuple(weights_BN[:, :, None, None] for weights_BN in weights_BNS.unbind(dim=2))
        return self._mixture(len(coefficients_BND), weights_S)


class VelocitySettings(MixingSettings):
    """Mixing of predictions has no further settings."""

    kind: Literal["velocity"] = "velocity"


class Velocity(Mixing[VelocitySettings]):
    """The average of what the network predicts for every concept, a v_A + (1 - a) v_B, the same at every step."""

    Settings = VelocitySettings
    takes_pictures = True

    def __init__(
        self, settings: VelocitySettings, sources: Conditioning, *, steps: int, pooled: Pooled
    ) -> None:
        super().__init__(settings, sources, steps=steps, pooled=pooled)
        self.features_ND = self._positions(1)

    def mix(self, coefficients_BND: Tensor) -> Mixture:
        weights_BN11 = coefficients_BND.float()[:, :, :1, None]
        return self._mixture(len(coefficients_BND), (weights_BN11,) * self.steps)


class Shape(StrEnum):
    """The shape of the concepts' parts of the picture."""

    TOP_DOWN = "top_down"
    """The first concept on top; the border lies where its coefficient says."""
    LEFT_RIGHT = "left_right"
    """The first concept on the left."""
    INSIDE_OUT = "inside_out"
    """The first concept in a disc in the middle, the others in rings around it."""
    GRID = "grid"
    """Every cell of a coarse grid has coefficients of its own, with smooth passages between cells."""


class MaskSettings(MixingSettings):
    """The part of the picture that is each concept's."""

    shape: Shape = Shape.TOP_DOWN
    soft: float | None = Field(None, gt=0, le=1)
    """Width of the passage between two concepts, as a share of the picture (0.25 where none is given); 1 is a gradient
    over all of it. Without effect on a grid."""
    cells: int | None = Field(None, ge=2, le=16)
    """Rows and columns of the grid (4 where none is given). Without effect on other shapes."""

    @model_validator(mode="after")
    def _has_effect(self) -> "MaskSettings":
        useless = "soft" if self.shape is Shape.GRID else "cells"
        if getattr(self, useless) is not None:
            raise ValueError(f"{useless} has no effect with shape={self.shape}; leave it out")
        return self


MaskSettingsT = TypeVar("MaskSettingsT", bound=MaskSettings)


class Masked(Mixing[MaskSettingsT]):
    """A mixing that divides the picture among the concepts."""

    def __init__(self, settings: MaskSettingsT, sources: Conditioning, *, steps: int, pooled: Pooled) -> None:
        super().__init__(settings, sources, steps=steps, pooled=pooled)
        self.cells = settings.cells or CELLS
        self.features_ND = self._positions(self.cells**2 if settings.shape is Shape.GRID else 1)

    def masks(self, coefficients_BND: Tensor) -> Tensor:
        """Return the concepts' masks [B, N, 64, 64], which sum to one over N in every place."""
        side = MASK_SIDE
        if self.settings.shape is Shape.GRID:
            cells_BNHW = coefficients_BND.float().unflatten(2, (self.cells, -1))
            return F.interpolate(cells_BNHW, size=(side, side), mode="bilinear", align_corners=False)
        middles = (torch.arange(side) + 0.5) / side
        if self.settings.shape is Shape.TOP_DOWN:
            places_HW = middles[:, None].expand(side, side)
        elif self.settings.shape is Shape.LEFT_RIGHT:
            places_HW = middles.expand(side, side)
        else:
            squares_HW = (middles[:, None] - 0.5).square() + (middles - 0.5).square()
            # ranks, so that equal steps are equal areas
            places_HW = (squares_HW.flatten().argsort(stable=True).argsort().view(side, side) + 0.5) / side**2
        masks_BNP = bands(shares(coefficients_BND), places_HW.flatten(), self.settings.soft or SOFT)
        masks_BNHW: Tensor = masks_BNP.unflatten(2, (side, side))
        return masks_BNHW


class SpatialSettings(MaskSettings):
    """The part of the picture in which each concept's prediction counts."""

    kind: Literal["spatial"] = "spatial"
    start: Count = 2
    """Steps before the masks, fewer than the model takes: until then predictions are averaged by shares of the area."""


class Spatial(Masked[SpatialSettings]):
    """The predictions of the concepts, each in its part of the latents."""

    Settings = SpatialSettings
    takes_pictures = True

    def __init__(
        self, settings: SpatialSettings, sources: Conditioning, *, steps: int, pooled: Pooled
    ) -> None:
        super().__init__(settings, sources, steps=steps, pooled=pooled)
        if settings.start >= steps:
            raise InputError(
                f"mixing.start={settings.start} leaves no step for the masks: this model takes {steps}. "
                f"Give mixing.start={max(1, steps - 1)} or less, or more sampling steps."
            )

    def mix(self, coefficients_BND: Tensor) -> Mixture:
        masks_BNHW = self.masks(coefficients_BND)
        plain_BN11 = masks_BNHW.mean(dim=(2, 3), keepdim=True)
        start = self.settings.start
        weights_S = (plain_BN11,) * start + (masks_BNHW,) * (self.steps - start)
        return self._mixture(len(coefficients_BND), weights_S)


class RegionsSettings(MaskSettings):
    """The part of the picture that attends to each concept's tokens, at every step."""

    kind: Literal["regions"] = "regions"


class Regions(Masked[RegionsSettings]):
    """All concepts in one pass of the network, of which each part of the picture attends to its own."""

    Settings = RegionsSettings
    needs_regions = True

    def mix(self, coefficients_BND: Tensor) -> Conditioning:
        tokens_NLD = self.sources.tokens_BLD
        # an unbounded policy's cells may be negative, and nothing attends less than not at all
        masks_BNHW = self.masks(coefficients_BND).clamp_min(0).to(tokens_NLD.device)
        masks_BNHW = masks_BNHW / masks_BNHW.sum(dim=1, keepdim=True)
        areas_BN1 = masks_BNHW.mean(dim=(2, 3))[:, :, None]
        own_NL = self.sources.mask_BL
        return Conditioning(
            tokens_NLD.flatten(0, 1).expand(len(masks_BNHW), -1, -1),
            mix_pooled(self.sources, areas_BN1, Pooled.WEIGHT),
            mask_BL=None if own_NL is None else own_NL.flatten().expand(len(masks_BNHW), -1),
            regions_BNHW=masks_BNHW,
        )


def shares(coefficients_BND: Tensor) -> Tensor:
    """Return one non-negative share a concept, [B, N], that sum to one: coefficients may lie outside [0, 1]."""
    positive_BN = coefficients_BND.float().mean(dim=2).clamp_min(0)
    return positive_BN / positive_BN.sum(dim=1, keepdim=True)


def bands(shares_BN: Tensor, places_P: Tensor, soft: float) -> Tensor:
    """Divide the interval [0, 1] into one band a concept, in order, each as wide as its share.

    Args:
        shares_BN: non-negative, sums of one.
        places_P: where to look, within [0, 1].
        soft: width of the linear passage from a band to the next.

    Returns:
        Weights [B, N, P] that sum to one over N. A concept with the whole share has weight one everywhere.
    """
    edges_BN = (
        shares_BN.cumsum(dim=1)[:, :-1] * (1 + soft) - soft / 2
    )  # stretched: a share of 0 leaves nothing
    reached_BNP = ((edges_BN[:, :, None] - places_P) / soft + 0.5).clamp(0, 1)
    ends = reached_BNP.new_zeros(len(shares_BN), 1, len(places_P))
    return torch.cat((reached_BNP, ends + 1), dim=1) - torch.cat((ends, reached_BNP), dim=1)


def turns(shares_BN: Tensor, steps: int) -> Tensor:
    """Return which concept's turn each step is, one-hot [B, N, S]: at each, the one that waits for the most."""
    waiting_BN = torch.zeros_like(shares_BN)
    found = []
    for _ in range(steps):
        waiting_BN = waiting_BN + shares_BN
        turn_BN = F.one_hot(waiting_BN.argmax(dim=1), shares_BN.shape[1]).to(shares_BN)
        waiting_BN = waiting_BN - turn_BN
        found.append(turn_BN)
    return torch.stack(found, dim=2)


def mix_pooled(
    sources: Conditioning, coefficients_BND: Tensor, how: Pooled, own_BNE: Tensor | None = None
) -> Tensor | None:
    """Return the pooled features [B, E] of mixed concepts; None where the model has none.

    Args:
        sources: one row a concept.
        coefficients_BND: of the tokens or columns.
        how: see `Pooled`.
        own_BNE: the pooled columns' own coefficients, with `Pooled.COLUMNS`.
    """
    pooled_NE = sources.pooled_BE
    if pooled_NE is None:
        return None
    if how is Pooled.COLUMNS:
        if own_BNE is None:
            raise ShapeError("pooled=columns needs coefficients of the pooled columns.")
        weights_BNE = own_BNE
    else:
        weights_BNE = coefficients_BND.mean(dim=2, keepdim=True).expand(-1, -1, pooled_NE.shape[1])
        if how is Pooled.AVERAGE:
            weights_BNE = torch.full_like(weights_BNE, 1 / len(pooled_NE))
    pooled_BE = torch.cat([fuse(pooled_NE[:, None], weights_NE) for weights_NE in weights_BNE])
    return pooled_BE.to(pooled_NE.dtype)
