"""The slots of a denoiser's weights, as LoRA or as whole copies, and LoRA that is merged into the weights below them.

The slots: `current` is trained, `old` samples, `ema` is evaluated, `reference` is the model before training. Only
`current` requires gradients, whichever slot is active. Two classes have them:

`LoraSlots`: PEFT adapters on the same modules, so that no second copy of the backbone ever exists; the reference is
the backbone.
`FullSlots`: all weights are trained, and every other slot that is wanted is a copy of the denoiser. All are float32
whatever dtype the model was loaded in: an update of a thousandth of a weight, or an average that moves by as little,
is lost to bfloat16's eight bits. Matrix products stay in the model's dtype, by autocast.
"""

import copy
import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from pixrl.errors import CheckpointError, InputError, RunError, did_you_mean
from pixrl.libraries import check_torchvision
from pixrl.models.memory.quantization import dense_weight, set_weight
from pixrl.models.memory.sharding import cut, local, shard_trained, whole

Lora = Mapping[str, tuple[Tensor, Tensor]]
"""A mapping of the transformer's modules to (down [r, in], up [out, r]), whose product is added to the weight."""
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
"""The endings that peft gives the names of both."""


class Slot(StrEnum):
    """The weights that `velocity` uses."""

    CURRENT = "current"
    OLD = "old"
    EMA = "ema"
    REFERENCE = "reference"


KNOWN_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
"""The attention projections of SD3 and FLUX, which are trained where no targets are named."""
ADAPTERS = (Slot.CURRENT, Slot.OLD, Slot.EMA)


def parse_slot(name: str) -> Slot:
    """Return the slot of that name.

    Raises:
        InputError: there is none.
    """
    if name not in list(Slot):
        raise InputError(f"Unknown slot {name!r}. There are {', '.join(Slot)}.")
    return Slot(name)


class Slots(ABC):
    """Weights of equal shape and equal start in several slots, of which `current` is trained."""

    kind: ClassVar[str]
    """What the slots hold, in words."""

    def __init__(self, trained: Iterable[Slot]) -> None:
        """Begin with `current`; `trained` are the slots that change in training."""
        self._trained = tuple(trained)
        self._active = Slot.CURRENT

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The denoiser that computes with the active slot."""

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Run the backbone with that slot while it is open; the one before comes back after, also on an error."""
        before = self._active
        self._activate(parse_slot(name))
        try:
            yield
        finally:
            self._activate(before)

    def folded(self) -> AbstractContextManager[None]:
        """Put the active slot into the backbone's own weights while it is open, where it lies beside them.

        The weights of before come back as they were, bit for bit.

        Raises:
            RunError: another slot is used within it, which would be added to the folded one.
        """
        return nullcontext()

    @property
    def active(self) -> Slot:
        """The slot in use now."""
        return self._active

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The denoisers that the slots compute with, that of `current` first."""
        return (self.backbone,)

    def parameters(self) -> list[nn.Parameter]:
        """Return what an optimizer trains: the parameters of `current`."""
        return list(self._tensors(Slot.CURRENT).values())

    @torch.no_grad()
    def blend(self, target: str, source: str, decay: float) -> None:
        """Set target to decay * target + (1 - decay) * source; decay 0 copies."""
        if not 0 <= decay <= 1:
            raise InputError(f"decay must be in [0, 1], got {decay}.")
        into, out_of = self._written(target), self._written(source)
        for name, tensor in into.items():
            local(tensor).lerp_(local(out_of[name]), 1 - decay)

    def state(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Return copies of every trained slot's tensors on the CPU, by 'SLOT/PARAMETER', for a checkpoint.

        Where they are divided among processes, all of them must call this, to gather the parts.

        Args:
            keep: whether this process wants them; otherwise it returns {}.
        """
        found = {}
        for name, tensor in self._saved().items():
            gathered = whole(tensor.detach())
            if keep:
                found[name] = gathered.to("cpu", copy=True)
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            CheckpointError: names or shapes are not the same.
        """
        own = self._saved()
        wrong = sorted(own.keys() ^ state.keys())
        wrong = wrong or [name for name in own if own[name].shape != state[name].shape]
        if wrong:
            raise CheckpointError(
                f"The saved {self.kind} slots do not fit this model: {len(wrong)} tensors differ, first {wrong[0]!r}. "
                "Load the checkpoint, and train the layers, that the run began with."
            )
        for name, tensor in own.items():
            local(tensor).copy_(cut(state[name], tensor))

    def _saved(self) -> dict[str, nn.Parameter]:
        return {
            f"{slot.value}/{name}": tensor
            for slot in self._trained
            for name, tensor in self._tensors(slot).items()
        }

    def _written(self, name: str) -> dict[str, nn.Parameter]:
        slot = parse_slot(name)
        if slot is Slot.REFERENCE:
            raise InputError(
                "The reference slot is the backbone itself: it can be neither written nor copied."
            )
        return self._tensors(slot)

    @abstractmethod
    def _tensors(self, slot: Slot) -> dict[str, nn.Parameter]:
        """Return one slot's parameters by a name that is the same in every slot."""

    @abstractmethod
    def _activate(self, slot: Slot) -> None: ...


