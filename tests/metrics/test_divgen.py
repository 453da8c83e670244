"""IDS, ASC, SDI and PVS on cases whose answers are known."""

import math
import runpy
from collections.abc import Mapping, Sequence
from math import comb, factorial
from pathlib import Path

import pytest
import torch

from pixrl.errors import InputError, ShapeError
from pixrl.metrics.divgen import (
    Features,
    asc,
    encode,
    identity_similarity,
    ids,
    intersection_over_union,
    layout_similarity,
    photographic_variance,
    picture_tones,
    pvs,
    reachable,
    retrieval,
    sdi,
    spatial_diversity,
    style_coverage,
)

REFERENCE = Path(__file__).parents[3] / "shared" / "reference" / "irs.py"


def boxes(*rows: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor(rows).view(-1, 4)


def test_ids_is_the_mean_cosine_over_pairs_whatever_the_lengths() -> None:
    faces = torch.tensor([[2.0, 0.0], [0.0, 3.0], [5.0, 5.0]])
    found = identity_similarity(faces)
    assert found.similarity == pytest.approx((0 + 2 * math.sqrt(0.5)) / 3)
    assert identity_similarity(torch.ones(4, 7)).similarity == pytest.approx(1)
    assert identity_similarity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).similarity == pytest.approx(-1)


def test_pictures_without_a_face_are_counted_not_compared() -> None:
    faces = torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [0.0, 1.0]])
    found = identity_similarity(faces)
    assert (found.similarity, found.faces, found.pictures) == (pytest.approx(0), 2, 3)
    assert math.isnan(identity_similarity(faces[:2]).similarity)
    with pytest.raises(ShapeError):
        identity_similarity(torch.ones(3))


def stirling(n: int, k: int) -> int:
    """Ways to part n things into k parts, by inclusion and exclusion."""
    return sum((-1) ** j * comb(k, j) * (k - j) ** n for j in range(k + 1)) // factorial(k)


def chance(k: int, n: int, s: int) -> float:
    return comb(s, k) * factorial(k) * stirling(n, k) / s**n


@pytest.mark.parametrize(("n", "train"), [(6, 12), (10, 30), (4, 9)])
def test_irs_is_the_likeliest_number_of_reachable_pictures(n: int, train: int) -> None:
    for s in (2, 5, 9):  # the law is one: it sums to 1
        assert sum(chance(k, n, s) for k in range(1, min(n, s) + 1)) == pytest.approx(1)
    for k in range(1, min(n, train) + 1):
        likelihoods = {s: chance(k, n, s) for s in range(k, train + 1)}
        assert reachable(k, n, train) == max(likelihoods, key=likelihoods.__getitem__)


@pytest.mark.parametrize(
    ("distinct", "queries", "train", "found"),
    [(1, 10, 100, 1), (10, 10, 100, 100), (5, 10, 100, 5), (63, 100, 1000, 98), (50, 1000, 1000, 50)],
)
def test_irs_table(distinct: int, queries: int, train: int, found: int) -> None:
    """One picture again and again is one; all different can be all; 5! / 5^10 exceeds 6! / 6^10.

    100 draws from 98 hit 62.9 of them on average.
    """
    assert reachable(distinct, queries, train) == found


@pytest.mark.skipif(not REFERENCE.is_file(), reason=f"the working notes are not at {REFERENCE}")
@pytest.mark.parametrize("case", [(17, 40, 500), (3, 3, 50), (120, 800, 3000), (799, 800, 3000)])
def test_irs_is_that_of_the_working_notes(case: tuple[int, int, int]) -> None:
    """Theirs equals BeyondFID's."""
    distinct, queries, train = case
    irs_inf = runpy.run_path(str(REFERENCE))["irs_inf"]
    assert reachable(*case) / train == irs_inf(distinct, queries, train)


def test_what_irs_refuses() -> None:
    with pytest.raises(InputError, match="hit from 1 to 4 of them, got 5"):
        reachable(5, 4, 10)
    with pytest.raises(ShapeError, match=r"\[4, 3\] and \[4, 2\]"):
        retrieval(torch.rand(4, 3), torch.rand(4, 2))


