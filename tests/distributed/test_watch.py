"""``Watch`` on one process: what it says of a rank, and which errors are only consequences."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from sbn_lightning.callbacks import RankWatch
from sbn_lightning.callbacks.rank_watch import because_of
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed import watch as watching
from sbn_lightning.distributed.watch import Watch, is_consequence


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_first_cause_counts(alone, monkeypatch):
    monkeypatch.setattr(watching, "BEAT", 0.01)  # A rank that fails gives the others three beats to read its cause.
    watch = Watch(silence=1, grace=1)
    assert watch.cause() is None
    assert watch.report("DataError: no room") == "rank 0: DataError: no room"
    assert watch.report("RuntimeError: later") == "rank 0: DataError: no room"
    assert Watch(silence=1, grace=1).cause() is None  # another run of the same process


def test_errors_that_only_say_that_another_rank_is_gone():
    assert is_consequence(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert is_consequence(dist.DistBackendError("NCCL error"))
    assert not is_consequence(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_consequence(ConfigError("Connection closed"))


@pytest.mark.parametrize("name", ["silence", "grace"])
def test_seconds_must_be_positive(name):
    with pytest.raises(ConfigError, match=f"{name}=0 must be more than 0 seconds"):
        RankWatch(**{name: 0})


class SlowStore:
    """A store in which a sign of life takes a while."""

    def __init__(self, store):
        self.store, self.on_its_way = store, threading.Event()

    def clone(self):
        return self

    def set(self, key, value):
        if value.isdecimal() and value != "0":
            self.on_its_way.set()
            time.sleep(0.3)
        self.store.set(key, value)

    def __getattr__(self, name):
        return getattr(self.store, name)


def test_the_last_sign_of_a_rank_says_that_it_is_done(alone, monkeypatch):
    """A sign of life that is on its way when the run ends must not come after it: the rank would count as gone."""
    monkeypatch.setattr(watching, "BEAT", 0.01)
    watch = Watch(silence=5, grace=5)
    store = watch._store = SlowStore(watch._store)
    watch.start()
    assert store.on_its_way.wait(5)
    watch.stop()
    watch._thread.join()
    assert store.get(f"{watch._prefix}/beat/0") == b"done"


def test_a_store_that_vanishes_hides_no_error(alone, monkeypatch):
    monkeypatch.setattr(watching, "BEAT", 0.01)
    watch = Watch(silence=1, grace=1)

    class Vanishing:
        def check(self, keys):
            return False

        def compare_set(self, *args):
            raise dist.DistNetworkError("Connection reset by peer")

        set = compare_set

    watch._store = Vanishing()
    watch.stop()
    assert watch.report("DataError: no room") == watching.GONE


@pytest.mark.parametrize(
    "cause", ["rank 1: OutOfMemoryError: no memory", "rank 1: DataError: make room and continue with --ckpt_path last"]
)
def test_an_error_says_once_how_to_go_on(cause):
    assert because_of(cause).startswith(f"this rank ends because of {cause}")
    assert because_of(cause).count("--ckpt_path last") == 1
