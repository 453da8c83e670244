"""The processes of a run, by `torchrun` or `accelerate launch`: gloo on CPUs, NCCL on GPUs. One needs no launcher.

Where no GPU is, `accelerate launch` starts as many as --num_processes says only with --multi_gpu, else one.
"""

from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor

from pixrl.device import choose_device

AnyT = TypeVar("AnyT")


class Team:
    """This process and its peers."""

    def __init__(self, device: str = "auto") -> None:
        """Joins the peers, where a launcher started several processes.

        `device`: that of a run with one process; of several GPUs each process takes its own.

        Raises:
            InputError: the device does not exist.
        """
        asked = choose_device(device)
        self._state = PartialState(cpu=asked.type == "cpu")
        alone = self._state.num_processes == 1
        self.device = str(asked) if alone or asked.type == "cpu" else str(self._state.device)

    @property
    def rank(self) -> int:
        return int(self._state.process_index)

    @property
    def size(self) -> int:
        return int(self._state.num_processes)

    @property
    def leads(self) -> bool:
        """Whether this process writes the logs."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        if self.size == 1:
            return values
        total: Tensor = reduce(values.to(self._state.device), "sum")
        return total.to(values.device)

    def gather(self, value: AnyT) -> list[AnyT]:
        if self.size == 1:
            return [value]
        values: list[AnyT] = gather_object([value])
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        self._state.wait_for_everyone()


def limit_threads(size: int) -> None:
    """Several CPU processes on one machine share its cores instead of each taking all."""
    if size > 1 and not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
