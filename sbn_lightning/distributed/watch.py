"""``Watch``: every rank of a run learns why the run ended, and no rank waits for one that is gone.

If one rank fails, the others stand in a collective that never ends. torch gives up after the timeout of the process
group, ten minutes and more, and then names the collective and not the cause. So each rank has a thread that talks to
the store of the process group, apart from collectives:

* A rank that fails writes its cause into the store. The first cause counts, because later ones are consequences.
* Each rank writes a sign of life every second, and looks at the sign of the next rank. A rank that was killed writes no
  cause, so its silence is the cause, and the rank before it writes that.
* A rank whose collective fails asks all ranks to be less patient, because a connection to some rank has broken.
* A rank that reads a cause waits a little, because most ranks end by themselves: a broken connection raises an error.
  Then it prints the cause and ends the process. The host may be stuck in a collective at this point, where no Python
  exception reaches it. Checkpoints are whole or not there (:mod:`sbn_lightning.checkpoints.io`), so nothing is lost.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from itertools import count

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from sbn_lightning.core.errors import ConfigError

BEAT = 1.0  # Seconds between signs of life.
BROKEN = 6.0  # The most seconds that a rank may be silent once a connection has broken.
STATUS = 1  # The exit status of a rank that ends because of another one.
GONE = "rank 0: gone, and the store of the process group with it"
_runs = count()  # Runs of this process. All ranks count alike, so the number makes keys of a run unique.


class Watch:
    """Watches the ranks of one run. Construct it on all ranks, when the process group is there.

    Args:
        silence: The seconds without a sign of life after which a rank counts as gone.
        grace: The seconds that a rank has to end by itself after another one has failed.
    """

    def __init__(self, silence: float, grace: float) -> None:
        self.silence, self.grace = silence, grace
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._prefix = f"sbn_lightning/{next(_runs)}"
        self._store = _get_default_store()
        self._known: str | None = None  # The cause, once this rank has read it. The store may be gone by then.
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sbn_lightning watch", daemon=True)

    def start(self) -> None:
        """Start to send and to expect signs of life."""
        self._store.set(f"{self._prefix}/beat/{self.rank}", "0")
        dist.barrier()  # Every rank has sent its first sign.
        self._thread.start()

    def stop(self) -> None:
        """End the thread. A rank that has reached the end of the run is not gone."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(self.silence)  # A sign of life that is on its way would replace the last one.
        if self.cause() is None:
            with suppress(RuntimeError):  # Rank 0 may have ended, and the store with it.
                self._store.set(f"{self._prefix}/beat/{self.rank}", "done")

    def report(self, cause: str) -> str:
        """Write down why this rank fails, unless another rank has failed before. Return the first cause."""
        own = f"rank {self.rank}: {cause}"
        if self.cause() is None:
            try:
                self._known = self._store.compare_set(f"{self._prefix}/cause", "", own).decode() or own
            except RuntimeError:
                self._known = GONE
            time.sleep(3 * BEAT)  # The store may end with this process, so the others have time to read the cause.
        assert self._known is not None
        return self._known

    def cause(self) -> str | None:
        """The first cause that a rank has written down; None if all is well."""
        key = f"{self._prefix}/cause"
        if self._known is None:
            try:
                self._known = self._store.get(key).decode() if self._store.check([key]) else None
            except RuntimeError:
                self._known = GONE
        return self._known

    def wait_for_cause(self) -> str | None:
        """Wait for the cause, because a connection to another rank has broken.

        Returns:
            The cause that a rank has written down; None if that takes longer than ranks may be silent.
        """
        end = time.monotonic() + self.silence + 5 * BEAT
        with suppress(RuntimeError):  # The store may be gone.
            self._store.set(f"{self._prefix}/broken", "")
        while time.monotonic() < end:
            if (cause := self.cause()) is not None:
                return cause
            time.sleep(BEAT / 4)
        return None

    def _watch(self) -> None:
        # The connection of the process group may be busy for minutes, for example while another rank starts.
        store = self._store.clone()
        store.set_timeout(timedelta(seconds=self.silence))
        following = (self.rank + 1) % self.ranks
        mine, its = f"{self._prefix}/beat/{self.rank}", f"{self._prefix}/beat/{following}"
        last, changed, zero = b"", time.monotonic(), b""
        for beat in count(1):
            if self._ended.wait(BEAT):
                return
            try:
                store.set(mine, str(beat))
                if store.check([f"{self._prefix}/cause"]):
                    self._known = store.get(f"{self._prefix}/cause").decode()
                    break
                sign, zero = store.get(its), store.get(f"{self._prefix}/beat/0")
                if sign != last:
                    last, changed = sign, time.monotonic()
                limit = self.silence
                if store.check([f"{self._prefix}/broken"]):
                    limit = min(limit, BROKEN)
                if last != b"done" and time.monotonic() - changed > limit:
                    silent = f"rank {following}: gone without a word for {limit:g} seconds; was it killed?"
                    store.compare_set(f"{self._prefix}/cause", "", silent)
            except RuntimeError:
                # Rank 0 owns the store. (torchrun does in a program that does not call `meet_afresh`.)
                if zero == b"done":
                    return
                self._known = self._known or GONE
                break
        if not self._ended.wait(self.grace):
            tell(self.rank, str(self._known))
            sys.stdout.flush()
            os._exit(STATUS)


def tell(rank: int, cause: str) -> None:
    """Print on this rank why the run ends."""
    print(f"rank {rank} ends because of {cause}", file=sys.stderr, flush=True)


def is_consequence(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone."""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "recvValue failed")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def check_recipes_are_equal(recipe: dict[str, str]) -> None:
    """Refuse to train if ranks were started with different recipes. All ranks must call this together.

    Args:
        recipe: The options of this rank by name, as text.

    Raises:
        ConfigError: On every rank, if a rank has other options than rank 0. The message names the rank and the options.
    """
    recipes: list[dict[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(recipes, recipe)
    first = recipes[0]
    assert first is not None
    for rank, other in enumerate(recipes):
        assert other is not None
        names = [name for name in sorted({*first, *other}) if first.get(name) != other.get(name)]
        if names:
            told = ", ".join(f"{n}={other.get(n, 'nothing')}, not {first.get(n, 'nothing')}" for n in names[:3])
            more = f", and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(f"rank {rank} has another recipe than rank 0: {told}{more}; start all ranks alike")
