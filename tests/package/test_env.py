"""``sbn env`` says what a bug report needs."""

import platform

import pytest
import torch

import sbn_lightning
from sbn_lightning.backends.selection import describe
from sbn_lightning.cli import main


def test_it_names_versions_and_every_kernel(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    for value in (sbn_lightning.__version__, platform.python_version(), torch.__version__):
        assert value in printed
    for row in describe():
        assert row.kernel in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs some of the kernels")
def test_it_says_why_a_kernel_does_not_run(capsys):
    main(["env"])
    printed = capsys.readouterr().out
    reasons = {row.reason for row in describe()} - {None}
    assert reasons
    assert all(reason in printed for reason in reasons)


def test_it_names_variables_that_are_set(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "somewhere")
    monkeypatch.delenv("NCCL_DEBUG", raising=False)
    main(["env"])
    printed = capsys.readouterr().out
    assert "somewhere" in printed
    assert "NCCL_DEBUG" not in printed
