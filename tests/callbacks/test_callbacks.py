import copy
import itertools

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sbn_lightning import (
    DenseToSparseRamp,
    MaskRefresh,
    NMPattern,
    SparsityPatternLogger,
    TernarySparseConversion,
    TokenThroughput,
    TrainingReport,
    WeightDecaySchedule,
)
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.sparse_linear import masked_layers
from sbn_lightning.sparsity.pattern import nonzeros_per_group, top_n_mask
from tests.helpers import ForeignModule, quiet_trainer, regression_loader, small_module, token_loader


class Recorder(Callback):
    """Records weights, masks and gradients of one layer at each micro-batch."""

    def __init__(self, name="model.blocks.0.mlp.down"):
        self.name = name
        self.steps, self.weights, self.masks, self.masked_gradient = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        layer = dict(masked_layers(pl_module))[self.name]
        self.steps.append(trainer.global_step)
        self.weights.append(layer.weight.detach().clone())
        self.masks.append(layer.mask.clone())

    def on_after_backward(self, trainer, pl_module):
        layer = dict(masked_layers(pl_module))[self.name]
        self.masked_gradient.append(layer.weight.grad[~layer.mask].abs().sum().item())


# MaskRefresh


def test_refresh_is_a_pure_function_of_the_step():
    every_third = MaskRefresh(interval=3, freeze_after=7)
    assert [step for step in range(20) if every_third.is_due(step)] == [0, 3, 6]
    assert all(MaskRefresh().is_due(step) for step in range(5))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_masks_change_only_at_refreshes_counted_in_optimiser_steps(accumulate):
    recorder = Recorder()
    trainer = quiet_trainer([MaskRefresh(interval=3), recorder], max_steps=8, accumulate_grad_batches=accumulate)
    trainer.fit(small_module(), token_loader(batches=20))
    assert len(recorder.steps) == 8 * accumulate
    at = {step: (w, m) for step, w, m in zip(recorder.steps, recorder.weights, recorder.masks, strict=True)}
    for step, (_, mask) in at.items():
        refreshed_at = step - step % 3
        assert torch.equal(mask, top_n_mask(at[refreshed_at][0], NMPattern(6, 8)))
    assert not torch.equal(at[0][1], at[6][1])


def test_masked_weights_get_a_gradient_only_when_the_mask_is_fresh():
    recorder = Recorder()
    trainer = quiet_trainer([MaskRefresh(interval=3), recorder], max_steps=7)
    trainer.fit(small_module(), token_loader())
    assert [gradient > 0 for gradient in recorder.masked_gradient] == [s % 3 == 0 for s in range(7)]


def test_frozen_masks_stay_and_masked_weights_rest():
    recorder = Recorder()
    trainer = quiet_trainer([MaskRefresh(freeze_after=2), recorder], max_steps=6)
    trainer.fit(small_module(), token_loader())
    assert not torch.equal(recorder.masks[1], recorder.masks[2])
    assert all(torch.equal(recorder.masks[2], mask) for mask in recorder.masks[3:])
    assert [gradient > 0 for gradient in recorder.masked_gradient] == [True, True, True, False, False, False]


@pytest.mark.parametrize("options", [{"interval": 4}, {"freeze_after": 2}])
def test_held_masks_stay_after_training_until_the_weights_train_again(options):
    module, recorder = small_module(), Recorder()
    trainer = quiet_trainer([MaskRefresh(**options)], max_steps=7)
    trainer.fit(module, token_loader())
    layer = dict(masked_layers(module))[recorder.name]
    masks = layer.mask.clone()
    assert not torch.equal(masks, top_n_mask(layer.weight, layer.pattern))
    trainer.save_checkpoint("end.ckpt")
    trainer.validate(module, token_loader(), verbose=False)
    assert torch.equal(layer.mask, masks)
    assert torch.equal(torch.load("end.ckpt")["state_dict"][f"{recorder.name}.mask_bits"], layer.mask_bits)
    quiet_trainer([recorder], max_steps=3).fit(module, token_loader())
    assert torch.equal(recorder.masks[0], masks)
    for weight, mask in list(zip(recorder.weights, recorder.masks, strict=True))[1:]:
        assert torch.equal(mask, top_n_mask(weight, layer.pattern))
    assert all(gradient > 0 for gradient in recorder.masked_gradient)


def test_dense_stale_gradient_warns():
    with pytest.warns(UserWarning, match="drift under a stale mask"):
        MaskRefresh(interval=10, stale_gradient="dense")


