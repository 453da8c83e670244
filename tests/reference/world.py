"""A flow model of a few hundred float64 numbers, with text, reference pictures and targets, all told apart by content.

The functions are what the plain loops call; `TinyPolicy` offers the same to the product. Nothing of a method is here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pixrl.models.base import Conditioning, FlowPolicy, ReferencePolicy, SamplingSettings
from pixrl.models.text import ClipEncoder, PerturbableText

CHANNELS, SIDE, HIDDEN = 3, 2, 8
LENGTH = 8
"""Tokens that the CLIP encoders take; one more row, T5's, follows."""
START, END = 0, 1
VOCABULARY = "a an red owl two blue snails snail cat green house fish cup photo of"
COLUMNS = {"clip_l": 3, "clip_g": 2}
"""Columns of each encoder's tokens and of its pooled features, side by side in the condition."""
PROMPTS = ("a red owl", "two blue snails", "a cat", "a green house", "fish", "red cup")
Weights = dict[str, Tensor]
Text = tuple[Tensor, Tensor]
"""Token features [L, D] and pooled features [E] of one prompt."""


def normal(name: str, *shape: int, scale: float = 1.0) -> Tensor:
    """Fixed numbers of a name, exact in float32."""
    number = int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "big")
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=torch.float32)
    return (scale * drawn).double()


_WIDTH = sum(COLUMNS.values())
BASE: Weights = {
    "picture": normal("picture", CHANNELS * SIDE * SIDE, HIDDEN, scale=0.3),
    "text": normal("text", (LENGTH + 1) * _WIDTH, HIDDEN, scale=0.4),
    "pooled": normal("pooled", _WIDTH, HIDDEN, scale=0.4),
    "time": normal("time", 1, HIDDEN),
    "out": normal("out", HIDDEN, CHANNELS * SIDE * SIDE, scale=0.5),
}
"""The backbone: what the slot `reference` is."""
SEEN = [normal(f"reference {place}", CHANNELS * SIDE * SIDE, HIDDEN, scale=0.4) for place in range(2)]
"""How the first and the second reference picture are taken in."""


def added(slot: str) -> Weights:
    """What a slot adds to the backbone when training begins: other numbers in each slot, as in a run gone on with."""
    return {name: normal(f"{slot} {name}", *x.shape, scale=0.05) for name, x in BASE.items()}


def velocity(
    extra: Weights | None, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor, references: Sequence[Tensor]
) -> Tensor:
    """The model, [B, C, h, w]; `extra` is what the slot adds, None the backbone alone."""
    w = BASE if extra is None else {name: one + extra[name] for name, one in BASE.items()}
    seen = x.flatten(1) @ w["picture"] + tokens.flatten(1) @ w["text"] + pooled @ w["pooled"]
    seen = seen + t[:, None] * w["time"]
    for place, one in enumerate(references):
        seen = seen + one.flatten(1) @ SEEN[place]
    return (torch.tanh(seen) @ w["out"]).view_as(x)


def noise_levels(steps: int) -> list[float]:
    """From 1 down to 0, shifted; exact in float32."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float32)
    return (2 * even / (1 + even)).tolist()


def latent_noise(seed: int) -> Tensor:
    """Standard normal [C, h, w]."""
    drawer = torch.Generator().manual_seed(seed)
    return torch.randn(CHANNELS, SIDE, SIDE, generator=drawer, dtype=torch.float64)


def decoded(latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] to pictures [B, 3, 2 h, 2 w]."""
    return latents.sigmoid().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def encoded(images: Tensor) -> Tensor:
    """Pictures [B, 3, 2 h, 2 w] to latents [B, C, h, w]."""
    return 3 * torch.nn.functional.avg_pool2d(images.double(), 2) - 1.5


