"""The launcher of ``sbn_ddp`` and ``sbn_fsdp2``, for a Trainer that starts its ranks itself, without torchrun or Slurm.

Lightning kills all ranks within five seconds if one has ended with an error. The others could then not say why they
end, or finish what they are writing. With the callback :class:`~sbn_lightning.callbacks.rank_watch.RankWatch` they end
by themselves, so this launcher waits that long before it kills them.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from typing_extensions import override

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

MORE = 10.0  # Seconds, besides those of the callback, for imports that are under way, and for the exit of a process.


class PatientLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks of this node. Kills them only if they do not end by themselves."""

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            Observer(self.procs, patience(trainer)).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


class Observer(_ChildProcessObserver):
    """Watches the processes of the other ranks, in a thread of rank 0.

    Args:
        processes: The processes.
        patience: The seconds that all ranks have to end by themselves after one has ended with an error.
    """

    def __init__(self, processes: list[subprocess.Popen[Any]], patience: float) -> None:
        super().__init__(os.getpid(), processes)
        self.processes, self.patience = processes, patience

    @override
    def _run(self) -> bool:
        if any(process.poll() for process in self.processes):
            time.sleep(self.patience)
        return super()._run()


def patience(trainer: Trainer | None) -> float:
    """The seconds in which all ranks of a run end by themselves if one fails; 0 if no callback makes them end.

    Args:
        trainer: The Trainer of the run, if there is one.
    """
    seconds = [getattr(callback, "seconds_to_end", 0.0) for callback in getattr(trainer, "callbacks", ())]
    return max(seconds, default=0.0) + MORE if any(seconds) else 0.0
