"""Pixrl commands, or functions, in processes that know each other as those of torchrun do, forked to begin at once."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from pixrl import cli

Launch = Callable[..., list[int | None]]


def launching() -> Iterator[Launch]:
    """Yield what runs a command or `act` in processes and returns their exit codes; all of them end with it."""
    # a mutant of tools/mutate_semantic.py lives in this process alone: a server's children would import the original
    server = multiprocessing.get_context(os.environ.get("TESTS_START", "forkserver"))
    server.set_forkserver_preload(["pixrl.jobs.align", "diffusers", "transformers", "peft"])
    begun: list[BaseProcess] = []

    def run(processes: int, *words: str, act: Callable[..., None] = _command) -> list[int | None]:
        port = free_port()
        own = [
            server.Process(target=_play, args=(act, words, rank, processes, port))
            for rank in range(processes)
        ]
        begun.extend(own)
        for process in own:
            process.start()
        for process in own:
            process.join(600)
        return [process.exitcode for process in own]

    yield run
    for process in begun:
        process.kill()
        process.join(60)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _play(act: Callable[..., None], words: Sequence[str], rank: int, processes: int, port: int) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}
    if processes > 1:
        os.environ |= {name: str(number) for name, number in place.items()}
    # a fork inherits what an earlier test's one process was
    AcceleratorState._reset_state(reset_partial_state=True)
    act(*words)
    if dist.is_initialized():
        dist.barrier()  # the store ends with rank 0, which may be done while the others still make their groups


def _command(*words: str) -> None:
    cli.app(list(words), standalone_mode=False)
