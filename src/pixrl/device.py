"""The device that a model runs on, its precision, attention that is fast on it, and quiet loading."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixrl.errors import InputError
from pixrl.libraries import check_torchvision

_MEMINFO = Path("/proc/meminfo")


class DType(StrEnum):
    """The precision that a caller may ask for."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@dataclass(frozen=True)
class Precision:
    """The dtype that parameters are kept in, and the dtype that matrix products run in (None: the parameters')."""

    weights: torch.dtype
    autocast: torch.dtype | None

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Return autocast where it is wanted, else a context without effect."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


def choose_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is the first GPU when there is one.

    Raises:
        InputError: the name is unknown, or there is no GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu" or name.partition(":")[0] == "cuda":
        if name != "cpu" and not torch.cuda.is_available():
            raise InputError(f"device {name!r}: no CUDA GPU is available. Use 'auto' or 'cpu'.")
        return torch.device(name)
    raise InputError(f"Unknown device {name!r}. Use 'auto', 'cpu', 'cuda' or 'cuda:N'.")


def choose_precision(device: torch.device, dtype: str, on_gpu: DType = DType.BFLOAT16) -> Precision:
    """Return the precision for a dtype: float32 parameters with bfloat16 autocast on a CPU, the dtype itself on a GPU.

    `auto` is `on_gpu` on a GPU, bfloat16 on a CPU with AVX512-BF16 instructions, else float32.

    Raises:
        InputError: the dtype is unknown, or float16 on a CPU.
    """
    if dtype not in list(DType):
        raise InputError(f"Unknown dtype {dtype!r}. Use one of {', '.join(DType)}.")
    asked = DType(dtype)
    if asked is DType.AUTO:
        on_cpu = DType.BFLOAT16 if cpu_has_bfloat16() else DType.FLOAT32
        asked = on_gpu if device.type == "cuda" else on_cpu
    if asked is DType.FLOAT32:
        return Precision(torch.float32, None)
    if device.type == "cpu":
        if asked is DType.FLOAT16:
            raise InputError("dtype 'float16' needs a GPU. On a CPU use 'auto', 'float32' or 'bfloat16'.")
        return Precision(torch.float32, torch.bfloat16)
    low = torch.bfloat16 if asked is DType.BFLOAT16 else torch.float16
    return Precision(low, low)


@cache
def cpu_has_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 in hardware."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx512_bf16" in info.read_text(encoding="utf-8", errors="replace")


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free now on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence progress bars and advice of diffusers and transformers while it is open; errors still come through.

    Raises:
        RunError: they cannot be imported, because torchvision was built for another torch.
    """
    check_torchvision()
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    levels = [(module, module.get_verbosity()) for module in (diffusers_logging, transformers_logging)]
    for module, _ in levels:
        module.disable_progress_bar()
        module.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.enable_progress_bar()
        if bars:
            transformers_logging.enable_progress_bar()
        for module, level in levels:
            module.set_verbosity(level)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Make `scaled_dot_product_attention` plain matrix products, in the dtype that it is given, while it is open.

    torch's fused kernel saves memory that short sequences do not need, and its backward pass is slow in bfloat16 on a
    CPU. There plain matrix products are faster in an update and no farther from float32; forwards alone, and in full
    precision, the fused kernel is (`benchmarks/align.py`, "fused attention").
    """
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
