"""The gates of `sd3`, `turbo` and `flux`: is what they draw right and sharp, and does it leave something to learn?

The gates of `judge`, which reads what `flux` draws, stand beside them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from pixrl import models
from pixrl.equations import fuse
from pixrl.models.base import Conditioning, Renderer
from pixrl.models.flux import FluxPolicy
from pixrl.rewards.encoders import DinoEncoder
from pixrl.rewards.geneval import GenEvalReward
from pixrl.rewards.segmentation import Foreground, Segmenter
from pixrl.toy.judge import SceneJudge
from pixrl.toy.language import caption, held_out_prompts, parse
from pixrl.toy.pairs import HELD_OUT_PAIRS, TRAINING_PAIRS
from pixrl.toy.pictures import drawn
from pixrl.toy.random_scenes import (
    ToySubject,
    held_out_subjects,
    random_subject,
    resembles_held_out,
    subject_scene,
)
from pixrl.toy.scene import FIRST_PART, GENEVAL, Scene, Task
from pixrl.toy.verify import (
    SEED,
    Gate,
    cut_out,
    high_frequencies,
    judged,
    load_vae,
    reconstruct,
    scenes,
    truth,
)
from pixrl.toy.vocabulary import ACCESSORIES, BACKGROUNDS, KINDS, SLOTS
from pixrl.types import RewardBatch, sample_seed

HARD = (Task.TWO_OBJECT, Task.COUNTING, Task.POSITION, Task.COLOR_ATTR)
GROUP = 24
"""Noises of one prompt in the gate that asks how often all of them fail."""
ROUND = 6
"""How many of them are drawn at a time."""
FRECHET = "Fréchet distance, times that of two halves of the drawings"
SWEEP = 11
"""Places of a sweep from one parent to the other."""


def pictures(
    policy: Renderer, prompts: Sequence[str], key: int, places: Sequence[int] | None = None
) -> Tensor:
    """Return a picture of each prompt [B, 3, 128, 128]; its noise depends on its place, by default that in the list."""
    numbers = range(len(prompts)) if places is None else places
    return policy.sample(policy.encode(prompts), [sample_seed(SEED, key, i, 0) for i in numbers])


def shows(root: Path, images: Tensor, kinds: Sequence[str]) -> float:
    """Return the share of pictures in which all four parts of the kind are seen and those of another are not."""
    right = []
    for classes, kind in zip(truth(root).segmenter.classes(images).numpy(), kinds, strict=True):
        areas = np.bincount(classes[classes >= FIRST_PART] - FIRST_PART, minlength=len(KINDS) * len(SLOTS))
        areas = areas.reshape(len(KINDS), len(SLOTS)) / max((classes > 0).sum(), 1)
        own = areas[KINDS.index(kind)]
        right.append(bool((own > 0.01).all() and areas.sum() - own.sum() < 0.05))
    return float(np.mean(right))


def sharpness(name: str, root: Path, images: Tensor, thin: int) -> Iterable[Gate]:
    """Yield how sharp, and how near in distribution, pictures of single objects are."""
    real = drawn(scenes(512 // thin, Task.SINGLE_OBJECT))
    share = high_frequencies(images) / high_frequencies(real)
    yield Gate(name, "high frequencies, share of the drawings'", share, 0.8, 1.2)
    encoder = DinoEncoder(root / "identity")
    features = encoder.image_features(real).double()
    floor = frechet(
        *features[torch.randperm(len(features), generator=torch.Generator().manual_seed(SEED))].chunk(2)
    )
    distance = frechet(encoder.image_features(images).double(), features) / floor
    yield Gate(name, FRECHET, distance, at_most=3.0)


def frechet(a: Tensor, b: Tensor) -> float:
    """Return the distance of two sets of features [N, D], taken for Gaussians (Heusel et al. 2017)."""
    root = sqrtm((a.T.cov() @ b.T.cov()).numpy()).real
    return float(
        (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * np.trace(root)
    )


def check_sd3(root: Path, thin: int) -> Iterable[Gate]:
    """Yield strict GenEval scores of pictures drawn without guidance, and how often hard prompts fail throughout."""
    policy, reward = models.load(root / "sd3"), GenEvalReward(root / "segmenter", clip=root / "clip")

    def strict(prompts: Sequence[str], key: int, places: Sequence[int] | None = None) -> Tensor:
        images = pictures(policy, prompts, key, places)
        return reward.score(RewardBatch(images, list(prompts), [parse(p).metadata for p in prompts])).values_B

    limits = {Task.SINGLE_OBJECT: (0.92, 1.0), Task.COLORS: (0.80, 1.0)}
    found = {}
    for number, task in enumerate(GENEVAL):
        found[task] = float(strict(held_out_prompts(task, 80 // thin, SEED), number).nanmean())
        yield Gate("sd3", f"GenEval {task}", found[task], *limits.get(task, (0.05, 0.45)))
    yield Gate("sd3", "GenEval overall", float(np.mean(list(found.values()))), 0.25, 0.50)
    alone = [f"a photo of {kind}" for kind in KINDS for _ in range(8 // min(thin, 8))]
    images = pictures(policy, alone, 7)
    yield Gate("sd3", "single objects by parts", shows(root, images, [p.split()[-1] for p in alone]), 0.92)
    hard = [prompt for task in HARD for prompt in held_out_prompts(task, 12 // min(thin, 12), SEED + 1)]
    failing = list(range(len(hard)))
    for first in range(0, GROUP, ROUND):  # a group that has succeeded once needs no more pictures
        places = [group * GROUP + first + k for group in failing for k in range(ROUND)]
        scores = strict([hard[place // GROUP] for place in places], 8, places).view(-1, ROUND)
        failing = [group for group, row in zip(failing, scores, strict=True) if row.nansum() == 0]
        if not failing:
            break
    yield Gate("sd3", f"hard groups of {GROUP} that all fail", len(failing) / len(hard), 0.3)
    yield from sharpness(
        "sd3", root, pictures(policy, held_out_prompts(Task.SINGLE_OBJECT, 256 // thin, SEED), 9), thin
    )


def check_turbo(root: Path, thin: int) -> Iterable[Gate]:
    """Yield how right single objects, mixes by prompt and column-wise mixtures of held-out pairs are."""
    policy = models.load(root / "turbo")
    alone = [f"a photo of {kind}" for kind in KINDS for _ in range(8 // min(thin, 8))]
    images = pictures(policy, alone, 1)
    yield Gate("turbo", "single objects by parts", shows(root, images, [p.split()[-1] for p in alone]), 0.97)
    rng = np.random.default_rng(SEED)
    chosen = [TRAINING_PAIRS[int(k)] for k in rng.integers(len(TRAINING_PAIRS), size=256 // thin)]
    mixes = pictures(policy, [f"a photo of a mix of {article(a)} and {article(b)}" for a, b in chosen], 2)
    yield Gate("turbo", "mixes of training pairs that are true fusions", true_share(root, mixes, chosen), 0.5)
    pairs = [
        HELD_OUT_PAIRS[int(k)] for k in rng.choice(len(HELD_OUT_PAIRS), 48 // min(thin, 12), replace=False)
    ]
    swept, random = [], []
    for number, pair in enumerate(pairs):
        columns = order(number, policy)
        swept.append(
            [mixture(policy, pair, (columns < place).float()) for place in np.linspace(0.1, 0.9, SWEEP)]
        )
        draws = torch.rand(SWEEP, len(columns), generator=torch.Generator().manual_seed(number))
        random.append([mixture(policy, pair, draw) for draw in draws])
    seeds = [sample_seed(SEED, 3, number, k % 4) for number in range(len(pairs)) for k in range(SWEEP)]
    asked = [pair for pair in pairs for _ in range(SWEEP)]
    for name, mixed, limits in (("on a sweep", swept, (0.9, 1.0)), ("at random", random, (0.0, 0.15))):
        drawn_ = policy.sample(Conditioning.cat([row for rows in mixed for row in rows]), seeds)
        true = torch.tensor(fusions(root, drawn_, asked)).view(len(pairs), SWEEP)
        share = true.any(1).float().mean() if name == "on a sweep" else true.float().mean()
        yield Gate("turbo", f"held-out pairs by columns {name}, true fusions", float(share), *limits)
    yield from sharpness(
        "turbo", root, pictures(policy, held_out_prompts(Task.SINGLE_OBJECT, 256 // thin, SEED), 4), thin
    )


def article(kind: str) -> str:
    """Return the kind with its article: "an owl"."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def fusions(root: Path, images: Tensor, pairs: Sequence[tuple[str, ...]]) -> list[bool]:
    """Return which pictures are true fusions of their pair."""
    return [fusion.is_true for fusion in judged(root, images, pairs)]


