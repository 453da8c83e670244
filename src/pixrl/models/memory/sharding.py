"""What is done to a transformer block by block: dividing its weights among processes, and compiling it.

Weights are divided by torch's `fully_shard` (FSDP2).

Each process keeps its part of every weight. A block's weights are gathered before the block computes, forwards and
backwards, and given back after it, so that all processes must make the same passes in the same order. LoRA stays whole
on each: its gradients are summed as without sharding, so slots, optimizer and checkpoints are the same, bit for bit.
Divided with its block, LoRA would be gathered in float32 with every pass, not its gradient summed once an update.

Where all weights are trained, their gradients, moments and copies are divided like them: FSDP2 sums each block's
gradient over the processes in its backward pass, in float32, and a process keeps its part. Weights are gathered in the
dtype that matrix products take. What leaves a process (checkpoints) is gathered whole.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pixrl.errors import ConfigError, did_you_mean

GATHERED = 2
"""Blocks whose weights are whole at a time: the one that computes, and the next one, gathered meanwhile."""
VARIANTS = 256
"""The most times that one block may be compiled: slots x gradients x kinds of block x sizes. torch's own limit is 8."""


def transformer_blocks(transformer: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model repeats: those that diffusers names, or all that stand in its lists; else []."""
    names = set(getattr(transformer, "_repeated_blocks", None) or ())
    named = [one for one in transformer.modules() if names & {kind.__name__ for kind in type(one).__mro__}]
    return named or [
        one for part in transformer.children() if isinstance(part, nn.ModuleList) for one in part
    ]


def require_blocks(transformer: nn.Module) -> list[nn.Module]:
    """Return the blocks that can be sharded one by one.

    Raises:
        ConfigError: there are none, or weights are quantized, whose scales FSDP2 would not gather with them.
    """
    blocks = transformer_blocks(transformer)
    if not blocks:
        raise ConfigError(
            f"machine.shard: {type(transformer).__name__} has no list of blocks, by which its weights would be divided "
            "among processes. Set machine.shard=none."
        )
    quantized = [name for name, x in transformer.named_parameters() if not x.is_floating_point()]
    if quantized:
        raise ConfigError(
            f"machine.shard: {len(quantized)} quantized weights, first {quantized[0]}, cannot be divided among "
            "processes. Set machine.shard=none, or take the weights as they are published."
        )
    return blocks


def shard(transformer: nn.Module, mesh: DeviceMesh, whole: Collection[nn.Parameter]) -> None:
    """Divide the weights of a transformer among the processes of a mesh and move this process's part to its device.

    Args:
        transformer: with the LoRA layers already attached; may lie on the CPU.
        mesh: one dimension, over all processes.
        whole: the parameters that every process keeps whole: LoRA's.

    Raises:
        ConfigError: it has no list of blocks.
    """
    blocks = require_blocks(transformer)
    for parameter in whole:
        parameter.data = parameter.data.to(mesh.device_type)
    for module in (*blocks, transformer):
        fully_shard(module, mesh=mesh, ignored_params=set(whole))


def shard_trained(transformer: nn.Module, mesh: DeviceMesh, computing: torch.dtype | None) -> None:
    """Divide a transformer of which all weights are trained, or a copy of one, among the processes of a mesh.

    Gradients are summed over processes, not averaged: each process's loss is a sum divided by the terms of all.
    Nothing stays gathered after a pass, since weights change between two passes without gradients.

    Args:
        transformer: in float32; may lie on the CPU.
        mesh: of all processes; of two dimensions where each host holds a copy: hosts, and processes of a host.
        computing: the dtype of matrix products; None: float32.

    Raises:
        ConfigError: it has no list of blocks.
    """
    precision = MixedPrecisionPolicy(
        param_dtype=computing, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*require_blocks(transformer), transformer):
        made = fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
        assert isinstance(made, FSDPModule)
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)  # gloo knows no other reduction with a factor


def local(x: Tensor) -> Tensor:
    """Return this process's part of a tensor, sharing its memory; the tensor itself where it is whole."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """Return a tensor with the parts of all processes, all of which must call this where it is divided."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def cut(x: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that this process has of `like`, without asking the others."""
    return local(divided(x, like))


def divided(x: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, which every process has, divided as `like` is; as it is where that is whole."""
    if not isinstance(like, DTensor):
        return x
    here = x.to(like.device)
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


def sharded_bytes(transformer: nn.Module, processes: int) -> int:
    """Return the most bytes of its weights on one process: its part, what is no block, and the blocks in use.

    What belongs to no block (embeddings, the output layers) stays gathered from its first use on.

    Raises:
        ConfigError: it has no list of blocks.
    """
    sizes = [_bytes(block) for block in require_blocks(transformer)]
    total = _bytes(transformer)
    return -(-total // processes) + total - sum(sizes) + sum(sorted(sizes)[-GATHERED:])


def gathered_bytes(transformer: nn.Module, computing: torch.dtype) -> int:
    """Return the most bytes of trained weights that are whole at a time on one process, beside its part.

    That is what is no block, the blocks in use, and a gradient: in the computing dtype, and in float32 to be summed.

    Raises:
        ConfigError: it has no list of blocks.
    """
    sizes = sorted(_count(block) for block in require_blocks(transformer))
    rest = _count(transformer) - sum(sizes)
    gradient = max(rest, sizes[-1]) * (computing.itemsize + torch.float32.itemsize)
    return (rest + sum(sizes[-GATHERED:])) * computing.itemsize + gradient


def _count(module: nn.Module) -> int:
    return sum(x.numel() for x in module.parameters())


def _bytes(module: nn.Module) -> int:
    frozen = (x for name, x in module.named_parameters() if "lora_" not in name)
    return sum(x.numel() * x.element_size() for x in frozen)


def compile_blocks(denoiser: nn.Module, backend: str) -> int:
    """Compile every transformer block in place by torch.compile and return how many there are.

    LoRA layers must be attached already.

    The blocks of a transformer are alike, so one compiled block serves all of them: minutes less to wait than for the
    whole model, at the speed of the whole. What differs between calls is compiled anew: each LoRA slot, with gradients
    and without, and a second batch size (from the third on sizes are symbols).
    Past `VARIANTS` torch would go back to uncompiled code in silence; here it raises. This is set for the process.

    Args:
        denoiser: keeps its blocks in lists, as those of diffusers do.
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
    blocks = transformer_blocks(denoiser)
    if not blocks:
        raise ConfigError(
            f"{type(denoiser).__name__} has no list of blocks to compile. Leave out machine.compile."
        )
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in blocks:
        block.compile(backend=backend)
    return len(blocks)
