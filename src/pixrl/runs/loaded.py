"""Everything that an align recipe names, loaded and checked against each other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pixrl import models
from pixrl import rewards as rewards_table
from pixrl.algorithms import make_advantage, make_exploration, make_loss
from pixrl.algorithms.exploration import Group, NoiseOnly, prepare, shown_pictures
from pixrl.algorithms.trainer import Aligner, Method, MicroBatches
from pixrl.algorithms.world import Team, limit_threads
from pixrl.data.preferences import load_pairs
from pixrl.data.prompts import Prompt, PromptSet, Split, load_prompts
from pixrl.data.subject_prompts import subject_prompts
from pixrl.data.subjects import check_targets, load_subjects
from pixrl.errors import ConfigError, InputError
from pixrl.metrics.diversity import Features, pixel_features
from pixrl.models.flux import FluxPolicy
from pixrl.models.memory.plan import Shard
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.models.references import ReferenceShape, TokenReferences
from pixrl.models.slots import Slot, Slots
from pixrl.models.text import check_words
from pixrl.rewards.encoders import load_encoder
from pixrl.rewards.set import RewardSet
from pixrl.rewards.settings import RewardSetting
from pixrl.runs.config import AlignConfig, PersonalizeConfig, Train
from pixrl.runs.data import PromptSampler, share, what_is_asked
from pixrl.runs.evaluation import Evaluator, spread_evenly
from pixrl.runs.planner import plan, require_equal_shares, require_room


@dataclass(frozen=True)
class LoadedRun:
    """Everything that a recipe names, loaded."""

    config: AlignConfig
    team: Team
    policy: FlowPipelinePolicy
    slots: Slots
    prompts: PromptSampler
    held_out: PromptSet
    rewards: RewardSet
    method: Method
    features: Features

    def groups(self, step: int) -> list[Group]:
        """Return this process's groups of a step."""
        groups = self.prompts.groups(step)
        return groups[share(len(groups), self.team.rank, self.team.size)]

    def first_groups(self) -> list[Group]:
        """Return this process's groups of the first step, or any group where it has none."""
        return self.groups(0) or self.prompts.groups(0)[:1]

    def largest_group(self) -> Group:
        """Return a group of the first step; where references keep their shape, with the largest ones of the run."""
        group = self.first_groups()[0]
        if not isinstance(self.policy, TokenReferences) or self.policy.shape is ReferenceShape.SQUARE:
            return group
        shown = [one.metadata for one in (*self.prompts.prompts, *self.evaluated())]
        areas = [sum(one[0].numel() for one in self.policy.laid_out(shown_pictures(of))) for of in shown]
        return replace(group, metadata=shown[areas.index(max(areas))])

    def evaluated(self) -> tuple[Prompt, ...]:
        """Return the prompts of the evaluation."""
        return spread_evenly(self.held_out, self.config.evaluation.prompts)

    def trained_on(self) -> int:
        """Count the evaluation's prompts that are trained on too; of subjects, those whose subject is."""
        known = set(what_is_asked(self.prompts.prompts))
        return sum(one in known for one in what_is_asked(self.evaluated()))

    def aligner(self, micro_batches: MicroBatches) -> Aligner:
        """Make the algorithm, before its first step."""
        return Aligner(
            self.policy,
            self.slots,
            self.method,
            micro_batches,
            seed=self.config.seed,
            world=self.team,
            scale_loss=self.policy.precision.autocast is torch.float16,
        )


def load_rewards(config: AlignConfig, device: str) -> RewardSet:
    """Load the rewards of a recipe, on a device where their own options do not say where."""
    scoring = config.scoring
    return RewardSet(
        [placed(setting, device) for setting in config.rewards],
        config.stages,
        time_limit=scoring.time_limit,
        max_failed_share=scoring.max_failed_share,
    )


