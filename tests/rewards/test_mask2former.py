"""GenEval's detector in both published layouts: equal detections, mmdet's pipeline and post-processing."""

import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.tiny_mask2former import RESOLUTION, mask2former, openmmlab_file
from tests.tolerance import MODEL, rounding
from torch import Tensor

from pixrl import rewards
from pixrl.conformance import check_reward
from pixrl.errors import CheckpointError, ConfigError
from pixrl.rewards.geneval import THRESHOLD, GenEvalReward
from pixrl.rewards.zoo import openmmlab
from pixrl.rewards.zoo.mask2former import CLASSES, Frame, Mask2FormerDetector, Sides, instances_of
from pixrl.types import RewardBatch

SHARED = Path(__file__).parents[3] / "shared"
REFERENCE = SHARED / "reference" / "mask2former_from_mmdet.py"
NAMES = SHARED / "data" / "geneval_object_names.txt"
SMALL = Sides(RESOLUTION, round(RESOLUTION * 1333 / 800))


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mask2former(tmp_path_factory.mktemp("m2f") / "folder")


@pytest.fixture(scope="module")
def mmdet_file(hub_folder: Path) -> Path:
    return openmmlab_file(hub_folder, hub_folder.parent / "mask2former_swin-s.pth")


@pytest.fixture(scope="module")
def detector(hub_folder: Path) -> Mask2FormerDetector:
    return Mask2FormerDetector(hub_folder, device="cpu")


@pytest.fixture
def pictures() -> Tensor:
    """Two pictures of 40 x 52 with structure: scaled to 64 x 83, which no 32 divides."""
    coarse = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, (40, 52), mode="nearest")


def test_both_layouts_give_equal_detections(
    detector: Mask2FormerDetector, mmdet_file: Path, pictures: Tensor
) -> None:
    other = Mask2FormerDetector(mmdet_file, device="cpu", sides=SMALL)
    assert detector.sides == SMALL
    seen = 0
    for ours, theirs in zip(detector.instances(pictures), other.instances(pictures), strict=True):
        assert [(one.kind, one.box, one.score) for one in ours] == [
            (one.kind, one.box, one.score) for one in theirs
        ]
        assert all(torch.equal(a.mask_HW, b.mask_HW) for a, b in zip(ours, theirs, strict=True))
        seen += len(ours)
    assert seen > 20
    assert detector.provenance["weights"] != other.provenance["weights"]
    assert other.provenance["licence"] == "Apache-2.0"


def test_every_tensor_of_the_file_reaches_its_place(hub_folder: Path, mmdet_file: Path) -> None:
    """The converted weights are the folder's, name by name: tensors of equal shapes are not swapped."""
    from safetensors.torch import load_file

    converted = openmmlab.convert(openmmlab.read(mmdet_file), mmdet_file)
    saved = load_file(hub_folder / "model.safetensors")
    unused = {name for name in saved if name.startswith("criterion") or ".swin.layernorm" in name}
    assert converted.keys() == saved.keys() - unused
    assert all(torch.equal(converted[name], saved[name]) for name in converted)


def test_mmdet_3_names_the_same_weights_otherwise(mmdet_file: Path, tmp_path: Path, pictures: Tensor) -> None:
    """As in mmdet 3's mask2former_layers.py: one attention and one feed-forward a name, instead of numbered lists."""
    newer = {}
    for name, x in openmmlab.read(mmdet_file).items():
        for old, new in (
            ("pixel_decoder.encoder.layers.0.attentions.0.", "pixel_decoder.encoder.layers.0.self_attn."),
            ("attentions.0.attn.", "cross_attn.attn."),
            ("attentions.1.attn.", "self_attn.attn."),
            ("ffns.0.", "ffn."),
        ):
            name = name.replace(old, new) if name.startswith("panoptic_head") else name
        newer[name] = x
    assert sum(".self_attn.attn." in name for name in newer) == 2 * 4
    file = tmp_path / "mask2former_swin-s_8xb2.pth"
    torch.save({"meta": {}, "state_dict": newer}, file)
    assert openmmlab.read(file).keys() == openmmlab.read(mmdet_file).keys()
    found, expected = (
        Mask2FormerDetector(one, device="cpu", sides=SMALL).instances(pictures) for one in (file, mmdet_file)
    )
    assert [[one.box for one in some] for some in found] == [[one.box for one in some] for some in expected]


