"""An adapter in a file of one's own: conformance, doctor, a fusion, its resume, and what is wrong with one."""

import json
from pathlib import Path

import pytest

from pixrl import api, models
from pixrl.conformance import check_renderer
from pixrl.errors import CheckpointError, ConfigError, InputError
from pixrl.hub import full_path, split_adapter
from pixrl.jobs.fuse import go_on
from pixrl.models import adapter_of

DISCS = '''
"""Draws a disc: of a colour that follows from the words, at a place that follows from the seed."""

import hashlib

import torch

from pixrl.device import choose_device
from pixrl.hub import checkpoint_fingerprint
from pixrl.models.base import Conditioning, Renderer, SamplingSettings
from pixrl.models.conditioning import check_pairs
from pixrl.models.pipeline import draw, generators
from pixrl.models.text import check_words

SIDE = 64


class Discs(Renderer):
    pipelines = ("DiscPipeline",)
    licences = {"me/discs": "MIT"}
    vocabulary = None

    def __init__(self, checkpoint, *, name, device, steps, guidance, resolution, **_):
        self.name, self.checkpoint, self.device = name, checkpoint, choose_device(device)
        self.settings = SamplingSettings(steps or 1, guidance or 0.0, resolution or SIDE)

    def encode(self, prompts):
        check_words(prompts, self.vocabulary, self.name)
        seeds = [int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) for prompt in prompts]
        return Conditioning(draw(generators(seeds), (2, 12)), draw(generators(seeds), (4,)))

    def sample(self, conditioning, seeds):
        check_pairs(conditioning, seeds)
        color = conditioning.tokens_BLD.mean(dim=1)[:, :3].mul(4).sigmoid()[:, :, None, None]
        at = draw(generators(seeds), (2,)).clamp(-1, 1) * 8 + SIDE / 2
        y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        far = (y - at[:, :1, None]) ** 2 + (x - at[:, 1:, None]) ** 2
        inside = (18 - far.sqrt()).clamp(0, 1)[:, None]
        return 1 - inside * (1 - color)

    def fingerprint(self):
        return checkpoint_fingerprint(self.checkpoint)


class Half(Renderer):
    def encode(self, prompts):
        raise NotImplementedError
'''
FUSE = {"budget": 4, "batch": 2, "exemplars": 2, "keep": 1, "clip": "toy:clip", "segmenter": "toy:segmenter"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "discs.py").write_text(DISCS)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model_index.json").write_text(json.dumps({"_class_name": "DiscPipeline"}))
    return tmp_path


def ref(place: Path, name: str = "Discs") -> str:
    return f"{place / 'discs.py'}:{name}@{place / 'weights'}"


def test_it_keeps_the_interfaces_promises(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renderer = models.load(ref(place), device="cpu")
    check_renderer(renderer)
    assert type(renderer).__name__ == "Discs"
    assert "Running Python code that the recipe names: " in capsys.readouterr().err
    assert models.load(place / "weights", kind=f"{place / 'discs.py'}:Discs").settings.resolution == 64
    with pytest.raises(InputError, match=r"cannot be merged into .*, a Discs"):
        models.load(ref(place), lora=place / "lora.safetensors")


def test_a_fusion_is_examined_run_and_resumed_with_the_same_file_alone(place: Path) -> None:
    settings = [f"{key}={value}" for key, value in FUSE.items()]
    found = api.examine({"kind": "fuse", "model": ref(place), "concepts": ["owl", "cat"]}, settings)
    assert not found.problems
    assert any("was not checked: its adapter Discs is made around no class" in note for note in found.notes)
    result = api.fuse(("owl", "cat"), model=ref(place), out=place / "run", **FUSE)
    assert len(result.scores) == 4
    file = place / "discs.py"
    file.write_text(DISCS.replace("18 - far", "19 - far"))
    with pytest.raises(CheckpointError, match=r"has changed since the run .* began"):
        go_on(place / "run")
    file.write_text(DISCS)
    assert len(go_on(place / "run").rows) == 4


def test_training_says_that_it_only_draws(place: Path) -> None:
    found = api.examine("toy/flow-grpo", [f"model={ref(place)}"])
    assert any("is a Discs: it draws pictures but has no velocity" in one.message for one in found.problems)


def test_what_is_no_adapter_is_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match="lacks fingerprint, sample"):
        models.load(ref(place, "Half"))
    with pytest.raises(ConfigError, match="is no class that extends"):
        models.load(ref(place, "SIDE"))
    with pytest.raises(ConfigError, match=r"has no 'Disks'\. Did you mean 'Discs'"):
        models.load(ref(place, "Disks"))
    with pytest.raises(InputError, match="names an adapter, and no checkpoint"):
        models.load(f"{place / 'discs.py'}:Discs")
    with pytest.raises(CheckpointError, match="is a DiscPipeline, which pixrl has no adapter for"):
        models.load(place / "weights")


def test_an_installed_package_is_found_by_the_pipelines_class(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = place / "discs-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: discs\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[pixrl.models]\ndiscs = discs:Discs\n")
    monkeypatch.syspath_prepend(str(place))
    assert models.load(place / "weights").name == str(place / "weights")
    assert models.load(place / "weights", kind="discs").settings.steps == 1
    assert models.generator_licence("me/discs") == "MIT"


def test_references_with_an_adapter_are_split_and_completed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert full_path("discs.py:Discs@weights") == ref(place)
    assert full_path("my.module:Discs@me/weights@main") == "my.module:Discs@me/weights@main"
    assert split_adapter("my.module:Discs@me/weights@main") == ("my.module:Discs", "me/weights@main")
    for plain in ("toy:sd3", "me/weights@main", "a.safetensors@toy:sd3", "./folder"):
        assert split_adapter(plain) == (None, plain)
    with pytest.raises(InputError, match="names an adapter"):
        split_adapter("discs.py:Discs")
    assert adapter_of(models.locate("toy:sd3")).lora_layout == "sd3"
