"""How long each parser is fuzzed: briefly and always alike in the suite, longer and anew in `make fuzz`."""

import os
from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from pixrl.errors import PixrlError

_ANY_MACHINE = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("brief", max_examples=25, derandomize=True, database=None, **_ANY_MACHINE)
settings.register_profile("long", max_examples=300, print_blob=True, **_ANY_MACHINE)
fuzz = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "brief"))
"""The decorator of every test here; the environment variable HYPOTHESIS_PROFILE=long asks for more examples."""

ANYTHING = st.text(st.characters(exclude_categories=()))
"""Any str, lone surrogates and control characters among it."""
ANY_BYTES = st.binary() | ANYTHING.map(lambda text: text.encode("utf-8", "surrogatepass"))
LINE = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1).map(str.strip).filter(bool)
"""A line of text without white space around it."""

T = TypeVar("T")


def soup(*tokens: str, most: int = 30) -> st.SearchStrategy[str]:
    """Texts made of a format's own pieces, in any order: what random letters hardly ever hit."""
    return st.lists(st.sampled_from(tokens) | ANYTHING, max_size=most).map("".join)


def unless_refused(parse: Callable[[], T]) -> T | None:
    """What a parser gives; None where it refuses with a message. Any other exception is a fault of pixrl's."""
    try:
        return parse()
    except PixrlError as error:
        assert str(error).strip()
        return None
