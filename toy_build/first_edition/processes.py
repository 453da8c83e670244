"""Several processes that train one stage together, started by torchrun; alone, every function here does nothing."""

import os

import torch.distributed as dist


def join() -> None:
    """Meet the other processes when torchrun started this one."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        dist.init_process_group()


def leads() -> bool:
    """Whether this process writes the files: the only one, or torchrun's first."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def launcher() -> str:
    """What stands before the command that started these processes."""
    return f"torchrun --nproc-per-node {dist.get_world_size()} -m " if dist.is_initialized() else ""
