"""RMLer: reinforcement mixing learning.

Li, Chen, Chen, Chen, Yang: "RMLer: Synthesizing Novel Objects Across Diverse Categories via Reinforcement Mixing
Learning". A policy proposes, for every column of the concepts' text embeddings, how much of each concept goes into the
fused one; the picture made from it is scored by how present and how balanced the concepts are; a critic-free PPO
improves the policy.

| paper                         | here                                                             |
|-------------------------------|------------------------------------------------------------------|
| e_1, e_2                      | `task.features_ND` (tokens averaged), mixed as [N, L, D] by the renderer |
| s_t = e_f^(t), s_0 = mean     | `state_D`                                                        |
| a_t, 1 - a_t                  | `Proposal.coefficients_BND`                                      |
| f_fuse, Eq. 2                 | `equations.fuse`, in `PolicySampler.transition`                  |
| R, Eq. 5                      | `Feedback.rewards_B` from `equations.fusion_reward`              |
| k_t(theta), L^PPO, Eq. 4      | `equations.clipped_surrogate`, in `PolicySampler.improve`        |
| xi = 0.2                      | `clip`                                                           |
| T = 128, updates every 16     | `budget` less `pool`, `batch`                                    |
| pi_theta                      | `policy`: `CompactPolicy`, or the published `PublishedPolicy`        |

Deviations:

1. The advantage is the reward minus the mean of the batch's other rewards, of those from the same noise where several
   share it; standardized over the batch. The paper multiplies by the raw reward, which is nearly always positive and
   so raises the probability of whatever was drawn; `baseline: none` does that.
2. `compact`, the default policy: coefficients stay in [0, 1] (a = sigmoid(u), u Gaussian, log-probabilities of u) and
   depend on 1 + `groups` numbers. The published network has a standard deviation of at least 1 and no bound, so that
   62 % of its coefficients leave [0, 1], and more weights than 128 pictures can teach. `policy: paper` is that network.
3. Several epochs a batch (one in the published code, where the ratio is always 1 and the clip never acts).
4. Log-probabilities are [B] in float32, one action against its own state. The published code scores 16 actions
   against 16 states ([16, 16]) in float16.
5. The network sees the state averaged over tokens instead of all tokens in a row: the state is a function of the
   action's columns alone, and the published first layer would hold 77 times the weights.
6. More than two concepts: one logit a concept, softmax over them in every column; Eq. 5 with max S - min S.
7. A picture whose scoring failed leaves the batch; it never counts as a reward of 0.
8. "The best-performing checkpoint" that draws at inference is the state that drew the batch of the highest mean reward;
   the pool that it draws is a part of the budget (`pool`, a quarter). The paper says neither.
9. `policy: conditional` sees, beside the embedding, the concepts themselves and the mean similarities of the last
   batch; the paper's state is the fused embedding alone, from which neither can be told.
"""

from enum import StrEnum

import torch
from torch import Tensor

from pixrl.algorithms.fusion.base import Feedback, Proposal
from pixrl.algorithms.fusion.policy import PolicySampler, PolicySettings
from pixrl.equations import group_advantages, leave_one_out


class Baseline(StrEnum):
    """The baseline that a reward is compared with."""

    LEAVE_ONE_OUT = "leave_one_out"
    NONE = "none"


class RMLerSettings(PolicySettings):
    """The settings of RMLer."""

    baseline: Baseline = Baseline.LEAVE_ONE_OUT
    """leave_one_out: standardized, minus the mean of the others; none: the paper's raw reward."""


class RMLer(PolicySampler[RMLerSettings]):
    """Critic-free PPO on the raw or the centred reward."""

    Settings = RMLerSettings

    def advantages(self, proposal: Proposal, feedback: Feedback) -> Tensor:
        if self.settings.baseline is Baseline.NONE:
            return feedback.rewards_B.nan_to_num(0.0)
        centered_B = leave_one_out(feedback.by_noise()).sum(dim=0)
        return group_advantages(centered_B.masked_fill(feedback.rewards_B.isnan(), torch.nan)[None])[0]
