"""`texts`: a second CLIP text tower and a T5 encoder, which learn to read: what does a caption say?

The first text tower (`clip`) learned from pictures which captions go together; these two learn from captions alone to
name what is said: kinds, colours, moods, sizes, numbers, relations. So a generator has two views of a prompt, as SD3's
and SDXL's have. The checkpoints lie beside the others, `clip`'s text tower with them, and the pipelines link to them.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from pixrl.toy.language import caption
from pixrl.toy.random_scenes import EVEN_SHARES, random_scene
from pixrl.toy.scene import Scene, Task
from pixrl.toy.vocabulary import (
    ACCESSORIES,
    BACKGROUNDS,
    COLOURS,
    KINDS,
    MOODS,
    PATTERNS,
    RELATIONS,
    SIZES,
)
from toy_build.clip import WIDTH, text_config, tokens
from toy_build.tokenizers import T5_LENGTH, t5_tokenizer
from toy_build.training import Build, Draw, Lesson, Plan, save_half

PLAN = Plan(steps=2_500, batch=128, lr=2e-3, warmup=100, weight_decay=0.02, level=0.4)
SECOND_WIDTH = 128
MOST = 2
"""Objects of which captions say something one by one."""


def facts(scene: Scene) -> dict[str, int | None]:
    """What the scene's caption says, question by question; None: it does not say."""
    said: dict[str, int | None] = {
        "task": list(Task).index(scene.task),
        "background": BACKGROUNDS.index(scene.background) if scene.mentions_background else len(BACKGROUNDS),
        "relation": RELATIONS.index(scene.relation) if scene.relation else len(RELATIONS),
        "count": len(scene.objects) if scene.task is Task.COUNTING else 0,
    }
    for number in range(MOST):
        thing = (
            scene.objects[number] if number < len(scene.objects) and scene.task is not Task.COUNTING else None
        )
        ordered = scene.relation is not None or number == 0 == len(scene.objects) - 1
        alone = scene.task in (Task.SINGLE_OBJECT, Task.COLORS)
        said[f"kind {number}"] = (
            KINDS.index(thing.kind) if thing and ordered and scene.task is not Task.HYBRID else None
        )
        coloured = thing is not None and scene.task in (Task.COLORS, Task.COLOR_ATTR)
        said[f"colour {number}"] = None
        if thing is not None and thing.colour is not None and coloured and alone:
            said[f"colour {number}"] = list(COLOURS).index(thing.colour)
        if number == 0 and thing is not None:
            said["accessory"] = ACCESSORIES.index(thing.accessory) if thing.accessory else len(ACCESSORIES)
            said["mood"] = MOODS.index(thing.mood) if thing.mood else len(MOODS)
            said["size"] = SIZES.index(thing.size_word) if thing.size_word else len(SIZES)
            said["pattern"] = PATTERNS.index(thing.pattern) if alone else None
    return said


QUESTIONS: dict[str, int] = {
    "task": len(Task), "background": len(BACKGROUNDS) + 1, "relation": len(RELATIONS) + 1, "count": 5,
    **{f"kind {k}": len(KINDS) for k in range(MOST)}, **{f"colour {k}": len(COLOURS) for k in range(MOST)},
    "accessory": len(ACCESSORIES) + 1, "mood": len(MOODS) + 1, "size": len(SIZES) + 1, "pattern": len(PATTERNS),
}  # fmt: skip
"""How many answers each question has."""


def coloured_kinds(scene: Scene) -> list[int]:
    """Which (kind, colour) pairs a caption names; colour 0 is none. Kinds of hybrids are told by slot."""
    out = []
    for thing in (*scene.objects, *scene.pasted):
        colour = thing.colour if scene.task in (Task.COLORS, Task.COLOR_ATTR) and thing.colour else None
        for kind in thing.parents:
            out.append(
                KINDS.index(kind) * (len(COLOURS) + 1) + (list(COLOURS).index(colour) + 1 if colour else 0)
            )
    return out


