"""Small data and models that train in seconds."""

import os

import pytest
import torch

from tests.distributed.forked_runs import forked_runs  # noqa: F401 (a fixture)

# The tests of several ranks. The first of them runs the jobs of all: see forked_runs.
OF_RANKS = ("tests/distributed/", "tests/fabric/test_sharded_fabric.py")
# Files that take longest. They come first, so that no worker ends with one of them alone.
LONGEST = (
    *OF_RANKS,
    "tests/kernels/test_interpreter.py",
    "tests/docs/test_notebooks.py",
    "tests/research/test_end_to_end.py",
)

# On matrices this small, two threads spend more time waiting for each other than computing. This is true of the
# processes that tests start as well.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give the tests of several ranks to one worker. Another worker with such a test would only wait for the jobs."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return "ranks" if nodeid.startswith(OF_RANKS) else super()._split_scope(nodeid)

    return Scheduler(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_modifyitems(config, items):
    """Put the longest files first if several processes run the tests."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: next((i for i, name in enumerate(LONGEST) if item.nodeid.startswith(name)), 99))


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    """A folder that ``prepare`` wrote: part of the standard library, with the byte tokenizer."""
    from sbn_lightning.data import prepare

    folder = tmp_path_factory.mktemp("tokens") / "stdlib"
    prepare(input="stdlib", output=str(folder), tokenizer="byte", max_bytes=200_000, val_fraction=0.1, num_workers=1)
    return folder


@pytest.fixture
def recordings(monkeypatch):
    """Record on a CPU: the function runs at once, and again in each replay. The list counts both."""
    from sbn_lightning.training import graphs

    calls = {"recorded": 0, "replayed": 0}

    def record(function, pool):
        calls["recorded"] += 1
        function()

        def replay():
            calls["replayed"] += 1
            with torch.enable_grad():
                function()

        return replay

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr("sbn_lightning.training.module.check_graphs", lambda module, trainer: None)
    return calls


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    """Each test writes its logs and checkpoints to a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """Reset torch.compile. torch compiles a function at most eight times a process, so tests would depend on order."""
    torch._dynamo.reset()