@pytest.mark.parametrize("options", [{"interval": 0}, {"freeze_after": -1}, {"stale_gradient": "none"}])
def test_refresh_refuses(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        MaskRefresh(**options)


@pytest.mark.parametrize("callback", [MaskRefresh(), DenseToSparseRamp(), SparsityPatternLogger()])
def test_a_model_without_masked_layers_is_an_error(callback):
    with pytest.raises(ConfigError, match="add the TernarySparseConversion callback"):
        quiet_trainer([callback]).fit(ForeignModule(), regression_loader())


# DenseToSparseRamp


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        (DenseToSparseRamp("step", start=0.5), [(4, 1), (4, 1), (4, 1), (4, 1), (4, 1), (2, 1), (2, 1)]),
        (DenseToSparseRamp("walk", end=0.4), [(4, 1), (4, 1), (3, 1), (3, 1), (2, 1), (2, 1), (2, 1)]),
        (DenseToSparseRamp("walk", start=0.2, end=0.4), [(4, 1), (4, 1), (4, 1), (3, 1), (2, 1), (2, 1), (2, 1)]),
        (DenseToSparseRamp("rows", end=0.4), [(2, 0), (2, 0.25), (2, 0.5), (2, 0.75), (2, 1), (2, 1), (2, 1)]),
        (
            DenseToSparseRamp("rows", end=0.4, curve="cubic"),
            [(2, 0), (2, 37 / 64), (2, 7 / 8), (2, 63 / 64), (2, 1), (2, 1), (2, 1)],
        ),
    ],
)
def test_ramp_densities(ramp, expected):
    densities = [ramp.density(ramp.progress(step, 10), NMPattern(2, 4), 0, 1) for step in range(7)]
    assert densities == expected


def test_ramp_by_layers():
    ramp = DenseToSparseRamp("layers", end=1.0)
    sparse = [[ramp.density(ramp.progress(s, 4), NMPattern(2, 4), i, 4)[1] for i in range(4)] for s in range(5)]
    assert sparse == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_ramp_reaches_the_masks_of_a_run():
    recorder = Recorder()
    trainer = quiet_trainer([DenseToSparseRamp("walk", end=0.5), recorder], max_steps=8)
    trainer.fit(small_module(pattern="4:8"), token_loader(batches=20))
    counts = [nonzeros_per_group(mask, 8).unique().tolist() for mask in recorder.masks]
    assert counts == [[8], [7], [6], [5], [4], [4], [4], [4]]
    final = dict(masked_layers(trainer.lightning_module))[recorder.name]
    assert torch.equal(final.mask, top_n_mask(final.weight, NMPattern(4, 8)))


@pytest.mark.parametrize(
    "options", [{"shape": "jump"}, {"curve": "square"}, {"start": 1.5}, {"shape": "walk", "start": 0.6, "end": 0.5}]
)
def test_ramp_refuses(options):
    with pytest.raises(ConfigError, match="DenseToSparseRamp"):
        DenseToSparseRamp(**options)


# WeightDecaySchedule


def test_weight_decay_falls_to_zero_over_half_of_training():
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append([group["weight_decay"] for group in trainer.optimizers[0].param_groups])

    quiet_trainer([WeightDecaySchedule(until=0.5), Watch()], max_steps=8).fit(small_module(), token_loader())
    assert [decay for decay, _ in seen] == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447, 0, 0, 0, 0], abs=1e-6)
    assert {rest for _, rest in seen} == {0.0}


def test_weight_decay_resumes_from_the_initial_value():
    first = quiet_trainer([WeightDecaySchedule(until=1.0, total_steps=8)], max_steps=4)
    first.fit(small_module(), token_loader(batches=4))
    first.save_checkpoint("half.ckpt")
    again = quiet_trainer([WeightDecaySchedule(until=1.0, total_steps=8)], max_steps=6)
    again.fit(small_module(), token_loader(), ckpt_path="half.ckpt")
    assert again.optimizers[0].param_groups[0]["weight_decay"] == pytest.approx(0.1 * 0.1464466, abs=1e-6)


def test_weight_decay_of_a_second_run_is_that_of_its_optimiser():
    class Decaying(ForeignModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3, weight_decay=self.decay)

    callback = WeightDecaySchedule(until=1.0, total_steps=2)
    for decay in (0.1, 0.5):
        module = Decaying()
        module.decay = decay
        trainer = quiet_trainer([callback], max_steps=1)
        trainer.fit(module, regression_loader())
        assert trainer.optimizers[0].param_groups[0]["weight_decay"] == pytest.approx(decay / 2)


# All