class TinyClip(nn.Module):
    """A causal text encoder, pooled at the first end token."""

    def __init__(self, name: str) -> None:
        super().__init__()
        columns = COLUMNS[name]
        self.table = nn.Embedding.from_pretrained(
            normal(f"{name} table", 2 + len(VOCABULARY.split()), columns)
        )
        self.positions = normal(f"{name} positions", LENGTH, columns, scale=0.3)
        self.mixes = [normal(f"{name} mix {layer}", columns, columns) for layer in range(2)]
        self.projection = normal(f"{name} projection", columns, columns)
        self.config = SimpleNamespace(hidden_size=columns)
        self.device, self.dtype = torch.device("cpu"), torch.float64

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def run(self, ids: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Token features [B, L, D], of the layer before the last, and pooled features [B, D]."""
        first = torch.tanh((embedded + self.positions[: ids.shape[1]]).cumsum(dim=1) @ self.mixes[0])
        last = torch.tanh(first.cumsum(dim=1) @ self.mixes[1])
        end = (ids == END).int().argmax(dim=1)
        return first, last[torch.arange(len(ids)), end] @ self.projection

    def forward(self, ids: Tensor, output_hidden_states: bool = False) -> SimpleNamespace:
        tokens, pooled = self.run(ids, self.table(ids))
        return SimpleNamespace(hidden_states=(None, tokens, None), text_embeds=pooled, pooler_output=None)


CLIPS = {name: TinyClip(name) for name in COLUMNS}


def token_ids(prompt: str) -> Tensor:
    """[L]: start, words, end, and the end again as padding."""
    words = [2 + VOCABULARY.split().index(word) for word in prompt.split()][: LENGTH - 2]
    return torch.tensor([START, *words, *[END] * (LENGTH - 1 - len(words))])


def static_embeddings(name: str, prompt: str) -> Tensor:
    """The input embeddings [L, D] of one encoder."""
    return CLIPS[name].table.weight[token_ids(prompt)].detach()


def text(prompt: str, changed: Mapping[str, Tensor] | None = None) -> Text:
    """A prompt's condition; `changed`: encoder -> other input embeddings [L, D]."""
    ids, parts = token_ids(prompt)[None], []
    for name, clip in CLIPS.items():
        embedded = (changed or {}).get(name, static_embeddings(name, prompt))
        parts.append(clip.run(ids, embedded[None]))
    tokens = torch.cat([first[0] for first, _ in parts], dim=1)
    pooled = torch.cat([last[0] for _, last in parts])
    return torch.cat([tokens, normal(f"t5 {prompt}", 1, _WIDTH)]), pooled


@dataclass(frozen=True)
class Scene:
    """One prompt of a training step, and what belongs to it."""

    place: int
    epoch: int
    index: int
    prompt: str
    shown: tuple[Tensor, ...] = ()
    """Reference pictures [3, H, W] that the model is shown."""
    target: Tensor | None = None
    """The picture that it should give."""
    pair: tuple[Tensor, ...] = ()
    """The picture that was preferred, and the one that was not."""
    word: str = ""
    """Class of what the first reference shows."""


def picture(name: str) -> Tensor:
    """[3, 4, 4] in [0, 1], float32."""
    return normal(name, 3, 4, 4).sigmoid().float()


def scenes(step: int, references: int = 0) -> list[Scene]:
    """Three prompts of a step; the next step has others, of another pass in the end.

    The second reference, and every target, is narrower than the square that it is put on.
    """
    found = []
    for place in range(3):
        number = 3 * step + place
        index = number % len(PROMPTS)
        shown = tuple(picture(f"shown {index} {which}")[:, :, which:] for which in range(references))
        target = picture(f"target {index}")[:, 2:] if references else None
        word = ("owl", "snail", "cat", "house", "fish", "cup")[index]
        pair = tuple(picture(f"{side} {index}")[:, 1:] for side in ("winner", "loser"))
        found.append(Scene(place, number // len(PROMPTS), index, PROMPTS[index], shown, target, pair, word))
    return found


def scores(name: str, step: int, per_group: int) -> Tensor:
    """A reward's values [3, S] of a step, float32: each prompt has a level and a spread of its own, one sample failed.

    In every odd step all samples of the last prompt are alike.
    """
    spread = torch.tensor([[0.2], [1.0], [3.0]])
    values = (normal(f"{name} {step}", 3, per_group) * spread + normal(f"{name} level {step}", 3, 1)).float()
    if step % 2:
        values[2] = 0.625
    if name == "first":
        values[1, (step + 1) % per_group] = torch.nan
    return values


class TinySlots:
    """What the product asks of LoRA slots, over `added`."""

    def __init__(self) -> None:
        self.slots = {slot: added(slot) for slot in ("current", "old", "ema")}
        for tensor in self.slots["current"].values():
            tensor.requires_grad_()
        self.active = "current"

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        assert name in ("current", "old", "ema", "reference")
        before, self.active = self.active, str(name)
        try:
            yield
        finally:
            self.active = before

    def parameters(self) -> list[Tensor]:
        return list(self.slots["current"].values())

    @torch.no_grad()
    def blend(self, target: str, source: str, decay: float) -> None:
        for name, tensor in self.slots[target].items():
            tensor.copy_(decay * tensor + (1 - decay) * self.slots[source][name])

    def state(self) -> dict[str, Tensor]:
        return {
            f"{slot}/{name}": x.detach().clone()
            for slot, own in self.slots.items()
            for name, x in own.items()
        }


class TinyPolicy(FlowPolicy, ReferencePolicy, PerturbableText):
    """The world as the product knows models."""

    name, vocabulary, device = "tiny", None, torch.device("cpu")
    settings = SamplingSettings(steps=4, guidance=1.0, resolution=2 * SIDE)
    reference_side = 2 * SIDE

    def __init__(self) -> None:
        self.lora = TinySlots()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        rows = [text(prompt) for prompt in prompts]
        return Conditioning(torch.stack([one for one, _ in rows]), torch.stack([one for _, one in rows]))

    def with_references(self, conditioning: Conditioning, references: Sequence[Tensor]) -> Conditioning:
        own = tuple(encoded(one) for one in references)
        return Conditioning(conditioning.tokens_BLD, conditioning.pooled_BE, own)

    def encode_images(self, images_BCHW: Tensor) -> Tensor:
        return encoded(images_BCHW)

    def text_encoders(self) -> tuple[ClipEncoder, ...]:
        found, first = [], 0
        for name, columns in COLUMNS.items():
            own = slice(first, first + columns)
            # an encoder of its own: the product's hooks on its table must not meet those of another thread
            found.append(ClipEncoder(name, TinyClip(name), _Tokenizer(), LENGTH, True, own, own))
            first += columns
        return tuple(found)

    def schedule(self, steps: int) -> Tensor:
        return torch.tensor(noise_levels(steps), dtype=torch.float32)

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        return torch.stack([latent_noise(seed) for seed in seeds])

    def velocity(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.pooled_BE is not None and len(x_t) == len(t_B) == len(conditioning)
        extra = self.lora.slots.get(self.lora.active)
        c = conditioning
        return velocity(extra, x_t, t_B, c.tokens_BLD, conditioning.pooled_BE, c.references)

    def decode(self, latents: Tensor) -> Tensor:
        return decoded(latents)

    def slot(self, name: str):
        return self.lora.use(name)

    def sample(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        raise NotImplementedError("these tests draw by Aligner.collect")

    def fingerprint(self) -> str:
        return "tiny"


class _Tokenizer:
    bos_token_id, eos_token_id = START, END

    def __call__(self, prompts: Sequence[str], **_: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.stack([token_ids(prompt) for prompt in prompts]))
