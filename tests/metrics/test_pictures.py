"""Statistics of pictures: what each says of pictures whose answer is known by hand."""

import pytest
import torch
from tests.tolerance import agree

from pixrl.errors import ShapeError
from pixrl.metrics.pictures import picture_statistics


def of(image_CHW: torch.Tensor) -> dict[str, float]:
    return {name: float(value[0]) for name, value in picture_statistics(image_CHW[None]).items()}


def test_plain_pictures() -> None:
    black, white = of(torch.zeros(3, 8, 8)), of(torch.ones(3, 8, 8))
    assert (black["brightness"], black["dark"], black["edges"], black["colours"]) == (0, 1, 0, 0)
    assert white["brightness"] == pytest.approx(1) and white["dark"] == 0 == white["saturated"]
    red = of(torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 8, 8))
    assert red["saturated"] == 1 and red["brightness"] == pytest.approx(0.299)
    assert all(value == value for value in (*black.values(), *white.values()))


def test_stripes_of_one_pixel_have_edges_and_fine_detail_and_broad_ones_neither() -> None:
    columns = torch.arange(32)
    stripes = {width: ((columns // width) % 2).float().expand(3, 32, 32) for width in (1, 16)}
    thin, broad = of(stripes[1]), of(stripes[16])
    assert thin["fine_detail"] == pytest.approx(1)
    assert thin["edges"] == pytest.approx(0.5)  # every step to the right is an edge, none downwards
    assert broad["fine_detail"] < 0.3 and broad["edges"] == pytest.approx(0.5 / 31)
    assert thin["brightness"] == pytest.approx(0.5) and thin["colours"] == pytest.approx(1)


def test_colours_are_counted_in_bits() -> None:
    levels = (torch.arange(4) + 0.5) / 4
    every = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).view(3, 8, 8)
    assert of(every)["colours"] == pytest.approx(6)


def test_a_pictures_figures_do_not_depend_on_the_others_nor_on_where_it_is_mirrored() -> None:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, mirrored = picture_statistics(images), picture_statistics(images.flip(-1))
    for name, value in whole.items():
        assert agree(value[2:3], picture_statistics(images[2:3])[name], 256), name
        assert agree(value, mirrored[name], 256), name
        assert value.std() > 0 or name == "dark", name


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 1, 8)])
def test_what_is_no_batch_of_pictures(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="at least 2 x 2 pixels; got"):
        picture_statistics(torch.zeros(shape))
