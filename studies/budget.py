"""What a run spends, so that methods are compared at equal budgets and the rest of what differs is said.

Two figures must be equal in a study: pictures and updates. Not every method draws its pictures itself:

| method       | its pictures are                                                   | their scores are for           |
|--------------|--------------------------------------------------------------------|--------------------------------|
| clipped, nft | drawn by the model in training                                     | learning, every one            |
| draft        | drawn by the model in training, the last K steps twice             | the log; learns from gradients |
| rpo          | drawn by the frozen base                                           | finding a group's best and worst |
| sft          | targets of the data set, each with G noises of its own; none drawn | the log alone                  |

So equal pictures mean equal numbers of (picture, noise) pairs, not equal costs: `gradient_terms` counts the pairs of a
picture and a noise level that go through a gradient, and a study's table has the minutes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pixrl import untrusted
from pixrl.errors import ConfigError
from pixrl.report.describe import images_of, updates_of
from pixrl.runs.config import AlignConfig

COLUMNS = ("pictures", "they are", "scores learned from", "gradient terms", "updates")


@dataclass(frozen=True)
class Budget:
    """One run's."""

    images: int
    """Steps x prompts x G x K."""
    source: str
    """Who draws them."""
    scores: int
    """Pictures whose scores say what is learned."""
    gradient_terms: int
    """Pictures x noise levels through a gradient."""
    updates: int
    """Optimizer steps."""

    @property
    def comparable(self) -> tuple[int, int]:
        """What a study holds equal."""
        return self.images, self.updates

    def cells(self) -> list[str]:
        """One a column of `COLUMNS`."""
        return [f"{self.images}", self.source, f"{self.scores}", f"{self.gradient_terms}", f"{self.updates}"]


def budget_of(config: AlignConfig) -> Budget:
    """What a recipe's run spends."""
    images, updates, groups = images_of(config), updates_of(config), config.steps * config.prompts.per_step
    spent = config.loss.spending(images, groups, config.sampling)
    return Budget(images, spent.source, spent.scores, spent.gradient_terms, updates)


def draws_its_own(config: AlignConfig) -> bool:
    """Whether the pictures of training show the model in training.

    Those of sft are targets, those of rpo the frozen base's: their rewards, group std and conflicts say nothing of what
    is learned.
    """
    return config.loss.draws_its_own


def check_budgets(configs: Mapping[str, AlignConfig]) -> None:
    """ConfigError, with the sizes of all, unless variants have equal pictures and equal updates."""
    budgets = {name: budget_of(config).comparable for name, config in configs.items()}
    if len(set(budgets.values())) > 1:
        listed = "\n  ".join(
            f"{name}: {images} images, {updates} updates" for name, (images, updates) in budgets.items()
        )
        raise ConfigError(
            f"The variants are not compared at equal images and equal updates:\n  {listed}\n"
            "images = steps × prompts.per_step × G × K, updates = steps × optimizer.updates. "
            "Change them in the variants' settings."
        )


def budget_table(configs: Mapping[str, AlignConfig]) -> str:
    """What each variant spends, as Markdown."""
    lines = [f"| variant | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    rows = {untrusted.markdown(name): budget_of(config).cells() for name, config in configs.items()}
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines)
