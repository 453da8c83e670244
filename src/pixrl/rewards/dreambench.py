"""DreamBench's three figures as they are published: rewards of this package with the encoders and transforms set.

Ruiz et al. 2023 (DreamBooth): CLIP-I and DINO are the mean cosine between a picture and all real pictures of its
subject, CLIP-T the cosine between a picture and its prompt, over 30 subjects x 25 prompts x 4 pictures. Whole pictures,
nothing is cut out.

Customized-GRPO evaluates with the encoders that are the defaults here, compares with one picture of each subject
(`references: first`), and counts a negative CLIP-T as 0 (`clamp: true`; real pictures have none). CLIP-T with ViT-L/14
is about 0.05 lower than with ViT-B/32, so a figure without its encoder says little: the provenance names it.
"""

from pathlib import Path

from pixrl.rewards.clip import ClipImageReward, ClipTextReward
from pixrl.rewards.dino import DinoSegReward, Mask, Transform
from pixrl.rewards.references import References

CLIP = "openai/clip-vit-base-patch32"
DINO = "facebook/dino-vits16"


def clip_i(
    model: str | Path = CLIP, references: str = References.ALL, device: str = "auto", dtype: str = "float32"
) -> ClipImageReward:
    """CLIP-I: `clip_image` of whole pictures."""
    reward = ClipImageReward(model, references=references, device=device, dtype=dtype)
    reward.name = "clip_i"
    return reward


def clip_t(
    model: str | Path = CLIP, clamp: bool = False, device: str = "auto", dtype: str = "float32"
) -> ClipTextReward:
    """CLIP-T: `clip_text`."""
    reward = ClipTextReward(model, clamp=clamp, device=device, dtype=dtype)
    reward.name = "clip_t"
    return reward


def dino(
    model: str | Path = DINO,
    references: str = References.ALL,
    transform: str = Transform.DREAMBENCH,
    device: str = "auto",
    dtype: str = "float32",
) -> DinoSegReward:
    """DINO: `dino_seg` of whole pictures. facebook/dinov2-base (or -large) gives the DINOv2 figure."""
    reward = DinoSegReward(
        model, mask=Mask.NONE, references=references, transform=transform, device=device, dtype=dtype
    )
    reward.name = "dino"
    return reward
