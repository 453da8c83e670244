"""The build's training loop, data and tokenizers."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from pixrl.errors import InputError
from pixrl.toy.language import WORDS, canonical, is_held_out
from pixrl.toy.pictures import (
    draw,
    guided_scene,
    held_out_scene,
    spoil,
    subject_view,
    training_scene,
    training_subject,
)
from pixrl.toy.scene import resembles_held_out
from pixrl.toy.vocabulary import KINDS
from toy_build.first_edition import STAGES, build
from toy_build.first_edition.flux import FIRST_PLANS, LATER_ROUNDS, rounds_done
from toy_build.first_edition.pictures import pictures
from toy_build.first_edition.tokenizers import clip_tokenizer, t5_tokenizer
from toy_build.first_edition.workshop import Draw, Plan, Workshop

PLAN = Plan(steps=30, batch=8, lr=1e-2, warmup=5, ema=0.9)


def workshop(path: Path, resume: bool = False) -> Workshop:
    return Workshop(path / "out", path / "work", 3, torch.device("cpu"), resume, "test")


class Block(nn.Module):
    """Its matrix is named as those inside a transformer's blocks are, so that Muon takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x).tanh()


def fresh_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(blocks=nn.Sequential(Block()), head=nn.Linear(8, 1)))


def regression(module: nn.Module, stop_at: int | None = None):  # type: ignore[no-untyped-def]
    calls = 0

    def loss(draw: Draw) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        x = draw.normal(PLAN.batch, 4)
        return (module(x) - x.sum(1, keepdim=True)).square().mean()

    return loss


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, muon=1e-2)], ids=["AdamW", "Muon"])
def test_a_killed_build_ends_with_the_weights_of_an_unbroken_one(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toy_build.first_edition.workshop.SAVE_EVERY_SECONDS", -1.0)
    unbroken = fresh_module()
    workshop(tmp_path / "a").fit("stage", unbroken, plan, regression(unbroken))
    for stop_at in (2, 13, 29):
        broken = fresh_module()
        with pytest.raises(KeyboardInterrupt):
            workshop(tmp_path / str(stop_at)).fit("stage", broken, plan, regression(broken, stop_at))
        resumed = fresh_module()
        workshop(tmp_path / str(stop_at), resume=True).fit("stage", resumed, plan, regression(resumed))
        for one, other in zip(unbroken.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_round_is_taken_as_done_only_if_the_same_plans_made_it(tmp_path: Path) -> None:
    shop = workshop(tmp_path)
    assert workshop(tmp_path, resume=True).finished("sd3", {"sd3": PLAN}) is None
    shop.folder("sd3")
    shop.provenance("sd3", {"sd3": PLAN}, 12.5)
    again = workshop(tmp_path, resume=True)
    assert again.finished("sd3", {"sd3": PLAN}) == 12.5
    assert shop.finished("sd3", {"sd3": PLAN}) is None
    assert again.finished("sd3", {"sd3": replace(PLAN, steps=31)}) is None
    assert again.finished("sd3", {"sd3": PLAN, "sd3-guided": PLAN}) is None
    assert replace(again, seed=4).finished("sd3", {"sd3": PLAN}) is None


def test_flux_goes_on_after_the_rounds_that_its_checkpoint_holds(tmp_path: Path) -> None:
    shop = workshop(tmp_path, resume=True)
    assert rounds_done(shop) == (0, 0.0)
    shop.folder("flux")
    names = list(LATER_ROUNDS)
    for count in range(len(names) + 1):
        shop.provenance(
            "flux", FIRST_PLANS | {name: LATER_ROUNDS[name] for name in names[:count]}, 10.0 + count
        )
        assert rounds_done(shop) == (count, 10.0 + count)
    shop.provenance("flux", {"flux": PLAN}, 1.0)
    assert rounds_done(shop) == (0, 0.0)


def test_muon_takes_the_matrices_of_the_blocks_alone(tmp_path: Path) -> None:
    ends = []
    for plan in (PLAN, replace(PLAN, muon=1e-2)):
        module = fresh_module()
        workshop(tmp_path / str(plan.muon)).fit("stage", module, replace(plan, steps=1), regression(module))
        ends.append(module.state_dict())
    changed = [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])]
    assert changed == ["blocks.0.ff.weight"]


def test_the_loop_learns(tmp_path: Path) -> None:
    module = fresh_module()
    before = regression(module)(workshop(tmp_path).draw(10_000)).item()
    workshop(tmp_path).fit("stage", module, Plan(steps=200, batch=8, lr=1e-2, warmup=5), regression(module))
    assert regression(module)(workshop(tmp_path).draw(10_000)).item() < 0.3 * before


def test_training_never_sees_what_is_held_out() -> None:
    for index in range(300):
        assert not is_held_out(canonical(training_scene(5, index)))
        assert not is_held_out(canonical(guided_scene(5, index)))
        assert not resembles_held_out(training_subject(5, index))
        assert not is_held_out(canonical(subject_view(5, index, index % 6)))
    rng = np.random.default_rng(0)
    assert all(is_held_out(canonical(held_out_scene(rng))) for _ in range(50))


def test_pictures_are_drawn_once_and_the_same_again(tmp_path: Path) -> None:
    first = pictures(tmp_path, "scenes", 12, 5)
    again = pictures(tmp_path, "scenes", 12, 5)
    assert np.array_equal(first.images, again.images)
    image, labels = draw(first.scene(7))
    assert np.array_equal(first.images[7], image) and np.array_equal(first.labels[7], labels)
    kinds = {KINDS.index(thing.kind) + 1 for thing in first.scene(7).objects}
    assert set(np.unique(labels)) == kinds | {0}


def test_cutouts_keep_the_object_and_nothing_else(tmp_path: Path) -> None:
    data = pictures(tmp_path, "subjects", 6, 5)
    cut, whole = data.cutouts([0])[0], data.tensor([0])[0]
    ink = torch.from_numpy(np.asarray(data.labels[0]) > 0)
    assert torch.equal(cut[:, ink], whole[:, ink])
    assert torch.all(cut[:, ~ink] == 1)


@pytest.mark.parametrize("make", [clip_tokenizer, t5_tokenizer])
def test_every_word_is_one_token_of_its_own(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    make().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    special = len(tokenizer("").input_ids)
    ids = [tuple(tokenizer(word).input_ids) for word in WORDS]
    assert all(len(one) == 1 + special for one in ids)
    assert len(set(ids)) == len(WORDS)
    assert tokenizer.model_max_length == 20


def test_the_clip_tokenizer_ignores_case() -> None:
    tokenizer = clip_tokenizer()
    assert tokenizer("A Photo of an Owl").input_ids == tokenizer("a photo of an owl").input_ids


def test_spoiling_changes_every_picture() -> None:
    images = torch.rand(20, 3, 64, 64)
    spoiled = spoil(images, np.random.default_rng(0))
    assert spoiled.shape == images.shape and bool(torch.isfinite(spoiled).all())
    assert float((spoiled - images).abs().flatten(1).mean(1).min()) > 0.01


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(InputError, match="Did you mean 'segmenter'"):
        build(["segmentor"])
    assert list(STAGES)[:2] == ["clip", "vae"]
