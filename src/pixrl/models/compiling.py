"""torch.compile for the transformer of a policy, block by block.

The blocks of a transformer are alike, so one compiled block serves all of them (regional compilation): minutes less to
wait than for the whole model, at the speed of the whole. What differs between calls is compiled anew: each LoRA slot,
with gradients and without, and a second batch size (from the third on sizes are symbols).
"""

import torch
from torch import nn

from pixrl.errors import ConfigError, did_you_mean

VARIANTS = 256
"""How often one block may be compiled: slots x gradients x kinds of block x sizes. torch's own limit is 8."""


def compile_blocks(transformer: nn.Module, backend: str) -> int:
    """Compiles every transformer block in place; how many. LoRA layers must be attached already.

    Past `VARIANTS` torch would go back to uncompiled code in silence; here it raises. This is set for the process.

    Args:
        transformer: keeps its blocks in lists, as those of diffusers do.
        backend: of torch.compile: inductor, or another that this installation has.

    Raises:
        ConfigError: there is no such backend, or the model has no blocks.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(
            f"torch.compile has no backend {backend!r} here.{did_you_mean(backend, known)} Usual is inductor; "
            f"there are {', '.join(sorted(known))}."
        )
    blocks = [one for part in transformer.children() if isinstance(part, nn.ModuleList) for one in part]
    if not blocks:
        raise ConfigError(
            f"{type(transformer).__name__} has no list of blocks to compile. Leave out machine.compile."
        )
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in blocks:
        block.compile(backend=backend)
    return len(blocks)
