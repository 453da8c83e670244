"""`pixrl toy verify` measures every shipped checkpoint on held-out scenes and compares it with its gates.

The networks that look at pictures are here; `verify_generators` has those that draw them.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from pixrl.errors import InputError, did_you_mean
from pixrl.metrics.true_fusion import Fusion, FusionTruth, judge
from pixrl.models.latents import decode_latents
from pixrl.rewards.encoders import ClipSimilarity, DinoEncoder
from pixrl.rewards.segmentation import Segmenter
from pixrl.toy import CHECKPOINTS
from pixrl.toy.language import canonical, caption, is_held_out
from pixrl.toy.pictures import drawn, smear, spoil, to_tensor
from pixrl.toy.random_scenes import (
    EVEN_SHARES,
    ToySubject,
    held_out_hybrid,
    held_out_subjects,
    random_scene,
    random_subject,
    subject_scene,
)
from pixrl.toy.scene import Scene, Task, draw, kind_classes
from pixrl.toy.vocabulary import KINDS

SEED = 91
GALLERY = 64
"""Captions that a picture is told apart from in the retrieval gate."""
CHUNK = 32
"""Pictures that go through the autoencoder at once."""
UNBOUNDED = float("inf")
Random = np.random.Generator


@dataclass(frozen=True)
class Gate:
    """One figure of a checkpoint, and the range that it must lie in."""

    checkpoint: str
    figure: str
    value: float
    at_least: float = -UNBOUNDED
    at_most: float = UNBOUNDED

    @property
    def passed(self) -> bool:
        """Return whether the figure lies in its range."""
        return self.at_least <= self.value <= self.at_most


def held_out_scene(rng: Random, task: Task | None = None) -> Scene:
    """Return a scene whose prompt training never saw; a hybrid is of a held-out pair."""
    # chosen once: most scenes are not held out, and hybrids of held-out pairs always are
    wanted = task or Task(rng.choice(list(EVEN_SHARES), p=list(EVEN_SHARES.values())))
    if wanted is Task.HYBRID:
        return held_out_hybrid(rng)
    while True:
        scene = random_scene(rng, wanted)
        if is_held_out(canonical(scene)):
            return scene


def scenes(count: int, task: Task | None = None) -> list[Scene]:
    """Return the same held-out scenes at every call."""
    rng = np.random.default_rng(SEED)
    return [held_out_scene(rng, task) for _ in range(count)]


def high_frequencies(images: Tensor) -> float:
    """Return the mean power of pictures [B, 3, H, W] above a quarter of the Nyquist frequency."""
    spectrum = torch.fft.fft2(images.mean(1), norm="ortho").abs().square()
    rows, columns = (torch.fft.fftfreq(size).abs() for size in spectrum.shape[-2:])
    above = (rows[:, None] ** 2 + columns[None, :] ** 2).sqrt() > 0.25 * 0.5
    return float(spectrum[:, above].sum(-1).mean())


def load_vae(root: Path) -> AutoencoderKL:
    """Return the autoencoder that the generators share."""
    return AutoencoderKL.from_pretrained(root / "vae", dtype=torch.float32).eval()


@torch.inference_mode()
def reconstruct(
    vae: AutoencoderKL, images: Tensor, roughness: float = 0.0, noise: torch.Generator | None = None
) -> Tensor:
    """Return pictures [B, 3, H, W] in [0, 1] after they were encoded and decoded by the autoencoder.

    The latents get noise of up to `roughness` of their standard deviation in between, drawn from `noise`.
    """
    out = []
    for part in images.split(CHUNK):
        latents = vae.encode(part * 2 - 1).latent_dist.mean
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        if roughness:
            strength = roughness * torch.rand(len(part), 1, 1, 1, generator=noise)
            latents = latents + strength * torch.randn(latents.shape, generator=noise)
        out.append(decode_latents(vae, latents))
    return torch.cat(out)


def check_vae(root: Path, thin: int) -> Iterable[Gate]:
    """Yield how near and how sharp pictures are that were encoded and decoded."""
    images = drawn(scenes(256 // thin))
    decoded = reconstruct(load_vae(root), images)
    error = (decoded - images).square().flatten(1).mean(1)
    yield Gate("vae", "PSNR in dB, mean over pictures", float((-10 * error.log10()).mean()), 27.0)
    yield Gate(
        "vae",
        "high frequencies, share of the drawings'",
        high_frequencies(decoded) / high_frequencies(images),
        0.9,
        1.1,
    )


def said(scene: Scene) -> str:
    """Return the scene's caption, the same for a mix of two kinds in either order."""
    text = caption(scene)
    if scene.task is not Task.HYBRID:
        return text
    parents = "|".join(map(re.escape, scene.objects[0].parents))
    return " ".join(sorted(re.findall(parents, text))) + re.sub(parents, "", text)


