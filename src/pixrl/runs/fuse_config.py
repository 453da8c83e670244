"""What a fusion run is made from: the `fuse` recipe."""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from pixrl import plugins
from pixrl.algorithms import SAMPLERS
from pixrl.algorithms.fusion.base import Sampler
from pixrl.config import MOST, Count, Seed, Settings, refuse_infinite
from pixrl.data.pairs import check_concepts
from pixrl.errors import ConfigError, did_you_mean
from pixrl.fusion.noise import Noise, NoisePlan
from pixrl.hub import full_path
from pixrl.models.memory_plan import MemoryPlan
from pixrl.plugins import checksums, is_path

CHECKPOINTS = ("model", "clip", "segmenter")
"""Settings that may name a folder."""


def _require_sampler(name: object) -> str:
    """A name of the table, or the path of a sampler of yours."""
    if not isinstance(name, str) or not (is_path(name) or name in SAMPLERS.names()):
        *first, last = map(repr, SAMPLERS.names())
        raise PydanticKnownError("enum", {"expected": f"{', '.join(first)} or {last}"})
    return name


SamplerName = Annotated[str, BeforeValidator(_require_sampler)]
"""A sampler: a name of `pixrl.algorithms.SAMPLERS`, `path/to/file.py:Name` or `module:Name`."""


class Pooled(StrEnum):
    """How the pooled text features are mixed."""

    AVERAGE = "average"
    """1/N each, whatever the coefficients: the paper's code."""
    WEIGHT = "weight"
    """Each concept by the mean of its coefficients."""
    COLUMNS = "columns"
    """Column by column, with coefficients of their own."""


class FuseConfig(Settings):
    """One fusion: which concepts, with which model, by which sampler, scored and selected how."""

    concepts: tuple[str, ...] = ()
    """Two or more different concepts."""
    model: str = "toy:sd3"
    """toy:NAME, a folder in diffusers' layout, a hub id (owner/name@revision), or FILE.safetensors@CONFIG."""
    sampler: SamplerName = "rmler"
    """How the mixing coefficients are chosen: a name, or path/to/file.py:Name for a sampler of yours."""
    options: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """The sampler's own settings."""
    budget: Count = 128
    """Pictures in all."""
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
    pooled: Pooled = Pooled.WEIGHT
    noise: Noise = Noise.NARROW
    max_failed_share: float = Field(0.5, ge=0, lt=1)
    """The run stops when more than this share of its pictures could not be scored."""
    clip: str | None = None
    """The encoder of the similarities; none: the checkpoint's own choice, or CLIP ViT-H/14."""
    segmenter: str | None = None
    """The foreground segmentation; none: the checkpoint's own choice."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: str = "auto"
    """Of the generator: auto, float32, bfloat16 or float16 (GPU)."""
    memory: MemoryPlan = MemoryPlan()
    """What to do to save memory."""

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
        if self.budget < self.batch:
            raise ValueError(
                f"a budget of {self.budget} pictures is below one batch of {self.batch}; "
                f"raise --budget to {self.batch} or more, or add --set batch={max(2, self.budget)}"
            )
        return self

    @property
    def code(self) -> dict[str, str]:
        """The checksum of the file of yours that holds the sampler, for a resume to compare."""
        return checksums([(SAMPLERS, self.sampler)])

    def with_full_paths(self) -> "FuseConfig":
        """The same, its checkpoints by their whole paths where they are on this disk."""
        found = {name: full_path(ref) for name in CHECKPOINTS if (ref := self.__dict__[name]) is not None}
        return self.model_copy(update={**found, "sampler": plugins.full_path(self.sampler)})

    @property
    def world(self) -> tuple[str, str | None, str | None, str, str, MemoryPlan]:
        """What `fuse_world.load_world` takes."""
        return self.model, self.clip, self.segmenter, self.device, self.dtype, self.memory

    @property
    def steps(self) -> int:
        """Batches in all; the last may be smaller."""
        return -(-self.budget // self.batch)

    def count(self, step: int) -> int:
        """Pictures of a step."""
        return min(self.batch, self.budget - step * self.batch)

    def noise_plan(self) -> NoisePlan:
        """A run's seeds."""
        return NoisePlan(self.noise, self.seed, self.steps)


def sampler_of(name: str) -> type[Sampler[Any]]:
    """The sampler of a name or path. ConfigError where a path names something else."""
    found = SAMPLERS.find(name)
    if not (isinstance(found, type) and issubclass(found, Sampler)):
        raise ConfigError(
            f"{name!r} is no sampler: it must be a class that is derived from {Sampler.__module__}.Sampler."
        )
    return found


def resolve_options(sampler: str, options: dict[str, Any]) -> Settings:
    """A sampler's settings, all of them filled; ValueError that names what it knows for an unknown one."""
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
