"""What a training run is made from: the recipes `align` and `personalize`.

A method is the combination of four of its parts:

exploration (noise, perturbed) x sampling (solver, random steps) x advantage (weights, synergy, time) x loss (clipped,
nft, draft, dpo; sft and rpo as baselines).

Customized-GRPO is noise exploration x random steps x (synergy, time weights) x clipped; every other combination runs.
A personalize recipe is an align recipe whose prompts come with subjects. `fusion/config.py` has the recipe of `fuse`.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from pixrl import config as recipes
from pixrl.algorithms import ADVANTAGES, EXPLORATIONS, LOSSES
from pixrl.algorithms.advantages import AdvantageSettings, EstimatorSettings
from pixrl.algorithms.exploration import ExplorationSettings, GroupSize, NoiseExploration
from pixrl.algorithms.loss import LossSettings
from pixrl.algorithms.nft import NFTSettings
from pixrl.algorithms.sampling import MOST_STEPS as MOST_SAMPLING
from pixrl.algorithms.sampling import RolloutSettings, StepNoise
from pixrl.algorithms.trainer import OptimizerSettings
from pixrl.config import MOST, MOST_GUIDANCE, Count, Resolution, Seed, Settings, Side, refuse_infinite
from pixrl.data.prompts import Split
from pixrl.device import DType
from pixrl.errors import ConfigError, RunError
from pixrl.hub import split_adapter
from pixrl.models import REGISTRY as ADAPTERS
from pixrl.models.flux import Preset, Shift
from pixrl.models.memory.plan import Base, MemoryPlan, Offload, Shard
from pixrl.models.references import ReferenceShape
from pixrl.models.slots import Slot
from pixrl.plugins import PartOf, checksums
from pixrl.rewards import REGISTRY as REWARDS
from pixrl.rewards.settings import RewardSetting, Stage, check_rewards, weights_by_stage
from pixrl.runs.folder import RunFolder
from pixrl.runs.guard import Action, MonitorSettings
from pixrl.runs.trackers import Trackers

MOST_RANK = 4096
LONGEST_WAIT = 86400.0
"""Seconds."""


class PromptSettings(Settings):
    """The prompts of training."""

    source: str = "toy:geneval"
    """toy:geneval, toy:geneval/counting,colors, a .txt, .jsonl, .json, .csv, .tsv or .parquet file, or a folder of
    pictures with captions."""
    column: str | None = None
    """The column or key of the file that holds the prompts; none: prompt, prompts or caption."""
    per_step: Count = 8
    """P: prompts of a training step; each makes one group."""


class ScoringSettings(Settings):
    """The limits of trouble with rewards that a run bears."""

    time_limit: float | None = Field(300.0, gt=0, le=LONGEST_WAIT)
    """Seconds that one reward may take for a step's pictures; none: no limit."""
    max_failed_share: float = Field(0.5, ge=0, le=1)
    """The run stops when one reward, held out or not, has no score for more than this share of a step's (or an
    evaluation's) pictures."""


class Train(StrEnum):
    """The weights of the denoiser that are trained."""

    LORA = "lora"
    """A LoRA on the frozen weights."""
    FULL = "full"
    """All of them, in float32, with a whole copy for each other policy that the method keeps."""


class LoraSettings(Settings):
    """The trainable parameters of `train: lora`, and what is trained on top of."""

    base: str | None = None
    """A LoRA that is merged into the model first and makes the base with it: a file, or a folder as peft saves it."""
    rank: int = Field(32, ge=1, le=MOST_RANK)
    alpha: float = Field(64.0, gt=0, le=MOST)
    targets: tuple[str, ...] | None = None
    """Names of modules; none: the attention projections."""


