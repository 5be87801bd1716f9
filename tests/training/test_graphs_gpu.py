"""CUDA graphs of the training step on a GPU: equal to the step without graphs to the last bit."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from sbn_lightning import MaskedWeightDecay, MaskRefresh, NonFiniteGuard, RoundingWarmup, SparseTernaryPrecision
from sbn_lightning.backends.selection import engines
from sbn_lightning.checkpoints import lightning_file
from sbn_lightning.checkpoints.text_files import TextFiles
from sbn_lightning.distributed.gradient_mean import GradientMean
from sbn_lightning.distributed.strategies import ReplicatedStrategy, ShardedStrategy
from sbn_lightning.models.transformer import TernaryTransformer
from sbn_lightning.training import graphs
from sbn_lightning.training.distillation import Distillation
from sbn_lightning.training.module import SparseBitNet
from tests.helpers import Losses, quiet_trainer, small_config, small_module, token_loader, unbounded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
METRICS = ("train/loss", "train/distillation", "train/distillation_logits")
SHAPE = {"d_model": 256, "d_ffn": 512, "vocab_size": 512, "n_layers": 2}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """The backward of attention adds in any order otherwise."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def recorded(monkeypatch):
    calls, record = [], graphs.record
    monkeypatch.setattr(graphs, "record", lambda *given: calls.append(1) or record(*given))
    return calls


def train(
    cuda_graphs, compile=False, gradients="bf16", steps=20, interval=1, ckpt_path=None, save=None, loader=None,
    recomputed=False, strategy="auto",
):  # fmt: skip
    if "sparse" not in engines(torch.device("cuda"))[0]:
        pytest.skip("sparse does not run on this GPU")
    module = small_module(**SHAPE, pattern="2:4", loss="chunked", activation_checkpointing=recomputed)
    module.cuda_graphs, module.hparams["schedule_steps"] = cuda_graphs, 20
    module.hparams["compile"] = compile
    losses = Losses()
    callbacks: list[Callback] = [
        losses,
        MaskRefresh(interval),
        MaskedWeightDecay(1.0, until=0.9, total_steps=20),
        NonFiniteGuard(),
    ]
    trainer = quiet_trainer(
        callbacks, accelerator="gpu", devices=1, max_steps=steps, accumulate_grad_batches=2, gradient_clip_val=0.5,
        plugins=[SparseTernaryPrecision("sparse", gradients)], strategy=strategy, use_distributed_sampler=False,
    )  # fmt: skip
    if loader is None:
        loader = token_loader(batches=2 * steps, batch_size=8, length=65, vocab_size=512)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    if save:
        trainer.save_checkpoint(save)
    state = {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in module.state_dict().items()}
    return {name: value.cpu() for name, value in state.items()}, losses.values


def assert_equal(a, b):
    for name in b:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("gradients", ["bf16", "int8"])
@pytest.mark.parametrize(("interval", "compile"), [(1, False), (1, True), (4, False)])
def test_twenty_steps_are_the_same_to_the_last_bit(interval, compile, gradients, recorded):
    expected, losses = train(False, compile, gradients, interval=interval)
    again, _ = train(False, compile, gradients, interval=interval)
    assert_equal(again, expected)  # Without this the comparison below would mean nothing.
    assert not recorded
    actual, graphed = train(True, compile, gradients, interval=interval)
    assert len(recorded) == (2 if interval == 1 else 4)
    assert graphed == losses
    assert_equal(actual, expected)


@pytest.mark.parametrize(
    ("interval", "compile", "recomputed", "gradients"),
    [
        (4, True, False, "int8"),
        (1, False, "mlp", "bf16"),
        (1, True, "mlp", "int8"),
        (1, False, True, "int8"),
        (4, True, True, "int8"),
    ],
)
def test_held_masks_and_recomputation(interval, compile, recomputed, gradients, recorded):
    options = {"compile": compile, "gradients": gradients, "interval": interval, "recomputed": recomputed}
    expected, losses = train(False, **options)
    assert not recorded
    actual, graphed = train(True, **options)
    assert len(recorded) == (2 if interval == 1 else 4)
    assert graphed == losses
    assert_equal(actual, expected)


class OneRank(ReplicatedStrategy):
    """``sbn_ddp`` that sends gradients, to itself."""

    def configure_ddp(self):
        self._mean = GradientMean(self.lightning_module, dist.group.WORLD)


