"""One teacher for several students that read the same text, each in a process with a GPU of its own.

The students of a comparison differ in their pattern alone: their seed is the same, and so are the windows of each step.
Each process would compute the same hidden states of the teacher. Here the processes take turns. For a round of as many
steps as there are processes, process r computes the hidden states of step r, and all of them exchange the results. (The
logits are not exchanged. They are a hundred times as large, and quickly computed.)

The processes then wait for each other once in a round. They must stop at the same step, and continue from the same one.
``torchrun`` starts them, one for each GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models.transformer import TernaryTransformer

# The number of steps between two looks at the clock. All processes have to agree on what they see.
LOOK_EVERY = 16
# The most seconds that a process waits for the others. In the first step all of them compile.
PATIENCE = 180


class SharedTeacher:
    """The teacher's hidden states of the present step, always in the same tensor, as CUDA graphs need it.

    Args:
        teacher: The teacher, whole in each process. Processes that do not form a group yet form one here.
        shape: The number of sequences of a step, and their length.
    """

    def __init__(self, teacher: TernaryTransformer, shape: tuple[int, int]) -> None:
        self.teacher = teacher
        if not dist.is_initialized():
            backend = "nccl" if teacher.lm_head.weight.is_cuda else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=PATIENCE))
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        weight = teacher.lm_head.weight
        self._round = weight.new_zeros(self.count, *shape, teacher.config.d_model)
        self._first: int | None = None  # The first step of the round that was computed.
        self.hidden = torch.zeros_like(self._round[0])

    def check(self, step: int, steps: int, seed: int) -> None:
        """Check that all processes are at the same step of trainings of the same length and seed.

        Raises:
            ConfigError: If they are not.
        """
        found: list[tuple[int, int, int] | None] = [None] * self.count
        dist.all_gather_object(found, (step, steps, seed))
        if len(set(found)) > 1:
            raise ConfigError(f"students of one teacher need the same step, number of steps and seed, not {found}")

    @torch.no_grad()
    def advance(self, step: int, windows: Callable[[int], Tensor]) -> None:
        """Write the hidden states of a step to ``hidden``.

        Args:
            step: The number of the step.
            windows: A function from the number of a step to its token ids, int64 ``[sequences, length]``.
        """
        first = step // self.count * self.count
        if self._first != first:
            mine = self.teacher.hidden(windows(first + self.rank)).to(self._round.dtype)
            dist.all_gather(list(self._round.unbind()), mine.contiguous())
            self._first = first
        self.hidden.copy_(self._round[step - first])

    def agree(self, late: bool) -> bool:
        """Return whether any process is late.

        Args:
            late: Whether this process is late.
        """
        votes = torch.tensor(float(late), device=self.hidden.device)
        dist.all_reduce(votes)
        return bool(votes)
