"""How large the parts of a checkpoint are and how much memory it computes in, estimated before any weight is loaded.

Sizes come from the headers of safetensors files. Activations come from running the real adapter on tensors that have
shapes and no content (torch's fake tensors), or zeros for small models, and counting what is alive at a time.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import finalize

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from pixrl.device import Precision, quiet_loading
from pixrl.errors import CheckpointError
from pixrl.hub import Checkpoint
from pixrl.hub_check import (
    INDEX,
    T5_COMPONENTS,
    TensorHeader,
    components,
    is_model,
    model_files,
    read_header,
    read_json,
    remedy,
)
from pixrl.models.loading import DENOISERS, PREFIXES, decoder_dtype, part_class
from pixrl.models.memory.plan import Base
from pixrl.models.memory.quantization import is_quantized, quantized_bytes

SMALL_MODEL, SMALL_SIDE = 2**25, 256
"""Parameters, and side in pixels, of a model that computes a picture in a moment with little memory."""
VAE = "vae"
_T5_KEPT_WIDE = ".wo."
"""The weights that transformers keeps in float32 where T5 is loaded in float16."""
_INTEGERS = ("I", "U", "B")
CONTRADICTIONS = (
    RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, AssertionError,
)  # fmt: skip
"""The errors of the model libraries where a config contradicts itself, other configs or the weights."""


@dataclass(frozen=True)
class PartSize:
    """The size of one part of a checkpoint."""

    parameters: int
    bytes: int
    """The bytes that it will take in memory."""


def parameters_of(parts: Mapping[str, PartSize]) -> int:
    """Return the number of parameters of all parts."""
    return sum(part.parameters for part in parts.values())


def part_sizes(
    checkpoint: Checkpoint, precision: Precision, *, t5: bool = True, base: Base = Base.DTYPE
) -> dict[str, PartSize]:
    """Return each part's size in memory, from file headers alone.

    Of a quantized denoiser with its largest matrix once more, unpacked, as it is while that layer computes.

    Raises:
        CheckpointError: a file is missing or cut short.
    """
    return sizes_of(headers(checkpoint, list(_wanted(checkpoint, t5=t5))), checkpoint, precision, base)


def _wanted(checkpoint: Checkpoint, *, t5: bool) -> dict[str, str]:
    """Return the class of each part that is a model, without T5 where it is not wanted."""
    kinds = {name: kind for name, kind in components(checkpoint.folder).items() if is_model(kind)}
    return {name: kind for name, kind in kinds.items() if t5 or name not in T5_COMPONENTS}


def sizes_of(
    found: Mapping[str, Mapping[str, TensorHeader]], checkpoint: Checkpoint, precision: Precision, base: Base
) -> dict[str, PartSize]:
    """Return each part's size in memory, of its tensors."""
    kinds = components(checkpoint.folder)
    sizes = {
        name: _size(tensors, decoder_dtype(precision) if name == VAE else precision.weights, kinds[name])
        for name, tensors in found.items()
    }
    for name in sizes.keys() & set(DENOISERS):
        shapes = [x.shape for key, x in found[name].items() if key.endswith(".weight") and len(x.shape) == 2]
        saved = saved_bytes(shapes, precision.weights, base)
        sizes[name] = PartSize(sizes[name].parameters, sizes[name].bytes - saved)
    return sizes


def saved_bytes(shapes: Sequence[Sequence[int]], dtype: torch.dtype, base: Base) -> int:
    """Return the bytes by which quantized linear layers take less than in the dtype, while one of them computes.

    Args:
        shapes: of the linear layers' weights, each [out, in].
        dtype: the weights' otherwise.
        base: the form that they are kept in.
    """
    quantized = [shape for shape in shapes if is_quantized(shape, base)]
    whole = [math.prod(shape) * dtype.itemsize for shape in quantized]
    return sum(whole) - sum(quantized_bytes(shape, base) for shape in quantized) - max(whole, default=0)


