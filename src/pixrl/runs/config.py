"""What runs are made from: the recipes `align`, `personalize` and `fuse`.

A method of the first two is the combination of four of its parts:

exploration (noise, perturbed) x sampling (solver, random steps) x advantage (weights, synergy, time) x loss (clipped,
nft, draft; sft and rpo as baselines).

Customized-GRPO is noise exploration x random steps x (synergy, time weights) x clipped; every other combination runs.
A personalize recipe is an align recipe whose prompts come with subjects; a fuse recipe has a sampler for a method.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from pixrl import config as recipes
from pixrl import plugins
from pixrl.algorithms import ADVANTAGES, EXPLORATIONS, LOSSES, MIXINGS, SAMPLERS
from pixrl.algorithms.advantages import AdvantageSettings, EstimatorSettings
from pixrl.algorithms.exploration import ExplorationSettings, GroupSize, NoiseExploration
from pixrl.algorithms.fusion.base import Sampler
from pixrl.algorithms.fusion.mixing import ColumnsSettings, MixingSettings, Pooled
from pixrl.algorithms.loss import LossSettings
from pixrl.algorithms.nft import NFTSettings
from pixrl.algorithms.sampling import MOST_STEPS as MOST_SAMPLING
from pixrl.algorithms.sampling import RolloutSettings, StepNoise
from pixrl.algorithms.trainer import OptimizerSettings
from pixrl.config import MOST, Count, Seed, Settings, Side, refuse_infinite
from pixrl.data.pairs import check_concepts
from pixrl.data.prompts import Split
from pixrl.errors import ConfigError, RunError, did_you_mean
from pixrl.fusion.noise import Noise, NoisePlan
from pixrl.hub import full_path, split_adapter
from pixrl.models import REGISTRY as ADAPTERS
from pixrl.models.flux import Preset, Shift
from pixrl.models.memory_plan import MemoryPlan, Offload
from pixrl.plugins import PartOf, checksums, is_path
from pixrl.rewards import REGISTRY as REWARDS
from pixrl.rewards.settings import RewardSetting, Stage, check_rewards, weights_by_stage
from pixrl.runs.folder import RunFolder

MOST_RANK, MOST_GUIDANCE = 4096, 1000
LONGEST_WAIT = 86400.0
"""Seconds."""


class PromptSettings(Settings):
    """What is drawn."""

    source: str = "toy:geneval"
    """toy:geneval, toy:geneval/counting,colors, a .txt, .jsonl, .json, .csv, .tsv or .parquet file, or a folder of
    pictures with captions."""
    column: str | None = None
    """The column or key of the file that holds the prompts; none: prompt, prompts or caption."""
    per_step: Count = 8
    """P: prompts of a training step; each makes one group."""


class ScoringSettings(Settings):
    """How much trouble with rewards a run bears."""

    time_limit: float | None = Field(300.0, gt=0, le=LONGEST_WAIT)
    """Seconds that one reward may take for a step's pictures; none: no limit."""
    max_failed_share: float = Field(0.5, ge=0, le=1)
    """The run stops when one reward, held out or not, has no score for more than this share of a step's (or an
    evaluation's) pictures."""


class LoraSettings(Settings):
    """The trainable parameters, and what they are trained on top of."""

    base: str | None = None
    """A LoRA that is merged into the model first and makes the base with it: a file, or a folder as peft saves it."""
    rank: int = Field(32, ge=1, le=MOST_RANK)
    alpha: float = Field(64.0, gt=0, le=MOST)
    targets: tuple[str, ...] | None = None
    """Names of modules; none: the attention projections."""


class EvaluationSettings(Settings):
    """Pictures at fixed seeds, drawn before, during and after training, and scored by every reward."""

    every: Count | None = None
    """Training steps between two; none: before and after alone."""
    source: str | None = None
    """Prompts; none: the held-out ones of the toy world, or the training file's own (which the log and report say)."""
    column: str | None = None
    """The column or key of the source that holds the prompts; none: prompt, prompts or caption."""
    prompts: Count = 24
    """How many of them, spread evenly."""
    per_prompt: GroupSize = 1
    """Pictures of each."""
    steps: int | None = Field(None, ge=1, le=MOST_SAMPLING)
    """Sampling steps; none: those of training."""


