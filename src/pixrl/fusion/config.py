"""What a fusion is made from: the recipe `fuse`, whose method is a sampler."""

from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from pixrl import config as recipes
from pixrl import plugins
from pixrl.algorithms import MIXINGS, SAMPLERS
from pixrl.algorithms.fusion.base import Sampler
from pixrl.algorithms.fusion.mixing import ColumnsSettings, MixingSettings, Pooled, Velocity
from pixrl.config import MOST, MOST_GUIDANCE, Count, Resolution, Seed, Settings, refuse_infinite
from pixrl.data.pairs import check_concepts, is_wordless, split_picture
from pixrl.errors import ConfigError, RunError, did_you_mean
from pixrl.fusion.noise import Noise, NoisePlan
from pixrl.hub import full_path, split_adapter
from pixrl.models import REGISTRY as ADAPTERS
from pixrl.models.memory.plan import MemoryPlan
from pixrl.plugins import PartOf, checksums, is_path
from pixrl.runs.folder import RunFolder
from pixrl.runs.trackers import Trackers

KIND, COMPARE, PAIRS = "fuse", "fuse-compare", "fuse-pairs"
CHECKPOINTS = ("model", "clip", "segmenter", "truth")
"""Settings that may name a folder."""


def _require_sampler(name: object) -> str:
    """A name of the table, or the path of a sampler of yours."""
    if not isinstance(name, str) or not (is_path(name) or name in SAMPLERS.names()):
        *first, last = map(repr, SAMPLERS.names())
        raise PydanticKnownError("enum", {"expected": f"{', '.join(first)} or {last}"})
    return name


SamplerName = Annotated[str, BeforeValidator(_require_sampler)]
"""A sampler: a name of `pixrl.algorithms.SAMPLERS`, `path/to/file.py:Name` or `module:Name`."""


class FusionReward(StrEnum):
    """What a sampler learns from."""

    SIMILARITY = "similarity"
    """RMLer's reward (Eq. 5): the similarities to all concepts, less their imbalance."""
    TRUE_FUSION = "true_fusion"
    """The balance of a true fusion, and 0 of everything else."""


class FusionMemory(MemoryPlan):
    """How memory is saved while pictures are drawn."""

    rollout_batch: Count | None = Field(None, exclude_if=lambda size: size is None)
    """The most pictures that go through the model at a time, a child counted once for each concept whose prediction is
    averaged; none: what suits the device."""


