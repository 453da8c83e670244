"""The reference pictures in a sample's metadata, and the rewards that compare a picture with them."""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pixrl.errors import ConfigError, did_you_mean
from pixrl.rewards.base import DifferentiableReward
from pixrl.rewards.encoders import PictureEncoder
from pixrl.rewards.preprocess import require_images
from pixrl.rewards.segmentation import Colour, Foreground
from pixrl.types import RewardBatch, Scores

Encode = Callable[[Tensor], Tensor]
"""A function from pictures [B, 3, H, W] to unit vectors [B, E]."""

KEY = "reference"
"""The metadata key of references: one picture [3, H, W], several of one size [M, 3, H, W], or a list of pictures."""


MASK = "mask"
"""The metadata key of masks of the user's own: a list with one [3, H, W] a reference, white the subject, or None."""

SUBJECTS = "subjects"
"""The metadata key of several subjects in a picture: a list of metadata, with a class and a reference each."""


def of_subject(metadata: Mapping[str, object], number: int | None) -> Mapping[str, object]:
    """Return the metadata of one of several subjects: all of it with None, and {} where there is no such subject."""
    if number is None:
        return metadata
    several = metadata.get(SUBJECTS)
    if not isinstance(several, Sequence) or not 0 <= number < len(several):
        return {}
    found = several[number]
    return found if isinstance(found, Mapping) else {}


def references_of(metadata: Mapping[str, object]) -> list[Tensor]:
    """Return the references, each [1, 3, H, W]; none where the metadata has none or something that is no picture."""
    given = metadata.get(KEY)
    parts = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    pictures: list[Tensor] = []
    for part in parts:
        if not isinstance(part, Tensor) or part.ndim not in (3, 4):
            return []
        pictures.extend([part[None]] if part.ndim == 3 else part.split(1))
    return pictures


def masks_of(metadata: Mapping[str, object], count: int) -> list[Tensor | None]:
    """Return the user's own mask [1, H, W] in [0, 1] of each of so many references; None where there is none."""
    given = metadata.get(MASK)
    if not isinstance(given, Sequence) or len(given) != count:
        return [None] * count
    return [one.float().mean(dim=0, keepdim=True).cpu() if isinstance(one, Tensor) else None for one in given]


class References(StrEnum):
    """The references of a sample that are compared: all (the mean over them), or the first alone."""

    ALL = "all"
    FIRST = "first"


PartT = TypeVar("PartT")


def chosen(pictures: Sequence[PartT], which: References) -> Sequence[PartT]:
    """Return the references that are compared."""
    return pictures[:1] if which is References.FIRST else pictures


ChoiceT = TypeVar("ChoiceT", bound=StrEnum)


def choice(reward: str, option: str, given: str, choices: type[ChoiceT]) -> ChoiceT:
    """Return a reward's option as one of its choices.

    Raises:
        ConfigError: it is none of them.
    """
    if given not in list(choices):
        raise ConfigError(
            f"{reward}: unknown {option} {given!r}.{did_you_mean(str(given), choices)} Use {', '.join(choices)}."
        )
    return choices(given)


class FeatureCache:
    """A cache of features by the content of pictures: a group's samples share their references, as do later steps.

    The digest of a tensor that has not been written to since is not computed again.
    """

    def __init__(self, limit: int = 1024) -> None:
        self.limit = limit
        self._rows: dict[str, Tensor] = {}
        self._digests = WeakIdKeyDictionary()

    def get(self, image_BCHW: Tensor, what: str, make: Callable[[], Tensor]) -> Tensor:
        """Return the features of one picture, from `make` the first time; `what` tells kinds of features apart."""
        key = f"{what}/{list(image_BCHW.shape)}/{self._digest(image_BCHW)}"
        if key not in self._rows:
            while len(self._rows) >= self.limit:
                del self._rows[next(iter(self._rows))]
            self._rows[key] = make()
        return self._rows[key]

    def _digest(self, image_BCHW: Tensor) -> str:
        """Return the content's digest, remembered with the tensor that owns the memory and its version counter."""
        if image_BCHW.is_inference():  # nothing counts what is written to it
            return _content(image_BCHW)
        whole = image_BCHW if image_BCHW._base is None else image_BCHW._base
        view = (image_BCHW._version, image_BCHW.storage_offset(), image_BCHW.shape, image_BCHW.stride())
        known = self._digests.setdefault(whole, {})
        if view not in known:
            known[view] = _content(image_BCHW)
        return str(known[view])


