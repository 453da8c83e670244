"""Every loss that a recipe can name, and which rollouts it can learn from."""

from collections.abc import Mapping, Sequence

from pixrl import rewards as rewards_table
from pixrl.algorithms.advantages import AdvantageSettings
from pixrl.algorithms.draft import DRaFTLoss, DraftSettings
from pixrl.algorithms.grpo import GRPOLoss, GRPOSettings
from pixrl.algorithms.loss import Loss
from pixrl.algorithms.nft import NFTLoss, NFTSettings
from pixrl.algorithms.rpo import RPOLoss, RPOSettings
from pixrl.algorithms.sampling import Noise, SamplingSettings, Solver
from pixrl.algorithms.sft import SFTLoss, SFTSettings
from pixrl.rewards.base import DifferentiableReward
from pixrl.rewards.settings import RewardSetting

LossSettings = GRPOSettings | NFTSettings | SFTSettings | RPOSettings | DraftSettings


def make_loss(settings: LossSettings, rewards: Mapping[str, DifferentiableReward] | None = None) -> Loss:
    """The loss that the settings describe; `rewards` are those that it may differentiate."""
    match settings:
        case GRPOSettings():
            return GRPOLoss(settings)
        case NFTSettings():
            return NFTLoss(settings)
        case SFTSettings():
            return SFTLoss(settings)
        case RPOSettings():
            return RPOLoss(settings)
        case DraftSettings():
            return DRaFTLoss(settings, rewards or {})


def check_fit(loss: LossSettings, sampling: SamplingSettings) -> None:
    """ValueError when a loss cannot learn from rollouts that are sampled so."""
    if isinstance(loss, GRPOSettings):
        if sampling.noise is Noise.NONE:
            raise ValueError(
                "loss: clipped needs rollouts with a density: set sampling.noise to flow_sde, dance or cps"
            )
    elif isinstance(loss, DraftSettings):
        _check_draft(loss, sampling)
    elif loss.timesteps > sampling.steps:
        raise ValueError(
            f"loss.timesteps is {loss.timesteps}, but {sampling.steps} sampling steps have only as many noise levels"
        )
    elif isinstance(loss, NFTSettings) and loss.levels is not None and loss.levels[1] > sampling.steps:
        raise ValueError(
            f"loss.levels ends at {loss.levels[1]}, but {sampling.steps} sampling steps have only as many noise levels"
        )
    if isinstance(loss, SFTSettings) and sampling.noise is not Noise.NONE:
        raise ValueError("sampling.noise has no effect with loss: sft, which draws nothing: remove it")


def _check_draft(loss: DraftSettings, sampling: SamplingSettings) -> None:
    if loss.last > sampling.steps:
        raise ValueError(f"loss.last is {loss.last}, but there are only {sampling.steps} sampling steps")
    if sampling.noise is not Noise.NONE:
        raise ValueError("loss: draft differentiates steps that are not random: remove sampling.noise")
    if sampling.solver is not Solver.EULER:
        raise ValueError(
            f"loss: draft takes the last steps again, which {sampling.solver.value} cannot without the steps before: "
            "set sampling.solver to euler"
        )


def check_gradients(loss: LossSettings, settings: Sequence[RewardSetting]) -> None:
    """ValueError when a loss needs the gradient of rewards that have none. Loads no model."""
    if not isinstance(loss, DraftSettings):
        return
    others = [one for one in settings if not one.held_out and not rewards_table.is_differentiable(one.reward)]
    if others:
        possible = [name for name in rewards_table.REWARDS if rewards_table.is_differentiable(name)]
        raise ValueError(
            f"loss: draft needs the gradient of every trained reward, and {others[0].name!r} ({others[0].reward}) has "
            f"none. Set held_out: true on it, or train on one of {', '.join(possible)}"
        )


def check_updates(loss: LossSettings, updates: int) -> None:
    """ValueError for a clip range that would have no effect, or that is missing."""
    if not isinstance(loss, GRPOSettings):
        return
    if updates == 1 and loss.clip is not None:
        raise ValueError(
            "loss.clip has no effect with optimizer.updates: 1, where every ratio is 1: remove it, or set "
            "optimizer.updates to 2 or more"
        )
    if updates > 1 and loss.clip is None:
        raise ValueError(
            f"loss: clipped with optimizer.updates: {updates} needs the range of ratios that it trusts: set "
            "loss.clip, such as 1e-4"
        )


def check_advantage(loss: LossSettings, advantage: AdvantageSettings) -> None:
    """ValueError for settings of advantages that a loss would not read."""
    if isinstance(loss, DraftSettings) and advantage != AdvantageSettings():
        raise ValueError(
            "advantage has no effect with loss: draft, which follows the rewards' own gradient: remove it"
        )
    if isinstance(loss, SFTSettings) and advantage != AdvantageSettings():
        raise ValueError("advantage has no effect with loss: sft, which learns from no score: remove it")
    if isinstance(loss, RPOSettings):
        for name in ("synergy", "time"):
            if advantage.__dict__[name] is not None:
                raise ValueError(
                    f"advantage.{name} has no effect with loss: rpo, which ranks by the harmonic mean: remove it"
                )
        for name in ("clamp", "skip_flat"):
            if advantage.__dict__[name] != AdvantageSettings().__dict__[name]:
                raise ValueError(
                    f"advantage.{name} has no effect with loss: rpo, which ranks by the harmonic mean: remove it"
                )