class MachineSettings(MemoryPlan):
    """Where and how the run computes; no result depends on it but for rounding, and for the seams of VAE tiles."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16 (GPU)."""
    rollout_batch: Count | None = None
    """Pictures drawn at a time; none: planned."""
    train_batch: Count | None = None
    """Pictures trained on at a time; none: planned."""
    gradient_checkpointing: bool = False
    """Recompute activations: less memory, about a third more time."""
    drop_text_encoders: bool = False
    """Encode every prompt at the start, then free the text encoders; the embeddings wait on the CPU."""
    compile: str | None = None
    """Compile the transformer's blocks by this backend of torch.compile, such as inductor; none: not compiled."""


class OutputSettings(Settings):
    """What the run's folder keeps."""

    checkpoint_every: Count = 10
    """Training steps."""
    keep_checkpoints: Count = 2
    images_every: Count = 1
    """Every how many training steps the pictures themselves are kept; the manifest lists all."""
    features: str | None = None
    """A CLIP or DINO whose image features measure the diversity of a group; none: small pixels."""


class AlignConfig(Settings):
    """One alignment run."""

    model: str = "toy:sd3"
    """toy:NAME, a folder in diffusers' layout, a hub id (owner/name@revision), or FILE.safetensors@CONFIG."""
    guidance: float | None = Field(None, ge=0, le=MOST_GUIDANCE)
    """Classifier-free guidance of sampling and training; none: the checkpoint's own. Up to 1: none."""
    resolution: Side | None = None
    """Side of the pictures in pixels; none: the checkpoint's own."""
    t5: bool = True
    """SD3's third text encoder; false: neither downloaded nor loaded; long prompts are understood worse."""
    seed: Seed = 0
    steps: Count = 100
    """Training steps: collect, score, update."""
    prompts: PromptSettings = PromptSettings()
    rewards: tuple[RewardSetting, ...] = ()
    stages: tuple[Stage, ...] = ()
    """Reward weights by step range; none: the rewards' own weights throughout."""
    scoring: ScoringSettings = ScoringSettings()
    exploration: Annotated[ExplorationSettings, PartOf(EXPLORATIONS)] = NoiseExploration()
    sampling: RolloutSettings = RolloutSettings()
    advantage: Annotated[EstimatorSettings, PartOf(ADVANTAGES, usual="group")] = AdvantageSettings()
    loss: Annotated[LossSettings, PartOf(LOSSES)] = NFTSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    lora: LoraSettings = LoraSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    machine: MachineSettings = MachineSettings()
    output: OutputSettings = OutputSettings()

    @model_validator(mode="after")
    def _parts_fit(self) -> "AlignConfig":
        refuse_infinite(self)
        check_rewards(self.rewards, self.stages)
        self.loss.check_sampling(self.sampling)
        self.loss.check_advantage(self.advantage)
        self.loss.check_updates(self.optimizer.updates)
        self.loss.check_rewards(self.rewards)
        for _, weights in weights_by_stage(self.rewards, self.stages):
            self.advantage.check_rewards(weights)
        if self.exploration.varies_conditions and self.loss.needs_targets:
            raise ValueError(
                f"exploration: {self.exploration.kind} has no effect with loss: {self.loss.kind}, which draws nothing: "
                "set exploration.kind to noise"
            )
        if self.group_size == 1 and self.loss.compares_samples:
            raise ValueError(
                "exploration makes groups of one sample, which have nothing to be compared with: raise "
                "exploration.noises to 2 or more"
            )
        if self.exploration.starts_at_one_noise and self.sampling.noise is StepNoise.NONE:
            raise ValueError(
                "exploration.shared_start: without random steps all samples of a group would be the same picture: set "
                "sampling.noise (flow_sde, dance, cps), or leave it out"
            )
        falls = self.optimizer.decay_steps
        if isinstance(falls, int) and falls < self.steps:
            raise ValueError(
                f"optimizer.decay_steps: {falls} ends before the run: steps {falls} to {self.steps} would learn "
                f"nothing. Give {self.steps} or more, or all"
            )
        if self.evaluation.column is not None and self.evaluation.source is None:
            raise ValueError(
                "evaluation.column names a column of evaluation.source, which is not given: give it, or leave both out"
            )
        self._memory_fits()
        return self

    @property
    def group_size(self) -> int:
        """The number of samples of a prompt: G noises times K variants."""
        return self.exploration.noises * self.exploration.per_noise

    @property
    def code(self) -> dict[str, str]:
        """Checksums of the files of yours that hold parts of the method, for a resume to compare."""
        functions = [reward.options.get("function") for reward in self.rewards]
        return checksums(
            [
                (LOSSES, self.loss.kind),
                (EXPLORATIONS, self.exploration.kind),
                (ADVANTAGES, self.advantage.kind),
                (ADAPTERS, split_adapter(self.model)[0] or ""),
                *((REWARDS, reward.kind or reward.name) for reward in self.rewards),
                *((REWARDS, function) for function in functions if isinstance(function, str)),
            ]
        )

    def prompts_of(self, split: Split) -> tuple[str, str | None]:
        """Source and column of the prompts of training, or of the evaluation."""
        if split is Split.TRAIN or self.evaluation.source is None:
            return self.prompts.source, self.prompts.column
        return self.evaluation.source, self.evaluation.column

    def _memory_fits(self) -> None:
        """ValueError for ways of saving memory that the method cannot bear."""
        machine = self.machine
        if machine.drop_text_encoders and self.exploration.varies_conditions:
            raise ValueError(
                f"machine.drop_text_encoders: {self.exploration.kind} exploration computes with the text encoders in "
                "every step; take machine.offload=parts instead"
            )
        if machine.offload is Offload.SEQUENTIAL and not machine.gradient_checkpointing:
            raise ValueError(
                "machine.offload=sequential saves nothing in training unless activations are computed again: "
                "add machine.gradient_checkpointing=true"
            )
        if machine.offload is Offload.SEQUENTIAL and machine.compile is not None:
            raise ValueError(
                "machine.compile: layers whose weights come and go cannot be compiled; leave it out, or take "
                "machine.offload=parts"
            )