def load_run(config: AlignConfig, rewards: RewardSet | None = None, *, sharded: bool = False) -> LoadedRun:
    """Load the model, the rewards and the prompts of a recipe, and check that they fit.

    Args:
        config: the recipe.
        rewards: those of the recipe, where they are loaded already.
        sharded: whether the processes divide the model's weights among them.
    """
    team = Team(config.machine.device)
    limit_threads(team.local)
    prompts, held_out = (read_prompts(config, split) for split in Split)
    if sharded:
        require_equal_shares(config, team.size, len(held_out))
    policy = load_policy(config, team, sharded=sharded)
    for one in (prompts, held_out):
        check_words([prompt.text for prompt in one], policy.vocabulary, policy.name)
    if config.machine.drop_text_encoders:
        known = [prompt for one in (prompts, held_out) for prompt in one]
        shown = [shown_pictures(prompt.metadata) for prompt in known]
        if isinstance(policy, TokenReferences):
            shown = [tuple(policy.laid_out(own)) for own in shown]
        policy.drop_text([prompt.text for prompt in known], shown)
    mesh = team.mesh(trained=config.train is Train.FULL) if sharded else None
    slots = attach_slots(policy, config, mesh)
    if config.machine.compile is not None:
        policy.compile(config.machine.compile)
    rewards = load_rewards(config, team.device) if rewards is None else rewards
    method = Method(
        exploration=make_exploration(config.exploration),
        sampling=config.sampling,
        advantage=make_advantage(config.advantage),
        loss=make_loss(config.loss, rewards.differentiable()),
        optimizer=config.optimizer.of_run(config.steps),
        noises=config.exploration.noises,
        shared_start=config.exploration.starts_at_one_noise,
    )
    features = _features(config.output.features, team.device)
    sampler = PromptSampler(prompts, per_step=config.prompts.per_step, seed=config.seed)
    return LoadedRun(config, team, policy, slots, sampler, held_out, rewards, method, features)


def read_prompts(config: AlignConfig, split: Split) -> PromptSet:
    """Read the prompts of training or of the evaluation, with their subjects where the recipe is one of subjects."""
    source, column = config.prompts_of(split)
    if isinstance(config, PersonalizeConfig):
        subjects = load_subjects(source, split=split)
        if config.loss.needs_targets and split is Split.TRAIN:
            check_targets(subjects)
        if config.loss.needs_pairs:
            raise ConfigError(
                f"loss: {config.loss.kind} learns from pairs of pictures, which subjects have not: pixrl align"
            )
        return subject_prompts(subjects, count=config.references.count)
    if config.loss.needs_targets:
        raise ConfigError(
            f"loss: {config.loss.kind} learns from target pictures, which only subjects have: pixrl personalize toy/sft"
        )
    if config.loss.needs_pairs and split is Split.TRAIN:
        return load_pairs(source, column=column)
    return load_prompts(source, split=split, column=column)


def load_policy(config: AlignConfig, team: Team, *, sharded: bool = False) -> FlowPipelinePolicy:
    """Load a recipe's model; `sharded`: its denoiser stays on the CPU. Raises ConfigError if it cannot be trained."""
    machine = config.machine.model_copy(update={"shard": Shard.FULL if sharded else Shard.NONE})
    policy = models.load(
        config.model,
        device=team.device,
        dtype=config.machine.dtype,
        steps=config.sampling.steps,
        plan=machine,
        lora=config.lora.base,
        **config.drawing,
    )
    policy = require_trainable(policy, config.model)
    if isinstance(config, PersonalizeConfig):
        show_references(policy, config)
    if config.machine.gradient_checkpointing:
        policy.checkpoint_gradients()
    return policy


def attach_slots(
    policy: FlowPipelinePolicy,
    config: AlignConfig,
    mesh: DeviceMesh | None = None,
    *,
    copies: Sequence[Slot] | None = None,
) -> Slots:
    """Attach what a recipe trains to its model.

    Args:
        policy: without slots.
        config: the recipe.
        mesh: the processes that divide the weights; None: each has all of them.
        copies: slots to keep copies for where all weights are trained; None: those that the method reads.
    """
    if config.train is Train.FULL:
        return policy.attach_full(config.copies if copies is None else copies, mesh)
    lora = config.lora
    slots = policy.attach_lora(rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=config.seed)
    if mesh is not None:
        policy.shard(mesh)
    return slots


