"""CUDA graphs of the training step, as far as a CPU goes: a recording that runs its function again in a replay."""

import copy
from contextlib import contextmanager

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch._dynamo.testing import CompileCounter

from sbn_lightning import MaskRefresh, TernarySparseConversion
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data import TokenDataModule
from sbn_lightning.distributed.fabric_strategy import FabricShardedStrategy
from sbn_lightning.distributed.strategies import ReplicatedStrategy, ShardedStrategy
from sbn_lightning.fabric import FabricRun
from sbn_lightning.fabric import train as fit_with_fabric
from sbn_lightning.layers.sparse_linear import masked_layers
from sbn_lightning.training import graphs
from sbn_lightning.training.checks import check_graphs
from sbn_lightning.training.graphs import GraphedLoss
from tests.helpers import Losses, compiled_frames, quiet_trainer, small_module, token_loader, unbounded


def train(cuda_graphs, steps=12, interval=3, ckpt_path=None, save=None, loader=None, **changes):
    module = small_module(pattern="2:4", **changes)
    module.cuda_graphs, module.hparams["schedule_steps"] = cuda_graphs, 12
    losses = Losses()
    trainer = quiet_trainer(
        [losses, MaskRefresh(interval=interval)], max_steps=steps, accumulate_grad_batches=2, gradient_clip_val=0.5
    )
    trainer.fit(module, token_loader(batches=2 * steps) if loader is None else loader, ckpt_path=ckpt_path)
    if save:
        trainer.save_checkpoint(save)
    return module, losses.values


def assert_equal(a, b):
    for (name, one), (_, other) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("interval", "recomputed"), [(1, False), (3, "mlp")])
def test_training_is_the_same_to_the_last_bit(recordings, interval, recomputed):
    """With held masks there are two states: masked weights get gradients after a refresh, and none in between."""
    plain, expected = train(False, interval=interval)
    graphed, losses = train(True, interval=interval, activation_checkpointing=recomputed)
    assert losses == expected
    assert_equal(graphed, plain)
    assert recordings["recorded"] == (2 if interval == 1 else 4)
    assert recordings["replayed"] == 2 * (24 - 2) if interval == 1 else recordings["replayed"] >= 2 * (24 - 4)


