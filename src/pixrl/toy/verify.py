"""`pixrl toy verify` measures every shipped checkpoint on held-out scenes and compares it with its gates."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from pixrl import models
from pixrl.errors import InputError, did_you_mean
from pixrl.models.base import Renderer
from pixrl.models.flux import FluxPolicy
from pixrl.rewards.base import Reward
from pixrl.rewards.encoders import ClipSimilarity, DinoEncoder
from pixrl.rewards.geneval import GenEvalReward
from pixrl.rewards.segmentation import Foreground, Segmenter
from pixrl.toy import CHECKPOINTS
from pixrl.toy.judge import FULL, QUICK, SceneJudge, reconstruct
from pixrl.toy.language import caption, held_out_prompts, parse
from pixrl.toy.pictures import TASK_SHARES, draw, held_out_scene, spoil, to_tensor
from pixrl.toy.scene import SUBJECTS, Scene, Task, ToySubject, random_subject, subject_scene
from pixrl.toy.vocabulary import ACCESSORIES, BACKGROUNDS
from pixrl.types import RewardBatch, sample_seed

SEED = 91
FEWEST_HELD_OUT = 64
"""Counting has no more held-out prompts than these; further pictures draw them again with other seeds."""
GALLERY = 64
"""Captions that a picture is told apart from in the retrieval gate."""


@dataclass(frozen=True)
class Gate:
    """A gate is one figure of a checkpoint with the range that it must lie in."""

    checkpoint: str
    figure: str
    value: float
    at_least: float
    at_most: float = float("inf")

    @property
    def passed(self) -> bool:
        """Return whether the figure lies in its range."""
        return self.at_least <= self.value <= self.at_most


def verify(names: Sequence[str] = (), *, root: Path = CHECKPOINTS, quick: bool = False) -> list[Gate]:
    """Measure the named checkpoints (all of them without a name) and return their gates.

    `quick` takes a quarter of the samples. When all samples were taken, the figures are also written into each folder's
    provenance.json.

    Raises:
        InputError: a checkpoint that does not exist.
    """
    for name in names:
        if name not in CHECKS:
            raise InputError(
                f"There is no toy checkpoint {name!r}.{did_you_mean(name, CHECKS)} There are {', '.join(CHECKS)}."
            )
    found: list[Gate] = []
    for name, check in CHECKS.items():
        if not names or name in names:
            gates = list(check(root, 4 if quick else 1))
            found += gates
            if not quick:
                _record(root / name / "provenance.json", gates)
    return found


def _record(path: Path, gates: Iterable[Gate]) -> None:
    record = json.loads(path.read_text())
    record["gates"] = [asdict(gate) | {"passed": gate.passed} for gate in gates]
    for gate in record["gates"]:
        gate["value"] = round(gate["value"], 4)
        if gate["at_most"] == float("inf"):
            del gate["at_most"]
    path.write_text(json.dumps(record, indent=1) + "\n")


def _scenes(count: int, task: Task | None = None) -> list[Scene]:
    rng = np.random.default_rng(SEED)
    return [held_out_scene(rng, task) for _ in range(count)]


def _pictures(scenes: Sequence[Scene]) -> tuple[Tensor, "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]"]:
    drawn = [draw(scene) for scene in scenes]
    return to_tensor(np.stack([image for image, _ in drawn])), np.stack([labels for _, labels in drawn])


def check_clip(root: Path, thin: int) -> Iterable[Gate]:
    """Yield the share of captions of held-out scenes that CLIP finds among 64."""
    clip = ClipSimilarity(root / "clip")
    hits: list[Tensor] = []
    rng = np.random.default_rng(SEED)
    for _ in range(24 // thin):
        gallery: dict[str, Scene] = {}
        while len(gallery) < GALLERY:
            scene = held_out_scene(rng)
            gallery.setdefault(caption(scene), scene)
        images, _ = _pictures(list(gallery.values()))
        similarity = clip.image_features(images) @ clip.text_features(list(gallery)).T
        hits.append(similarity.argmax(1) == torch.arange(GALLERY))
    yield Gate("clip", "caption retrieval among 64, top-1", float(torch.cat(hits).float().mean()), 0.90)


def check_vae(root: Path, thin: int) -> Iterable[Gate]:
    """Yield the peak signal-to-noise ratio of pictures that the autoencoder has encoded and decoded."""
    images, _ = _pictures(_scenes(256 // thin))
    error = (reconstruct(_vae(root), images) - images).square().flatten(1).mean(1)
    yield Gate("vae", "PSNR in dB, mean over pictures", float((-10 * error.log10()).mean()), 27.0)


def _vae(root: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(root / "vae", torch_dtype=torch.float32).eval()


def check_segmenter(root: Path, thin: int) -> Iterable[Gate]:
    """Yield how well the segmenter finds the pixels of each kind and counts objects on held-out scenes."""
    segmenter = Segmenter(root / "segmenter")
    images, labels = _pictures(_scenes(512 // thin))
    found = segmenter.probabilities(images).argmax(1).numpy()
    classes = range(int(labels.max()) + 1)
    ious = [
        ((found == k) & (labels == k)).sum() / max(((found == k) | (labels == k)).sum(), 1) for k in classes
    ]
    yield Gate("segmenter", "mean IoU over 25 classes", float(np.mean(ious)), 0.85)
    scenes = _scenes(400 // thin, Task.COUNTING)
    detections = segmenter.objects(_pictures(scenes)[0])
    right = [
        len(seen.get(scene.objects[0].kind, ())) == len(scene.objects)
        for seen, scene in zip(detections, scenes, strict=True)
    ]
    yield Gate("segmenter", "counting accuracy on true scenes", float(np.mean(right)), 0.95)


def _cut_out(scenes: Sequence[Scene]) -> Tensor:
    images, labels = _pictures(scenes)
    return torch.where(torch.from_numpy(labels > 0)[:, None], images, torch.ones(()))


def check_identity(root: Path, thin: int) -> Iterable[Gate]:
    """Yield how well the encoder tells the thirty held-out subjects from others of their kinds, cut out on white."""
    encoder = DinoEncoder(root / "identity")
    rng = np.random.default_rng(SEED)
    same, different = [], []
    for _ in range(max(8 // thin, 2)):
        first, second = (_cut_out([subject_scene(s, rng) for s in SUBJECTS]) for _ in range(2))
        others = _cut_out([subject_scene(_relative(s.kind, rng), rng) for s in SUBJECTS])
        here, again, other = (encoder.image_features(images) for images in (first, second, others))
        same.append((here * again).sum(-1))
        different.append((here * other).sum(-1))
    yield Gate(
        "identity",
        "same/different subject AUC within a kind",
        auc(torch.cat(same), torch.cat(different)),
        0.95,
    )


def auc(positive: Tensor, negative: Tensor) -> float:
    """Return the probability that a value of `positive` [N] lies above one of `negative` [M]; ties count half.

    It is the area under the receiver operating characteristic.
    """
    gap = positive[:, None] - negative[None, :]
    return float((gap > 0).float().mean() + 0.5 * (gap == 0).float().mean())


def _relative(kind: str, rng: np.random.Generator) -> ToySubject:
    """Another subject of the kind."""
    return replace(random_subject(rng), kind=kind)


def check_preference(root: Path, thin: int) -> Iterable[Gate]:
    """Yield how often the preference model puts right above wrong captions, and clean above spoiled pictures."""
    clip = ClipSimilarity(root / "preference")
    scenes = _scenes(512 // thin)
    images, _ = _pictures(scenes)
    texts = clip.text_features([caption(scene) for scene in scenes])
    good = (clip.image_features(images) * texts).sum(-1)
    swapped = (clip.image_features(images.roll(1, 0)) * texts).sum(-1)
    spoiled = (clip.image_features(spoil(images, np.random.default_rng(SEED))) * texts).sum(-1)
    wins = torch.cat((good > swapped, good > spoiled)).float().mean()
    yield Gate("preference", "pair accuracy", float(wins), 0.95)


def task_scores(policy: Renderer, reward: Reward, thin: int, each: int = 96) -> dict[Task, float]:
    """Return the mean strict GenEval score of `each // thin` pictures of each task's held-out prompts."""
    out = {}
    for number, task in enumerate(TASK_SHARES):
        known = held_out_prompts(task, min(each // thin, FEWEST_HELD_OUT), SEED)
        prompts = [known[i % len(known)] for i in range(each // thin)]
        seeds = [sample_seed(SEED, 0, number, i) for i in range(len(prompts))]
        images = policy.sample(policy.encode(prompts), seeds)
        batch = RewardBatch(images, prompts, [parse(prompt).metadata for prompt in prompts])
        out[task] = float(reward.score(batch).values_B.nanmean())
    return out


def check_sd3(root: Path, thin: int) -> Iterable[Gate]:
    """Yield the toy GenEval scores of pictures that SD3 draws in ten Euler steps without guidance."""
    reward = GenEvalReward(root / "segmenter", clip=root / "clip")
    scores = task_scores(models.load(root / "sd3"), reward, thin)
    limits = {Task.SINGLE_OBJECT: 0.90, Task.COLORS: 0.85}
    for task, score in scores.items():
        yield Gate("sd3", f"GenEval {task}", score, limits.get(task, 0.0))
    yield Gate("sd3", "GenEval overall", float(np.mean(list(scores.values()))), 0.45, 0.80)


def check_flux(root: Path, thin: int) -> Iterable[Gate]:
    """Yield how far pictures of held-out subjects follow their prompts and show the same individual."""
    policy = models.load(root / "flux")
    assert isinstance(policy, FluxPolicy)
    rng = np.random.default_rng(SEED)
    subjects = [subject for subject in SUBJECTS for _ in range(8 // thin)]
    references = _cut_out([subject_scene(subject, rng) for subject in subjects])
    relatives = _cut_out([subject_scene(_relative(subject.kind, rng), rng) for subject in subjects])
    wanted = [asking(subject, rng) for subject in subjects]
    prompts = [caption(scene) for scene in wanted]
    seeds = [sample_seed(SEED, 1, 0, i) for i in range(len(prompts))]
    images = policy.sample(policy.with_references(policy.encode(prompts), [references]), seeds)
    vae = _vae(root)
    judge = SceneJudge.fit(vae, SEED, QUICK if thin > 1 else FULL)
    yield Gate("flux", "background and accessory right", _share(judge.follows(images, wanted)), 0.70)
    # the judge itself on held-out subjects: drawn as asked and decoded so, and with one thing exchanged
    rng = np.random.default_rng(SEED)
    right = [asking(subject, rng) for subject in SUBJECTS for _ in range(8)]
    drawn, _ = _pictures(right)
    accepted = [judge.follows(pictures, right) for pictures in (drawn, reconstruct(vae, drawn))]
    rejected = [
        ~judge.follows(_pictures([exchange(scene, rng) for scene in right])[0], right)
        for exchange in (other_background, other_accessory)
    ]
    for figure, shares in (("accepts true", accepted), ("rejects wrong", rejected)):
        yield Gate("flux", f"judge {figure} drawings", min(map(_share, shares)), 0.95)
    masks = Foreground(root / "segmenter").masks(images)
    encoder = DinoEncoder(root / "identity")
    features = encoder.image_features(Foreground.composite(images, masks))
    own = (features * encoder.image_features(references)).sum(-1)
    other = (features * encoder.image_features(relatives)).sum(-1)
    yield Gate(
        "flux",
        "identity: own reference minus another of the kind, mean cosine",
        float((own - other).mean()),
        0.15,
    )
    yield Gate("flux", "identity: share nearer to its own reference", _share(own > other), 0.80)


def _share(holds: Tensor) -> float:
    """Of true values; in double precision, so that 168 of 240 are 0.7 and not less."""
    return float(holds.double().mean())


def asking(subject: ToySubject, rng: np.random.Generator) -> Scene:
    """Return a scene whose prompt names the background and an accessory that the subject does not own."""
    while True:
        scene = subject_scene(subject, rng, added_accessory=1.0)
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


CHECKS: dict[str, Callable[[Path, int], Iterable[Gate]]] = {
    "clip": check_clip,
    "vae": check_vae,
    "segmenter": check_segmenter,
    "identity": check_identity,
    "preference": check_preference,
    "sd3": check_sd3,
    "flux": check_flux,
}
