"""Small data and models that train in seconds."""

import pytest
import torch

from tests.distributed.forked_runs import forked_runs  # noqa: F401 (a fixture)

# The tests of several ranks. The first of them runs the jobs of all: see forked_runs.
OF_RANKS = ("tests/distributed/", "tests/fabric/test_sharded_fabric.py")

# On matrices this small, two threads spend more time waiting for each other than computing.
torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give the tests of several ranks to one worker. Another worker with such a test would only wait for the jobs."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return "ranks" if nodeid.startswith(OF_RANKS) else super()._split_scope(nodeid)

    return Scheduler(config, log) if config.getvalue("dist") == "loadscope" else None


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    """A folder that ``prepare`` wrote: part of the standard library, with the byte tokenizer."""
    from sbn_lightning.data import prepare

    folder = tmp_path_factory.mktemp("tokens") / "stdlib"
    prepare(input="stdlib", output=str(folder), tokenizer="byte", max_bytes=200_000, val_fraction=0.1, num_workers=1)
    return folder


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    """Each test writes its logs and checkpoints to a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """Reset torch.compile. torch compiles a function at most eight times a process, so tests would depend on order."""
    torch._dynamo.reset()
