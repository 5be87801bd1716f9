"""``sbn recipes``: the list, the copy, and ``--config NAME``."""

import sys
from pathlib import Path

import pytest

from sbn_lightning.cli import main, recipes

REPOSITORY = Path(__file__).parents[2] / "recipes"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sbn"])


def test_the_list_has_every_recipe_with_its_first_line(capsys):
    assert main(["recipes"]) == 0
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed.keys() == {path.stem for path in REPOSITORY.glob("*.yaml")}
    for name, about in printed.items():
        assert (REPOSITORY / f"{name}.yaml").read_text().startswith(f"# {about}\n")


@pytest.mark.parametrize(
    ("to", "written"), [([], "sparse_pretrain.yaml"), (["my.yaml"], "my.yaml"), (["new/"], "new/sparse_pretrain.yaml")]
)
def test_a_copy_is_the_recipe(to, written, capsys):
    assert main(["recipes", "copy", "sparse_pretrain", *to]) == 0
    assert written in capsys.readouterr().out
    assert Path(written).read_bytes() == (REPOSITORY / "sparse_pretrain.yaml").read_bytes()


def test_a_copy_never_replaces_a_file(capsys):
    Path("my.yaml").write_text("mine")
    assert main(["recipes", "copy", "sparse_pretrain", "my.yaml"]) == 1
    assert "my.yaml exists already" in capsys.readouterr().err
    assert Path("my.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["copy", "sparse_pretran"], "did you mean sparse_pretrain?"),
        (["copy"], "which recipe?"),
        (["show"], "invalid choice: 'show'"),
        (["list", "sparse_pretrain"], "takes no name"),
        (["--all"], "unrecognized arguments: --all"),
    ],
)
def test_wrong_words_are_one_line(words, told, capsys):
    assert main(["recipes", *words]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_help_says_how_to_copy(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["recipes", "--help"])
    assert stop.value.code == 0
    assert "sbn recipes copy NAME [TO]" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ternary_dense", "ternary_dense.yaml"])
def test_config_takes_the_name_of_a_recipe(name, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", name, "--print_config"])
    assert "pattern: '8:8'" in capsys.readouterr().out


def test_a_file_of_that_name_wins():
    Path("ternary_dense").write_text("seed_everything: 7\n")
    assert recipes.find("ternary_dense") == "ternary_dense"


def test_a_folder_of_that_name_is_no_recipe():
    Path("ternary_dense").mkdir()
    assert recipes.find("ternary_dense") == str(REPOSITORY / "ternary_dense.yaml")


def test_yaml_text_is_no_name():
    assert recipes.find("seed_everything: 7") == "seed_everything: 7"


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("sparse_pretran", "did you mean sparse_pretrain?"),
        ("recipes/sparse_pretrain.yaml", "--config sparse_pretrain reads the recipe of the package"),
        ("nothing_like_it", "sbn recipes lists them"),
    ],
)
def test_an_unknown_config_is_one_line(config, told, capsys):
    assert main(["fit", "--config", config]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