class LoraSlots(Slots):
    """Three LoRA adapters of equal shape and equal start on a frozen backbone.

    They start equal to the backbone (LoRA's B is zero); `A` is drawn from a generator of its own, seeded by `seed`.
    """

    kind = "LoRA"

    def __init__(
        self, backbone: nn.Module, *, rank: int, alpha: float, targets: tuple[str, ...], seed: int
    ) -> None:
        super().__init__(ADAPTERS)
        if rank < 1:
            raise InputError(f"The LoRA rank must be at least 1, got {rank}.")
        check_torchvision()
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        _require_targets(backbone, targets)
        backbone.requires_grad_(False)
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian"
        )
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            torch.manual_seed(seed)
            for slot in ADAPTERS:
                inject_adapter_in_model(config, backbone, slot.value)
        self._backbone = backbone
        self._layers = [module for module in backbone.modules() if isinstance(module, LoraLayer)]
        self._adapters: dict[Slot, dict[str, nn.Parameter]] = {slot: {} for slot in ADAPTERS}
        for name, parameter in backbone.named_parameters():
            for slot, own in self._adapters.items():
                if f".{slot.value}." in name and "lora_" in name:
                    parameter.data = parameter.data.float()  # whatever the backbone's dtype is
                    own[name.replace(f".{slot.value}.", ".")] = parameter
        if not all(self._adapters.values()):
            raise RunError("None of the LoRA target modules exists in this backbone.")
        self._sums_of_old: list[Tensor] | None = None
        """Each layer's weight with the product of `old` in it, until that changes."""
        self._is_folded = False
        for slot in (Slot.OLD, Slot.EMA):
            self.blend(slot, Slot.CURRENT, 0.0)
        self._activate(Slot.CURRENT)

    @property
    def backbone(self) -> nn.Module:
        return self._backbone

    def all_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of every slot."""
        return [parameter for tensors in self._adapters.values() for parameter in tensors.values()]

    def blend(self, target: str, source: str, decay: float) -> None:
        self._sums_of_old = None
        super().blend(target, source, decay)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._sums_of_old = None
        super().load_state(state)

    @contextmanager
    def folded(self) -> Iterator[None]:
        # Passes differ by rounding from those beside the weights, which in half precision would be more than the slot
        # itself: only full weights may be folded (`TrainedDenoiser.folded`).
        if self._active is Slot.REFERENCE:
            yield
            return
        weights = [layer.get_base_layer().weight for layer in self._layers]
        kept = [weight.data for weight in weights]
        for weight, folded in zip(weights, self._sums(), strict=True):
            weight.data = folded
        for layer in self._layers:
            layer.enable_adapters(False)
        self._is_folded = True
        try:
            yield
        finally:
            self._is_folded = False
            for weight, data in zip(weights, kept, strict=True):
                weight.data = data
            self._activate(self._active)

    @torch.no_grad()
    def _sums(self) -> list[Tensor]:
        """Return each layer's weight with the active slot's product added, in the layers' order."""
        if self._active is Slot.OLD and self._sums_of_old is not None:
            return self._sums_of_old
        self._sums_of_old = None  # never two copies at a time
        with torch.inference_mode(False):
            sums = [
                layer.get_base_layer().weight + layer.get_delta_weight(self._active.value)
                for layer in self._layers
            ]
        if self._active is Slot.OLD:
            self._sums_of_old = sums
        return sums

    def _tensors(self, slot: Slot) -> dict[str, nn.Parameter]:
        return self._adapters[slot]

    def _activate(self, slot: Slot) -> None:
        if self._is_folded:
            raise RunError(
                f"The slot {slot.value!r} was asked for while {self._active.value!r} is folded into the weights. Leave "
                "folded() first."
            )
        for layer in self._layers:
            if slot is Slot.REFERENCE:
                layer.enable_adapters(False)
                continue
            if layer.disable_adapters:
                layer.enable_adapters(True)
            if layer.active_adapters != [slot.value]:  # peft goes through all parameters of the layer
                layer.set_adapter(slot.value)
        self._active = slot
        for adapter, tensors in self._adapters.items():
            for tensor in tensors.values():
                tensor.requires_grad_(adapter is Slot.CURRENT)