def test_asc_is_one_for_real_pictures_and_small_for_one_style() -> None:
    train = torch.eye(20)
    generator = torch.Generator().manual_seed(0)
    test = train[torch.randint(20, (60,), generator=generator)] + 0.01
    assert style_coverage(test, test, train) == 1
    same = train[:1].expand(60, -1)
    assert retrieval(same, train) == pytest.approx(1 / 20)
    assert style_coverage(same, test, train) == pytest.approx(1 / 20 / retrieval(test, train))
    half = train[torch.randint(10, (60,), generator=generator)]
    assert 1 / 20 < retrieval(half, train) < retrieval(test, train) <= 1


def test_sdi_of_identical_layouts_is_zero() -> None:
    layout = boxes((0.1, 0.1, 0.3, 0.4), (0.5, 0.5, 0.9, 0.9))
    assert spatial_diversity([[layout, layout.flip(0), layout]]) == pytest.approx(0)
    assert layout_similarity(layout, layout.flip(0)) == pytest.approx(1)


def test_sdi_by_hand() -> None:
    one = boxes((0, 0, 2, 2))
    shifted = boxes((1, 0, 3, 2))  # shares 2 of 6
    assert layout_similarity(one, shifted) == pytest.approx(1 / 3)
    two = boxes((1, 0, 3, 2), (10, 10, 11, 11))
    assert layout_similarity(one, two) == pytest.approx(1 / 6)  # divided by the larger number
    apart = boxes((5, 5, 6, 6))
    assert spatial_diversity([[one, apart]]) == 1
    # mean over prompts of the mean over pairs; a prompt of one picture says nothing
    found = spatial_diversity([[one, shifted, apart], [one, one], [two]])
    assert found == pytest.approx(((1 - (1 / 3 + 0 + 0) / 3) + 0) / 2)
    assert math.isnan(spatial_diversity([[one]]))


def test_the_matching_is_the_best_one_not_the_nearest_first() -> None:
    one = boxes((0, 0, 4, 1), (2, 0, 6, 1))
    other = boxes((1, 0, 5, 1), (3, 0, 7, 1))
    # in order: 3/5 and 3/5; crossed: 1/7 and 3/5
    assert layout_similarity(one, other) == pytest.approx(3 / 5)
    greedy_trap = boxes((2, 0, 6, 1), (20, 0, 21, 1))
    assert layout_similarity(one, greedy_trap) == pytest.approx(1 / 2)


def test_empty_layouts() -> None:
    none, one = boxes(), boxes((0, 0, 1, 1))
    assert layout_similarity(none, none) == 1
    assert layout_similarity(none, one) == layout_similarity(one, none) == 0
    assert intersection_over_union(boxes((1, 1, 1, 1)), boxes((1, 1, 1, 1))).item() == 0
    with pytest.raises(ShapeError):
        layout_similarity(torch.zeros(4), one)


def test_pvs_of_equal_pictures_is_zero() -> None:
    picture = torch.rand(1, 3, 8, 8)
    assert photographic_variance([picture.expand(5, -1, -1, -1)]) == pytest.approx(0, abs=1e-12)
    assert photographic_variance([torch.full((3, 3, 4, 4), 0.2)]) == pytest.approx(0, abs=1e-12)
    assert photographic_variance(
        [torch.full((2, 3, 4, 4), 0.2), torch.full((1, 3, 9, 4), 0.2)]
    ) == pytest.approx(0)
    with pytest.raises(InputError):
        photographic_variance([])