def check_clip(root: Path, thin: int) -> Iterable[Gate]:
    """Yield the share of captions of held-out scenes that CLIP finds among 64."""
    clip, rng = ClipSimilarity(root / "clip"), np.random.default_rng(SEED)
    hits: list[Tensor] = []
    for _ in range(24 // thin):
        gallery: dict[str, Scene] = {}
        while len(gallery) < GALLERY:
            scene = held_out_scene(rng)
            gallery.setdefault(said(scene), scene)
        shown = list(gallery.values())
        captions = [caption(scene) for scene in shown]
        similarity = clip.image_features(drawn(shown)) @ clip.text_features(captions).T
        hits.append(similarity.argmax(1) == torch.arange(GALLERY))
    yield Gate("clip", "caption retrieval among 64, top-1", float(torch.cat(hits).float().mean()), 0.93)


@cache
def truth(root: Path) -> FusionTruth:
    """Return what tells true fusions: `parts`."""
    return FusionTruth(root / "parts", device="cpu")


def judged(root: Path, images: Tensor, parents: Iterable[Sequence[str]]) -> list[Fusion]:
    """Return what each picture [B, 3, 128, 128] is that should mix its parents."""
    told = truth(root)
    maps = told.segmenter.classes(images).numpy()
    return [judge(found, kinds, told.parts) for found, kinds in zip(maps, parents, strict=True)]


def check_parts(root: Path, thin: int) -> Iterable[Gate]:
    """Yield which true drawings pass as a fusion: hybrids of held-out pairs should, nothing else."""
    rng, count = np.random.default_rng(SEED), 2000 // thin**2  # shares near 0 and 1 need few

    def passed(asked: Sequence[tuple[Scene, tuple[str, ...]]]) -> float:
        found = judged(root, drawn(scene for scene, _ in asked), [parents for _, parents in asked])
        return float(np.mean([fusion.is_true for fusion in found]))

    def strangers(known: tuple[str, ...], number: int) -> tuple[str, ...]:
        return tuple(
            str(kind) for kind in rng.choice([k for k in KINDS if k not in known], number, replace=False)
        )

    hybrids = [held_out_hybrid(rng) for _ in range(count)]
    yield Gate("parts", "hybrids recognized", passed([(s, s.objects[0].parents) for s in hybrids]), 0.98)
    alone = [random_scene(rng, Task.SINGLE_OBJECT) for _ in range(count)]
    kinds = [(scene.objects[0].kind,) for scene in alone]
    unmixed = [(s, kind + strangers(kind, 1)) for s, kind in zip(alone, kinds, strict=True)]
    yield Gate("parts", "unmixed pictures that pass", passed(unmixed), at_most=0.002)
    third = [(s, strangers(kind, 2)) for s, kind in zip(alone, kinds, strict=True)]
    yield Gate("parts", "third kinds that pass", passed(third), at_most=0.002)
    pairs = [random_scene(rng, Task.TWO_OBJECT) for _ in range(count)]
    beside = [(s, (s.objects[0].kind, s.objects[1].kind)) for s in pairs]
    yield Gate("parts", "side by side that pass", passed(beside), at_most=0.002)


def check_segmenter(root: Path, thin: int) -> Iterable[Gate]:
    """Yield how well the pixels of each kind are found, and objects counted."""
    segmenter, shown = Segmenter(root / "segmenter"), scenes(512 // thin)
    drawings = [draw(scene) for scene in shown]
    labels = np.stack([kind_classes(scene)[d.labels] for scene, d in zip(shown, drawings, strict=True)])
    images = to_tensor(np.stack([d.picture for d in drawings]))
    found = segmenter.classes(images).numpy()
    classes = range(len(KINDS) + 1)
    overlaps = [
        ((found == k) & (labels == k)).sum() / max(((found == k) | (labels == k)).sum(), 1) for k in classes
    ]
    yield Gate("segmenter", "mean IoU over 33 classes", float(np.mean(overlaps)), 0.88)
    counted = scenes(400 // thin, Task.COUNTING)
    right = [
        len(seen.get(scene.objects[0].kind, ())) == len(scene.objects)
        for seen, scene in zip(segmenter.objects(drawn(counted)), counted, strict=True)
    ]
    yield Gate("segmenter", "counting accuracy on true scenes", float(np.mean(right)), 0.97)


def cut_out(shown: Iterable[Scene]) -> Tensor:
    """Return pictures of the scenes' objects on white [B, 3, 128, 128]."""
    drawings = [draw(scene) for scene in shown]
    return to_tensor(
        np.stack([np.where(d.foreground[..., None], d.picture, np.uint8(255)) for d in drawings])
    )


def auc(positive: Tensor, negative: Tensor) -> float:
    """Return the probability that a positive scores above a negative; ties count half."""
    gap = positive[:, None] - negative[None, :]
    return float((gap > 0).float().mean() + 0.5 * (gap == 0).float().mean())


def check_identity(root: Path, thin: int) -> Iterable[Gate]:
    """Yield how held-out subjects compare with others of their kinds, and with themselves without marks or smeared."""
    encoder, rng = DinoEncoder(root / "identity"), np.random.default_rng(SEED)
    cosines: dict[str, list[Tensor]] = {"same": [], "other": [], "unmarked": [], "smeared": []}

    def of(subjects: Iterable[ToySubject]) -> Tensor:
        return cut_out(subject_scene(subject, rng, added_accessory=0.0, mood=0.0) for subject in subjects)

    for _ in range(max(8 // thin, 2)):
        subjects = held_out_subjects()
        reference, again = of(subjects), of(subjects)
        smeared = smear(again, 8)
        shown = {
            "same": again, "smeared": smeared, "unmarked": of(replace(s, mark=None) for s in subjects),
            "other": of(replace(random_subject(rng), kind=s.kind) for s in subjects),
        }  # fmt: skip
        features = encoder.image_features(reference)
        for name, images in shown.items():
            cosines[name].append((features * encoder.image_features(images)).sum(-1))
    found = {name: torch.cat(values) for name, values in cosines.items()}
    yield Gate(
        "identity", "same/different subject AUC within a kind", auc(found["same"], found["other"]), 0.98
    )
    for name in ("unmarked", "smeared"):
        figure = f"share whose own picture is nearer than the {name} one by 0.05"
        yield Gate("identity", figure, float((found["same"] - found[name] > 0.05).float().mean()), 0.9)


def check_preference(root: Path, thin: int) -> Iterable[Gate]:
    """Yield how often the right caption and the clean picture are preferred."""
    clip, shown = ClipSimilarity(root / "preference"), scenes(512 // thin)
    images, texts = drawn(shown), clip.text_features([caption(scene) for scene in shown])
    good = (clip.image_features(images) * texts).sum(-1)
    swapped = (clip.image_features(images.roll(1, 0)) * texts).sum(-1)
    spoiled = (clip.image_features(spoil(images, np.random.default_rng(SEED))) * texts).sum(-1)
    yield Gate(
        "preference", "pair accuracy", float(torch.cat((good > swapped, good > spoiled)).float().mean()), 0.97
    )


CHECKS: dict[str, Callable[[Path, int], Iterable[Gate]]] = {
    "vae": check_vae, "clip": check_clip, "segmenter": check_segmenter, "parts": check_parts,
    "identity": check_identity, "preference": check_preference,
}  # fmt: skip


def checks() -> dict[str, Callable[[Path, int], Iterable[Gate]]]:
    """Return every checkpoint's check; the generators' build on the others."""
    from pixrl.toy.verify_generators import GENERATOR_CHECKS

    return CHECKS | GENERATOR_CHECKS


def verify(names: Sequence[str] = (), *, root: Path = CHECKPOINTS, quick: bool = False) -> list[Gate]:
    """Measure the named checkpoints (all of them without a name) and return their gates.

    `quick` takes a quarter of the samples. When all samples were taken, the figures are also written into each folder's
    provenance.json.

    Raises:
        InputError: a checkpoint that does not exist.
    """
    known = checks()
    for name in names:
        if name not in known:
            raise InputError(
                f"There is no toy checkpoint {name!r}.{did_you_mean(name, known)} There are {', '.join(known)}."
            )
    found: list[Gate] = []
    for name, check in known.items():
        if not names or name in names:
            gates = list(check(root, 4 if quick else 1))
            found += gates
            if not quick:
                _record(root / name / "provenance.json", gates)
    return found


def _record(path: Path, gates: Iterable[Gate]) -> None:
    """Write the gates beside how the checkpoint was made, without the bounds that a gate does not have."""
    rows = [
        {key: value for key, value in asdict(gate).items() if value not in (UNBOUNDED, -UNBOUNDED)}
        | {"value": round(gate.value, 4), "passed": gate.passed}
        for gate in gates
    ]
    record = json.loads(path.read_text()) | {"gates": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")
