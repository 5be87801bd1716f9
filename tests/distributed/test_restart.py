"""``torchrun --max-restarts`` starts a recipe again after a rank was killed, and the run goes on where it was saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cli.test_cli import RECIPE, small

pytestmark = pytest.mark.timeout(900)  # Four processes import Lightning.
ROOT = Path(__file__).parents[2]


def test_torchrun_goes_on_from_the_last_checkpoint(tokens, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    command += [str(ROOT / "cli.py"), "fit", f"--config={RECIPE}"]
    command += small(tokens, "--trainer.max_steps=4", "--trainer.devices=2", "--trainer.strategy=sbn_fsdp2")
    command += ["--ckpt_path=last", "--trainer.limit_val_batches=0", "--rank_watch.silence=20"]
    command += ["--trainer.callbacks=tests.distributed.jobs.Fault", "--trainer.callbacks.kind=killed"]
    command += ["--trainer.callbacks.rank=1", "--trainer.callbacks.step=2"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exitcode" in done.stderr or "Signal 9" in done.stderr or "SIGKILL" in done.stderr, done.stderr[-3000:]
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 4
    assert "training starts anew" in done.stdout  # the first time
    assert f"the checkpoint path at {last.relative_to(tmp_path)}" in done.stderr
