"""The questions that participants answer: those of the three papers, and any of your own.

| preset | from | as published |
|---|---|---|
| `e2po` | E²PO, appendix C.1 | best of five, four criteria, no tie |
| `rmler` | RMLer, "User Study" | best of five, the most harmonious fusion, no tie |
| `customized-grpo` | Customized-GRPO, appendix A.3 | pairs, identity and prompt following, ties allowed |

Numbered deviations: (1) The questions are in our words; Customized-GRPO alone prints its own. (2) Of E²PO's four
criteria its text names two, image-text alignment and overall quality; the others stand in a figure alone, so detail and
aesthetics are ours.
"""

from collections.abc import Sequence

from pixrl.config import Settings
from pixrl.errors import InputError, did_you_mean
from pixrl.text import require_text


class Criterion(Settings):
    """One question about the pictures of a comparison."""

    name: str
    """How tables call it."""
    question: str
    """What participants read."""


class Questionnaire(Settings):
    """The criteria of one published study."""

    criteria: tuple[Criterion, ...]
    ties: bool
    """Whether participants may say that none is better."""


def _criteria(**questions: str) -> tuple[Criterion, ...]:
    return tuple(Criterion(name=name, question=question) for name, question in questions.items())


PRESETS = {
    "e2po": Questionnaire(
        criteria=_criteria(
            alignment="Which picture shows best what the text says?",
            detail="Which picture has the cleanest details, with the fewest errors?",
            aesthetics="Which picture is the most beautiful?",
            overall="Which picture is the best overall?",
        ),
        ties=False,
    ),
    "rmler": Questionnaire(
        criteria=_criteria(harmony="Which picture joins the concepts most harmoniously into one new object?"),
        ties=False,
    ),
    "customized-grpo": Questionnaire(
        criteria=_criteria(
            identity="Which picture keeps the look of the subject in the reference better?",
            prompt="Which picture follows the text better, and looks better?",
        ),
        ties=True,
    ),
}


def parse_criteria(given: Sequence[str]) -> Questionnaire:
    """Return the criteria that were asked for: names of presets, and questions of one's own as `name=question`.

    Ties are allowed where any of the named presets allows them.

    Raises:
        InputError: a name is no preset, a question is empty, or a criterion is named twice.
    """
    criteria: list[Criterion] = []
    ties = False
    for text in given:
        name, is_own, question = (part.strip() for part in text.partition("="))
        if is_own:
            if not name or not question:
                raise InputError(
                    f"{text!r} is no criterion: write its name and its question, such as "
                    "--criteria 'humour=Which picture is funnier?'"
                )
            criteria.append(Criterion(name=name, question=require_text(question, f"the criterion {name!r}")))
            continue
        if name not in PRESETS:
            raise InputError(
                f"There are no criteria {name!r}.{did_you_mean(name, PRESETS)} There are {', '.join(PRESETS)}; "
                "one of your own is written name=question."
            )
        criteria += PRESETS[name].criteria
        ties = ties or PRESETS[name].ties
    names = [one.name for one in criteria]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"The criterion {twice!r} is given twice. Give each one another name.")
    if not criteria:
        raise InputError(f"A study asks something. Type: --criteria {' or --criteria '.join(PRESETS)}")
    return Questionnaire(criteria=tuple(criteria), ties=ties)
