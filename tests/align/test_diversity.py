"""Diversity of a prompt's pictures: invariances first, then oracles worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixrl.errors import InputError, ShapeError
from pixrl.metrics.diversity import (
    SAME_WITHIN,
    Arrangement,
    DiversityMeter,
    distinct_layouts,
    layout_distance,
    prompt_distances,
    prompt_layouts,
)
from pixrl.rewards.segmentation import Instance

PROPERTY = settings(deadline=None, max_examples=30, derandomize=True)
objects = st.lists(
    st.tuples(st.sampled_from(["owl", "cat"]), st.floats(0, 1, width=32), st.floats(0, 1, width=32)),
    max_size=5,
)


def layout(*things):
    return Arrangement(
        tuple(kind for kind, _, _ in things), torch.tensor([xy for _, *xy in things]).view(-1, 2)
    )


def unit(*rows):
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


@PROPERTY
@given(objects, st.randoms())
def test_a_layout_does_not_depend_on_the_order_of_its_objects(things, random):
    shuffled = random.sample(things, len(things))
    assert layout_distance(layout(*things), layout(*shuffled)) == 0


@PROPERTY
@given(objects, objects)
def test_the_distance_of_layouts_is_symmetric_and_zero_for_equal_ones_alone(one, other):
    there, back = layout_distance(layout(*one), layout(*other)), layout_distance(layout(*other), layout(*one))
    assert there == pytest.approx(back) or math.isinf(there)
    assert (there == 0) == (sorted(one) == sorted(other))


@PROPERTY
@given(st.lists(objects, min_size=1, max_size=5), st.integers(1, 3))
def test_repeated_pictures_add_no_layouts(pictures, times):
    layouts = [layout(*things) for things in pictures]
    assert 1 <= distinct_layouts(layouts) == distinct_layouts(layouts * times) <= len(layouts)


def test_the_matching_moves_objects_as_little_as_can_be():
    two = layout(("owl", 0.1, 0.5), ("owl", 0.9, 0.5))
    crossed = layout(("owl", 0.8, 0.5), ("owl", 0.1, 0.5))
    assert layout_distance(two, crossed) == pytest.approx(0.1)
    assert layout_distance(two, layout(("owl", 0.1, 0.5), ("cat", 0.9, 0.5))) == math.inf
    assert layout_distance(layout(), layout(("owl", 0.5, 0.5))) == math.inf
    assert layout_distance(layout(), layout()) == 0


def test_the_number_of_layouts_worked_out_by_hand():
    left, right = layout(("owl", 0.2, 0.5)), layout(("owl", 0.8, 0.5))
    nearly_left = layout(("owl", 0.2 + SAME_WITHIN * 0.9, 0.5))
    both = layout(("owl", 0.2, 0.5), ("owl", 0.8, 0.5))
    assert distinct_layouts([left, nearly_left]) == 1
    assert distinct_layouts([left, right, both, layout(), layout()]) == 4
    assert distinct_layouts([]) == 0
    # complete linkage: the ends of a chain are too far apart for one cluster
    chain = [layout(("owl", x, 0.5)) for x in (0.1, 0.25, 0.4)]
    assert distinct_layouts(chain) == 2
    assert distinct_layouts(chain, within=0.5) == 1


def test_swapping_left_and_right_is_another_layout():
    one = layout(("owl", 0.2, 0.5), ("cat", 0.8, 0.5))
    mirrored = layout(("owl", 0.8, 0.5), ("cat", 0.2, 0.5))
    assert distinct_layouts([one, mirrored]) == 2


def test_distances_worked_out_by_hand_with_prompts_of_any_size_and_order():
    features = unit([1, 0], [1, 0], [0, 1], [1, 0], [-1, 0])
    prompts = torch.tensor([7, 2, 7, 2, 2])
    # prompt 2: cosines 1, -1, -1; prompt 7: cosine 0
    assert prompt_distances(features, prompts).tolist() == pytest.approx([4 / 3, 1.0])


def test_a_picture_that_is_not_finite_is_left_out_and_one_picture_has_no_distance():
    features = torch.cat([unit([1, 0], [0, 1]), torch.full((1, 2), torch.nan), unit([1, 0])])
    found = prompt_distances(features, torch.tensor([0, 0, 0, 1]))
    assert found[0].item() == pytest.approx(1.0) and found[1].isnan()
    assert not len(prompt_distances(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)))


def test_wrong_shapes_and_thresholds_are_refused():
    with pytest.raises(ShapeError, match="prompts"):
        prompt_distances(unit([1, 0]), torch.tensor([0, 1]))
    with pytest.raises(ShapeError, match="1 layouts"):
        prompt_layouts([layout()], torch.tensor([0, 1]))
    with pytest.raises(InputError, match="share"):
        distinct_layouts([layout()], within=0)


class Corners:
    """Finds an owl where a picture's red channel is brightest."""

    provenance = {"model": "test", "preprocessing": "none"}  # noqa: RUF012

    def instances(self, images_BCHW):
        found = []
        for red in images_BCHW[:, 0]:
            y, x = divmod(int(red.argmax()), red.shape[1])
            box = (float(x), float(y), x + 1.0, y + 1.0)
            found.append([Instance("owl", box, 1.0, red > 0)] if red.max() > 0 else [])
        return found


def test_the_meter_measures_each_prompt_by_itself():
    images = torch.zeros(4, 3, 10, 10)
    images[0, 0, 0, 0] = images[1, 0, 9, 9] = images[2, 0, 5, 5] = images[3, 0, 5, 6] = 1
    meter = DiversityMeter(lambda x: torch.nn.functional.normalize(x[:, 0].flatten(1), dim=1), Corners())
    found = meter.measure(images, torch.tensor([0, 0, 1, 1]))
    assert found.layouts_P.tolist() == [2, 1] and found.layouts == 1.5
    assert found.distance_P.tolist() == [1, 1]
    plain = DiversityMeter(meter.features).measure(images, torch.tensor([0, 1, 2, 3]))
    assert math.isnan(plain.layouts) and math.isnan(plain.distance)