class FullSlots(Slots):
    """All weights of a denoiser as `current`, and a whole copy of it for each other slot; float32 throughout."""

    kind = "whole-weight"

    def __init__(
        self,
        denoiser: nn.Module,
        copies: Collection[Slot],
        mesh: DeviceMesh | None = None,
        computing: torch.dtype | None = None,
    ) -> None:
        """Make the copies, equal to the denoiser as it is now, which is the one that is trained from here on.

        Args:
            denoiser: becomes float32 and trainable, in place.
            copies: the slots besides `current`.
            mesh: the processes that divide all of them; None: each has all.
            computing: the dtype in which divided weights are gathered; None: float32.
        """
        super().__init__(slot for slot in ADAPTERS if slot is Slot.CURRENT or slot in copies)
        denoiser.float().requires_grad_(False)
        self._of = {Slot.CURRENT: denoiser}
        for slot in Slot:
            if slot in copies and slot is not Slot.CURRENT:
                self._of[slot] = copy.deepcopy(denoiser)
                if (
                    mesh is not None
                ):  # at once, so that one whole copy at a time is all that a process must hold
                    shard_trained(self._of[slot], mesh, computing)
        denoiser.requires_grad_(True)
        if mesh is not None:
            shard_trained(denoiser, mesh, computing)

    @property
    def backbone(self) -> nn.Module:
        return self._of[self._active]

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(self._of.values())

    def _tensors(self, slot: Slot) -> dict[str, nn.Parameter]:
        return dict(self._require(slot).named_parameters())

    def _activate(self, slot: Slot) -> None:
        self._require(slot)
        self._active = slot

    def _require(self, slot: Slot) -> nn.Module:
        if slot not in self._of:
            raise RunError(
                f"There is no copy of the weights for the slot {slot.value!r}: only those that the method reads are "
                f"kept, {', '.join(self._of)}."
            )
        return self._of[slot]


def slot_sizes(backbone: nn.Module, targets: Sequence[str], rank: int) -> list[int]:
    """Return how many values each trainable tensor of one slot will have, for a backbone that has none yet.

    Raises:
        InputError: a target is no layer that LoRA can change.
    """
    _require_targets(backbone, targets)
    found: list[int] = []
    for name, layer in backbone.named_modules():
        if not _is_target(name, targets):
            continue
        if isinstance(layer, nn.Linear):
            found += [rank * layer.in_features, rank * layer.out_features]
        elif isinstance(layer, nn.Conv2d):
            window = layer.kernel_size[0] * layer.kernel_size[1]
            found += [rank * layer.in_channels * window, rank * layer.out_channels]
    return found


