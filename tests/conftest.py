"""Small data and models that train in seconds."""

import pytest
import torch

from tests.distributed.forked_runs import forked_runs  # noqa: F401 (a fixture)

# On matrices this small, two threads spend more time waiting for each other than computing.
torch.set_num_threads(1)


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