def true_share(root: Path, images: Tensor, pairs: Sequence[tuple[str, ...]]) -> float:
    """Return the share of pictures that are."""
    return float(np.mean(fusions(root, images, pairs)))


def order(number: int, policy: Renderer) -> Tensor:
    """Return a random place in (0, 1) for every embedding column [D]: the order in which a sweep exchanges them."""
    width = concept(policy, "owl").tokens_BLD.shape[-1]
    return torch.rand(width, generator=torch.Generator().manual_seed(number))


@cache
def concept(policy: Renderer, kind: str) -> Conditioning:
    """Return "A photo of X", as RMLer asks for its concepts."""
    return policy.encode([f"A photo of {kind}"])


def mixture(policy: Renderer, pair: tuple[str, str], share_D: Tensor) -> Conditioning:
    """Return both concepts mixed column by column (RMLer, Eq. 2); `share_D` is the first one's share of each column."""
    rows = [concept(policy, kind) for kind in pair]
    tokens = fuse(torch.cat([row.tokens_BLD for row in rows]), torch.stack((share_D, 1 - share_D)))
    pooled = [row.pooled_BE for row in rows if row.pooled_BE is not None]
    return Conditioning(tokens[None], torch.stack(pooled).mean(0))


def check_flux(root: Path, thin: int) -> Iterable[Gate]:
    """Yield how far pictures of held-out subjects follow their prompts and show the same individual, marks and all."""
    policy = models.load(root / "flux")
    assert isinstance(policy, FluxPolicy)
    rng = np.random.default_rng(SEED)
    subjects = [subject for subject in held_out_subjects() for _ in range(max(8 // thin, 1))]
    references = cut_out(subject_scene(subject, rng, mood=0.0) for subject in subjects)
    wanted = [asking(subject, rng) for subject in subjects]
    prompts = [caption(scene) for scene in wanted]
    seeds = [sample_seed(SEED, 10, i, 0) for i in range(len(prompts))]
    images = policy.sample(policy.with_references(policy.encode(prompts), [references]), seeds)
    # By GenEval's rule for a single object. `parts` recognizes only nine in ten true drawings of these subjects.
    found = Segmenter(root / "segmenter").objects(images)
    recognized = np.mean([subject.kind in seen for seen, subject in zip(found, subjects, strict=True)])
    yield Gate("flux", "object recognized", float(recognized), 0.90)
    followed = SceneJudge.load(root / "judge").follows(images, wanted)
    yield Gate("flux", "background and accessory right", _share(followed), 0.85)
    masks = Foreground(root / "segmenter").masks(images)
    encoder = DinoEncoder(root / "identity")
    shown = encoder.image_features(Foreground.composite(images, masks))

    def nearness(others: Iterable[ToySubject]) -> Tensor:
        """Of each picture to a drawing of another subject in the scene that was asked for."""
        drawings = cut_out(_of(scene, subject) for scene, subject in zip(wanted, others, strict=True))
        return (shown * encoder.image_features(drawings)).sum(-1)

    own = (shown * encoder.image_features(references)).sum(-1)
    relatives = cut_out(subject_scene(relative(subject.kind, rng), rng, mood=0.0) for subject in subjects)
    other = (shown * encoder.image_features(relatives)).sum(-1)
    yield Gate(
        "flux",
        "identity: own reference minus another of the kind, mean cosine",
        float((own - other).mean()),
        0.3,
    )
    kept = nearness(subjects) > nearness(replace(subject, mark=None) for subject in subjects)
    yield Gate("flux", "marks kept: nearer to the subject than to it without its mark", _share(kept), 0.6)


def check_judge(root: Path, thin: int) -> Iterable[Gate]:
    """Yield what the judge says of held-out subjects, drawn as asked and decoded so, and with one thing exchanged."""
    judge, rng = SceneJudge.load(root / "judge"), np.random.default_rng(SEED)
    right = [asking(subject, rng) for subject in held_out_subjects() for _ in range(max(8 // thin, 1))]
    images = drawn(right)
    accepted = [judge.follows(seen, right) for seen in (images, reconstruct(load_vae(root), images))]
    rejected = [
        ~judge.follows(drawn(exchange(scene, rng) for scene in right), right)
        for exchange in (other_background, other_accessory)
    ]
    for figure, shares in (("accepts true", accepted), ("rejects wrong", rejected)):
        yield Gate("judge", f"{figure} drawings", min(map(_share, shares)), 0.95)


def _share(holds: Tensor) -> float:
    """Of true values; in double precision, so that 168 of 240 are 0.7 and not less."""
    return float(holds.double().mean())


def _of(scene: Scene, subject: ToySubject) -> Scene:
    """The scene with another subject in its place."""
    thing = scene.objects[0]
    looks = replace(thing, palette=subject.palette, pattern=subject.pattern, mark=subject.mark)
    return replace(scene, objects=(replace(looks, own=subject.accessory),))


def relative(kind: str, rng: np.random.Generator) -> ToySubject:
    """Return another subject of the kind."""
    while True:
        subject = replace(random_subject(rng), kind=kind)
        if not resembles_held_out(subject):
            return subject


def asking(subject: ToySubject, rng: np.random.Generator) -> Scene:
    """Return a scene whose prompt names the background and an accessory that the subject does not own."""
    while True:
        scene = subject_scene(subject, rng, added_accessory=1.0, mood=0.0)
        if scene.mentions_background and scene.background != "plain":
            return scene


def other_background(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene before a background that its prompt does not name."""
    return replace(scene, background=str(rng.choice([n for n in BACKGROUNDS if n != scene.background])))


def other_accessory(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene with an accessory that its prompt does not name, or without one."""
    thing = scene.objects[0]
    names = [name for name in (*ACCESSORIES, None) if name not in (thing.accessory, thing.own)]
    return replace(scene, objects=(replace(thing, accessory=names[int(rng.integers(len(names)))]),))


GENERATOR_CHECKS: dict[str, Callable[[Path, int], Iterable[Gate]]] = {
    "sd3": check_sd3, "turbo": check_turbo, "judge": check_judge, "flux": check_flux,
}  # fmt: skip
