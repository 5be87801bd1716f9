"""Six things that Lightning's own ModelPruning gets wrong and the callbacks here get right.

What ModelPruning does is printed (``pytest -rP``) and recorded but not asserted, because a new version may improve.
"""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.plugins.precision import Precision
from torch import nn

from sbn_lightning import MaskRefresh, TernarySparseConversion
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.sparse_linear import masked_layers
from sbn_lightning.sparsity.pattern import nonzeros_per_group, top_n_mask
from tests.helpers import ForeignModule, quiet_trainer, regression_loader

BATCHES = 4  # steps in an epoch


class Module(ForeignModule):
    """A module with everything that could be pruned: linear weights, biases, an embedding."""

    def configure_model(self):
        if self.net is None:
            super().configure_model()
            self.offset = nn.Embedding(4, 16)

    def training_step(self, batch, batch_idx):
        x, y = batch
        offset = self.offset(torch.full((len(x),), batch_idx % 4))
        return nn.functional.mse_loss(self.net(x + offset), y)


class Zeros(Callback):
    """Records the share of zeros in the first layer's effective weight at the start of each batch, and our masks."""

    def __init__(self):
        self.shares, self.masks, self.keys = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        layer = pl_module.net[0]
        if hasattr(layer, "mask"):
            self.masks.append(layer.mask)
        self.shares.append(zeros(layer))
        self.keys = list(pl_module.state_dict())


def zeros(layer):
    weight = layer.values() if hasattr(layer, "values") else layer.weight
    return (weight == 0).float().mean().item()


def pruning():
    return ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False, verbose=1)


def ours(**options):
    return [TernarySparseConversion("2:4", kind="masked", **options), MaskRefresh()]


