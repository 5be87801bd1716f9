"""A grid file becomes runs with ids that never change."""

import sys

import pytest
import yaml

from research.reproduce.grid import read_grid
from sbn_lightning.cli import main
from sbn_lightning.core.errors import ConfigError
from tests.research.fabricated import GRID

RECIPE = {
    "seed_everything": 1,
    "model": {"config": {"pattern": "6:8", "linear": "ternary"}, "optimizer": {"init_args": {"lr": 0.004}}},
    "checkpoint": {"every_n_train_steps": 5},
    "data": {"path": "here", "batch_size": 4, "sequence_length": 8, "seed": 1},
    "trainer": {"max_steps": 10, "val_check_interval": 5, "plugins": None},
}
FACTORS = {
    "family": {"ternary": {}, "bf16-sparse": {"model.config.linear": "masked"}},
    "pattern": "model.config.pattern",
    "seed": ["seed_everything", "data.seed"],
    "learning_rate": "model.optimizer.init_args.lr",
    "gradients": "trainer.plugins.init_args.gradients",
    "ramp": {"none": {}, "late": {"ramp.shape": "step", "ramp.start": 0.75}},
}


@pytest.fixture
def grid(tmp_path):
    """Write a grid of the given groups, and read it."""

    def write(groups, recipe=RECIPE, overrides=(), data=None):
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe))
        grid = {"recipe": "base.yaml", "factors": FACTORS, "groups": groups}
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
        return read_grid(tmp_path / "grid.yaml", overrides, data)

    return write


def test_expansion(grid):
    runs = grid({"a": {"family": ["ternary", "bf16-sparse"], "pattern": ["6:8", "2:4"], "seed": [1, 2]}}).runs()
    assert len(runs) == 8
    assert [run.name for run in runs[:3]] == [
        "ternary-6of8-lr_0.004-s1",
        "ternary-6of8-lr_0.004-s2",
        "ternary-2of4-lr_0.004-s1",
    ]
    last = runs[-1]
    assert last.recipe["model"]["config"] == {"pattern": "2:4", "linear": "masked"}
    assert (last.recipe["seed_everything"], last.recipe["data"]["seed"]) == (2, 2)
    assert last.factors == {
        "family": "bf16-sparse",
        "pattern": "2:4",
        "seed": 2,
        "learning_rate": 0.004,
        "gradients": None,
        "ramp": "none",
    }
    assert last.varied == {}
    assert last.tokens == 10 * 4 * 8


def test_ids_are_of_what_changes_a_result(grid):
    groups = {"a": {"pattern": "2:4", "ramp": "late"}}
    (run,) = grid(groups).runs()
    assert run.id == "ternary-2of4-lr_0.004-ramp_late-s1-f202efe4"
    (elsewhere,) = grid(groups, data="/somewhere", overrides=["trainer.accelerator=cpu"]).runs()
    assert elsewhere.id == run.id
    assert elsewhere.recipe["data"]["path"] == "/somewhere/tokens"
    (longer,) = grid(groups, overrides=["trainer.max_steps=20"]).runs()
    assert longer.name == run.name
    assert longer.id != run.id


def test_what_groups_share_runs_once_and_a_sweep_keeps_its_names(grid):
    groups = {"sweep": {"learning_rate": [0.002, 0.004]}, "patterns": {"pattern": ["6:8", "2:4"]}}
    runs = grid(groups).runs()
    assert [run.groups for run in runs] == [["sweep"], ["sweep", "patterns"], ["patterns"]]
    assert [run.varied for run in runs] == [{}, {}, {}]
    retuned = RECIPE | {"model": RECIPE["model"] | {"optimizer": {"init_args": {"lr": 0.002}}}}
    assert {run.id for run in runs[:2]} <= {run.id for run in grid(groups, retuned).runs()}