class FuseConfig(Settings):
    """The recipe of one fusion: its concepts, model and sampler, and how its pictures are scored and selected."""

    concepts: tuple[str, ...] = ()
    """Two or more different concepts: words, or pictures (photo.png, or owl=photo.png with the word for it)."""
    pictures: dict[str, str] = Field(default_factory=dict, exclude_if=lambda pictures: not pictures)
    """The file of the picture that stands for a concept, by the concept's name; filled in from `concepts`."""
    model: str = "toy:turbo"
    """toy:NAME, a folder in diffusers' layout, a hub id (owner/name@revision), or FILE.safetensors@CONFIG."""
    guidance: float | None = Field(None, ge=0, le=MOST_GUIDANCE)
    """Classifier-free guidance; none: the checkpoint's own."""
    negative_prompt: str | None = None
    """What guidance leads away from; none: what the model's pipeline does without one."""
    resolution: Resolution | None = None
    """Size of the pictures in pixels: 512 for squares, 832x1216 for width x height; none: the checkpoint's own."""
    sampler: SamplerName = "rmler"
    """How the mixing coefficients are chosen: a name, or path/to/file.py:Name for a sampler of yours."""
    options: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """The sampler's own settings."""
    budget: Count = 128
    """Pictures in all."""
    pool: int | None = Field(None, ge=0, le=MOST)
    """Of the budget, the pictures that a learned policy draws when it is done, among which the selection takes place;
    none: a quarter of it. Samplers without a policy search with all of the budget and select among all."""
    batch: int = Field(16, ge=2, le=MOST)
    """Pictures between two updates of the sampler."""
    exemplars: int = Field(4, ge=1, le=4096)
    """Pictures of each concept that the children are compared with."""
    seed: Seed = 0
    alpha: float = Field(5.0, ge=0, le=MOST)
    """Weight of the balance in the reward."""
    keep: Count = 4
    """How many of the candidates are selected."""
    presence: float | None = Field(None, gt=-1, lt=1)
    """A child shows a concept above this similarity; none: the checkpoint's calibration."""
    balance: float | None = Field(None, gt=0, le=MOST)
    """A child is balanced below this difference of similarities; none: the checkpoint's calibration."""
    policy_from: str | None = None
    """A finished fusion whose learned policy this one begins with (`policy: conditional`), or a folder of them."""
    mixing: Annotated[MixingSettings, PartOf(MIXINGS)] | None = None
    """What of the concepts is mixed: columns, tokens, steps, velocity, spatial or regions, with its settings; none: the
    checkpoint's own, or else columns, as the paper mixes."""
    pooled: Pooled = Pooled.WEIGHT
    """How the pooled text features are mixed, with the mixings columns and tokens."""
    noise: Noise = Noise.NARROW
    max_failed_share: float = Field(0.5, ge=0, lt=1)
    """The run stops when more than this share of its pictures could not be scored."""
    clip: str | None = None
    """The encoder of the similarities; none: the checkpoint's own choice, or CLIP ViT-H/14."""
    segmenter: str | None = None
    """The foreground segmentation; none: the checkpoint's own choice."""
    truth: str | None = Field(None, exclude_if=lambda truth: truth is None)
    """A segmentation of parts that tells which children are true fusions, for figures beside the reward; none: the
    checkpoint's own choice."""
    reward: FusionReward = Field(
        FusionReward.SIMILARITY, exclude_if=lambda reward: reward is FusionReward.SIMILARITY
    )
    """What the sampler learns from: similarity, or true_fusion, which the selection never looks at."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: str = "auto"
    """Of the generator: auto, float32, bfloat16 or float16 (GPU)."""
    memory: FusionMemory = FusionMemory()
    """What to do to save memory."""
    log: Trackers = ()
    """wandb and trackio: where the figures are shown besides the run's folder."""

    @model_validator(mode="before")
    @classmethod
    def _take_pictures(cls, given: Any) -> Any:
        """Name concepts that are pictures, and mix predictions unless a mixing is given: no embedding has pictures."""
        if not isinstance(given, dict) or not isinstance(given.get("concepts"), list | tuple):
            return given
        split = [split_picture(one) if isinstance(one, str) else (one, None) for one in given["concepts"]]
        found = {name: file for name, file in split if file is not None} | dict(given.get("pictures") or {})
        if not found:
            return given
        changed = {"concepts": [name for name, _ in split], "pictures": found}
        return {"mixing": {"kind": Velocity.Settings().kind}, **given, **changed}

    @field_validator("concepts")
    @classmethod
    def _different(cls, concepts: tuple[str, ...]) -> tuple[str, ...]:
        return check_concepts(concepts) if concepts else concepts

    @field_validator("options")
    @classmethod
    def _resolve_options(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "sampler" not in info.data:
            return options
        return resolve_options(info.data["sampler"], options).model_dump(mode="json")

    @model_validator(mode="after")
    def _one_batch_at_least(self) -> "FuseConfig":
        refuse_infinite(self)
        for name in self.pictures:
            if name not in self.concepts:
                raise ValueError(
                    f"pictures names {name!r}, which is none of the concepts {', '.join(self.concepts) or '(none)'}"
                )
        if self.pooled is not Pooled.WEIGHT and not MIXINGS.find(self.mixed_by.kind).mixes_embeddings:
            raise ValueError(
                f"pooled={self.pooled} has no effect with mixing={self.mixed_by.kind}, which mixes no embeddings; "
                "leave it out"
            )
        if self.budget < self.batch:
            raise ValueError(
                f"a budget of {self.budget} pictures is below one batch of {self.batch}; "
                f"raise --budget to {self.batch} or more, or add --set batch={max(2, self.budget)}"
            )
        only_draws = self.policy_from is not None and self.pool == self.budget
        if self.pool is not None and self.budget - self.pool < self.batch and not only_draws:
            raise ValueError(
                f"a pool of {self.pool} of {self.budget} pictures leaves less than one batch of {self.batch} to learn "
                f"from; give --pool {self.budget - self.batch} or less"
            )
        return self

    @property
    def mixed_by(self) -> MixingSettings:
        """What of the concepts is mixed: what the recipe says, else columns (RMLer, Eq. 2)."""
        return self.mixing or ColumnsSettings()

    def with_mixing(self, usual: str | None) -> "FuseConfig":
        """Return the same recipe with its mixing decided, which is that of its checkpoint where it names none.

        `usual`: the checkpoint's own; None: it has none. Where `pooled` is given, embeddings are meant.
        """
        if self.mixing is not None or usual is None or self.pooled is not Pooled.WEIGHT:
            return self.model_copy(update={"mixing": self.mixed_by})
        return self.model_copy(update={"mixing": PartOf(MIXINGS).settings(MixingSettings, usual)})

    @property
    def code(self) -> dict[str, str]:
        """Checksums of the user's files that hold the sampler and the mixing, for a resume to compare."""
        adapter = split_adapter(self.model)[0] or ""
        return checksums([(SAMPLERS, self.sampler), (MIXINGS, self.mixed_by.kind), (ADAPTERS, adapter)])

    @property
    def picture_sums(self) -> dict[str, str]:
        """SHA-256 of the pictures that stand for concepts, by the concepts' names, for a resume to compare.

        One that is gone has none.
        """
        found = {name: Path(file) for name, file in self.pictures.items() if Path(file).is_file()}
        return {name: sha256(file.read_bytes()).hexdigest() for name, file in found.items()}

    def with_full_paths(self) -> "FuseConfig":
        """Return the same recipe with absolute paths of the checkpoints that lie on this disk."""
        found = {name: full_path(ref) for name in CHECKPOINTS if (ref := self.__dict__[name]) is not None}
        mixing = self.mixing
        if mixing is not None:
            mixing = mixing.model_copy(update={"kind": plugins.full_path(mixing.kind)})
        if self.policy_from is not None:
            found["policy_from"] = str(Path(self.policy_from).resolve())
        pictures = {name: str(Path(file).resolve()) for name, file in self.pictures.items()}
        code = {"sampler": plugins.full_path(self.sampler), "mixing": mixing}
        return self.model_copy(update={**found, **code, "pictures": pictures})

    @property
    def typed(self) -> tuple[str, ...]:
        """The concepts as they are typed: a picture as its file, behind its word where it has one."""
        found = {
            name: file if is_wordless(name) else f"{name}={file}" for name, file in self.pictures.items()
        }
        return tuple(found.get(name, name) for name in self.concepts)

    @property
    def drawing(self) -> dict[str, Any]:
        """The options of `models.load` that say how the model draws."""
        return self.model_dump(include={"guidance", "negative_prompt", "resolution"})

    @property
    def world(self) -> tuple[Any, ...]:
        """The arguments of `fusion.world.load_world`, in its order."""
        drawn = (self.guidance, self.negative_prompt, self.resolution)
        return self.model, self.clip, self.segmenter, self.device, self.dtype, self.memory, *drawn, self.truth

    @property
    def pool_images(self) -> int:
        """The number of pictures in the pool, which are the last of the run; 0 for a sampler without a policy."""
        if not sampler_of(self.sampler).has_policy:
            return 0
        return min(self.budget // 4, self.budget - self.batch) if self.pool is None else self.pool

    @property
    def learning_images(self) -> int:
        """The number of pictures that the sampler learns from, which are the first of the run."""
        return self.budget - self.pool_images

    @property
    def learning_steps(self) -> int:
        """The number of batches that the sampler learns from; the last may be smaller."""
        return -(-self.learning_images // self.batch)

    @property
    def steps(self) -> int:
        """The number of batches in all: those of learning, then those of the pool."""
        return self.learning_steps + -(-self.pool_images // self.batch)

    def first_index(self, step: int) -> int:
        """Return the number of a step's first picture."""
        if step <= self.learning_steps:
            return min(step * self.batch, self.learning_images)
        return min(self.learning_images + (step - self.learning_steps) * self.batch, self.budget)

    def count(self, step: int) -> int:
        """Return the number of pictures of a step."""
        return self.first_index(step + 1) - self.first_index(step)

    def noise_plan(self) -> NoisePlan:
        """Make the plan that hands out the seeds of a run."""
        return NoisePlan(self.noise, self.seed, self.learning_steps)


def sampler_of(name: str) -> type[Sampler[Any]]:
    """Find the class of a sampler by name or path. Raises ConfigError where a path names something else."""
    found = SAMPLERS.find(name)
    if not (isinstance(found, type) and issubclass(found, Sampler)):
        raise ConfigError(
            f"{name!r} is no sampler: it must be a class that is derived from {Sampler.__module__}.Sampler."
        )
    return found


def resolve_options(sampler: str, options: dict[str, Any]) -> Settings:
    """Fill in a sampler's settings. Raises a ValueError that lists the known ones where one is unknown."""
    model = sampler_of(sampler).Settings
    for name in options:
        if name not in model.model_fields:
            known = ", ".join(model.model_fields)
            allowed = f"it has: {known}" if known else "it has none"
            raise ValueError(
                f"the sampler {str(sampler)!r} has no option {name!r}.{did_you_mean(name, model.model_fields)} "
                f"Of its own settings {allowed}"
            )
    try:
        return model.model_validate(options)
    except ValidationError as error:
        details = [
            f"{'.'.join(map(str, d['loc']))} {d['msg'].removeprefix('Value error, ')}".strip()
            for d in error.errors(include_url=False)
        ]
        raise ValueError("; ".join(details)) from None


def open_run(path: Path) -> tuple[RunFolder, FuseConfig]:
    """Open a fusion's folder and read its recipe; both are checked."""
    folder = RunFolder.open(path)
    if folder.kind != KIND:
        raise RunError(f"{path} is a run of kind {folder.kind!r}, not {KIND!r}.")
    recipe = {"pool": 0, **folder.recipe()}  # runs of before there was a pool select among all pictures
    return folder, recipes.load(FuseConfig, recipe, kind=KIND)
