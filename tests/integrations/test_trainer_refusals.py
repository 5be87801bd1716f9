"""What goes wrong without a word in ``transformers.Trainer``, or with a word about something else, is named."""

import warnings
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from sbn_lightning.core.errors import ConfigError  # noqa: E402
from sbn_lightning.integrations.huggingface import SBNConfig, SparsityCallback, save_packed  # noqa: E402
from sbn_lightning.integrations.pytorch import convert  # noqa: E402
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear  # noqa: E402
from tests.integrations.families import build  # noqa: E402


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def warned(action):
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        result = action()
    return result, [str(one.message) for one in recorded if "most updates" in str(one.message)]


def trainer_of(model, folder):
    rows = [{"input_ids": torch.arange(3, 11), "labels": torch.arange(3, 11)}] * 8
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    return transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[SparsityCallback()])


def test_a_bfloat16_folder_is_converted_with_one_warning_that_names_the_way_out(tmp_path):
    build("qwen2").bfloat16().save_pretrained(tmp_path / "dense")
    config = {"quantization_config": SBNConfig("2:4")}
    model, messages = warned(lambda: load(tmp_path / "dense", **config))
    assert model.dtype == torch.bfloat16
    assert len(messages) == 1
    assert "from_pretrained(..., dtype=torch.float32)" in messages[0]
    assert warned(trainer_of(model, tmp_path / "run").train)[1] == []
    model, messages = warned(lambda: load(tmp_path / "dense", dtype=torch.float32, **config))
    assert model.dtype == torch.float32
    assert messages == warned(trainer_of(model, tmp_path / "run").train)[1] == []


def test_a_bfloat16_folder_of_latent_weights_warns_when_it_is_trained(tmp_path):
    model = build("qwen2")
    convert(model, "2:4")
    save_packed(model, tmp_path / "packed", dtype=torch.bfloat16)
    build("qwen2").save_pretrained(tmp_path / "dense")
    load(tmp_path / "dense", quantization_config=SBNConfig("2:4")).save_pretrained(tmp_path / "latent")
    assert warned(lambda: load(tmp_path / "packed", dtype=torch.bfloat16))[1] == []
    model, messages = warned(lambda: load(tmp_path / "latent", dtype=torch.bfloat16))
    assert messages == []  # It may be loaded to be run.
    assert len(warned(trainer_of(model, tmp_path / "run").train)[1]) == 1


def test_data_parallel_is_refused_before_the_first_step():
    arguments = SimpleNamespace(n_gpu=2)
    with pytest.raises(ConfigError, match=r"nn\.DataParallel.*torchrun --nproc_per_node 2.*CUDA_VISIBLE_DEVICES=0"):
        SparsityCallback().on_train_begin(arguments, None, None, model=build("qwen2"), optimizer=None)


@pytest.mark.parametrize("kind", ["ternary", "masked"])
def test_a_copy_that_data_parallel_made_names_it(kind):
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    convert(model, "2:4", kind=kind)
    copy = model[0]._replicate_for_data_parallel()  # What torch.nn.parallel.replicate does, which needs two GPUs.
    copy._former_parameters = OrderedDict()
    for name, parameter in model[0]._parameters.items():
        setattr(copy, name, parameter * 1.0)
    with pytest.raises(ConfigError, match=r"\(16, 8\): nn\.DataParallel copies layers.*DistributedDataParallel"):
        copy(torch.randn(2, 16))
    pruned = SparseBitLinear(16, 8, pattern="2:4")
    del pruned._parameters["weight"]
    with pytest.raises(ConfigError, match="its weight is no parameter any more"):
        pruned(torch.randn(2, 16))