class SubjectSettings(PromptSettings):
    """Which subjects, with which prompts; each pair of them makes one group."""

    source: str = "toy:subjects"
    """toy:subjects, a subject's folder, a folder of such folders, DreamBench, or a UNO list (docs/data.md)."""
    per_step: Count = 4
    """P: pairs of a prompt and a subject in a training step."""


class ReferenceSettings(Settings):
    """How the model is shown a subject."""

    count: int | None = Field(1, ge=1, le=64)
    """Pictures of each subject, the first ones; none: all."""
    side: Side | None = None
    """Pixels of the square that each is laid out on; none: the pictures' own resolution."""
    preset: Preset | None = None
    """Position ids of their tokens, uno or kontext; none: what the checkpoint's card says, else uno."""
    shift: Shift | None = None
    """Schedule shift, flux or uno; none: flux. One schedule serves sampling and training."""


class PersonalizeConfig(AlignConfig):
    """One personalization run."""

    model: str = "toy:flux"
    """toy:flux, a FLUX folder in diffusers' layout, a hub id (owner/name@revision), or FILE.safetensors@CONFIG."""
    prompts: SubjectSettings = SubjectSettings()
    references: ReferenceSettings = ReferenceSettings()

    @model_validator(mode="before")
    @classmethod
    def _former_name(cls, given: Any) -> Any:
        """`references.lora`, as recipes of before it served every model named `lora.base`."""
        references = given.get("references") if isinstance(given, dict) else None
        if not isinstance(references, dict) or "lora" not in references:
            return given
        former, lora = references["lora"], given.get("lora") or {}
        if former is None or not isinstance(lora, dict):
            pass
        elif lora.get("base") not in (None, former):
            raise ValueError(
                f"references.lora ({former}) is the former name of lora.base ({lora['base']}): give lora.base alone"
            )
        else:
            lora = {**lora, "base": former}
        others = {name: value for name, value in references.items() if name != "lora"}
        return {**given, "references": others, "lora": lora}

    @model_validator(mode="after")
    def _subjects_have_no_columns(self) -> "PersonalizeConfig":
        for part, settings in (("prompts", self.prompts), ("evaluation", self.evaluation)):
            if settings.column is not None:
                raise ValueError(f"{part}.column has no effect: subjects have no columns. Leave it out")
        return self


ALIGN, PERSONALIZE = "align", "personalize"
KINDS: Mapping[str, type[AlignConfig]] = {ALIGN: AlignConfig, PERSONALIZE: PersonalizeConfig}


def kind_of(config: AlignConfig) -> str:
    """What its recipe calls it."""
    return next(kind for kind, settings in KINDS.items() if type(config) is settings)