class Bare(LightningModule):
    """A module of somebody else, whose training step is graphed as the guide says."""

    def __init__(self, cuda_graphs):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Embedding(512, 16), torch.nn.Linear(16, 32), torch.nn.Linear(32, 512))
        self.graphed = GraphedLoss() if cuda_graphs else None

    def compute_loss(self, batch):
        return torch.nn.functional.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        return self.compute_loss(batch) if self.graphed is None else self.graphed(self, self.compute_loss, batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_a_module_of_somebody_else(recordings):
    trained = []
    for cuda_graphs in (False, True):
        trained.append(Bare(cuda_graphs))
        callbacks = [TernarySparseConversion("2:4", exclude=()), MaskRefresh()]
        quiet_trainer(callbacks, max_steps=5, accumulate_grad_batches=2).fit(trained[-1], token_loader(batches=10))
    assert_equal(*trained)
    assert recordings["recorded"] == 2


def test_a_run_that_resumes_in_the_middle(recordings, tmp_path):
    plain, _ = train(False)
    loader = token_loader(batches=24)
    train(True, steps=5, save=tmp_path / "x.ckpt", loader=loader)
    rest = unbounded(list(loader)[10:])
    graphed, _ = train(True, ckpt_path=tmp_path / "x.ckpt", loader=rest)
    assert_equal(graphed, plain)


def test_what_the_loss_does_not_use_gets_no_gradient(recordings):
    torch.manual_seed(0)
    model = small_module(pattern="2:4").model
    unused = torch.nn.Parameter(torch.ones(3))
    model.register_parameter("unused", unused)
    graphed, batch = GraphedLoss(warm_up=0), next(iter(token_loader()))
    graphed(model, lambda rows: model.loss(rows[:, :-1], rows[:, 1:]), batch).backward()
    assert unused.grad is None
    assert model.embed.weight.grad is not None


def test_gradients_add_up_and_another_gradient_is_taken_over(recordings):
    model = small_module(pattern="2:4").model
    graphed, (one, two, *_) = GraphedLoss(warm_up=0), list(token_loader())

    def loss(rows):
        return model.loss(rows[:, :-1], rows[:, 1:])

    def gradient(*losses):
        model.zero_grad()
        for one in losses:
            one().backward()
        return model.embed.weight.grad.clone()

    expected = gradient(lambda: 0.5 * loss(one), lambda: 0.5 * loss(two))
    actual = gradient(lambda: 0.5 * graphed(model, loss, one), lambda: 0.5 * graphed(model, loss, two))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    model.zero_grad()
    loss(one).backward()
    given = model.embed.weight.grad
    graphed(model, loss, two).backward()
    torch.testing.assert_close(model.embed.weight.grad, given + gradient(lambda: loss(two)), rtol=0, atol=0)


def test_a_batch_of_another_shape_runs_without_the_graph(recordings):
    model = small_module(pattern="2:4").model
    graphed, batch = GraphedLoss(warm_up=0), next(iter(token_loader()))

    def loss(rows):
        return model.loss(rows[:, :-1], rows[:, 1:])

    graphed(model, loss, batch).backward()
    before = dict(recordings)
    with pytest.warns(UserWarning, match=r"a micro-batch of the shape \[2, 17\] runs without the graph"):
        assert torch.equal(graphed(model, loss, batch[:2]), loss(batch[:2]))
    assert recordings == before


def test_two_forwards_before_a_backward_are_refused(recordings):
    model = small_module(pattern="2:4").model
    graphed, batch = GraphedLoss(warm_up=0), next(iter(token_loader()))

    def loss(rows):
        return model.loss(rows[:, :-1], rows[:, 1:])

    first, _ = (graphed(model, loss, batch) for _ in range(2))
    with pytest.raises(ConfigError, match="one backward, which must come before the forward of the next micro-batch"):
        first.backward()


@pytest.mark.parametrize("warm_up", [0, 1])
def test_a_second_backward_is_refused(recordings, warm_up):
    model = small_module(pattern="2:4").model
    loss = GraphedLoss(warm_up)(model, lambda rows: model.loss(rows[:, :-1], rows[:, 1:]), next(iter(token_loader())))
    loss.backward(retain_graph=True)
    with pytest.raises(ConfigError, match="a micro-batch has one backward"):
        loss.backward()


def test_a_new_density_is_another_state_and_a_moved_model_starts_anew(recordings):
    model = small_module(pattern="2:4").model
    graphed, batch = GraphedLoss(warm_up=0), next(iter(token_loader()))

    def loss(rows):
        return model.loss(rows[:, :-1], rows[:, 1:])

    graphed(model, loss, batch).backward()
    for _, layer in masked_layers(model):
        layer.set_density(3)
    assert torch.equal(graphed(model, loss, batch), loss(batch))
    assert recordings["recorded"] == 4
    model.double().float()
    assert torch.equal(graphed(model, loss, batch), loss(batch))
    assert recordings["recorded"] == 6
    assert copy.deepcopy(graphed)._shared is None


def test_another_parameter_at_the_same_address_gets_the_gradients(recordings):
    model, batch = small_module(pattern="2:4", tie_embeddings=False).model, next(iter(token_loader()))
    graphed = GraphedLoss(warm_up=0)
    for recorded in (2, 4):
        graphed(model, lambda rows: model.loss(rows[:, :-1], rows[:, 1:]), batch).backward()
        assert recordings["recorded"] == recorded  # A graph writes to the gradients of the parameters that it knows.
        model.embed.weight = torch.nn.Parameter(model.embed.weight.data)


def test_an_operation_that_cannot_be_recorded_is_one_error(monkeypatch):
    def record(function, pool):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "record", record)
    model, batch = small_module(pattern="2:4").model, next(iter(token_loader()))
    with pytest.raises(ConfigError, match=r"cannot be recorded as a CUDA graph \(CUDA error: operation not permitted"):
        GraphedLoss(warm_up=0)(model, lambda rows: model.loss(rows[:, :-1], rows[:, 1:]), batch)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_first_error_of_a_recording_is_told_with_its_place(monkeypatch):
    """CUDA raises another error at the end of a recording that was broken."""

    @contextmanager
    def record(graph, **options):
        try:
            yield
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", record)
    model, batch = small_module(pattern="2:4").model, next(iter(token_loader()))

    def wait(rows):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with pytest.raises(ConfigError, match=r"not permitted when stream is capturing; test_graphs\.py, line \d+\)"):
        GraphedLoss(warm_up=0)(model, wait, batch)
    with pytest.raises(ConfigError, match="due to a previous error"):
        GraphedLoss(warm_up=0)(model, lambda rows: model.loss(rows[:, :-1], rows[:, 1:]), batch)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {}, "a run on cpu"),
        ({"n_experts": 4, "d_expert": 32}, {}, "a mixture of experts"),
        ({"loss": "liger"}, {}, "loss: liger"),
        ({}, {"strategy": DDPStrategy()}, r"DDPStrategy, only with trainer\.strategy: auto, sbn_ddp or sbn_fsdp2"),
        ({}, {"strategy": ReplicatedStrategy()}, "a run on cpu"),
        ({}, {"strategy": ShardedStrategy()}, "a run on cpu"),
        ({}, {"strategy": ShardedStrategy(gather="packed_layer")}, "gather: packed_layer in sbn_fsdp2"),
        ({}, {"strategy": ShardedStrategy(reduce="step")}, "reduce: step in sbn_fsdp2, only with micro_batch"),
        (
            {},
            {"strategy": ReplicatedStrategy(static_graph=True)},
            "options of torch's DistributedDataParallel in sbn_ddp",
        ),
    ],
)
def test_what_does_not_work_is_refused(changes, options, message):
    module = small_module(pattern="2:4", **changes)
    module.cuda_graphs, module.trainer = True, quiet_trainer(max_steps=1, **options)
    with pytest.raises(ConfigError, match=f"model.cuda_graphs does not work with {message}"):
        check_graphs(module, module.trainer)


