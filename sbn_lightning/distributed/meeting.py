"""``meet_afresh``: ranks that torchrun starts again do not read what ranks of an earlier attempt have left behind.

Ranks find each other through a key-value store. With ``torchrun`` the store belongs to torchrun itself and serves all
attempts, and torch uses the same keys in each. So after a restart a rank may read the address, or the NCCL identifier,
of a process that is dead. It then cannot connect, or it waits until the timeout of the process group. Whether this
happens depends on which rank starts first.

Here rank 0 opens a new store for each attempt. It has to tell the others where the store is, and can only do so in the
old store. No key there can be trusted, and neither can the number of the attempt: an agent that joins later counts from
zero. So each rank asks with a word that nobody has used before, and rank 0 answers to that word.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from uuid import uuid4

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch documents it there.

from sbn_lightning.core.errors import SBNError

TIMEOUT = timedelta(minutes=10)  # torch's own default is half an hour for gloo.
_OURS = "sbn_lightning/meeting"
_LOOK = 0.05  # Seconds between two looks into the store.
_opened: list[TCPStore] = []  # The store of rank 0. torch finds it by its port as long as it is there.


def meet_afresh(timeout: timedelta = TIMEOUT) -> None:
    """Give the ranks of this attempt a store of their own, before they make a process group.

    All ranks that torchrun has started must call this. It does nothing if they have called it before, and in programs
    that torchrun has not started.

    Args:
        timeout: How long to wait for ranks that do not come.

    Raises:
        SBNError: If a rank does not come.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or int(os.environ["WORLD_SIZE"]) == 1:
        return
    host, rank, ranks = os.environ["MASTER_ADDR"], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        old = TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
        port = _open(old, host, ranks, timeout) if rank == 0 else _ask(old, host, rank, timeout)
    except RuntimeError as error:
        raise SBNError(f"rank {rank} did not meet the other {ranks - 1} ranks in {timeout}: {error}") from error
    # With these variables rank 0 owns the store that torch connects to.
    os.environ["MASTER_PORT"], os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(port), "False"


def prepare_to_meet(timeout: timedelta | None) -> None:
    """Do what must come before the ranks make a process group.

    NCCL's kernels start before others that wait for the GPU.

    Args:
        timeout: How long to wait for ranks that do not come; None for :data:`TIMEOUT`.

    Raises:
        SBNError: If a rank does not come.
    """
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    meet_afresh(timeout or TIMEOUT)


def _open(old: TCPStore, host: str, ranks: int, timeout: timedelta) -> int:
    """Open a store, and tell all other ranks where it is. Return its port."""
    new = TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    questions = [f"{_OURS}/{rank}" for rank in range(1, ranks)]
    answered: set[str] = set()
    end = time.monotonic() + timeout.total_seconds()
    while (here := new.add("here", 0)) < ranks - 1:
        for question in questions:
            if old.check([question]) and (word := old.get(question).decode()) not in answered:
                old.set(f"{_OURS}/{word}", str(new.port))  # If a dead rank asked, nobody reads the answer.
                answered.add(word)
        if time.monotonic() > end:
            raise RuntimeError(f"{here} came")
        time.sleep(_LOOK)
    _opened.append(new)
    return new.port


def _ask(old: TCPStore, host: str, rank: int, timeout: timedelta) -> int:
    """Ask rank 0 for its store, and say there that this rank has come. Return the port of the store."""
    word = uuid4().hex
    old.set(f"{_OURS}/{rank}", word)
    port = int(old.get(f"{_OURS}/{word}"))  # Waits for the answer.
    TCPStore(host, port, is_master=False, timeout=timeout).add("here", 1)
    return port
