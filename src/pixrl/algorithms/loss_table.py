"""Every loss that a recipe can name, and which rollouts it can learn from."""

from pixrl.algorithms.advantages import AdvantageSettings
from pixrl.algorithms.losses import ClippedSettings, ClippedSurrogate, Loss, NegativeAware, NFTSettings
from pixrl.algorithms.rpo import PreferencePairs, RPOSettings
from pixrl.algorithms.sft import FlowMatching, SFTSettings
from pixrl.algorithms.stepping import Noise, SamplingSettings

LossSettings = ClippedSettings | NFTSettings | SFTSettings | RPOSettings


def make_loss(settings: LossSettings) -> Loss:
    """The loss that the settings describe."""
    match settings:
        case ClippedSettings():
            return ClippedSurrogate(settings)
        case NFTSettings():
            return NegativeAware(settings)
        case SFTSettings():
            return FlowMatching(settings)
        case RPOSettings():
            return PreferencePairs(settings)


def check_fit(loss: LossSettings, sampling: SamplingSettings) -> None:
    """ValueError when a loss cannot learn from rollouts that are sampled so."""
    if isinstance(loss, ClippedSettings):
        if sampling.noise is Noise.NONE:
            raise ValueError(
                "loss: clipped needs rollouts with a density: set sampling.noise to flow_sde, dance or cps"
            )
    elif loss.timesteps > sampling.steps:
        raise ValueError(
            f"loss.timesteps is {loss.timesteps}, but {sampling.steps} sampling steps have only as many noise levels"
        )
    if isinstance(loss, SFTSettings) and sampling.noise is not Noise.NONE:
        raise ValueError("sampling.noise has no effect with loss: sft, which draws nothing: remove it")


def check_advantage(loss: LossSettings, advantage: AdvantageSettings) -> None:
    """ValueError for settings of advantages that a loss would not read."""
    if isinstance(loss, SFTSettings) and advantage != AdvantageSettings():
        raise ValueError("advantage has no effect with loss: sft, which learns from no score: remove it")
    if isinstance(loss, RPOSettings):
        for name in ("synergy", "time"):
            if advantage.__dict__[name] is not None:
                raise ValueError(
                    f"advantage.{name} has no effect with loss: rpo, which ranks by the harmonic mean: remove it"
                )
        if advantage.clamp != AdvantageSettings().clamp:
            raise ValueError(
                "advantage.clamp has no effect with loss: rpo, which ranks by the harmonic mean: remove it"
            )