def test_a_replay_averages_gradients_over_nccl(recorded, monkeypatch):
    sent, send = [], dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *given, **options: sent.append(given) or send(*given, **options))
    expected, losses = train(False, True, "int8", steps=8)
    assert not sent
    counts = []
    for cuda_graphs in (False, True):
        actual, found = train(cuda_graphs, True, "int8", steps=8, strategy=OneRank())
        assert found == losses
        assert_equal(actual, expected)
        counts.append(len(sent))
    assert len(recorded) == 4  # The last micro-batch of a step has graphs of its own.
    plain, replayed = counts[0], counts[1] - counts[0]
    assert plain - replayed == 5  # The third of eight backwards is recorded, with its collective.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replay_sends_the_gradients_of_a_sharded_model_over_nccl(dtype, recorded):
    found = []
    for cuda_graphs in (False, True):
        assert not recorded
        found.append(train(cuda_graphs, True, "int8", steps=8, strategy=ShardedStrategy(dtype)))
    assert len(recorded) == 2
    (expected, losses), (actual, graphed) = found
    assert graphed == losses
    assert_equal(actual, expected)


def test_graphs_read_the_weights_where_their_preparation_writes_them(monkeypatch):
    """Once all is recorded, nothing is copied but the seeds, one number each."""
    copied, copy = [], torch._foreach_copy_
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda to, of: copied.append(max(map(torch.numel, to))) or copy(to, of)
    )
    train(True, True, "int8", steps=8)
    assert copied
    assert max(copied) == 1


def test_a_run_that_resumes_in_the_middle(tmp_path, recorded):
    expected, _ = train(False, gradients="int8", interval=4)
    loader = token_loader(batches=40, batch_size=8, length=65, vocab_size=512)
    train(True, gradients="int8", interval=4, steps=9, save=tmp_path / "x.ckpt", loader=loader)
    rest = unbounded(list(loader)[18:])
    actual, _ = train(True, gradients="int8", interval=4, ckpt_path=tmp_path / "x.ckpt", loader=rest)
    assert recorded
    assert_equal(actual, expected)


def test_an_evaluation_in_between_changes_nothing(recorded):
    module = small_module(**SHAPE, pattern="2:4").cuda()
    batches = [batch.cuda() for batch in token_loader(batches=8, batch_size=8, length=65, vocab_size=512)]
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)
    graphed = graphs.GraphedLoss()
    plain = small_module(**SHAPE, pattern="2:4").cuda()
    other = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    for batch in batches:
        loss, expected = graphed(module.model, module._plain_loss, batch), plain._plain_loss(batch)
        assert torch.equal(loss, expected)
        for each, one in ((loss, optimizer), (expected, other)):
            each.backward()
            one.step()
            one.zero_grad()
        with torch.no_grad():
            module.eval()
            assert torch.equal(module._plain_loss(batch), plain._plain_loss(batch))
            module.train()
    assert len(recorded) == 2


@pytest.mark.parametrize("compile", [False, True])
def test_a_distillation_with_a_warm_up_of_the_rounding(recorded, compile, tmp_path):
    """There are two states: partly rounded, in plain PyTorch, and rounded, with kernels."""
    torch.manual_seed(1)
    dense = small_config(**SHAPE, linear="dense")
    lightning_file.write(dense, TernaryTransformer(dense).state_dict(), tmp_path / "teacher.ckpt", TextFiles())
    loader = token_loader(batches=16, batch_size=8, length=65, vocab_size=512)
    seen = []
    for cuda_graphs in (False, True):
        distillation = Distillation(str(tmp_path / "teacher.ckpt"), language_model=0.5)
        torch.manual_seed(0)
        module = SparseBitNet(
            small_config(**SHAPE, pattern="2:4", loss="chunked"), partial(torch.optim.AdamW, lr=1e-2), warmup_steps=2,
            compile=compile, distillation=distillation, cuda_graphs=cuda_graphs,
        )  # fmt: skip
        losses = Losses()
        trainer = quiet_trainer(
            [losses, RoundingWarmup(0.5, total_steps=16)], accelerator="gpu", devices=1, max_steps=16,
            plugins=[SparseTernaryPrecision("int8", "bf16")],
        )  # fmt: skip
        trainer.fit(module, loader)
        seen.append((losses.values, [float(trainer.callback_metrics[name]) for name in METRICS]))
    assert len(recorded) == 4
    assert seen[1][0] == pytest.approx(seen[0][0], rel=1e-3)
    assert seen[1][1] == pytest.approx(seen[0][1], rel=1e-2)