SLOTS = "slots/"
"""What the names of the slots' tensors begin with in a checkpoint."""


def load_slot(
    policy: FlowPipelinePolicy, config: AlignConfig, tensors: Mapping[str, Tensor], slot: Slot
) -> Slot:
    """Give a policy what a run has in one slot, from a checkpoint's tensors, and return the slot to draw with.

    Raises:
        CheckpointError: the tensors do not fit.
    """
    if config.train is Train.LORA:
        own = {name.removeprefix(SLOTS): x for name, x in tensors.items() if name.startswith(SLOTS)}
        attach_slots(policy, config).load_state(own)
        return slot
    prefix = f"{SLOTS}{slot.value}/"
    names = (name for name in tensors if name.startswith(prefix))
    drawn = Slot.CURRENT  # no copies: one slot is enough to draw with
    own = {f"{drawn.value}/{name.removeprefix(prefix)}": tensors[name] for name in names}
    attach_slots(policy, config, copies=()).load_state(own)
    return drawn


def require_trainable(renderer: object, name: str) -> FlowPipelinePolicy:
    """Return the model as one that can be trained. Raises ConfigError where it cannot be."""
    if not isinstance(renderer, FlowPipelinePolicy):
        raise not_trainable(type(renderer), name)
    return renderer


def not_trainable(adapter: type, name: str) -> ConfigError:
    """Make the error of a model whose adapter only draws."""
    return ConfigError(
        f"{name} is a {adapter.__name__}: it draws pictures but has no velocity and no LoRA slots to train. "
        "Give a flow model: --set model=toy:sd3, or an SD3, SDXL, FLUX, FLUX.2, Z-Image or Qwen-Image checkpoint."
    )


def show_references(policy: FlowPipelinePolicy, config: PersonalizeConfig) -> TokenReferences:
    """Set up the model for reference pictures.

    Raises:
        ConfigError: it takes none, a setting has no effect on it, or the loss cannot learn with them.
    """
    settings = config.references
    if not isinstance(policy, TokenReferences):
        raise ConfigError(
            f"{policy.name} is a {type(policy).__name__}, which takes no reference pictures. Give a model that does: "
            "--set model=toy:flux, or a checkpoint of FLUX, FLUX.2 or Qwen-Image-Edit."
        )
    if isinstance(policy, FluxPolicy):
        policy.place(side=settings.side, shape=settings.shape, preset=settings.preset, shift=settings.shift)
    else:
        for name in ("preset", "shift"):
            if getattr(settings, name) is not None:
                raise ConfigError(
                    f"references.{name} has no effect on {policy.name}: it is FLUX.1's. Leave it out."
                )
        policy.place(side=settings.side, shape=settings.shape)
    is_square = settings.shape is not ReferenceShape.OWN
    sides = {policy.reference_side, policy.settings.width, policy.settings.height}
    config.loss.check_references(are_as_pictures=is_square and len(sides) == 1)
    return policy


def placed(setting: RewardSetting, device: str) -> RewardSetting:
    """Let a reward compute where the process does, unless its options say where."""
    elsewhere = setting.on is not None
    if elsewhere or "device" in setting.options or not rewards_table.takes(setting.reward, "device"):
        return setting
    return setting.model_copy(update={"options": {**setting.options, "device": device}})


def _features(ref: str | None, device: str) -> Features:
    return pixel_features if ref is None else load_encoder(ref, device=device).image_features