def test_the_tones_by_hand() -> None:
    red = torch.tensor([0.5, 0.1, 0.1]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert picture_tones(red)[0].tolist() == pytest.approx([0.8, 0.5, 0.0])
    halves = torch.zeros(1, 3, 2, 2)
    halves[..., 0] = 1
    assert picture_tones(halves)[0].tolist() == pytest.approx([0.0, 0.5, 0.5])
    assert picture_tones(torch.zeros(1, 3, 2, 2))[0].tolist() == [0, 0, 0]  # black has no saturation, not nan
    # s differs by 0.8, v not at all, c by 0.5: deviations of two values are half their distance
    assert photographic_variance([torch.cat([red, halves])]) == pytest.approx(0.4 + 0 + 0.25)


def test_pvs_passes_gradients() -> None:
    pictures = torch.rand(3, 3, 4, 4, requires_grad=True)
    picture_tones(pictures).std(dim=0, correction=0).sum().backward()
    assert (
        pictures.grad is not None
        and bool(pictures.grad.isfinite().all())
        and bool(pictures.grad.abs().sum() > 0)
    )


class MeanColour:
    """An encoder whose features are a picture's mean colour; none of a black one."""

    def __init__(self, name: str = "mean colour (0123456789abcdef)") -> None:
        self.provenance: Mapping[str, str] = {"model": name, "revision": "local", "licence": "its own"}
        self.given: list[int] = []

    def image_features(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        self.given.append(len(images_BCHW))
        means = images_BCHW.mean(dim=(2, 3))
        seen = means.sum(dim=1) > 0
        return (
            means.masked_fill(~seen[:, None], torch.nan)
            if seen.any()
            else torch.full((len(means), 1), torch.nan)
        )


class OneBox:
    """Finds the whole picture where anything is in it."""

    provenance: Mapping[str, str] = {"model": "one box (0123456789abcdef)", "box_threshold": "0.35"}

    def boxes(self, images_BCHW: torch.Tensor, kinds: Sequence[str]) -> list[torch.Tensor]:
        assert len(kinds) == len(images_BCHW)
        return [boxes((0, 0, 1, 1)) if image.any() else boxes() for image in images_BCHW]


def colours(*rows: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).view(-1, 3, 1, 1).expand(-1, -1, 4, 4)


def test_ids_says_what_measured_it_and_of_how_many_faces() -> None:
    faces = MeanColour()
    figure = ids([colours((1, 0, 0), (1, 1, 0)), colours((0, 0, 0)), colours((0, 0, 0), (1, 0, 0))], faces)
    assert (figure.name, figure.counts) == ("IDS", {"pictures": 5, "faces": 3})
    assert figure.value == pytest.approx((1 + 2 * 0.5**0.5) / 3)
    assert figure.provenance == faces.provenance
    assert faces.given == [2, 1, 2]
    assert math.isnan(ids([colours((0, 0, 0))], faces).value)
    with pytest.raises(InputError, match="no picture to encode"):
        ids([], faces)


def test_asc_says_what_measured_it_and_refuses_two_encoders() -> None:
    encoder = MeanColour()
    train = encode(encoder, [colours((1, 0, 0), (0, 1, 0)), colours((0, 0, 1), (1, 1, 0))])
    test = encode(encoder, [colours((0.9, 0, 0), (0, 0.9, 0), (0, 0, 0.9))])
    same = encode(encoder, [colours((0.9, 0, 0), (0.8, 0, 0), (0.9, 0, 0))])
    figure = asc(same, test, train)
    assert figure.value == style_coverage(same.rows_NE, test.rows_NE, train.rows_NE) < 1
    assert figure.counts == {"pictures": 3, "test": 3, "train": 4}
    assert figure.provenance == encoder.provenance
    other = Features(test.rows_NE, MeanColour("another (0)").provenance)
    with pytest.raises(
        InputError, match=r"one encoder, got mean colour \(0123456789abcdef\) and another \(0\)"
    ):
        asc(same, other, train)


def test_features_of_one_encoder_have_one_length() -> None:
    class Growing(MeanColour):
        def image_features(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(images_BCHW), images_BCHW.shape[-1])

    with pytest.raises(ShapeError, match=r"features of \[4, 5\] numbers"):
        encode(Growing(), [torch.ones(1, 3, 4, 4), torch.ones(1, 3, 5, 5)])


def test_sdi_and_pvs_say_what_measured_them() -> None:
    full, empty = colours((1, 0, 0), (0, 1, 0)), colours((1, 0, 0), (0, 0, 0))
    figure = sdi([("owl", full), ("cat", empty)], OneBox())
    assert (figure.name, figure.value) == ("SDI", pytest.approx(0.5))
    assert figure.counts == {"prompts": 2, "pictures": 4}
    assert figure.provenance["box_threshold"] == "0.35"
    tones = pvs([full, empty])
    assert tones.value == photographic_variance([full, empty]) > 0
    assert (tones.counts, tones.provenance["model"]) == ({"pictures": 4}, "the pixels alone")
    with pytest.raises(InputError, match="at least one picture"):
        pvs([])