def test_states_that_do_not_come_again_are_forgotten(recordings):
    """A ramp of the density has as many states as steps."""
    model, graphed, batch = small_module(pattern="2:4").model, GraphedLoss(), next(iter(token_loader()))
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        for _, layer in masked_layers(model):
            layer.set_density(2, share)
        graphed(model, lambda rows: model.loss(rows[:, :-1], rows[:, 1:]), batch).backward()
    assert len(graphed._graphs) == graphed.most


def test_a_state_of_one_step_is_not_recorded(recordings):
    """Each step of a ramp has a state of its own. Graphs for a few micro-batches would cost more than they save."""
    model, graphed, batch = small_module(pattern="2:4").model, GraphedLoss(), next(iter(token_loader()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for share in (0.1, 0.2, 0.3, 0.4, 0.4, 0.4):
        for _, layer in masked_layers(model):
            layer.set_density(2, share)
        for _ in range(4):
            graphed(model, lambda rows: model.loss(rows[:, :-1], rows[:, 1:]), batch).backward()
        optimizer.step()
    assert recordings["recorded"] == 2
    assert recordings["replayed"] == 2 * 2 * 4


def test_an_evaluation_records_nothing(recordings):
    model, graphed, batch = small_module(pattern="2:4").model, GraphedLoss(warm_up=0), next(iter(token_loader()))
    with torch.no_grad():
        loss = graphed(model, lambda rows: model.loss(rows[:, :-1], rows[:, 1:]), batch)
    assert not loss.requires_grad
    assert recordings["recorded"] == 0


def test_a_run_is_refused_before_its_first_step():
    module = small_module(pattern="2:4")
    module.cuda_graphs = True
    with pytest.raises(ConfigError, match=r"a run on cpu; set model\.cuda_graphs to false; --config sizes/cpu makes"):
        quiet_trainer().fit(module, token_loader())
    for options, reason in (
        ({"devices": 1}, "a run on cpu"),
        ({"strategy": "ddp", "devices": 2}, r"DDPStrategy, only with trainer\.strategy: auto, sbn_ddp or sbn_fsdp2"),
        ({"strategy": FabricShardedStrategy(reduce="step"), "devices": 2}, "reduce: step in sbn_fsdp2"),
    ):
        module.trainer = FabricRun(Fabric(accelerator="cpu", **options))
        with pytest.raises(ConfigError, match=reason):
            module.setup("fit")


def test_the_fabric_loop_replays_micro_batches(recordings, tokens):
    trained = []
    for cuda_graphs in (False, True):
        module = small_module(pattern="2:4")
        module.cuda_graphs = cuda_graphs
        data = TokenDataModule(str(tokens), batch_size=4, sequence_length=16, num_workers=0, seed=5)
        options = {"max_steps": 6, "accumulate_grad_batches": 2, "limit_val_batches": 1, "val_check_interval": 4}
        run = FabricRun(Fabric(accelerator="cpu", devices=1), **options, enable_progress_bar=False)
        fit_with_fabric(run, module, data)
        trained.append(module)
    assert_equal(*trained)
    assert recordings == {"recorded": 2, "replayed": 2 * (12 - 2)}


def test_compiled_blocks_are_not_compiled_again_while_recording(recordings):
    model, counter = small_module(pattern="2:4").model, CompileCounter()
    model.compile_blocks(backend=counter)
    compiled = compiled_frames(model, counter)
    assert recordings["recorded"] == 2
    assert compiled == [compiled[0]] * len(compiled)