def check_references(run: LoadedRun) -> tuple[str, ...]:
    """Refuse subjects by whose references a reward can judge nothing, before anything is drawn.

    Returns:
        What is to be said of references that a reward leaves out, because it finds nothing in them to compare with.

    Raises:
        InputError: they are more than `scoring.max_failed_share` of the subjects, so the run would stop; names one.
    """
    if not isinstance(run.config, PersonalizeConfig):
        return ()
    sources = (
        (run.prompts.prompts.name, run.prompts.prompts),
        (run.held_out.name, run.evaluated()),
    )
    # each once; one of the same name in another source is another subject
    known = {
        (source, str(prompt.metadata.get("subject", ""))): prompt.metadata
        for source, prompts in sources
        for prompt in prompts
    }
    subjects = [(name, metadata) for (_, name), metadata in known.items()]
    found = [(name, run.rewards.reference_problems(metadata)) for name, metadata in subjects]
    for reward in run.rewards.names:
        broken = [(name, of[reward]) for name, of in found if reward in of]
        if len(broken) > run.config.scoring.max_failed_share * len(subjects):
            first, reason = broken[0]
            raise InputError(
                f"The reward {reward!r} can judge no picture of {len(broken)} of {len(subjects)} subject(s); "
                f"{first!r}: {reason}. Give other pictures of it, on which it stands out; or let the reward compare "
                "whole pictures: options mask: none."
            )
    return tuple(_left_out(subjects, run.rewards))


def _left_out(subjects: Sequence[tuple[str, Mapping[str, object]]], rewards: RewardSet) -> Iterator[str]:
    """For each reward that leaves references out, how many and an example."""
    unused = [(name, rewards.unused_references(metadata)) for name, metadata in subjects]
    for reward in rewards.names:
        of_it = [(name, found[reward]) for name, found in unused if reward in found]
        if of_it:
            subject, numbers = of_it[0]
            count = sum(len(found) for _, found in of_it)
            yield (
                f"{reward}: {count} reference picture(s) of {len(of_it)} subject(s) show nothing to compare with and "
                f"are left out of its mean; the first is number {numbers[0]} of {subject!r}"
            )


def plan_batches(run: LoadedRun) -> tuple[MicroBatches, tuple[str, ...]]:
    """Plan micro-batches that fit every process, and say why."""
    config, team = run.config, run.team
    groups = -(-config.prompts.per_step // team.size)
    rollouts = groups * run.method.group_size
    condition = prepare(NoiseOnly(), run.policy, [run.largest_group()]).anchor
    require_room(run.policy, condition)
    found = plan(
        run.policy,
        condition,
        rollouts=rollouts,
        trained=-(-rollouts // config.optimizer.updates),
        rollout_batch=config.machine.rollout_batch,
        train_batch=config.machine.train_batch,
        through_decoder=config.loss.through_decoder,
    )
    sizes = team.gather(found.micro_batches)
    common = MicroBatches(min(one.rollout for one in sizes), min(one.train for one in sizes))
    spread = f"{config.prompts.per_step} groups of {run.method.group_size} over {team.size} process(es)"
    spread += ", which divide the denoiser's weights among them" if run.policy.in_step else ""
    read = dict.fromkeys([*run.prompts.prompts.notes, *run.held_out.notes])
    notes = [spread, *read, *(f"merged into the model: {one.said}" for one in run.policy.merged)]
    seen, asked = run.trained_on(), len(run.evaluated())
    if seen:  # the evaluation asks for what is trained on
        which = "all" if seen == asked else f"{seen} of"
        subjects = isinstance(config, PersonalizeConfig)
        how = "are of subjects that are trained on" if subjects else "are trained on too"
        notes.append(
            f"evaluation: {which} {asked} prompts {how}, so its figures show what was learned of them and "
            "not what carries over. Name others: --set evaluation.source=..."
        )
    return common, (*notes, *found.reasons)


def make_evaluator(run: LoadedRun, micro_batches: MicroBatches) -> Evaluator:
    """Make the evaluator of the averaged weights, or else the trained ones, with the solver of training."""
    settings = run.config.evaluation
    return Evaluator(
        policy=run.policy,
        prompts=run.evaluated(),
        per_prompt=settings.per_prompt,
        steps=settings.steps or run.config.sampling.steps,
        solver=run.config.sampling.solver,
        slot=Slot.CURRENT if run.config.optimizer.ema is None else Slot.EMA,
        rewards=run.rewards.of_single_pictures(),
        features=run.features,
        world=run.team,
        micro_batch=micro_batches.rollout,
        seed=run.config.seed,
    )
