"""An encoder that was not the reward: the same pictures and exemplars, cut out the same way, seen by other eyes."""

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from pixrl.errors import InputError
from pixrl.fusion.world import Calibration, Exemplars, FusionWorld, Scorer, calibrate_presence
from pixrl.rewards.clip import FusionScorer
from pixrl.rewards.encoders import load_encoder
from pixrl.rewards.segmentation import Foreground


class HeldOut:
    """Scores by another encoder, with thresholds calibrated for it."""

    def __init__(self, scorer: Scorer, calibration: Calibration) -> None:
        self.scorer = scorer
        self.calibration = calibration
        self._features: dict[tuple[str, int], Tensor] = {}

    def similarities(self, images_BCHW: Tensor, exemplars: Sequence[Exemplars]) -> Tensor:
        """Similarity of every picture to every concept, [B, N]."""
        features = [self._features_of(one) for one in exemplars]
        return self.scorer.similarities(images_BCHW, features).similarities_BN.float().cpu()

    def _features_of(self, exemplars: Exemplars) -> Tensor:
        key = (exemplars.concept, len(exemplars.seeds))
        if key not in self._features:
            features = self.scorer.exemplar_features(exemplars.images_MCHW)
            self._features[key] = features[~features.isnan().any(dim=1)]
        return self._features[key]


@lru_cache(maxsize=2)
def load_heldout(world: FusionWorld, ref: str, concepts: tuple[str, ...]) -> HeldOut:
    """A CLIP or DINO checkpoint as held-out encoder of a world; thresholds come from pictures of the concepts."""
    if ref == world.clip:
        raise InputError(f"{ref!r} is the reward's own encoder; a held-out one must be another.")
    scorer = FusionScorer(load_encoder(ref), Foreground(world.segmenter))
    seen_so = FusionWorld(world.renderer, scorer, world.card, clip=ref, segmenter=world.segmenter)
    calibration = calibrate_presence(seen_so, concepts)
    return HeldOut(scorer, calibration)