def headers(checkpoint: Checkpoint, parts: Sequence[str]) -> dict[str, dict[str, TensorHeader]]:
    """Return the tensors of each part, from the folder, or from the single file where that holds the part."""
    single = {} if checkpoint.file is None else read_header(checkpoint.file)
    found: dict[str, dict[str, TensorHeader]] = {}
    taken: set[str] = set()
    for name in parts:
        own = {key: x for key, x in single.items() if key.startswith(PREFIXES.get(name, ("\0",)))}
        if name in DENOISERS and single:
            continue
        taken |= own.keys()
        found[name] = own or of_folder(checkpoint.folder / name)
    for name in (name for name in parts if name in DENOISERS and single):
        found[name] = {key: x for key, x in single.items() if key not in taken}
    return found


def imagined_headers(
    checkpoint: Checkpoint, pipeline: Any, *, t5: bool
) -> dict[str, dict[str, TensorHeader]]:
    """Return the tensors that each part's weights would be, by its configs alone.

    Args:
        checkpoint: the configs.
        pipeline: of `empty_pipeline`, whose denoiser and VAE have no content.
        t5: whether SD3's third text encoder is wanted.

    Raises:
        CheckpointError: a config does not describe a model of its class.
    """
    index: Mapping[str, Any] = read_json(checkpoint.folder / INDEX)
    found: dict[str, dict[str, TensorHeader]] = {}
    for name in _wanted(checkpoint, t5=t5):
        if name in (*DENOISERS, VAE):
            part = pipeline.components[name]
        else:
            library, kind = index[name]
            part = empty_text_encoder(part_class(library, kind, checkpoint.folder), checkpoint.folder / name)
        shared = {key for key, _ in part.named_parameters()}
        kept = part.state_dict(keep_vars=True).items()
        found[name] = {
            key: TensorHeader("F32" if x.is_floating_point() else "I64", tuple(x.shape))
            for key, x in kept
            if key in shared or not isinstance(x, nn.Parameter)
        }
    return found


def of_folder(folder: Path) -> dict[str, TensorHeader]:
    """Return the tensors of a part in its own folder.

    Raises:
        CheckpointError: it holds no weights, or a file is missing or cut short.
    """
    files = model_files(folder)
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors weights.")
    return {key: x for file in files for key, x in read_header(file).items()}


def _size(tensors: Mapping[str, TensorHeader], dtype: torch.dtype, kind: str) -> PartSize:
    parameters = total = 0
    for name, tensor in tensors.items():
        count = math.prod(tensor.shape)
        parameters += count
        wide = kind.startswith("T5") and dtype is torch.float16 and _T5_KEPT_WIDE in name
        total += count * (8 if tensor.dtype.startswith(_INTEGERS) else 4 if wide else dtype.itemsize)
    return PartSize(parameters, total)


def empty_pipeline(class_name: str, folder: Path, precision: Precision) -> Any:
    """Return a pipeline without text encoders, whose denoiser and VAE have shapes and no content.

    Raises:
        CheckpointError: a class or a config is not what the installed libraries know.
    """
    import diffusers

    index: Mapping[str, Any] = read_json(folder / INDEX)
    with quiet_loading():
        library, scheduler_class = index["scheduler"]
        scheduler = part_class(library, scheduler_class, folder).from_pretrained(str(folder / "scheduler"))
        parts: dict[str, Any] = {"scheduler": scheduler}
        for name in (one for one in (*DENOISERS, VAE) if one in index):
            library, part_name = index[name]
            kind = part_class(library, part_name, folder)
            try:
                with torch.device("meta"):
                    model: nn.Module = kind.from_config(read_json(folder / name / "config.json"))
            except CONTRADICTIONS as error:
                raise _no_model(folder / name, kind, error) from error
            dtype = decoder_dtype(precision) if name == VAE else precision.weights
            parts[name] = model.to(dtype).requires_grad_(False).eval()
        made = getattr(diffusers, class_name)
        needed = inspect.signature(made.__init__).parameters.values()
        others = {p.name: None for p in needed if p.default is p.empty and p.name not in ("self", *parts)}
        return made(**parts, **others)