class EvaluationSettings(Settings):
    """The evaluation: pictures at fixed seeds, drawn before, during and after training, scored by every reward."""

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
    """The place and manner of computing; results depend on it by rounding (a quantized base's is large) and tiles."""

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
    shard: Shard = Shard.AUTO
    """Divide the denoiser among a run's processes by FSDP2: auto (where it does not fit whole), none or full."""
    compile: str | None = None
    """Compile the transformer's blocks by this backend of torch.compile, such as inductor; none: not compiled."""

    @property
    def divides(self) -> bool:
        return self.shard is Shard.FULL


class OutputSettings(Settings):
    """The files that the run's folder keeps."""

    checkpoint_every: Count = 10
    """Training steps."""
    keep_checkpoints: Count = 2
    images_every: Count = 1
    """Every how many training steps the pictures themselves are kept; the manifest lists all."""
    features: str | None = None
    """A CLIP or DINO whose image features measure the diversity of a group; none: small pixels."""


class AlignConfig(Settings):
    """The recipe of one alignment."""

    model: str = "toy:sd3"
    """toy:NAME, a folder in diffusers' layout, a hub id (owner/name@revision), or FILE.safetensors@CONFIG."""
    guidance: float | None = Field(None, ge=0, le=MOST_GUIDANCE)
    """Classifier-free guidance of sampling and training; none: the checkpoint's own. Up to 1: none."""
    negative_prompt: str | None = None
    """What guidance leads away from, in sampling and training; none: what the model's pipeline does without one."""
    resolution: Resolution | None = None
    """Size of the pictures in pixels: 512 for squares, 832x1216 for width x height; none: the checkpoint's own."""
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
    train: Train = Train.LORA
    """lora; full: all weights of the denoiser, in float32, for which `pixrl doctor` says the memory."""
    lora: LoraSettings = LoraSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    machine: MachineSettings = MachineSettings()
    output: OutputSettings = OutputSettings()
    monitor: MonitorSettings = MonitorSettings()
    log: Trackers = ()
    """wandb and trackio: where the figures are shown besides the run's folder."""

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
        if self.exploration.varies_conditions and (self.loss.needs_targets or self.loss.needs_pairs):
            raise ValueError(
                f"exploration: {self.exploration.kind} has no effect with loss: {self.loss.kind}, which draws nothing: "
                "set exploration.kind to noise"
            )
        if self.group_size == 1 and self.loss.compares_samples:
            raise ValueError(
                "exploration makes groups of one sample, which have nothing to be compared with: raise "
                "exploration.noises to 2 or more"
            )
        self.loss.check_group(self.group_size)
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
        return self

    @model_validator(mode="after")
    def _memory_fits(self) -> "AlignConfig":
        """Refuse ways of saving memory that the method cannot bear."""
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
        if machine.divides and machine.base is not Base.DTYPE:
            raise ValueError(
                f"machine.shard=full: weights of machine.base={machine.base} cannot be divided among processes; leave "
                "machine.shard out, or take base: dtype"
            )
        if machine.offload is Offload.SEQUENTIAL and machine.divides:
            raise ValueError(
                "machine.shard=full: layers that come from the CPU one by one cannot be divided among processes too; "
                "take machine.offload=parts"
            )
        if machine.offload is Offload.SEQUENTIAL and machine.compile is not None:
            raise ValueError(
                "machine.compile: layers whose weights come and go cannot be compiled; leave it out, or take "
                "machine.offload=parts"
            )
        return self

    @model_validator(mode="after")
    def _weights_can_be_trained(self) -> "AlignConfig":
        """Refuse settings that mean nothing where all weights are trained, or forbid it."""
        if self.train is not Train.FULL:
            return self
        machine, usual = self.machine, dict(LoraSettings())
        idle = [name for name, value in dict(self.lora).items() if name != "base" and value != usual[name]]
        if idle:
            raise ValueError(
                f"train: full trains every weight, so lora.{' and lora.'.join(idle)} would have no effect: leave "
                f"{'it' if len(idle) == 1 else 'them'} out, by --set 'lora={{}}' for instance, or take train: lora"
            )
        if machine.base is not Base.DTYPE:
            raise ValueError(
                f"train: full: weights of machine.base={machine.base} are rounded to a few values and cannot be "
                "trained; take base: dtype, or train: lora"
            )
        if machine.offload is Offload.SEQUENTIAL:
            raise ValueError(
                "train: full: machine.offload=sequential streams frozen weights, and here all change; take "
                "machine.offload=parts or machine.shard=full, or train: lora"
            )
        if machine.dtype == DType.FLOAT16:
            raise ValueError(
                "train: full: the gradients of whole weights underflow in float16; take machine.dtype=bfloat16"
            )
        if machine.divides and self.optimizer.eight_bit:
            raise ValueError(
                "optimizer.eight_bit: its moments cannot be divided among processes as machine.shard=full divides "
                "trained weights; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _guard_can_act(self) -> "AlignConfig":
        """Refuse an action of the guard that would have no effect, or nothing to go back to."""
        action, every, output = self.monitor.action, self.evaluation.every, self.output
        if action in (Action.STOP, Action.RAISE_KL) and (every is None or every >= self.steps):
            raise ValueError(
                f"monitor.action: {action} acts when an evaluation during the run finds something, and there is none: "
                "set evaluation.every to a few training steps, or leave the action at warn"
            )
        if action is Action.RAISE_KL and not self.loss.model_dump().get("kl"):
            raise ValueError(
                "monitor.action: raise_kl multiplies loss.kl, which is not above 0 here: set it, or take stop or "
                "rollback"
            )
        reach = (output.keep_checkpoints - 1) * output.checkpoint_every
        if action is Action.ROLLBACK and reach < (every or self.steps):
            raise ValueError(
                f"monitor.action: rollback needs the checkpoint of the evaluation before, {every or self.steps} steps "
                f"back, and the kept ones reach back {reach}: raise output.keep_checkpoints or evaluate more often"
            )
        return self

    @property
    def group_size(self) -> int:
        """The number of samples of a prompt: G noises times K variants."""
        return self.exploration.noises * self.exploration.per_noise

    @property
    def copies(self) -> tuple[Slot, ...]:
        """The slots besides the trained one of which `train: full` keeps whole copies: those that the method reads."""
        old = LOSSES.find(self.loss.kind).has_old_policy()
        wanted = {Slot.REFERENCE: True, Slot.OLD: old, Slot.EMA: self.optimizer.ema is not None}
        return tuple(slot for slot, is_wanted in wanted.items() if is_wanted)

    @property
    def code(self) -> dict[str, str]:
        """Checksums of the user's files that hold parts of the method, for a resume to compare."""
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

    @property
    def drawing(self) -> dict[str, Any]:
        """The options of `models.load` that say how the model draws, but for its steps."""
        return self.model_dump(include={"guidance", "negative_prompt", "resolution", "t5"})

    def prompts_of(self, split: Split) -> tuple[str, str | None]:
        """Return the source and the column of the prompts of training, or of the evaluation."""
        if split is Split.TRAIN or self.evaluation.source is None:
            return self.prompts.source, self.prompts.column
        return self.evaluation.source, self.evaluation.column


class SubjectSettings(PromptSettings):
    """The subjects and their prompts; each pair of them makes one group."""

    source: str = "toy:subjects"
    """toy:subjects, a subject's folder, a folder of such folders, DreamBench, or a UNO list (docs/data.md)."""
    per_step: Count = 4
    """P: pairs of a prompt and a subject in a training step."""


class ReferenceSettings(Settings):
    """The way in which the model is shown a subject."""

    count: int | None = Field(1, ge=1, le=64)
    """Pictures of each subject, the first ones; none: all."""
    side: Side | None = None
    """Pixels of the square that each is laid out on, or of its longer side; none: the pictures' shorter side."""
    shape: ReferenceShape | None = None
    """square (on white, nothing cut off), or own (in its own shape, as UNO shows them); none: square."""
    preset: Preset | None = None
    """Position ids of their tokens, uno or kontext; none: what the checkpoint's card says, else uno."""
    shift: Shift | None = None
    """Schedule shift, flux or uno; none: flux. One schedule serves sampling and training."""


class PersonalizeConfig(AlignConfig):
    """The recipe of one personalization."""

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
PERSONALIZE_RECIPE = "toy/customized-nft"
"""What `pixrl personalize` does where no recipe is given."""
SUBJECT_RECIPE = "toy/subject"
"""The same where a subject is."""
KINDS: Mapping[str, type[AlignConfig]] = {ALIGN: AlignConfig, PERSONALIZE: PersonalizeConfig}


def kind_of(config: AlignConfig) -> str:
    """Return the kind of a recipe, as its `kind` says it."""
    return next(kind for kind, settings in KINDS.items() if type(config) is settings)


def load_recipe(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    steps: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    kind: str | None = None,
) -> AlignConfig:
    """Load a recipe as what its own `kind` says it is, with what was given besides.

    Args:
        recipe: a YAML file, a name under recipes/, or a mapping.
        overrides: further settings, `a.b=c`.
        steps, seed: in place of the recipe's.
        settings: further ones by dotted name.
        kind: the job to do; None: the recipe's own, align where it does not say.

    Raises:
        ConfigError: it is wrong, or for another job than `kind`.
    """
    given = {"steps": steps, "seed": seed}
    values = {name: value for name, value in given.items() if value is not None} | dict(settings or {})
    wanted = kind or recipes.kind_of(recipe) or ALIGN
    return recipes.load(KINDS.get(wanted, AlignConfig), recipe, overrides, values=values, kind=wanted)


def load_personalize(
    recipe: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str] = (),
    *,
    subject: Path | str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[AlignConfig, str | Path | Mapping[str, Any]]:
    """Load the settings of a personalization, and what to name its folder after."""
    chosen = {text.partition("=")[0].strip() for text in overrides}
    sources = () if subject is None else ("prompts.source", "evaluation.source")
    own = {name: str(subject) for name in sources if name not in chosen}
    usual = PERSONALIZE_RECIPE if subject is None else SUBJECT_RECIPE
    source = usual if recipe is None else recipe
    config = load_recipe(
        source, overrides, steps=steps, seed=seed, settings={**own, **(settings or {})}, kind=PERSONALIZE
    )
    return config, source if subject is None else Path(subject).resolve().name


def load_either(
    recipe: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str] = (),
    *,
    subject: Path | str | None = None,
    steps: int | None = None,
    seed: int | None = None,
) -> AlignConfig:
    """Load the settings that `pixrl align RECIPE` or `pixrl personalize --subject SUBJECT` would train with.

    Raises:
        ConfigError: neither a recipe nor a subject, or the recipe is wrong.
    """
    if subject is not None:
        return load_personalize(recipe, overrides, subject=subject, steps=steps, seed=seed)[0]
    if recipe is None:
        raise ConfigError("Neither a recipe nor a subject was given. Type toy/e2po, or --subject FOLDER.")
    return load_recipe(recipe, overrides, steps=steps, seed=seed)


def require_kind(folder: RunFolder) -> str:
    """Return a run's kind. Raises RunError where it is neither an alignment nor a personalization."""
    if folder.kind not in KINDS:
        raise RunError(
            f"{folder.path} is a run of kind {folder.kind!r}, not {' or '.join(map(repr, KINDS))}. "
            f"Type: pixrl report {folder.path}"
        )
    return folder.kind


def read_config(folder: RunFolder, overrides: Sequence[str] = ()) -> AlignConfig:
    """Read the recipe of an alignment or a personalization, with what is set besides."""
    return load_recipe(folder.recipe(), overrides, kind=require_kind(folder))
