"""DDP and FSDP2 on two CPU processes against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

from sbn_lightning.data import prepare
from sbn_lightning.distributed import check_strategy
from sbn_lightning.errors import ConfigError
from tests.distributed.worker import GLOBAL_BATCH

ROOT = Path(__file__).parents[2]
STEPS = 6


def start(strategy, output, steps=STEPS, processes=1, **options):
    output.mkdir()
    run = [sys.executable]
    if processes > 1:
        run += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*run, str(ROOT / "tests/distributed/worker.py"), strategy, str(output), str(steps)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += [f"--{name}={value}" for name, value in options.items()]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=output)


def launch(strategy, output, steps=STEPS, processes=1, **options):
    done = start(strategy, output, steps, processes, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(output / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return launch("auto", tmp_path_factory.mktemp("single") / "run")[0]


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """Numbers in order, so that every block of tokens is another one."""
    folder = tmp_path_factory.mktemp("counting")
    for i in range(8):
        (folder / f"{i}.txt").write_text(" ".join(str(n) for n in range(i * 5000, i * 5000 + 2500)))
    output = folder / "tokens"
    prepare(str(folder / "*.txt"), str(output), tokenizer="byte", val_fraction=0.2, num_workers=1)
    return output


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


@pytest.mark.parametrize(("strategy_before", "strategy_after"), [("ddp", "auto"), ("auto", "ddp"), ("fsdp2", "auto")])
def test_a_run_resumes_on_another_number_of_processes(strategy_before, strategy_after, counting, tmp_path):
    """No sample twice; what an epoch leaves out at its end is less than two batches."""

    def rows(ranks):
        return [tuple(row) for rank in ranks for batch in rank["samples"] for row in batch.tolist()]

    before, after = (1 if strategy == "auto" else 2 for strategy in (strategy_before, strategy_after))
    index = json.loads((counting / "train/index.json").read_text())
    blocks = sum(chunk["dim"] // 64 for chunk in index["chunks"])
    epoch = blocks // GLOBAL_BATCH
    first = launch(strategy_before, tmp_path / "first", epoch // 2, before, tokens=counting)
    checkpoint = tmp_path / f"first/step={epoch // 2}.ckpt"
    rest = launch(strategy_after, tmp_path / "rest", epoch - 2, after, tokens=counting, checkpoint=checkpoint)
    seen = rows(first) + rows(rest)
    assert len(seen) == (epoch - 2) * GLOBAL_BATCH
    assert len(set(seen)) == len(seen)
    assert len(rest[0]["masks"]) == epoch - 2 - epoch // 2


def test_ranks_left_for_tensor_parallelism_are_refused(tmp_path):
    done = start("fsdp2-auto", tmp_path / "run", processes=2)
    assert "data_parallel_size=2, tensor_parallel_size=1" in done.stderr


def test_strategies_that_flatten_weights_are_refused():
    check_strategy(DDPStrategy())
    with pytest.raises(ConfigError, match=r"FSDPStrategy flattens weights.*ModelParallelStrategy"):
        check_strategy(object.__new__(FSDPStrategy))