def fit(callbacks, steps, module=None, ckpt_path=None, **options):
    module, seen = module or Module(), Zeros()
    trainer = quiet_trainer([*callbacks, seen], max_steps=steps, **options)
    trainer.fit(module, regression_loader(batch_size=64 // BATCHES), ckpt_path=ckpt_path)
    return module, seen, trainer


def percent(shares):
    return ", ".join(f"{100 * share:.0f} %" for share in shares)


@pytest.fixture
def observe(record_property):
    """Print and record what ModelPruning does. An error of ModelPruning is a finding, and does not fail the test."""

    def run(question, look):
        try:
            answer = look()
        except Exception as error:
            answer = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        record_property("ModelPruning", f"{question}: {answer}")
        print(f"ModelPruning | {question} | {answer}")

    return run


def test_n_of_m_from_the_first_step_of_a_single_epoch_with_regrowth(observe):
    module, seen, _ = fit(ours(), BATCHES)
    assert seen.shares == [0.5] * BATCHES
    assert all((nonzeros_per_group(mask, 4) == 2).all() for mask in [*seen.masks, module.net[0].mask])
    assert (module.net[0].mask & ~seen.masks[0]).any()  # weights that have grown back

    def look():
        module, seen, _ = fit([pruning()], BATCHES)
        wrong = (nonzeros_per_group(module.net[0].weight, 4) != 2).float().mean()
        return f"{percent(seen.shares)}; {100 * wrong:.0f} % of the groups of 4 then keep another number than 2"

    observe("zeros while one epoch trains", look)


def test_the_target_does_not_compound(observe):
    _, seen, _ = fit(ours(), 3 * BATCHES + 1)
    assert seen.shares[::BATCHES] == [0.5] * 4

    def look():
        return percent(fit([pruning()], 3 * BATCHES + 1)[1].shares[::BATCHES])

    observe("zeros at the start of epochs 0 to 3, amount=0.5", look)


def test_a_model_built_in_configure_model(observe):
    module, _, _ = fit(ours(), BATCHES, Module(in_configure_model=True))
    assert [name for name, _ in masked_layers(module)] == ["net.0", "net.2"]
    assert zeros(module.net[0]) == 0.5
    observe(
        "a model built in configure_model", lambda: percent([zeros(fit([pruning()], BATCHES, Module(True))[0].net[0])])
    )


class Swapping(Precision):
    """Replaces linear layers by its own layers: all linear layers, or only layers of exactly type ``nn.Linear``."""

    def __init__(self, exact):
        self.exact = exact

    def convert_module(self, module):
        for i, layer in enumerate(module.net):
            if type(layer) is nn.Linear or (not self.exact and isinstance(layer, nn.Linear)):
                module.net[i] = nn.Linear(layer.in_features, layer.out_features)
        return module


def test_a_precision_plugin_that_swaps_layers(observe):
    with pytest.raises(ConfigError, match=r"net\.0, net\.2; does the precision plugin swap"):
        fit(ours(), BATCHES, plugins=[Swapping(exact=False)])
    _, seen, _ = fit(ours(exclude=("net.2",)), BATCHES, plugins=[Swapping(exact=True)])
    assert seen.shares == [0.5] * BATCHES

    def look():
        return percent([zeros(fit([pruning()], BATCHES, plugins=[Swapping(exact=False)])[0].net[0])])

    observe("zeros at the end, with a precision plugin that swaps layers", look)


class SaveInTheMiddle(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == BATCHES + 1:
            trainer.save_checkpoint("pruned.ckpt")


def test_masks_are_saved_and_a_resumed_run_goes_on_with_them(observe):
    def held():
        return [TernarySparseConversion("2:4", kind="masked"), MaskRefresh(freeze_after=BATCHES)]

    before, _, trainer = fit(held(), 2 * BATCHES)
    trainer.save_checkpoint("sparse.ckpt")
    saved = torch.load("sparse.ckpt", weights_only=True)
    latent = before.net[0].weight
    assert torch.equal(saved["state_dict"]["net.0.weight"], latent)  # the parameter itself, not the masked product
    # a held mask cannot be computed again from the weight
    assert not torch.equal(before.net[0].mask, top_n_mask(latent, before.net[0].pattern))
    assert saved["callbacks"]["MaskRefresh"]["last_refresh"] == BATCHES
    _, seen, _ = fit(held(), 3 * BATCHES, ckpt_path="sparse.ckpt")
    assert seen.shares == [0.5] * BATCHES
    assert all(torch.equal(mask, before.net[0].mask) for mask in seen.masks)

    def look():
        fit([pruning(), SaveInTheMiddle()], 2 * BATCHES)
        state = torch.load("pruned.ckpt", weights_only=True)
        share = (state["state_dict"]["net.0.weight"] == 0).float().mean().item()
        seen = fit([pruning()], 2 * BATCHES, ckpt_path="pruned.ckpt")[1]
        kept = [key for key in state["callbacks"] if "Pruning" in key] or "none"
        return f"{percent([share])} in the file, then {percent(seen.shares)}; state of the callback: {kept}"

    observe("zeros after resuming from its checkpoint", look)


def test_names_stay_only_weights_are_masked_and_the_report_says_so(observe):
    names = list(Module().state_dict())
    module, seen, _ = fit(callbacks := ours(exclude=("net.2",)), 2 * BATCHES)
    assert [key for key in seen.keys if not key.endswith("mask_bits")] == names
    assert [key for key in seen.keys if key.endswith("mask_bits")] == ["net.0.mask_bits"]
    assert all(module.state_dict()[key].all() for key in ("net.0.bias", "net.2.weight", "net.2.bias", "offset.weight"))
    shares = "(66.7% of the linear parameters, 58.7% of all)"
    assert str(callbacks[0].report) == f"converted 1 layers: net.0 {shares}\nskipped net.2: excluded by name"
    with pytest.raises(ValueError, match=r"no layer was converted to 3:5 \(net\.0: in_features=16"):
        fit([TernarySparseConversion("3:5")], 1)

    def look():
        module, seen, _ = fit([pruning()], 2 * BATCHES)
        new = [key for key in seen.keys if key not in names]
        state = module.state_dict()
        others = {key: (state[key] == 0).float().mean().item() for key in ("net.0.bias", "offset.weight")}
        others = ", ".join(f"{percent([share])} of {key}" for key, share in others.items())
        gone = [key for key in names if key not in seen.keys]
        return f"{len(gone)} of {len(names)} keys gone ({', '.join(new[:2])}, ... instead); zeros in {others}"

    observe("names, biases and embeddings", look)
