"""DDP and FSDP2 on two CPU processes, compared with one process; each continues the checkpoints of the others."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

from sbn_lightning.callbacks.durable_checkpoint import folder_of_before_kept
from sbn_lightning.checkpoints.resume import why_unreadable
from sbn_lightning.checkpoints.sharded import consolidate
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.data import prepare
from sbn_lightning.distributed.strategies import check_checkpoint, check_strategy
from tests.distributed.forked_runs import statuses
from tests.distributed.worker import EPOCH, GLOBAL_BATCH, TINY_EPOCH
from tests.helpers import Interrupted

pytestmark = pytest.mark.timeout(900)  # The first of these tests runs the jobs of all.
JOBS = ("first1", "first2", "onward1", "onward2")
STEPS = 6
ONWARD = [
    ("auto", "ddp"),
    ("auto", "fsdp2"),
    ("ddp", "auto"),
    ("ddp", "fsdp2"),
    ("fsdp2", "auto"),
    ("fsdp2", "fsdp2"),
    ("fsdp2", "packed"),
    ("packed", "auto"),
    ("packed", "packed"),
    ("sharded", "sharded"),
    ("sharded", "auto"),  # by way of one file, as the error of the command line advises
    ("sharded", "fsdp2"),
]
# Name, strategy, options of the precision plugin, whether rank 0 has measured, relative bound for the losses.
# Kernels run in Triton's interpreter.
PLUGINS = [
    ("plugin fsdp2 auto", "fsdp2", {}, False, 1e-5),
    ("plugin ddp measured", "lightning ddp", {"backend": "auto"}, True, 1e-5),
    ("plugin fsdp2 int8", "fsdp2", {"backend": "int8", "gradients": "int8"}, False, 1e-3),
    ("plugin packed int8", "packed", {"backend": "int8", "gradients": "int8"}, False, 1e-3),
]
PLUGIN_STEPS = TINY_EPOCH + 1
ACCUMULATED = [
    ("accumulated alone", "auto"),
    ("accumulated", "fsdp2"),
    ("accumulated packed", "packed"),
    ("accumulated step", "packed step"),
]


def jobs_of_ranks(folder, tokens):
    """Whole runs, runs of half an epoch, and runs that continue them: those on one process, and those on two."""
    data, onward = {"tokens": str(counting(folder))}, {"refused": {"strategy": "tensor-parallel", "steps": 1}}
    first, half = {}, epoch_of(folder) // 2
    for strategy in ("auto", "ddp", "fsdp2", "sharded", "packed"):
        first[strategy] = {"strategy": strategy, "steps": STEPS}
        first[f"{strategy} half"] = {"strategy": strategy, "steps": half, **data}
    for name, strategy in ACCUMULATED:
        first[name] = {"strategy": strategy, "steps": STEPS // 2, "accumulate": 2}
    for strategy in ("auto", "ddp", "fsdp2", "packed"):
        first[f"{strategy} decayed"] = {"strategy": strategy, "steps": STEPS, "decay": 20.0}
    first["plugin alone"] = {"strategy": "auto", "steps": PLUGIN_STEPS, "plugin": {"backend": "reference"}}
    for name, strategy, plugin, measured, _ in PLUGINS:
        job = {"strategy": strategy, "steps": PLUGIN_STEPS, "plugin": plugin, "measured": measured}
        first[name] = job
        onward[f"{name} rest"] = job | {"checkpoint": str(folder / name / f"step={TINY_EPOCH}.ckpt")}
    for before, after in ONWARD:
        kind = "ckpt.consolidated" if before == "sharded" and after != "sharded" else "ckpt"
        whole, part = folder / before / f"step={EPOCH}.{kind}", folder / f"{before} half" / f"step={half}.{kind}"
        onward[f"{before} to {after}"] = {"strategy": after, "steps": STEPS, "checkpoint": str(whole)}
        rest = {"strategy": after, "steps": epoch_of(folder) - 2, "checkpoint": str(part), **data}
        onward[f"{before} to {after} rest"] = rest
    sharded = [str(folder / f"sharded/step={EPOCH}.ckpt"), str(folder / f"sharded half/step={half}.ckpt")]
    found = []
    for name, runs in (("first", first), ("onward", onward)):
        for ranks in (1, 2):
            some = {str(folder / key): run for key, run in runs.items() if (run["strategy"] == "auto") == (ranks == 1)}
            options = {"runs": some, "consolidated": sharded if (name, ranks) == ("onward", 1) else []}
            found.append({"ranks": ranks, "function": "trained", "folder": folder / f"{name}{ranks}"})
            found[-1]["options"] = options
    return found


def counting(folder):
    """A folder of tokens that count upwards, so that no two blocks of tokens are equal."""
    texts, output = folder / "texts", folder / "counting"
    texts.mkdir(parents=True)
    for i in range(8):
        (texts / f"{i}.txt").write_text(" ".join(str(n) for n in range(i * 5000, i * 5000 + 300)))
    prepare(str(texts / "*.txt"), str(output), tokenizer="byte", val_fraction=0.2, num_workers=1)
    return output


def epoch_of(folder):
    index = json.loads((folder / "counting/train/index.json").read_text())
    return sum(chunk["dim"] // 64 for chunk in index["chunks"]) // GLOBAL_BATCH


@pytest.fixture(scope="module")
def runs(forked_runs):
    """What each rank saw, by the name of the run."""
    folder = forked_runs / "test_two_processes"
    logs = [(folder / job / "rank0.log").read_text()[-2000:] for job in JOBS if any(statuses(folder / job))]
    assert not logs, logs[0]
    seen = {"folder": folder}
    for path in sorted(folder.glob("*.rank*.pt")):
        seen.setdefault(path.name.rpartition(".rank")[0], []).append(torch.load(path, weights_only=True))
    return seen


@pytest.fixture(scope="module")
def epoch(runs):
    return epoch_of(runs["folder"])


def rows(ranks):
    return [tuple(row) for rank in ranks for batch in rank["samples"] for row in batch.tolist()]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "sharded", "packed"])
def test_two_processes_equal_one(strategy, runs):
    ranks, (single,) = runs[strategy], runs["auto"]
    for step in range(STEPS):
        for name, mask in single["masks"][step].items():
            for rank in ranks:
                assert torch.equal(rank["masks"][step][name], mask)
                torch.testing.assert_close(rank["gammas"][step][name], single["gammas"][step][name], rtol=1e-5, atol=0)
        # No two ranks see the same sample. Together the ranks see the samples of the single process.
        together = [tuple(row) for rank in ranks for row in rank["samples"][step].tolist()]
        assert set(together) == {tuple(row) for row in single["samples"][step].tolist()}
        assert len(set(together)) == len(together)
    assert ranks[0]["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert [rank["counts"] for rank in ranks] == [single["counts"]] * 2
    assert ranks[0]["ignored"] == sorted(f"{name}.mask_bits" for name in single["counts"])


@pytest.mark.parametrize(("before", "after"), ONWARD)
def test_a_checkpoint_goes_on_under_another_strategy(before, after, runs):
    """Optimiser states continue to the last bit, and losses equal those of an undisturbed run."""
    first, rest, (single,) = runs[before][0], runs[f"{before} to {after}"], runs["auto"]
    parameters = len(single["moments"][-1])
    for rank in rest:
        assert len(rank["masks"]) == STEPS - EPOCH
        assert len(rank["moments"][0]) == parameters
        assert any(value.any() for name, value in rank["moments"][0].items() if name.endswith("exp_avg"))
        for name, value in rank["moments"][0].items():
            assert torch.equal(value, first["moments"][EPOCH][name]), name
        for step, masks in enumerate(rank["masks"], start=EPOCH):
            assert all(torch.equal(mask, single["masks"][step][name]) for name, mask in masks.items())
    assert rest[0]["losses"] == pytest.approx(single["losses"][EPOCH:], rel=1e-5)


@pytest.mark.parametrize(("before", "after"), ONWARD)
def test_a_run_resumes_on_another_number_of_processes(before, after, runs, epoch):
    """No sample comes twice. An epoch leaves out less than two batches at its end."""
    rest = runs[f"{before} to {after} rest"]
    seen = rows(runs[f"{before} half"]) + rows(rest)
    assert len(seen) == (epoch - 2) * GLOBAL_BATCH
    assert len(set(seen)) == len(seen)
    assert len(rest[0]["masks"]) == epoch - 2 - epoch // 2


@pytest.mark.parametrize(("name", "strategy", "plugin", "measured", "near"), PLUGINS)
def test_the_precision_plugin_on_two_processes(name, strategy, plugin, measured, near, runs):
    """Losses are those of one process, ranks have equal masks and backends, and resuming is exact to the last bit."""
    ranks, (single,) = runs[name], runs["plugin alone"]
    for step in range(PLUGIN_STEPS):
        for layer, mask in single["masks"][step].items():
            assert all(torch.equal(rank["masks"][step][layer], ranks[0]["masks"][step][layer]) for rank in ranks)
            if near == 1e-5 or step == 0:  # later losses depend on weights that were rounded differently
                assert torch.equal(ranks[0]["masks"][step][layer], mask)
    assert ranks[0]["losses"] == pytest.approx(single["losses"], rel=near)
    expected = "int8" if measured or plugin.get("backend") == "int8" else "reference"
    layers = len(single["masks"][0])
    assert all(rank["backends"] == [[expected] * layers] * PLUGIN_STEPS for rank in ranks)
    for rank, rest in zip(ranks, runs[f"{name} rest"], strict=True):
        assert rest["losses"] == rank["losses"][TINY_EPOCH:]
        assert rest["seeds"] == rank["seeds"][TINY_EPOCH:]
    # Equal draws would give every rank the same rounding error, so no seed may be used twice.
    seeds = [seed for rank in ranks for step in rank["seeds"] for seed in step]
    assert len(set(seeds)) == len(seeds) == (2 * PLUGIN_STEPS * layers if "gradients" in plugin else 0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "packed"])
def test_masked_weights_decay_on_every_rank(strategy, runs):
    (single,), (plain,) = runs["auto decayed"], runs["auto"]
    name = "model.blocks.0.attention.qkv"
    assert not torch.equal(single["masks"][-1][name], plain["masks"][-1][name])
    for rank in runs[f"{strategy} decayed"]:
        assert rank["losses"] == pytest.approx(single["losses"], rel=1e-5)
        for masks, expected in zip(rank["masks"], single["masks"], strict=True):
            assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())
        for gammas, expected in zip(rank["gammas"], single["gammas"], strict=True):
            for name, gamma in gammas.items():
                torch.testing.assert_close(gamma, expected[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["accumulated", "accumulated packed", "accumulated step"])
def test_accumulation_under_shards(name, runs):
    (single,) = runs["accumulated alone"]
    for rank in runs[name]:
        assert rank["losses"] == pytest.approx(single["losses"], rel=1e-5)
        assert len(rank["masks"]) == STEPS
        for step, masks in enumerate(rank["masks"]):
            assert all(torch.equal(mask, single["masks"][step][name]) for name, mask in masks.items())


def test_what_a_strategy_would_misread_is_refused(runs):
    """Each error names a way out. For a folder the way out is a command."""
    folder = runs["folder"] / f"sharded/step={EPOCH}.ckpt"
    file = runs["folder"] / f"auto/step={EPOCH}.ckpt"
    with pytest.raises(ConfigError, match=f"sbn consolidate --checkpoint {folder} --output .*step=4.whole.ckpt"):
        check_checkpoint(folder, "auto")
    check_checkpoint(folder, ModelParallelStrategy())
    check_checkpoint(file, ModelParallelStrategy())
    # Number the states as torch does, by parameter group.
    saved = torch.load(file, weights_only=True)
    state = saved["optimizer_states"][0]
    numbers = iter(range(len(state["state"])))
    for group in state["param_groups"]:
        group["params"] = [next(numbers) for _ in group["params"]]
    torch.save(saved, runs["folder"] / "numbered.ckpt")
    with pytest.raises(ConfigError, match="without that strategy first"):
        check_checkpoint(runs["folder"] / "numbered.ckpt", ModelParallelStrategy())
    check_checkpoint(runs["folder"] / "numbered.ckpt", DDPStrategy())


def test_a_sharded_checkpoint_that_is_replaced_stays_until_the_new_one_is_whole(runs, tmp_path):
    """The run saved `last.ckpt` three times."""
    assert not list((runs["folder"] / "sharded").glob("*.before.ckpt"))
    last = tmp_path / "last.ckpt"
    shutil.copytree(runs["folder"] / "sharded/last.ckpt", last)
    assert why_unreadable(last) == ""
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(_save_distributed_checkpoint=True, barrier=lambda: None), is_global_zero=True
    )

    def save():
        with folder_of_before_kept(trainer, str(last)):
            last.mkdir(exist_ok=True)
            (last / ".metadata").write_bytes(b"half")
            raise Interrupted

    for _ in range(2):  # the second time, the file that the first left behind is in the way
        with pytest.raises(Interrupted):
            save()
        assert why_unreadable(last) == "is not complete (it has no meta.pt)"
        assert why_unreadable(tmp_path / "last.before.ckpt") == ""
    (last / "meta.pt").write_bytes(b"half")
    assert "is damaged" in why_unreadable(last)
    with pytest.raises(DataError, match=r"there is no .*nothing/.metadata"):
        consolidate(str(tmp_path / "nothing"), str(tmp_path / "one.ckpt"))
    with pytest.raises(DataError, match=r"last.ckpt is damaged"):
        consolidate(str(last), str(tmp_path / "one.ckpt"))
    assert not list(tmp_path.glob("one.*"))


def test_ranks_left_for_tensor_parallelism_are_refused(runs):
    assert all("data_parallel_size=2, tensor_parallel_size=1" in rank["error"] for rank in runs["refused"])


def test_strategies_that_flatten_weights_are_refused():
    check_strategy(DDPStrategy())
    with pytest.raises(ConfigError, match=r"FSDPStrategy flattens weights.*use the strategy sbn_ddp, or sbn_fsdp2"):
        check_strategy(object.__new__(FSDPStrategy))