def test_runs_are_picked_by_group_name_or_id(grid):
    runs = grid({"a": {"pattern": ["6:8", "2:4"]}, "b": {"ramp": "late"}}).runs()

    def picked(*patterns):
        return [run.name for run in runs if run.matches(patterns)]

    assert len(picked()) == 3
    assert picked("b/*") == ["ternary-6of8-lr_0.004-ramp_late-s1"]
    assert picked("*2of4*", "b/*") == ["ternary-2of4-lr_0.004-s1", "ternary-6of8-lr_0.004-ramp_late-s1"]
    assert picked(runs[0].id) == [runs[0].name]
    assert picked("c/*") == []


@pytest.mark.parametrize(
    ("groups", "overrides", "message"),
    [
        ({"a": {"patern": "6:8"}}, [], "group a: 'patern' is not one of the factors"),
        ({"a": {"ramp": "early"}}, [], "ramp: 'early' is not one of none, late"),
        ({"a": {"pattern": 368}}, [], "quote it"),
        ({"a": {"learning_rate": "1e-3"}}, [], "write it with a point"),
        ({"a": {"family": "bf16-sparse", "gradients": "int8"}}, [], "this family has no such part"),
        ({"a": {}}, ["trainer.max_steps=7"], "val_check_interval=5 does not divide trainer.max_steps=7"),
        ({"a": {}}, ["trainer.max_steps"], "not of the form key=value"),
        ({"a": {}}, ["trainer.max_steps=[1"], "is no YAML"),
    ],
)
def test_errors_say_what_is_wrong(grid, groups, overrides, message):
    with pytest.raises(ConfigError, match=message):
        grid(groups, overrides=overrides).runs()


def test_the_shipped_grid(capsys):
    """Its defaults are those of the base recipe, every run parses by name, and the report finds every run it needs."""
    runs = read_grid(GRID).runs()
    assert len({run.id for run in runs}) == len(runs)
    assert f"{len(runs)} runs of 50 million tokens" in GRID.read_text().splitlines()[0]
    plain = {(r.factors["family"], r.factors["pattern"], r.factors["seed"]) for r in runs if not r.varied}
    patterns = ("8:8", "7:8", "6:8", "5:8", "4:8", "2:4", "3:8", "2:8")
    families = ("ternary", "bf16-sparse")
    assert {(f, p, 1) for f in families for p in patterns} <= plain
    assert {(f, p, s) for f in families for p in ("8:8", "6:8", "2:4", "2:8") for s in (2, 3)} <= plain
    (naive,) = [run for run in runs if run.varied == {"refresh_interval": 10, "stale_gradient": "dense"}]
    assert naive.recipe["mask_refresh"] == {"interval": 10, "stale_gradient": "dense"}
    assert {run.factors["gradients"] for run in runs} == {None, "bf16", "int8"}
    assert main(["reproduce", "--grid", str(GRID), "--dry_run", "true", "--only", "ramps/*walk*", "*_10-*"]) == 0
    printed = capsys.readouterr().out
    assert "4 runs, 4 to do: 201,326,592 tokens" in printed
    assert main(["reproduce", "--grid", str(GRID), "--only", "nothing"]) == 1
    assert "matches nothing" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["ternary", "bf16-sparse"])
def test_the_shipped_recipe_parses(family, tmp_path, capsys, monkeypatch):
    from sbn_lightning.cli.training import SBNCLI

    run = next(run for run in read_grid(GRID).runs() if run.factors["family"] == family)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(run.recipe))
    monkeypatch.setattr(sys, "argv", ["sbn"])
    with pytest.raises(SystemExit) as ended:
        SBNCLI(["fit", "--config", "recipe.yaml", "--print_config"])
    assert ended.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert parsed["model"]["config"]["linear"] == {"ternary": "ternary", "bf16-sparse": "masked"}[family]


def test_the_old_path_of_the_grid_says_where_it_is_now(capsys):
    assert main(["reproduce", "--grid", "recipes/reproduce/grid.yaml", "--dry_run"]) == 1
    assert "No such file or directory; the grid moved to research/reproduce/grid.yaml" in capsys.readouterr().err