def load_recipe(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    values: Mapping[str, Any] | None = None,
    kind: str | None = None,
) -> AlignConfig:
    """A recipe as what its own `kind` says it is.

    Args:
        recipe: a YAML file, a name under recipes/, or a mapping.
        overrides, values: see `config.load`.
        kind: the job to do; None: the recipe's own, align where it does not say.

    Raises:
        ConfigError: it is wrong, or for another job than `kind`.
    """
    wanted = kind or recipes.kind_of(recipe) or ALIGN
    return recipes.load(KINDS.get(wanted, AlignConfig), recipe, overrides, values=values, kind=wanted)


def require_kind(folder: RunFolder) -> str:
    """A run's kind. RunError where the loop did not play it."""
    if folder.kind not in KINDS:
        raise RunError(
            f"{folder.path} is a run of kind {folder.kind!r}, not {' or '.join(map(repr, KINDS))}. "
            f"Type: pixrl report {folder.path}"
        )
    return folder.kind


def read_config(folder: RunFolder) -> AlignConfig:
    """The recipe of a run of one of these kinds."""
    return load_recipe(folder.recipe(), kind=require_kind(folder))


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
    mixing: Annotated[MixingSettings, PartOf(MIXINGS)] = ColumnsSettings()
    """What of the concepts is mixed: columns, tokens, steps, velocity or spatial, with its settings."""
    pooled: Pooled = Pooled.WEIGHT
    """How the pooled text features are mixed, with the mixings columns and tokens."""
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
        if self.pooled is not Pooled.WEIGHT and not MIXINGS.find(self.mixing.kind).mixes_embeddings:
            raise ValueError(
                f"pooled={self.pooled} has no effect with mixing={self.mixing.kind}, which mixes no embeddings; leave "
                "it out"
            )
        if self.budget < self.batch:
            raise ValueError(
                f"a budget of {self.budget} pictures is below one batch of {self.batch}; "
                f"raise --budget to {self.batch} or more, or add --set batch={max(2, self.budget)}"
            )
        if self.pool is not None and self.budget - self.pool < self.batch:
            raise ValueError(
                f"a pool of {self.pool} of {self.budget} pictures leaves less than one batch of {self.batch} to learn "
                f"from; give --pool {self.budget - self.batch} or less"
            )
        return self

    @property
    def code(self) -> dict[str, str]:
        """Checksums of the files of yours that hold the sampler and the mixing, for a resume to compare."""
        adapter = split_adapter(self.model)[0] or ""
        return checksums([(SAMPLERS, self.sampler), (MIXINGS, self.mixing.kind), (ADAPTERS, adapter)])

    def with_full_paths(self) -> "FuseConfig":
        """The same, its checkpoints by their whole paths where they are on this disk."""
        found = {name: full_path(ref) for name in CHECKPOINTS if (ref := self.__dict__[name]) is not None}
        mixing = self.mixing.model_copy(update={"kind": plugins.full_path(self.mixing.kind)})
        return self.model_copy(update={**found, "sampler": plugins.full_path(self.sampler), "mixing": mixing})

    @property
    def world(self) -> tuple[str, str | None, str | None, str, str, MemoryPlan]:
        """What `fuse_world.load_world` takes."""
        return self.model, self.clip, self.segmenter, self.device, self.dtype, self.memory

    @property
    def pool_images(self) -> int:
        """Pictures of the pool, 0 for a sampler without a policy: the last of the run."""
        if not sampler_of(self.sampler).has_policy:
            return 0
        return min(self.budget // 4, self.budget - self.batch) if self.pool is None else self.pool

    @property
    def learning_images(self) -> int:
        """Pictures that the sampler learns from: the first of the run."""
        return self.budget - self.pool_images

    @property
    def learning_steps(self) -> int:
        """Batches that the sampler learns from; the last may be smaller."""
        return -(-self.learning_images // self.batch)

    @property
    def steps(self) -> int:
        """Batches in all: those of learning, then those of the pool."""
        return self.learning_steps + -(-self.pool_images // self.batch)

    def first_index(self, step: int) -> int:
        """The number of a step's first picture."""
        if step <= self.learning_steps:
            return min(step * self.batch, self.learning_images)
        return min(self.learning_images + (step - self.learning_steps) * self.batch, self.budget)

    def count(self, step: int) -> int:
        """Pictures of a step."""
        return self.first_index(step + 1) - self.first_index(step)

    def noise_plan(self) -> NoisePlan:
        """A run's seeds."""
        return NoisePlan(self.noise, self.seed, self.learning_steps)


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