def _content(image_BCHW: Tensor) -> str:
    content = image_BCHW.detach().float().cpu().contiguous().numpy().tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@dataclass(frozen=True)
class _Sought:
    """What a picture is compared with."""

    kind: object
    """The class in the metadata."""
    references_ME: Tensor
    """The unit vectors of the compared references; a row of nan where nothing was found."""
    unjudged: str | None = None
    """Why there is nothing to compare with, whatever the pictures show."""

    def found(self) -> Tensor:
        """Return [M]: whether each reference shows something to compare with."""
        return self.references_ME.isfinite().all(dim=1)

    def usable(self) -> Tensor:
        """Return the unit vectors of the references that show something to compare with."""
        return self.references_ME[self.found()]


class ReferenceReward(DifferentiableReward):
    """The mean cosine in [-1, 1] between an encoder's features of a picture and of its references.

    A subclass decides what the encoder sees of a picture. References get no gradient, and each is encoded once, however
    many samples share it. A sample fails, with the reason, where it has no reference, or where nothing to compare is
    found in its picture or in all of its references; a reference in which nothing is found is left out of the mean.
    """

    provenance: Mapping[str, str]
    subject: int | None = None
    """The number of the compared subject, from 0, where a picture has several; None: there is one."""
    background: Colour
    _foreground: Foreground | None = None

    def __init__(self, encoder: PictureEncoder, references: References) -> None:
        self.encoder = encoder
        self.references = references
        self._cache = FeatureCache()

    @classmethod
    def lacks(cls, prompt: str, metadata: Mapping[str, object], options: Mapping[str, object]) -> str | None:
        number = options.get("subject")
        about = of_subject(metadata, number if isinstance(number, int) else None)
        if KEY not in about:
            return _no_reference(number)
        by_class = options.get("region") == "class"
        return "no class in the metadata" if by_class and "class" not in about else None

    @abstractmethod
    def cuts_out(self, of_reference: bool) -> bool:
        """Return whether the encoder sees the subject alone, cut out, rather than the whole picture."""

    @abstractmethod
    def _masks(self, images_BCHW: Tensor, kinds: Sequence[object]) -> Tensor:
        """Return masks [B, H, W] in [0, 1] of pictures that show one kind each; asked only where it cuts out."""

    def _features(
        self,
        images_BCHW: Tensor,
        kinds: Sequence[object],
        encode: Encode,
        *,
        of_reference: bool,
        own_BHW: Tensor | None = None,
    ) -> Tensor:
        """Return unit vectors [B, E] of pictures that show one kind each; a row is nan where nothing was found.

        `own_BHW` are masks of the user's, in place of the segmenter's.
        """
        if not self.cuts_out(of_reference):
            return encode(images_BCHW)
        masks_BHW = self._masks(images_BCHW.detach(), kinds) if own_BHW is None else own_BHW
        assert self._foreground is not None
        return cut_out_features(images_BCHW, masks_BHW, self._foreground, self.background, encode)

    def kind_problem(self, kind: object) -> str | None:
        """Return why that kind cannot be looked for, or None."""
        return None

    def _nothing(self, kind: object) -> str:
        """Return what a picture lacks in which nothing was found."""
        return "no foreground found"

    @torch.no_grad()
    def reference_problem(self, metadata: Mapping[str, object]) -> str | None:
        """Return why no picture can be judged by a sample's references (a subject not found, say), or None."""
        found = self._looked_up(of_subject(metadata, self.subject))
        if found.unjudged is not None:
            return found.unjudged
        return None if len(found.usable()) else f"{self._nothing(found.kind)} in the reference"

    @torch.no_grad()
    def unused_references(self, metadata: Mapping[str, object]) -> list[int]:
        """Return which references, counted from 1, show nothing to compare with: the mean leaves them out."""
        found = self._looked_up(of_subject(metadata, self.subject))
        return [number for number, is_there in enumerate(found.found().tolist(), 1) if not is_there]

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> Scores:
        values_B, reasons = self._judge(batch.images_BCHW, batch.metadata, self.encoder.image_features)
        return Scores(values_B, tuple(reasons), provenance=self.provenance)

    def differentiable_scores(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] = ()
    ) -> Tensor:
        values_B, _ = self._judge(images_BCHW, metadata, self.encoder.differentiable_features)
        return values_B.to(images_BCHW.device)

    def _judge(
        self, images_BCHW: Tensor, metadata: Sequence[Mapping[str, object]], encode: Encode
    ) -> tuple[Tensor, list[str | None]]:
        """Return scores [B], nan with a reason where there is none."""
        require_images(images_BCHW)
        given = list(metadata or [{}] * len(images_BCHW))
        # a group's samples share their metadata: what it refers to is looked up once
        entries = {key: of_subject(one, self.subject) for key, one in {id(one): one for one in given}.items()}
        kinds = [entries[id(one)].get("class") for one in given]
        features_BE = self._features(images_BCHW, kinds, encode, of_reference=False)
        known = {key: self._looked_up(entry) for key, entry in entries.items()}
        finite = images_BCHW.isfinite().flatten(1).all(dim=1).tolist()
        values: list[Tensor] = []
        reasons: list[str | None] = []
        for one, feature_E, ok in zip(given, features_BE, finite, strict=True):
            sought, reason = known[id(one)], None
            usable_ME = sought.usable()
            if not ok:
                reason = "the picture is not finite"
            elif sought.unjudged is not None:
                reason = sought.unjudged
            elif not feature_E.isfinite().all():
                reason = f"{self._nothing(sought.kind)} in the picture"
            elif not len(usable_ME):
                reason = f"{self._nothing(sought.kind)} in the reference"
            cosines_M = usable_ME.to(feature_E.device) @ feature_E if reason is None else None
            values.append(feature_E.new_tensor(torch.nan) if cosines_M is None else cosines_M.mean())
            reasons.append(reason)
        return torch.stack(values), reasons

    def _looked_up(self, metadata: Mapping[str, object]) -> _Sought:
        """Return what pictures with this metadata are compared with; each reference is encoded once."""
        kind = metadata.get("class")
        found = references_of(metadata)
        pictures = chosen(found, self.references)
        masks = chosen(masks_of(metadata, len(found)), self.references)
        unjudged = self.kind_problem(kind) if pictures else _no_reference(self.subject)
        if unjudged is not None:
            return _Sought(kind, torch.empty(0, 0), unjudged)
        with torch.no_grad():
            # one at a time: a reference's features are the same however the samples are batched
            features = [
                self._cache.get(
                    picture,
                    f"{kind}{'' if mask is None else _content(mask)}",
                    partial(
                        self._features,
                        picture,
                        [kind],
                        self.encoder.image_features,
                        of_reference=True,
                        own_BHW=mask,
                    ),
                )
                for picture, mask in zip(pictures, masks, strict=True)
            ]
            return _Sought(kind, torch.cat(features))


def _no_reference(number: object) -> str:
    where = repr(KEY) if number is None else f"{SUBJECTS!r}, number {number}"
    return f"no reference picture in the metadata (under {where})"


def cut_out_features(
    images_BCHW: Tensor, masks_BHW: Tensor, foreground: Foreground, background: Colour, encode: Encode
) -> Tensor:
    """Return unit vectors [B, E] of what the masks leave, on one colour; a row is nan where that is too little.

    The gradient goes to the pictures, not through the masks.
    """
    # cloned: autograd cannot keep a tensor of inference mode
    masks_BHW = masks_BHW.detach().clone()
    features_BE = encode(Foreground.composite(images_BCHW.float().cpu(), masks_BHW, background))
    found_B = foreground.is_present(masks_BHW).to(features_BE.device)
    return torch.where(found_B[:, None], features_BE, torch.nan)
