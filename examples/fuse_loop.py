"""RMLer in one file: two concepts become one object. Read `e2po_loop.py` beside it: the same four verbs.

    python examples/fuse_loop.py owl snail

draws on the toy world's frozen generator; what learns is a policy over mixing coefficients, a coefficient for each
column of the text embeddings as in the paper, whose update is in `algorithms/fusion/rmler.py`. `pixrl fuse --mixing
columns` adds shared noises, calibrated selection, resume and a report; a test holds this file's pictures and rewards
against its own.

Axes: N concepts, B pictures of a batch, D embedding columns, M exemplars of a concept.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from pixrl import models
from pixrl.algorithms.fusion.base import Feedback, FusionTask
from pixrl.algorithms.fusion.rmler import RMLer, RMLerSettings
from pixrl.fusion.world import EXEMPLAR_SEED
from pixrl.models.base import Conditioning
from pixrl.rewards.clip import FusionScorer
from pixrl.rewards.encoders import ClipSimilarity
from pixrl.rewards.segmentation import Foreground
from pixrl.types import sample_seed

SEED, BUDGET, BATCH, EXEMPLARS = 0, 128, 16, 4
ALPHA = 5.0  # weight of the balance in the reward (Eq. 5)


def fuse(concepts: Sequence[str], budget: int = BUDGET, model: str = "toy:turbo") -> tuple[Tensor, Tensor]:
    """Every picture [n, 3, H, W] and its reward [n], in the order in which they were drawn."""
    generator = models.load(model, device="cpu")
    scorer = FusionScorer(ClipSimilarity("toy:clip", device="cpu"), Foreground("toy:segmenter", device="cpu"))
    prompts = [f"a photo of {concept}" for concept in concepts]

    # what the children are compared with: pictures of each concept alone
    seeds = [sample_seed(EXEMPLAR_SEED, 0, 0, i) for i in range(EXEMPLARS)]
    drawn = [generator.sample(generator.encode([prompt] * EXEMPLARS), seeds) for prompt in prompts]
    exemplars = [scorer.exemplar_features(images_MCHW) for images_MCHW in drawn]
    exemplars = [features_ME[~features_ME.isnan().any(dim=1)] for features_ME in exemplars]

    sources = generator.encode(prompts)
    policy = RMLer(FusionTask(sources.tokens_BLD.float().mean(dim=1), SEED, budget, BATCH), settings())
    images, rewards = [], []
    for step in range(budget // BATCH):
        proposal = policy.ask(BATCH, step)  # how much of each concept goes into every column
        mixed = Conditioning.cat([sources.mix(one_ND) for one_ND in proposal.coefficients_BND])  # Eq. 2
        noises = [sample_seed(SEED, step, 0, i) for i in range(BATCH)]
        images_BCHW = generator.sample(mixed, noises)
        similarities_BN = scorer.similarities(images_BCHW, exemplars).similarities_BN
        feedback = Feedback.of(similarities_BN, ALPHA, noises)  # Eq. 5: presence minus alpha times imbalance
        policy.tell(proposal, feedback)  # Eq. 4: a clipped policy gradient
        images.append(images_BCHW)
        rewards.append(feedback.rewards_B)
        print(
            f"step {step}: mean reward {feedback.rewards_B.nanmean():.3f}, best {feedback.rewards_B.max():.3f}"
        )
    return torch.cat(images), torch.cat(rewards)


def settings() -> RMLerSettings:
    """Those of `pixrl fuse`; what is not given takes the policy's own default."""
    return RMLerSettings.model_validate({})


if __name__ == "__main__":
    fuse(sys.argv[1:] or ["owl", "snail"])
