"""Small data and models that train in seconds."""

import pytest
import torch

# Two threads on matrices this small wait for each other more than they compute.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    """A prepared folder: part of the standard library as bytes."""
    from sbn_lightning.data import prepare

    folder = tmp_path_factory.mktemp("tokens") / "stdlib"
    prepare(input="stdlib", output=str(folder), tokenizer="byte", max_bytes=200_000, val_fraction=0.1, num_workers=1)
    return folder


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    """Logs and checkpoints of a test land in its own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """torch compiles a function eight times a process, then runs it as it is: tests would depend on their order."""
    torch._dynamo.reset()
