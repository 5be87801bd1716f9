"""A training by ``transformers.Trainer`` that ends before its ramp or its warm-up says so."""

from types import SimpleNamespace

import pytest
import torch

from sbn_lightning.integrations.pytorch import convert
from sbn_lightning.schedule import Ramp, Rounding
from tests.helpers import ForeignModule


def test_a_training_that_stops_early():
    pytest.importorskip("transformers")
    from sbn_lightning.integrations.huggingface import SparsityCallback

    model, state = ForeignModule(), SimpleNamespace(max_steps=100, global_step=0)
    convert(model, "2:4", exclude=())
    callback = SparsityCallback(ramp=Ramp("rows", end=0.6), rounding=Rounding(end=0.5))
    callback.on_train_begin(
        SimpleNamespace(n_gpu=0), state, None, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    )
    state.global_step = 3  # The Trainer stopped, for example by an EarlyStoppingCallback.
    callback.on_step_end(None, state, None)
    with pytest.warns(UserWarning, match="training ended after 3 of 100 steps") as got:
        callback.on_train_end(None, state, None)
    assert [str(one.message).partition(": training")[0] for one in got] == ["Ramp", "Rounding"]
