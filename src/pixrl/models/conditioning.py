"""What a picture is drawn from: encoded prompts (`Conditioning`), or several for each picture (`Mixture`)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pixrl.errors import InputError, ShapeError


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: token features [B, L, D], pooled features [B, E] and, where used, reference latents.

    Attributes:
        tokens_BLD: one row a prompt; zeros where it is padding. With regions, a row's N prompts one after another.
        pooled_BE: None where the model takes none.
        references: latents of reference pictures.
        mask_BL: true on a prompt's own tokens, false on padding; None: every token counts, as SD3, SDXL and FLUX have
            it, which attend to padding too.
        away: what guidance leads away from, row by row, where that depends on the references; None: it does not.
        sizes_BN2: rows and columns of the latents of each row's N references, where these have several shapes; zeros
            fill up what is beyond, and a reference of 0 x 0 is none. None: all references at a place have the shape of
            their tensor.
        regions_BNHW: masks of the N prompts of each row, of any size, which sum to one over N: how much each place of
            the picture attends to each prompt (`pixrl.models.regions`). None: a row is one prompt.
    """

    tokens_BLD: Tensor
    pooled_BE: Tensor | None = None
    references: tuple[Tensor, ...] = ()
    mask_BL: Tensor | None = None
    away: "Conditioning | None" = None
    sizes_BN2: Tensor | None = None
    regions_BNHW: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens_BLD.shape[0]

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> "Conditioning":
        index = (
            rows
            if isinstance(rows, slice)
            else torch.as_tensor(rows, dtype=torch.long).to(self.tokens_BLD.device)
        )
        mask = None if self.mask_BL is None else self.mask_BL[index]
        sizes = self.sizes_BN2
        if sizes is not None:  # on the CPU, since shapes are read from it
            sizes = sizes[index if isinstance(index, slice) else index.cpu()]
        away = None if self.away is None else self.away[rows]
        regions = None if self.regions_BNHW is None else self.regions_BNHW[index]
        changed = self._map(lambda x: x[index])
        return replace(changed, mask_BL=mask, away=away, sizes_BN2=sizes, regions_BNHW=regions)

    def to(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Conditioning":
        """Return the same rows on a device, in a dtype."""
        mask = None if self.mask_BL is None else self.mask_BL.to(device=device)
        away = None if self.away is None else self.away.to(device=device, dtype=dtype)
        regions = None if self.regions_BNHW is None else self.regions_BNHW.to(device=device)
        changed = self._map(lambda x: x.to(device=device, dtype=dtype))
        return replace(changed, mask_BL=mask, away=away, regions_BNHW=regions)

    @property
    def own_BL(self) -> Tensor:
        """True on the tokens that count, which are all where there is no mask."""
        if self.mask_BL is not None:
            return self.mask_BL
        return torch.ones(self.tokens_BLD.shape[:2], dtype=torch.bool, device=self.tokens_BLD.device)

    @property
    def sizes(self) -> Tensor:
        """The rows and columns of every reference's latents, [B, N, 2]."""
        if self.sizes_BN2 is not None:
            return self.sizes_BN2
        found = torch.tensor([one.shape[2:] for one in self.references], dtype=torch.long)
        return found.view(1, len(self.references), 2).expand(len(self), -1, -1)

    @property
    def mean_BD(self) -> Tensor:
        """The mean of each prompt's own tokens, float32."""
        if self.mask_BL is None:
            return self.tokens_BLD.float().mean(dim=1)
        own_BL1 = self.mask_BL[:, :, None]
        return (self.tokens_BLD.float() * own_BL1).sum(dim=1) / own_BL1.sum(dim=1)

    def mixed_mask(self, used_MBL: Tensor) -> Tensor | None:
        """Return the mask [M, L] of M mixtures of these rows: a token counts where it is one of a row that is used.

        `used_MBL`: bool, of each row or of each token of it ([M, B, 1] or [M, B, L]).
        """
        return None if self.mask_BL is None else (used_MBL.to(self.mask_BL.device) & self.mask_BL).any(dim=1)

    def mix(self, weights: Tensor) -> "Conditioning":
        """Return the weighted sum over the batch as one row: weights [B] for all columns, or [B, D] column by column.

        With column weights the pooled features take each concept's mean weight.

        Raises:
            ShapeError: the weights have another shape, or the rows have regions.
        """
        self._require_no_regions("mix")
        if weights.shape[0] != len(self) or weights.ndim not in (1, 2):
            raise ShapeError(
                f"mix: weights {tuple(weights.shape)} for {len(self)} conditionings; give [B] or [B, D]."
            )
        if self.sizes_BN2 is not None:
            raise ShapeError("mix: references of several shapes cannot be added up; lay them out on squares.")
        column_weights = weights if weights.ndim == 2 else weights[:, None]
        flat = column_weights.mean(dim=1)
        return replace(
            self,
            tokens_BLD=(self.tokens_BLD * column_weights[:, None, :]).sum(0, keepdim=True),
            pooled_BE=None
            if self.pooled_BE is None
            else (self.pooled_BE * flat[:, None]).sum(0, keepdim=True),
            references=tuple(
                (r * flat.view(-1, *[1] * (r.ndim - 1))).sum(0, keepdim=True) for r in self.references
            ),
            mask_BL=self.mixed_mask((column_weights != 0).any(dim=1)[None, :, None]),
            away=None if self.away is None else self.away.mix(weights),
        )

    def lerp(self, other: "Conditioning", weight: Tensor | float) -> "Conditioning":
        """Return (1 - weight) * self + weight * other; the weight is a number or [B].

        Raises:
            ShapeError: references of the two have other shapes, or rows have regions.
        """
        self._require_no_regions("lerp")
        other._require_no_regions("lerp")
        w = torch.as_tensor(weight, dtype=self.tokens_BLD.dtype, device=self.tokens_BLD.device)

        def blend(a: Tensor, b: Tensor) -> Tensor:
            return torch.lerp(a, b, w.view(-1, *[1] * (a.ndim - 1)) if w.ndim else w)

        pooled = None
        if self.pooled_BE is not None and other.pooled_BE is not None:
            pooled = blend(self.pooled_BE, other.pooled_BE)
        if not torch.equal(self.sizes, other.sizes):
            raise ShapeError("lerp: the references of the two have other shapes; lay them out on squares.")
        refs = tuple(blend(a, b) for a, b in zip(self.references, other.references, strict=True))
        mask = None
        if self.mask_BL is not None or other.mask_BL is not None:
            far = w.view(-1, 1)
            mask = (self.own_BL & (far != 1)) | (other.own_BL & (far != 0))
        away = None
        if self.away is not None and other.away is not None:
            away = self.away.lerp(other.away, weight)
        return Conditioning(
            blend(self.tokens_BLD, other.tokens_BLD), pooled, refs, mask, away, self.sizes_BN2
        )

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """Return all rows of the parts, in order.

        Raises:
            ShapeError: some have regions and others none, or regions of other prompts or sizes.
        """
        pooled = [p.pooled_BE for p in parts if p.pooled_BE is not None]
        is_masked = any(p.mask_BL is not None for p in parts)
        aways = [p.away for p in parts if p.away is not None]
        regions = [p.regions_BNHW for p in parts if p.regions_BNHW is not None]
        if regions and (len(regions) != len(parts) or len({one.shape[1:] for one in regions}) > 1):
            shapes = [None if p.regions_BNHW is None else list(p.regions_BNHW.shape) for p in parts]
            raise ShapeError(
                f"cat: regions of {shapes}; give all parts masks [B, N, H, W] of one shape, or none "
                "(Conditioning.in_regions_of)."
            )
        longest = max((p.references for p in parts), key=len, default=())
        parts = [p._beside(longest) for p in parts]
        references = []
        for column in zip(*(p.references for p in parts), strict=True):
            # up to the largest there are zeros, below and at the right; the sizes say where, unless all have one shape
            rows, columns = (max(one.shape[axis] for one in column) for axis in (2, 3))
            filled = [F.pad(one, (0, columns - one.shape[3], 0, rows - one.shape[2])) for one in column]
            references.append(torch.cat(filled))
        of_one_shape = len({tuple(one.shape[1:] for one in p.references) for p in parts}) == 1
        if of_one_shape and all(p.sizes_BN2 is None for p in parts):
            sizes_BN2 = None
        else:
            sizes_BN2 = torch.cat([p.sizes for p in parts])
        return Conditioning(
            torch.cat([p.tokens_BLD for p in parts]),
            torch.cat(pooled) if pooled else None,
            tuple(references),
            torch.cat([p.own_BL for p in parts]) if is_masked else None,
            Conditioning.cat(aways) if len(aways) == len(parts) else None,
            sizes_BN2,
            torch.cat(regions) if regions else None,
        )

    def in_regions_of(self, other: "Conditioning") -> "Conditioning":
        """Return each row once for each region of `other`, the first of them everywhere, so that a row means the same.

        It can then go through a network in one batch with `other`. Without regions there the rows are as they are.
        """
        if other.regions_BNHW is None:
            return self
        regions_BNHW = torch.zeros_like(other.regions_BNHW[:1]).repeat(len(self), 1, 1, 1)
        regions_BNHW[:, 0] = 1
        return replace(
            self, tokens_BLD=self.tokens_BLD.repeat(1, regions_BNHW.shape[1], 1), regions_BNHW=regions_BNHW
        )

    def by_shape(self) -> "Iterator[tuple[Tensor, Conditioning]]":
        """Yield the rows that are shown as many references of the same shapes, and what they are, without filling."""
        if self.sizes_BN2 is None:
            yield torch.arange(len(self)), self
            return
        for sizes_N2 in self.sizes_BN2.unique(dim=0):
            rows = (self.sizes_BN2 == sizes_N2).flatten(1).all(dim=1).nonzero().flatten()
            part = self[rows]
            sizes = zip(part.references, sizes_N2.tolist(), strict=True)
            cut = tuple(x[:, :, :h, :w] for x, (h, w) in sizes if h and w)
            yield rows, replace(part, references=cut, sizes_BN2=None)

    def _require_no_regions(self, what: str) -> None:
        if self.regions_BNHW is not None:
            raise ShapeError(
                f"{what}: rows with regions hold several prompts; mix them before they get regions."
            )

    def _beside(self, references: tuple[Tensor, ...]) -> "Conditioning":
        """Return the rows with as many references as others have, of which those beyond their own are 0 x 0."""
        absent = tuple(x.new_zeros(len(self), x.shape[1], 0, 0) for x in references[len(self.references) :])
        if not absent:
            return self
        sizes_BN2 = F.pad(self.sizes, (0, 0, 0, len(absent)))
        return replace(self, references=self.references + absent, sizes_BN2=sizes_BN2)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        """Return the rows with every tensor but the masks changed."""
        pooled = None if self.pooled_BE is None else change(self.pooled_BE)
        return replace(
            self,
            tokens_BLD=change(self.tokens_BLD),
            pooled_BE=pooled,
            references=tuple(change(r) for r in self.references),
        )


@dataclass(frozen=True)
class Mixture:
    """Several prompts for each picture, for which the network's predictions are averaged at every step.

    Attributes:
        parts: N conditionings of B rows each.
        weights_S: for each of the S sampling steps the parts' weights, [B, N, 1, 1], or masks of any size,
            [B, N, H, W], which are resized to the latents. They sum to one over N.
    """

    parts: tuple[Conditioning, ...]
    weights_S: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        rows = {len(part) for part in self.parts} | {len(weights) for weights in self.weights_S}
        counts = {weights.shape[1] for weights in self.weights_S}
        if len(rows) != 1 or counts != {len(self.parts)} or {w.ndim for w in self.weights_S} != {4}:
            raise ShapeError(
                f"Mixture: {len(self.parts)} parts and weights of {[list(w.shape) for w in self.weights_S]}; each step "
                "needs weights [B, N, H, W] of N parts with B rows."
            )

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, rows: slice) -> "Mixture":
        return Mixture(tuple(part[rows] for part in self.parts), tuple(w[rows] for w in self.weights_S))

    @property
    def passes(self) -> int:
        """The number of the network's evaluations in all, counted in pictures; parts without weight are left out."""
        return sum(len(self.used(step)[0]) for step in range(len(self.weights_S)))

    def used(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the pairs (row, part) that have weight at a step, as two vectors of equal length."""
        rows, parts = (self.weights_S[step].flatten(2) != 0).any(dim=2).nonzero(as_tuple=True)
        return rows, parts

    def conditioning(self, step: int) -> Conditioning:
        """Return the prompts of the pairs of `used`, one row each."""
        rows, parts = self.used(step)
        return Conditioning.cat(self.parts)[parts * len(self) + rows]

    def average(self, step: int, predictions: Tensor) -> Tensor:
        """Return the weighted sum [B, C, h, w] of predictions [pairs, C, h, w] for the pairs of `used`."""
        rows, parts = self.used(step)
        weights_BNHW = self.weights_S[step].to(predictions)
        if weights_BNHW.shape[2:] != (1, 1):
            size = predictions.shape[2:]
            weights_BNHW = F.interpolate(
                weights_BNHW, size=size, mode="bilinear", antialias=True, align_corners=False
            )
        found = predictions.new_zeros(len(self), len(self.parts), *predictions.shape[1:])
        found[rows, parts] = predictions
        return (found * weights_BNHW[:, :, None]).sum(dim=1)


def check_pairs(
    source: Conditioning | Mixture, seeds: Sequence[int], steps: int | None = None, *, by_region: bool = False
) -> None:
    """Check what a picture each is drawn from.

    Args:
        source: a row a picture.
        seeds: of the noises.
        steps: those of the model, for which a mixture must have weights.
        by_region: whether the model attends by region.

    Raises:
        ShapeError: a row without a seed, no row at all, or weights for other steps.
        InputError: the rows have regions, which this model does not read.
    """
    if len(source) != len(seeds) or not seeds:
        raise ShapeError(f"sample: {len(source)} conditionings for {len(seeds)} seeds; give one seed a row.")
    if isinstance(source, Mixture) and len(source.weights_S) != steps:
        raise ShapeError(
            f"sample_mixture: weights for {len(source.weights_S)} steps, but this model takes {steps} steps."
        )
    rows = source.parts if isinstance(source, Mixture) else (source,)
    if not by_region and any(one.regions_BNHW is not None for one in rows):
        raise InputError(
            "sample: the prompts have regions, and this model has no attention by region. SD3, SDXL and FLUX models "
            "have; with this one take mixing=spatial."
        )
