"""DDP and FSDP2 on two CPU processes against one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

from sbn_lightning.distributed import check_strategy
from sbn_lightning.errors import ConfigError

ROOT = Path(__file__).parents[2]
STEPS = 6


def start(strategy, output, steps=STEPS, processes=1, checkpoint=None):
    output.mkdir()
    run = [sys.executable]
    if processes > 1:
        run += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*run, str(ROOT / "tests/distributed/worker.py"), strategy, str(output), str(steps)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += [str(checkpoint)] if checkpoint else []
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=output)


def launch(strategy, output, steps=STEPS, processes=1, checkpoint=None):
    done = start(strategy, output, steps, processes, checkpoint)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(output / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return launch("auto", tmp_path_factory.mktemp("single") / "run")[0]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_one(strategy, single, tmp_path):
    ranks = launch(strategy, tmp_path / "run", processes=2)
    for step in range(STEPS):
        for name, mask in single["masks"][step].items():
            for rank in ranks:
                assert torch.equal(rank["masks"][step][name], mask)
                torch.testing.assert_close(rank["gammas"][step][name], single["gammas"][step][name], rtol=1e-5, atol=0)
        # No rank sees another's samples, and together they see the single process's.
        rows = torch.cat([rank["samples"][step] for rank in ranks])
        together, alone = ({tuple(row) for row in batch.tolist()} for batch in (rows, single["samples"][step]))
        assert together == alone
        assert len(together) == len(rows)
    assert ranks[0]["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert [rank["counts"] for rank in ranks] == [single["counts"]] * 2
    assert ranks[0]["ignored"] == sorted(f"{name}.mask_bits" for name in single["counts"])


def test_ranks_left_for_tensor_parallelism_are_refused(tmp_path):
    done = start("fsdp2-auto", tmp_path / "run", processes=2)
    assert "data_parallel_size=2, tensor_parallel_size=1" in done.stderr


def test_strategies_that_flatten_weights_are_refused():
    check_strategy(DDPStrategy())
    with pytest.raises(ConfigError, match="FSDPStrategy flattens weights.*ModelParallelStrategy"):
        check_strategy(object.__new__(FSDPStrategy))
