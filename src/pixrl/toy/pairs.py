"""Which pairs of kinds are drawn as hybrids in training, and which are kept for judging fusion.

The split is a function of the two names alone, so it needs no file and cannot drift; a test pins it.
"""

import hashlib
from collections.abc import Iterable
from itertools import combinations

from pixrl.toy.vocabulary import KINDS

HELD_OUT_SHARE = 0.4


def is_held_out_pair(a: str, b: str) -> bool:
    """Whether hybrids of the two kinds, in either order, are never drawn in training."""
    first, second = sorted((a, b))
    digest = hashlib.sha256(f"{first}+{second}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < HELD_OUT_SHARE


def may_be_trained(kinds: Iterable[str]) -> bool:
    """Whether a hybrid of all these kinds may be a training picture: none of its pairs is held out."""
    return not any(is_held_out_pair(a, b) for a, b in combinations(sorted(set(kinds)), 2))


TRAINING_PAIRS = tuple(pair for pair in combinations(KINDS, 2) if not is_held_out_pair(*pair))
HELD_OUT_PAIRS = tuple(pair for pair in combinations(KINDS, 2) if is_held_out_pair(*pair))