def test_without_anything_that_costs_time():
    """A ``barebones`` Trainer has no logging at all."""
    callbacks = [MaskRefresh(), DenseToSparseRamp(), WeightDecaySchedule(), SparsityPatternLogger(2)]
    trainer = Trainer(barebones=True, accelerator="cpu", max_steps=4, callbacks=callbacks)
    trainer.fit(small_module(), token_loader())
    assert trainer.global_step == 4


# Order


def test_callbacks_do_not_depend_on_their_order(tmp_path):
    def run(order, name):
        callbacks = [
            MaskRefresh(interval=2),
            DenseToSparseRamp("rows", end=0.8),
            WeightDecaySchedule(),
            SparsityPatternLogger(interval=3),
        ]
        trainer = quiet_trainer([callbacks[i] for i in order], max_steps=7, logger=CSVLogger(tmp_path, name))
        module = small_module(pattern="4:8")
        trainer.fit(module, token_loader())
        return module.state_dict(), callbacks[3].counts

    expected, counts = run((0, 1, 2, 3), "first")
    for order in list(itertools.permutations(range(4)))[5::6]:
        state, other = run(order, "-".join(map(str, order)))
        assert all(torch.equal(expected[key], state[key]) for key in expected)
        assert other == counts


# SparsityPatternLogger


def test_logged_numbers_equal_a_count_by_hand(tmp_path):
    recorder, logger = Recorder(), SparsityPatternLogger(interval=2)
    codes = []

    class Codes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            layer = dict(masked_layers(pl_module))[recorder.name]
            codes.append((layer.ternary()[0].clone(), layer.values(masked=False)))

    trainer = quiet_trainer([logger, recorder, Codes()], max_steps=5, logger=CSVLogger(tmp_path))
    trainer.fit(small_module(pattern="2:4"), token_loader())
    counts = logger.counts[recorder.name]  # logged at the end, after 5 steps, and before that after 4
    layer = dict(masked_layers(trainer.lightning_module))[recorder.name]
    final, free = layer.ternary()[0], layer.values(masked=False)
    assert counts.weights == final.numel()
    assert counts.kept == final.numel() / 2
    assert counts.natural == (free == 0).sum()
    assert counts.enforced == ((free != 0) & ~layer.mask).sum()
    assert counts.natural + counts.enforced == (final == 0).sum()
    assert counts.mask_flips == (layer.mask != recorder.masks[4]).sum()
    assert counts.code_flips == (final != codes[4][0]).sum()
    assert counts.code_flips > 0
    metrics = logger.total().shares()
    assert metrics["mask_density"] == 0.5


def test_tensorboard_gets_histograms_pictures_and_scalars(tmp_path):
    callbacks = [SparsityPatternLogger(interval=2), WeightDecaySchedule(), TokenThroughput(window=2)]
    trainer = quiet_trainer(callbacks, max_steps=4, logger=TensorBoardLogger(tmp_path, "run"))
    trainer.fit(small_module(), token_loader(), token_loader(batches=1))
    events = EventAccumulator(trainer.logger.log_dir, size_guidance={"histograms": 0, "images": 0}).Reload()
    tags = events.Tags()
    name = "model.blocks.1.attention.qkv"
    assert {f"{kind}/{name}" for kind in ("latent_weight", "nonzeros_per_group", "ternary_code")} <= set(
        tags["histograms"]
    )
    assert {"pattern/model.blocks.0.attention.qkv", "pattern/model.blocks.0.mlp.down"} <= set(tags["images"])
    scalars = {"sparsity/zeros", "sparsity/flip_rate_mask", f"flip_rate_code/{name}", f"zeros_enforced/{name}"}
    scalars |= {f"gamma/{name}/2", "gamma/model.blocks.0.mlp.down", "train/loss", "train/perplexity", "learning_rate"}
    assert scalars | {"weight_decay", "tokens_per_second"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("sparsity/zeros")] == [0, 2, 4]
    assert [event.step for event in events.Scalars("sparsity/flip_rate_mask")] == [2, 4]
    code = events.Histograms(f"ternary_code/{name}")[-1].histogram_value
    layer = dict(masked_layers(trainer.lightning_module))[name]
    assert code.num == layer.weight.numel()
    assert list(code.bucket) == [(layer.ternary()[0] == value).sum().item() for value in (-1, 0, 1)]
    image = events.Images("pattern/model.blocks.0.mlp.down")[-1]
    assert (image.height, image.width) == (32 * 6, 64 * 6)