class Reader(nn.Module):
    """Both encoders and the throw-away heads that answer from their summary of a caption."""

    def __init__(self, tower: CLIPTextModelWithProjection, t5: T5EncoderModel) -> None:
        super().__init__()
        self.tower, self.t5 = tower, t5
        pairs = len(KINDS) * (len(COLOURS) + 1)
        sizes = QUESTIONS | {"pairs": pairs}
        self.heads = nn.ModuleDict(
            {f"{which} {name}": nn.Linear(WIDTH, size) for which in range(2) for name, size in sizes.items()}
        )

    def forward(self, ids: Tensor, mask: Tensor, t5_ids: Tensor, t5_mask: Tensor) -> list[Tensor]:
        """The summaries of both encoders [B, WIDTH]."""
        first: Tensor = self.tower(input_ids=ids, attention_mask=mask).text_embeds
        states = self.t5(input_ids=t5_ids, attention_mask=t5_mask).last_hidden_state
        weights = t5_mask[..., None].float()
        return [first, (states * weights).sum(1) / weights.sum(1)]


def new_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=32, d_ff=2 * WIDTH, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return T5EncoderModel(config)


def build_texts(build: Build) -> None:
    """Train and save both encoders."""
    torch.manual_seed(build.seed + 3)
    tokenizer, t5_words = CLIPTokenizer.from_pretrained(build.out / "clip"), t5_tokenizer()
    config = CLIPTextConfig(**text_config(tokenizer, SECOND_WIDTH, 3))
    reader = Reader(CLIPTextModelWithProjection(config), new_t5(t5_words)).to(build.device)

    def lesson(draw: Draw) -> Lesson:
        tasks = draw.rng.choice(list(EVEN_SHARES), PLAN.batch, p=list(EVEN_SHARES.values()))
        scenes = [random_scene(draw.rng, Task(task)) for task in tasks]
        captions = [caption(scene, draw.rng) for scene in scenes]
        answers = [facts(scene) for scene in scenes]
        table = torch.tensor(
            [[-100 if a.get(name) is None else a[name] for name in QUESTIONS] for a in answers]
        )
        pairs = torch.zeros(len(scenes), len(KINDS) * (len(COLOURS) + 1))
        for row, scene in zip(pairs, scenes, strict=True):
            row[coloured_kinds(scene)] = 1.0
        t5 = t5_words(
            captions, padding="max_length", truncation=True, max_length=T5_LENGTH, return_tensors="pt"
        )
        return *tokens(tokenizer, captions), t5.input_ids, t5.attention_mask, table, pairs

    def loss(
        ids: Tensor, mask: Tensor, t5_ids: Tensor, t5_mask: Tensor, table: Tensor, pairs: Tensor
    ) -> Tensor:
        total = torch.zeros((), device=ids.device)
        for which, summary in enumerate(reader(ids, mask, t5_ids, t5_mask)):
            for column, name in enumerate(QUESTIONS):
                wanted = table[:, column]
                if (wanted >= 0).any():
                    total = total + F.cross_entropy(reader.heads[f"{which} {name}"](summary), wanted)
            total = total + 100 * F.binary_cross_entropy_with_logits(
                reader.heads[f"{which} pairs"](summary), pairs
            )
        return total

    build.fit("texts", reader, PLAN, lesson, loss)
    first = CLIPTextModelWithProjection.from_pretrained(build.out / "clip", dtype=torch.float32)
    save_half(first, text_folder(build) / "text_encoder")
    save_half(reader.tower.eval(), text_folder(build) / "text_encoder_2")
    save_half(reader.t5.eval(), text_folder(build) / "t5")
    build.provenance("texts", {"texts": PLAN})


def text_folder(build: Build) -> Path:
    """Where the encoders wait for the pipelines that ship them."""
    return build.out / "texts"


def load_tower(build: Build) -> CLIPTextModelWithProjection:
    """The second text tower."""
    tower = CLIPTextModelWithProjection.from_pretrained(
        text_folder(build) / "text_encoder_2", dtype=torch.float32
    )
    return tower.eval()


def load_t5(build: Build) -> T5EncoderModel:
    """The T5 encoder."""
    return T5EncoderModel.from_pretrained(text_folder(build) / "t5", dtype=torch.float32).eval()
