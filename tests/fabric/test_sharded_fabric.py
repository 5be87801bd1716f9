"""The Fabric loop under ``sbn_fsdp2`` on two CPU processes: the losses of the Trainer, and each other's checkpoints."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric import Fabric

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed.fabric_strategy import FabricShardedStrategy
from sbn_lightning.distributed.strategies import ShardedStrategy
from sbn_lightning.fabric.options import fabric_sharded

pytestmark = pytest.mark.timeout(900)  # The first of these tests runs the jobs of all.
STEPS = 4
RUNS = ("trainer", "fabric", "fabric rest", "trainer rest", "fabric step")


def jobs_of_ranks(folder, tokens):
    options = {"steps": STEPS, "tokens": str(tokens)}
    runs = {loop: options | {"loop": loop} for loop in ("trainer", "fabric")}
    for loop, other in (("fabric", "trainer"), ("trainer", "fabric")):
        runs[f"{loop} rest"] = runs[loop] | {"checkpoint": str(folder / other / "step=2.ckpt")}
    runs["fabric step"] = runs["fabric"] | {"reduce": "step"}
    return [
        {"ranks": 2, "function": "fabric", "folder": folder / name, "options": options}
        for name, options in runs.items()
    ]


def test_fabric_equals_the_trainer_and_each_continues_the_other(forked_runs):
    folder = forked_runs / "test_sharded_fabric"
    logs = {name: (folder / name / "rank0.log").read_text()[-2000:] for name in RUNS}
    for rank in range(2):
        seen = {}
        for name in RUNS:
            assert (folder / name / f"rank{rank}.pt").exists(), logs[name]
            seen[name] = torch.load(folder / name / f"rank{rank}.pt")
        assert len(seen["trainer"]) == 2 * STEPS
        assert seen["fabric"] == seen["trainer"]
        assert seen["fabric step"] == pytest.approx(seen["trainer"], rel=1e-6)
        for name in ("trainer rest", "fabric rest"):
            assert seen[name] == seen["trainer"][STEPS:]


def test_fabric_takes_the_name_and_the_options_of_the_strategy():
    assert isinstance(Fabric(accelerator="cpu", strategy="sbn_fsdp2").strategy, FabricShardedStrategy)
    options = {"gather": "packed_layer", "replicate": 2, "reduce": "step", "max_ctas": 4}
    taken = fabric_sharded(ShardedStrategy("bfloat16", **options))
    assert taken.sharding == {"reduce_dtype": torch.bfloat16, **options}
    with pytest.raises(ConfigError, match="save_distributed_checkpoint=false"):
        fabric_sharded(ShardedStrategy(save_distributed_checkpoint=True))


def test_an_optimiser_that_is_older_than_the_sharded_parameters_is_refused():
    """It would change weights that the model has no more, and the ternary layers would never train."""
    module = torch.nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=r"make the optimizer afterwards: model = fabric\.setup_module\(module\)"):
        FabricShardedStrategy().setup_module_and_optimizers(module, [torch.optim.SGD(module.parameters())], None)
