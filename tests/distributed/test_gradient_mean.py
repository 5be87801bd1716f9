"""``sbn_ddp`` averages gradients where they lie. The means are those of torch's DDP."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import Strategy

from sbn_lightning.distributed.strategies import ReplicatedStrategy
from tests.distributed.forked_runs import assert_two_ended, jobs_on_two_ranks

JOBS = ("mean", "fabric_mean")


def jobs_of_ranks(folder, tokens):
    return jobs_on_two_ranks(folder, JOBS)


@pytest.mark.timeout(900)  # The first of these tests runs the jobs of all.
@pytest.mark.parametrize("job", JOBS)
def test_means_equal_those_of_torch(job, forked_runs):
    assert_two_ended(forked_runs / "test_gradient_mean" / job)


def by_recipe(options):
    """The strategy as a recipe makes it."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(Strategy, "strategy")
    path = f"{ReplicatedStrategy.__module__}.ReplicatedStrategy"
    config = parser.parse_object({"strategy": {"class_path": path, "init_args": options}})
    assert "process_group" in config.strategy.init_args  # The parser knows the options of torch's class, too.
    return parser.instantiate(config).strategy


def test_an_option_of_torchs_class_lets_torch_do_it():
    assert not ReplicatedStrategy("bfloat16", process_group_backend="gloo", max_ctas=8).by_torch
    assert ReplicatedStrategy(find_unused_parameters=True).by_torch
    assert ReplicatedStrategy(ddp_comm_hook=print).by_torch
    assert not ReplicatedStrategy(find_unused_parameters=False, ddp_comm_hook=None).by_torch


@pytest.mark.parametrize(("name", "value"), [("broadcast_buffers", True), ("gradient_as_bucket_view", False)])
def test_torchs_default_is_a_choice_where_this_class_has_another(name, value):
    for made in (ReplicatedStrategy(**{name: value}), by_recipe({name: value})):
        assert made.by_torch
        given = made._ddp_kwargs
        assert given["forward_sync_buffers" if "forward_sync_buffers" in given and "broad" in name else name] is value


@pytest.mark.parametrize("options", [{}, {"max_ctas": 8}, {"find_unused_parameters": True}])
def test_a_recipe_which_gives_every_option_its_default_is_no_other_choice(options):
    made = by_recipe(options)
    assert made.by_torch == ("find_unused_parameters" in options)
    assert made._ddp_kwargs == ReplicatedStrategy(**options)._ddp_kwargs
    assert made.max_ctas == options.get("max_ctas")