def _is_target(name: str, targets: Sequence[str]) -> bool:
    return any(name == one or name.endswith(f".{one}") for one in targets)


def _require_targets(backbone: nn.Module, targets: Sequence[str]) -> None:
    """Raise InputError where no target, or not one that the caller names, is a layer that LoRA can change."""
    if not targets:
        raise InputError("lora.targets is empty, so nothing would be trained. Leave it out, or name layers.")
    layers = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    unknown = [one for one in targets if not any(_is_target(name, [one]) for name in layers)]
    is_own_list = len(unknown) < len(targets) and not set(unknown) - set(KNOWN_TARGETS)
    if not unknown or is_own_list:  # a family's own list names layers that its smaller models lack
        return
    ends = sorted({_end(name) for name in layers})
    raise InputError(
        f"lora.targets: no layer of the transformer is called {unknown[0]!r}.{did_you_mean(unknown[0], ends)} "
        f"Its layers are {', '.join(ends)}; without the setting its attention is trained."
    )


def _end(name: str) -> str:
    """Return a layer's name within its block: attn.to_q of transformer_blocks.3.attn.to_q."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts[:-1]) if part.isdigit()]
    first = numbers[0] + 1 if numbers else 0
    return ".".join(parts[first:])


def fitting_layers(backbone: nn.Module, lora: Lora, name: str) -> dict[str, nn.Linear]:
    """Return the layers that a LoRA changes, by the shapes of its weights.

    Raises:
        CheckpointError: a module does not exist or has another shape.
    """
    known = dict(backbone.named_modules())
    layers: dict[str, nn.Linear] = {}
    for module, (down, up) in lora.items():
        layer = known.get(module)
        if not isinstance(layer, nn.Linear) or _shape(layer) != [len(up), down.shape[1]]:
            shape = _shape(layer) if isinstance(layer, nn.Linear) else "missing"
            raise CheckpointError(
                f"{name} does not fit this transformer: {module} is {shape} here and "
                f"{[len(up), down.shape[1]]} there. It belongs to another model."
            )
        layers[module] = layer
    return layers


@torch.no_grad()
def merge(backbone: nn.Module, lora: Lora, name: str) -> None:
    """Add a LoRA to a backbone's weights; each sum is rounded once to the weights' dtype.

    A quantized layer is unpacked, and its sum quantized again.

    Raises:
        CheckpointError: as `fitting_layers`; nothing was changed.
    """
    for module, layer in fitting_layers(backbone, lora, name).items():
        down, up = (x.to(layer.weight.device) for x in lora[module])
        set_weight(layer, dense_weight(layer) + up @ down)


def _shape(layer: nn.Linear) -> list[int]:
    return [layer.out_features, layer.in_features]  # the weight of a quantized one is packed


def digest(lora: Lora) -> str:
    """Return a hash of a LoRA's content, 16 hex digits."""
    total = hashlib.sha256()
    for module, pair in sorted(lora.items()):
        for x in pair:
            total.update(module.encode() + x.contiguous().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def slot_lora(state: Mapping[str, Tensor], slot: str, scale: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Return one slot of `LoraSlots.state()` as a `Lora`, with `scale` = alpha / rank put into the ups."""
    own = {key.removeprefix(f"{slot}/"): x for key, x in state.items() if key.startswith(f"{slot}/")}
    modules = [key.removesuffix(DOWN) for key in own if key.endswith(DOWN)]
    return {module: (own[module + DOWN].float(), own[module + UP].float() * scale) for module in modules}


def added(loras: Sequence[Lora]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return one LoRA whose change is the sum of several, such as an imported one and what was trained on top."""
    modules = dict.fromkeys(module for lora in loras for module in lora)
    return {
        module: (
            torch.cat([lora[module][0] for lora in loras if module in lora]),
            torch.cat([lora[module][1] for lora in loras if module in lora], dim=1),
        )
        for module in modules
    }