@pytest.mark.parametrize("kind", ["ternary", "masked"])
def test_a_nan_in_a_histogram_does_not_end_a_training(tmp_path, recwarn, kind):
    class Spoils(ForeignModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 1 else 1)

    callbacks = [TernarySparseConversion("2:4", kind=kind), SparsityPatternLogger(interval=1)]
    trainer = quiet_trainer(callbacks, max_steps=4, logger=TensorBoardLogger(tmp_path, kind))
    trainer.fit(Spoils(), regression_loader())
    assert trainer.global_step == 4
    told = [str(warning.message) for warning in recwarn if "histograms are left out" in str(warning.message)]
    assert len(told) == 2  # one call for each layer
    assert "the weight of net.0 has a value that is NaN or infinite at step 2" in told[0]


def test_any_logger_will_do(tmp_path):
    trainer = quiet_trainer([SparsityPatternLogger(interval=1)], max_steps=2, logger=CSVLogger(tmp_path, "csv"))
    trainer.fit(small_module(linear="masked"), token_loader())
    header = (tmp_path / "csv/version_0/metrics.csv").read_text().splitlines()[0]
    assert "sparsity/zeros_enforced" in header
    assert "gamma" not in header


# TernarySparseConversion


def test_the_logger_looks_at_a_second_run_as_at_the_first():
    """With ``max_steps``, the second run starts at step 0 again, before the step at which the first run last logged."""
    looks = []

    class Noted(SparsityPatternLogger):
        def _look(self, trainer, module):
            super()._look(trainer, module)
            looks.append((trainer.global_step, self.total().shares()))

    logger = Noted(interval=2)
    for _ in range(2):
        quiet_trainer([logger], max_steps=5).fit(small_module(), token_loader())
    assert [step for step, _ in looks] == [0, 2, 4, 5] * 2
    assert looks[:4] == looks[4:]


# Report and throughput


def test_report_names_losses_zeros_and_places(tmp_path, capsys):
    callbacks = [SparsityPatternLogger(interval=2), TrainingReport()]
    trainer = quiet_trainer(
        callbacks,
        max_steps=4,
        logger=TensorBoardLogger(tmp_path / "logs", "run"),
        enable_checkpointing=True,
        val_check_interval=2,
    )
    trainer.fit(small_module(), token_loader(), token_loader(batches=1))
    printed = capsys.readouterr().out
    for expected in (
        "val/perplexity",
        "gate_up",
        "zeros natural",
        "code flips",
        "checkpoint (best)",
        "tensorboard --logdir",
    ):
        assert expected in printed
    assert f"logs: {trainer.logger.log_dir}" in printed


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"max_steps": 2},
            "Nothing to do: the checkpoint is at step 4, and max_steps is 2. A larger max_steps trains on.",
        ),
        (
            {"max_steps": 4},
            "Nothing to do: the checkpoint is at step 4, and max_steps is 4. A larger max_steps trains on.",
        ),
        ({"max_steps": 9, "max_epochs": 1}, "Nothing to do: the checkpoint is at step 4, and max_epochs is 1."),
        ({"max_steps": 6, "limit_train_batches": 0}, "Trained no step: the checkpoint is at step 4."),
        ({"max_steps": 6}, "Trained 6 steps."),
    ],
)
def test_a_run_that_continues_beyond_its_end_says_that_nothing_was_done(tmp_path, capsys, options, line):
    first = quiet_trainer([TrainingReport()], max_steps=4)
    first.fit(small_module(), token_loader(batches=4))
    assert "Trained 4 steps." in capsys.readouterr().out
    first.save_checkpoint(tmp_path / "state.ckpt")
    report = TrainingReport()
    quiet_trainer([report], **options).fit(small_module(), token_loader(batches=4), ckpt_path=tmp_path / "state.ckpt")
    assert line in capsys.readouterr().out


def test_a_second_fit_without_a_checkpoint_has_nothing_to_do(capsys):
    trainer = quiet_trainer([TrainingReport()], max_steps=2)
    for line in ("Trained 2 steps.", "Nothing to do: the run is at step 2 already, and max_steps is 2."):
        trainer.fit(small_module(), token_loader())
        assert line in capsys.readouterr().out


def test_callback_state_loads_with_weights_only(tmp_path):
    callbacks = [MaskRefresh(2), DenseToSparseRamp("walk"), WeightDecaySchedule(), SparsityPatternLogger(2)]
    trainer = quiet_trainer(copy.deepcopy(callbacks), max_steps=3, logger=CSVLogger(tmp_path))
    trainer.fit(small_module(), token_loader())
    trainer.save_checkpoint("state.ckpt")
    saved = torch.load("state.ckpt", weights_only=True)["callbacks"]
    assert {"MaskRefresh", "DenseToSparseRamp", "WeightDecaySchedule", "SparsityPatternLogger"} <= set(saved)