@pytest.mark.skipif(not REFERENCE.is_file(), reason=f"the working notes are not at {REFERENCE}")
def test_the_mapping_is_that_of_the_working_notes(mmdet_file: Path) -> None:
    """Every loaded tensor is where their mapping puts it, which was compared with mmdet 2.28.2's outputs."""
    notes = runpy.run_path(str(REFERENCE))
    expected = notes["mmdet_to_hf"](openmmlab.read(mmdet_file))
    loaded = Mask2FormerDetector(mmdet_file, device="cpu", sides=SMALL).model.state_dict()
    unused = {name for name in loaded if name.startswith("criterion") or ".swin.layernorm" in name}
    assert expected.keys() == loaded.keys() - unused
    assert all(torch.equal(x, loaded[name]) for name, x in expected.items())


@pytest.mark.skipif(not REFERENCE.is_file(), reason=f"the working notes are not at {REFERENCE}")
@pytest.mark.parametrize("size", [(40, 52), (64, 64), (70, 33)])
def test_instances_are_those_of_the_working_notes(size: tuple[int, int]) -> None:
    notes = runpy.run_path(str(REFERENCE))
    generator = torch.Generator().manual_seed(0)
    frame = Frame.of(*size, SMALL)
    rows, columns = frame.padded
    classes = 4 * torch.randn(30, 81, generator=generator)
    masks = torch.randn(30, rows // 4, columns // 4, generator=generator)
    padded = (*frame.padded, *frame.scaled)
    labels, boxes, inside = notes["instances"](classes, masks, size, pad=padded)
    found = instances_of(classes, masks, frame, CLASSES)
    assert len(found) == len(labels) == 100
    order = boxes[:, 4].argsort(descending=True).tolist()
    for one, row in zip(found, order, strict=True):
        assert one.kind == CLASSES[int(labels[row])]
        assert one.score == pytest.approx(boxes[row, 4].item(), abs=rounding(torch.float32, 81))
        assert list(one.box) == boxes[row, :4].tolist()
        assert torch.equal(one.mask_HW, inside[row])


def test_the_frame_is_that_of_mmdet() -> None:
    assert Frame.of(512, 512, Sides()) == Frame((512, 512), (800, 800), (800, 800))
    assert Frame.of(1024, 1024, Sides()).scaled == (800, 800)
    assert Frame.of(480, 640, Sides()) == Frame((480, 640), (800, 1067), (800, 1088))
    assert Frame.of(300, 900, Sides()).scaled == (444, 1333)  # the longer side binds
    pixels = Frame.of(40, 52, SMALL).pixels(torch.zeros(1, 3, 40, 52))
    assert pixels.shape == (1, 3, 64, 96)
    grey, black = ((level - 123.675) / 58.395 for level in (128, 0))
    assert pixels[0, 0, 0, 82].item() == pytest.approx(black, abs=rounding(torch.float32, 64))
    assert pixels[0, 0, 0, 83].item() == pytest.approx(grey, abs=rounding(torch.float32, 64))


def test_shrinking_does_not_antialias() -> None:
    """cv2's bilinear looks at two pixels a side; PIL's would average the stripes to grey."""
    stripes = torch.zeros(1, 3, 256, 256)
    stripes[..., ::2] = 1
    levels = Frame.of(256, 256, Sides(64, 107)).pixels(stripes)[0, 0] * 58.395 + 123.675
    assert levels[10, 10].item() == pytest.approx(
        128, abs=0.01
    )  # halfway between the two middle pixels of four
    thin = torch.zeros(1, 3, 256, 256)
    thin[..., ::4] = 1  # never among the two middle ones
    levels = Frame.of(256, 256, Sides(64, 107)).pixels(thin)[0, 0] * 58.395 + 123.675
    assert levels.abs().max().item() < 1e-3


def test_a_known_instance() -> None:
    """One query: P(cat) = e^3 / (e^3 + 80), mask logits 2 on a quarter of the picture."""
    frame = Frame((32, 32), (32, 32), (32, 32))
    classes = torch.zeros(1, 81)
    classes[0, CLASSES.index("cat")] = 3.0
    masks = torch.full((1, 8, 8), -20.0)
    masks[0, :4, :4] = 2.0
    (cat, *others) = instances_of(classes, masks, frame, CLASSES)
    assert len(others) == 79  # the same mask under every class
    chance = torch.tensor(3.0).exp() / (torch.tensor(3.0).exp() + 80)
    assert cat.kind == "cat"
    inside = cat.mask_HW
    assert cat.box == (0.0, 0.0, float(inside.any(0).sum()), float(inside.any(1).sum()))
    assert cat.score < chance * torch.tensor(2.0).sigmoid() + 1e-6
    assert cat.score > chance / 2
    assert instances_of(classes, masks, frame, CLASSES, least=float(chance)) == []
    empty = torch.full((1, 8, 8), -20.0)
    assert instances_of(classes, empty, frame, CLASSES) == []


@dataclass(frozen=True)
class Products:
    """How float32 products are computed, on a GPU that could round them to TF32."""

    matmul: str
    matmul_tf32: bool
    convolution_tf32: bool
    autocast: bool

    @staticmethod
    def now() -> "Products":
        return Products(
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
        )


@pytest.fixture
def rounding_to_tf32() -> Iterator[Products]:
    """As training code sets it for speed."""
    before = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield Products.now()
    torch.backends.cudnn.allow_tf32 = cudnn
    torch.set_float32_matmul_precision(before)


def test_it_computes_in_full_float32(
    detector: Mask2FormerDetector, pictures: Tensor, rounding_to_tf32: Products
) -> None:
    """In the backbone and the last layer TF32 is off, whatever a run has set; after it the run's setting is back."""
    assert rounding_to_tf32 == Products("high", True, True, False)
    seen: list[Products] = []
    backbone = detector.model.model.pixel_level_module.encoder
    hooks = [
        part.register_forward_hook(lambda *_: seen.append(Products.now()))
        for part in (backbone, detector.model.class_predictor)
    ]
    detector.instances(pictures[:1])
    for hook in hooks:
        hook.remove()
    assert len(seen) >= 2
    assert set(seen) == {Products("highest", False, False, False)}
    assert Products.now() == rounding_to_tf32
    assert {x.dtype for x in detector.model.state_dict().values() if x.is_floating_point()} == {torch.float32}


def test_the_runs_setting_is_back_after_a_failure(
    detector: Mask2FormerDetector, pictures: Tensor, rounding_to_tf32: Products
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    hook = detector.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            detector.instances(pictures[:1])
    finally:
        hook.remove()
    assert Products.now() == rounding_to_tf32


def test_pictures_do_not_depend_on_their_batch(detector: Mask2FormerDetector, pictures: Tensor) -> None:
    together = detector.instances(pictures)
    alone = [detector.instances(one[None])[0] for one in pictures]
    for a, b in zip(together, alone, strict=True):
        assert [one.kind for one in a] == [one.kind for one in b]
        assert [one.score for one in a] == pytest.approx(
            [one.score for one in b], abs=rounding(torch.float32, 4 * MODEL)
        )


def test_the_folder_need_not_ask_for_genevals_sizes(hub_folder: Path) -> None:
    """Without a card pictures are scaled to mmdet's (800, 1333), whatever preprocessor_config.json says."""
    card = hub_folder / "pixrl.json"
    content = card.read_text()
    card.unlink()
    try:
        assert Mask2FormerDetector(hub_folder, device="cpu").sides == Sides(800, 1333)
    finally:
        card.write_text(content)


def test_as_the_reward(hub_folder: Path, mmdet_file: Path, tmp_path: Path, pictures: Tensor) -> None:
    clip = tiny.clip(tmp_path / "clip")
    reward = rewards.load("geneval", detector=hub_folder, clip=clip, device="cpu")
    assert isinstance(reward, GenEvalReward)
    found = reward.detect(pictures, [{"include": []}] * 2)
    detections = [one for picture in found for group in picture.values() for one in group]
    assert detections and all(one["score"] > THRESHOLD for one in detections)
    kind = max(found[0], key=lambda name: found[0][name][0]["score"])
    entries = [{"tag": "single_object", "include": [{"class": kind, "count": 1}]}, {"tag": "x", "include": [
        {"class": "toothbrush" if kind != "toothbrush" else "vase", "count": 16}]}]  # fmt: skip
    scores = reward.score(RewardBatch(pictures, ["a", "b"], entries))
    assert scores.values_B.tolist() == [1.0, 0.0]
    assert str(mmdet_file) not in scores.provenance["model"]
    assert "not those that GenEval is published with" in scores.provenance["weights"]


def test_the_reward_keeps_the_interfaces_promises(hub_folder: Path, tmp_path: Path, pictures: Tensor) -> None:
    reward = rewards.load("geneval", detector=hub_folder, clip=tiny.clip(tmp_path / "clip"), device="cpu")
    entries = [{"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}, {}]
    check_reward(reward, RewardBatch(pictures, ["a red cat", "a dog"], entries))


def test_one_of_detector_and_segmenter(hub_folder: Path, tmp_path: Path) -> None:
    clip = tiny.clip(tmp_path / "clip")
    with pytest.raises(ConfigError, match="and neither is given"):
        rewards.load("geneval", clip=clip)
    with pytest.raises(ConfigError, match="and both are given"):
        rewards.load("geneval", clip=clip, detector=hub_folder, segmenter="toy:segmenter")
    with pytest.raises(ConfigError, match="needs the option 'clip'"):
        rewards.load("geneval", detector=hub_folder)


def test_a_panoptic_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"133 classes .* COCO's 80, from person to toothbrush"):
        Mask2FormerDetector(mask2former(tmp_path / "a", labels=tuple(f"thing {n}" for n in range(133))))
    shuffled = (*CLASSES[1:], CLASSES[0])
    with pytest.raises(CheckpointError, match=r"80 classes \(bicycle"):
        Mask2FormerDetector(mask2former(tmp_path / "b", labels=shuffled))


def test_other_classes_of_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds a 'segformer' model.*'segmenter'"):
        Mask2FormerDetector(tiny.segmenter(tmp_path))


def test_broken_files(mmdet_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no file .*743b7d99\.pth"):
        Mask2FormerDetector(tmp_path / "missing.pth")
    cut = tmp_path / "cut.pth"
    cut.write_bytes(mmdet_file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cut short"):
        Mask2FormerDetector(cut)
    state = openmmlab.read(mmdet_file)
    other = tmp_path / "other.pth"
    torch.save({"state_dict": state | {"panoptic_head.new.weight": torch.zeros(1)}}, other)
    with pytest.raises(CheckpointError, match=r"1 names are unknown, first panoptic_head\.new\.weight"):
        Mask2FormerDetector(other)
    torch.save({"state_dict": {"backbone.conv1.weight": torch.zeros(3)}}, other)
    with pytest.raises(
        CheckpointError, match=r"has no tensor .* not mmdet's Mask2Former\. GenEval's own: curl"
    ):
        Mask2FormerDetector(other)
    del state["backbone.norm2.weight"]
    torch.save({"state_dict": state}, other)
    with pytest.raises(CheckpointError, match=r"1 weights are missing .*hidden_states_norms\.stage3"):
        Mask2FormerDetector(other)


def test_a_file_with_code_is_never_run(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, ("1 + 1",))

    file = tmp_path / "code.pth"
    torch.save({"state_dict": {"a": Code()}}, file)
    with pytest.raises(CheckpointError, match="more than tensors"):
        Mask2FormerDetector(file)


@pytest.mark.skipif(not NAMES.is_file(), reason=f"GenEval's list of names is not at {NAMES}")
def test_the_names_are_genevals() -> None:
    assert NAMES.read_text().splitlines() == list(CLASSES)
