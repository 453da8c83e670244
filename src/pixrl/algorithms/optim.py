"""AdamW in 32 and in 8 bits, and their moments as tensors for a checkpoint.

The 8-bit one keeps both moments of large tensors as bytes with a scale for every 256 values (Dettmers et al., 2022,
"8-bit Optimizers via Block-wise Quantization"); tensors below 4096 values stay in 32 bits.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pixrl.errors import CheckpointError
from pixrl.libraries import bitsandbytes
from pixrl.models.memory.sharding import divided, whole

SMALLEST, BLOCK = 4096, 256
"""The number of values of the smallest tensor that is kept in bytes, and of those that share a scale."""
_STEP = "step"


def adamw(parameters: Iterable[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """Return torch's own AdamW, in one kernel."""
    return torch.optim.AdamW(parameters, fused=True, **settings)


def adamw_8bit(parameters: Iterable[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """Return the 8-bit AdamW of bitsandbytes.

    Raises:
        RunError: that package is not installed.
    """
    made: torch.optim.Optimizer = bitsandbytes("optimizer.eight_bit").optim.AdamW8bit(parameters, **settings)
    return made


def moment_bytes(sizes: Sequence[int], *, eight_bit: bool) -> int:
    """Return the bytes of the optimizer's moments of parameters of these sizes, after its first step."""
    if not eight_bit:
        return sum(8 * size + 4 for size in sizes)  # two moments, and the number of steps
    tables = 2 * 256 * 4
    return sum(8 * size if size < SMALLEST else 2 * size + 2 * 4 * -(-size // BLOCK) for size in sizes) + (
        tables if any(size >= SMALLEST for size in sizes) else 0
    )


def moments(optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, Tensor]:
    """Return an optimizer's moments, 'PARAMETER/NAME' -> a copy on the CPU; parameters are counted from 0.

    Where they are divided among processes, all of them must call this, to gather the parts.

    Args:
        optimizer: of any class of torch or bitsandbytes.
        keep: whether this process wants them; otherwise it returns {}.
    """
    found = {}
    for place, parameter in enumerate(_parameters(optimizer)):
        for name, x in optimizer.state.get(parameter, {}).items():
            gathered = whole(torch.as_tensor(x).detach())
            if keep:
                found[f"{place}/{name}"] = gathered.to("cpu", copy=True)
    return found


def restore_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back the moments that `moments` gave.

    Raises:
        CheckpointError: it was another optimizer's.
    """
    known = _parameters(optimizer)
    states: dict[int, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        place, _, key = name.partition("/")
        states.setdefault(int(place), {})[key] = x
    is_bytes = any(x.dtype is torch.uint8 for x in tensors.values())
    in_bytes = not isinstance(optimizer, torch.optim.AdamW)
    if (is_bytes and not in_bytes) or max(states, default=-1) >= len(known):
        raise CheckpointError(
            "The optimizer's moments in the checkpoint are those of another optimizer: put optimizer.eight_bit, train "
            "and the LoRA settings back to what the run began with."
        )
    if not in_bytes:
        for number, state in states.items():
            state |= {key: divided(x, known[number]) for key, x in state.items() if key != _STEP}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})
        return
    for number, state in states.items():
        parameter = known[number]
        optimizer.state[parameter] = {
            name: int(x.item()) if name == _STEP else x.to(parameter.device) for name, x in state.items()
        }


def _parameters(optimizer: torch.optim.Optimizer) -> Sequence[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