def empty_text_encoder(kind: Any, folder: Path) -> nn.Module:
    """Return a text encoder of transformers that has shapes and no content.

    Raises:
        CheckpointError: its config does not describe a model of that class.
    """
    try:
        with quiet_loading(), torch.device("meta"):
            made: nn.Module = kind(kind.config_class.from_pretrained(str(folder), local_files_only=True))
    except (*CONTRADICTIONS, OSError) as error:
        raise _no_model(folder, kind, error) from error
    return made


def _no_model(folder: Path, kind: Any, error: BaseException) -> CheckpointError:
    said = next(iter(str(error).splitlines()), type(error).__name__)
    return CheckpointError(
        f"{folder}/config.json does not describe a {kind.__name__}: {said}. {remedy(folder)}"
    )


@dataclass(frozen=True)
class Cost:
    """The memory that a pass needs beyond the weights."""

    first: int
    """The bytes that one picture takes."""
    each: int
    """The bytes that each further picture takes."""

    def bytes(self, pictures: int) -> int:
        """Return the bytes that several pictures take at a time."""
        return self.first + (pictures - 1) * self.each

    def most(self, room: int) -> int:
        """Return the most pictures that so many bytes hold at a time, and one where they hold none."""
        return max(1, (room - self.first + self.each) // self.each)


@contextmanager
def imagined(*modules: nn.Module, pixels: int) -> Iterator[None]:
    """Give the modules tensors of their shapes, whose content lies on no device yet, and compute with those meanwhile.

    They are zeros where the modules are small, and `pixels`, those of a picture with its references, are few, and else
    torch's fake tensors: those take a tenth of a millisecond an operation, in which a small model has long computed.
    """
    inner = [one for outer in modules for one in outer.modules()]
    weights = [x for one in inner for x in one.parameters(recurse=False)]
    small = sum(x.numel() for x in weights) < SMALL_MODEL and pixels <= SMALL_SIDE**2
    # bfloat16 is imitated by most processors, and slowly
    computed = small and all(x.dtype is torch.float32 for x in weights)
    with nullcontext() if computed else FakeTensorMode(allow_non_fake_inputs=True):
        for module in inner:
            for name, parameter in module.named_parameters(recurse=False):
                content = torch.zeros(parameter.shape, dtype=parameter.dtype, device="cpu")
                module.register_parameter(name, nn.Parameter(content, requires_grad=parameter.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                content = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
                module.register_buffer(name, content, name not in module._non_persistent_buffers_set)
        yield


def cost_of(trial: Callable[[int], object], modules: Sequence[nn.Module]) -> Cost:
    """Return what a pass over pictures needs, measured on one and on two of them within `imagined`.

    Gradients of trained weights lie there already, from the micro-batch before, and are not counted.
    """
    peaks = []
    for count in (2, 1):
        for parameter in (x for module in modules for x in module.parameters() if x.requires_grad):
            parameter.grad = torch.zeros_like(parameter)
        meter = PeakMeter()
        with meter:
            trial(count)
        peaks.append(meter.peak)
        for module in modules:
            module.zero_grad()
    return Cost(peaks[1], max(1, peaks[0] - peaks[1]))


def operations_of(trial: Callable[[int], object]) -> int:
    """Return the floating point operations of a pass over one picture, within `imagined`.

    It is not part of `cost_of`, since torch's counter keeps tensors alive, and knows the products of attention alone
    where no CPU kernel hides them.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trial(1)
    return int(counter.get_total_flops())


class PeakMeter(TorchDispatchMode):
    """A counter of the bytes of tensors that are made while it is active, and of the most that were alive at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_address(x) for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
        for x in tree_flatten(result)[0]:
            if isinstance(x, torch.Tensor) and _address(x) not in self._known | given:
                storage = x.untyped_storage()
                size, address = storage.nbytes(), storage._cdata
                self._known.add(address)
                self.now += size
                self.peak = max(self.peak, self.now)
                finalize(storage, self._end, size, address)
        return result

    def _end(self, size: int, address: int) -> None:
        self._known.discard(address)
        self.now -= size


def _address(x: torch.Tensor) -> int:
    address: int = x.untyped_storage()._cdata
    return address
