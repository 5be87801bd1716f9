"""What version 0.1.0 computed and promised still holds. The files beside this module are its record.

Losses are compared to the last bit where torch, its CPU capability and the processor are those of the record. Another
build of torch adds floats in another order, so elsewhere the bound is a relative one.
"""

from __future__ import annotations

import json
import warnings
from importlib import import_module

import pytest
import torch

from tests.golden import record

LOSSES = json.loads((record.HERE / "losses.json").read_text())
EXACT = LOSSES["environment"] == record.environment()
RELATIVE_ERROR = 2e-3  # relative bound of a loss after at most 20 steps, on another processor or with another torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    record.prepare_tokens(folder)
    return folder


def read(name):
    return json.loads((record.HERE / name).read_text())


def expected_losses(recipe):
    return [float.fromhex(value) for value in LOSSES["losses"][recipe]]


def compare(losses, expected):
    assert len(losses) == len(expected)
    assert losses == expected if EXACT else losses == pytest.approx(expected, rel=RELATIVE_ERROR)


@pytest.mark.parametrize("recipe", record.SMALL_RECIPES)
def test_a_recipe_gives_the_recorded_losses_and_keys(folder, recipe):
    losses, made = record.fit(folder, recipe)
    compare(losses, expected_losses(recipe))
    assert record.keys(made / "checkpoints" / "last.ckpt") == read("state_dict_keys.json")[recipe]


def test_an_old_checkpoint_continues_to_the_recorded_losses(folder):
    losses, _ = record.fit(folder, "sparse_pretrain", f"--ckpt_path={record.HERE / 'step_10.ckpt'}")
    compare(losses, expected_losses("sparse_pretrain")[10:])


def test_old_and_new_exports_of_a_checkpoint_hold_the_same_model(folder):
    from sbn_lightning.formats import load_model

    record.export(record.HERE / "step_10.ckpt", folder)
    tokens = torch.arange(32).unsqueeze(0)
    with torch.no_grad():
        logits = load_model(record.HERE / "step_10.ckpt").model(tokens)
        for packed in (record.HERE / "packed", folder / "packed"):
            assert torch.equal(load_model(packed).model(tokens), logits)
    new, old = (path.read_bytes() for path in (folder / "gguf" / "model-Q4_0.gguf", record.HERE / "model-Q4_0.gguf"))
    assert tensors_of(new, folder / "new.gguf") == tensors_of(old, folder / "old.gguf")


def tensors_of(contents, file):
    """Names, types and bytes of the tensors in a GGUF file."""
    from gguf import GGUFReader

    file.write_bytes(contents)
    return {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in GGUFReader(file).tensors}


def test_every_option_of_the_command_line_is_still_there():
    now = record.command_line()
    for command, options in read("command_line.json").items():
        missing = set(options) - set(now[command])
        assert not missing, f"{command}: {sorted(missing)}"


@pytest.mark.parametrize(("module", "names"), read("public_names.json").items())
def test_a_public_name_still_imports(module, names):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = import_module(module)
        missing = [name for name in names if not hasattr(found, name)]
    assert not missing


def test_a_module_that_moved_says_so():
    import sys

    sys.modules.pop("sbn_lightning.pattern", None)
    with pytest.warns(
        DeprecationWarning, match=r"sbn_lightning\.pattern has moved to sbn_lightning\.sparsity\.pattern"
    ):
        pattern = import_module("sbn_lightning.pattern")
    from sbn_lightning import NMPattern

    assert pattern.NMPattern is NMPattern


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_function_is_called_although_an_old_module_has_its_name(tmp_path, capsys):
    import_module("sbn_lightning.data.prepare")
    from sbn_lightning.cli.app import main
    from sbn_lightning.core.errors import ConfigError
    from sbn_lightning.data import prepare

    with pytest.raises(ConfigError, match="'absent' is no file"):
        prepare(input="absent", output=str(tmp_path / "tokens"), tokenizer="byte")
    words = ["--input", "absent", "gone", "--output", str(tmp_path / "tokens"), "--tokenizer", "byte"]
    assert main(["prepare", *words]) == 1
    assert "'absent' is no file" in capsys.readouterr().err


def test_the_record_is_whole():
    assert set(LOSSES["losses"]) == set(record.SMALL_RECIPES)
    assert all(len(values) == record.STEPS for values in LOSSES["losses"].values())
