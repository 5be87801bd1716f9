"""Record what this project computes and promises, to compare with after a change of structure.

``python -m tests.golden.record`` writes the files beside this module. ``test_golden.py`` makes the same things again
and compares them. Record only on purpose: a new file is a decision that behaviour changes, and needs an entry in
CHANGELOG.md. ``public_names.json`` was written once, from version 0.1.0. Helpers that have been replaced since are no
longer in the file.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SMALL_RECIPES = ("sparse_pretrain", "sparse_pretrain_2_4", "ternary_dense", "bf16_sparse_baseline", "dense_to_sparse")
STEPS = 20
SHRUNKEN = {
    "model.config.vocab_size": 257,
    "model.config.d_model": 64,
    "model.config.n_layers": 2,
    "model.config.n_heads": 4,
    "model.config.n_kv_heads": 2,
    "model.config.d_ffn": 128,
    "model.config.max_sequence_length": 64,
    "model.warmup_steps": 4,
    "data.batch_size": 4,
    "data.sequence_length": 32,
    "data.num_workers": 0,
    "trainer.accelerator": "cpu",
    "trainer.val_check_interval": 10,
    "trainer.limit_val_batches": 2,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "checkpoint.every_n_train_steps": 10,
    "checkpoint.save_top_k": -1,
}


def environment() -> dict[str, str]:
    """The parts of the environment that decide the last bits of a float32 sum on a CPU."""
    names = (
        re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    )
    return {
        "torch": torch.__version__,
        "processor": names[0] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def run(*arguments: str) -> str:
    """Run one command, and return what it printed."""
    from sbn_lightning.cli import main

    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            status = main(list(arguments))
        except SystemExit as stop:  # --help
            status = stop.code or 0
    assert status == 0, printed.getvalue()
    return printed.getvalue()


def prepare_tokens(folder: Path) -> None:
    """Write tokens of a text that does not change: the bytes of the licence."""
    texts = folder / "texts"
    texts.mkdir()
    text = (ROOT / "LICENSE").read_text()
    for i in range(8):
        (texts / f"{i}.txt").write_text(text[i * 1400 : (i + 1) * 1400])
    run("prepare", "--input", str(texts), "--output", str(folder / "data"), "--tokenizer", "byte",
        "--val_fraction", "0.2", "--num_workers", "1")  # fmt: skip


def fit(folder: Path, recipe: str, *extra: str, steps: int = STEPS) -> tuple[list[float], Path]:
    """Train a shrunken recipe, and return the losses of all steps and the folder of the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = SHRUNKEN | {"data.path": folder / "data", "trainer.max_steps": steps}
    with chdir(folder):
        run(
            "fit",
            "--config",
            str(ROOT / "recipes" / f"{recipe}.yaml"),
            *(f"--{k}={v}" for k, v in options.items()),
            *extra,
        )
        newest = max((folder / "logs" / recipe).glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
    events = EventAccumulator(str(newest))
    events.Reload()
    return [scalar.value for scalar in events.Scalars("train/loss")], newest


def keys(checkpoint: Path) -> dict[str, str]:
    """Names, shapes and dtypes of a checkpoint's state dict."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {name: f"{str(tensor.dtype)[6:]} {list(tensor.shape)}" for name, tensor in state.items()}


def command_line() -> dict[str, list[str]]:
    """The options of every command with their types and defaults, without their descriptions."""
    from sbn_lightning import cli

    surface = {}
    for command in [*cli.TRAINING, *cli.TOOLS]:
        with patch.dict(os.environ, COLUMNS="100000"):  # no line is broken
            printed = run(command, "--help")
        options = []
        for line in printed.splitlines():
            flag = re.match(r"\s+(-\S+(?:, -\S+)*)", line)
            if flag is None:
                continue
            about = re.search(r"\(((?:required, )?type: .*)\)\s*$", line)
            if flag[1].startswith(("--trainer.", "--lr_scheduler")) and "CLASS_PATH" not in line:
                continue  # Lightning's own, which differ between its versions
            options.append(f"{flag[1]} {about[1] if about else ''}".strip())
        surface[command] = options
    return surface


def main() -> None:
    """Writes all files."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    prepare_tokens(folder)
    losses, state = {}, {}
    for recipe in SMALL_RECIPES:
        values, made = fit(folder, recipe)
        losses[recipe] = [value.hex() for value in values]
        state[recipe] = keys(made / "checkpoints" / "last.ckpt")
        print(recipe, values[-1], made)
        if recipe == "sparse_pretrain":
            shutil.copy(next((made / "checkpoints").glob("*step=10.ckpt")), HERE / "step_10.ckpt")
            export(HERE / "step_10.ckpt", folder)
            shutil.rmtree(HERE / "packed", ignore_errors=True)
            shutil.copytree(folder / "packed", HERE / "packed")
            shutil.copy(folder / "gguf" / "model-Q4_0.gguf", HERE / "model-Q4_0.gguf")
    write("losses.json", {"environment": environment(), "losses": losses})
    write("state_dict_keys.json", state)
    write("command_line.json", command_line())
    shutil.rmtree(folder)


def export(checkpoint: Path, folder: Path) -> None:
    """Export a checkpoint to ``folder`` in the formats ``packed`` and ``gguf``.

    The record is older than the default of 16-bit embeddings, so the files are exported in float32.
    """
    for form, extra in (("packed", ()), ("gguf", ("--quantization", "Q4_0"))):
        run("export", "--checkpoint", str(checkpoint), "--output", str(folder / form), "--format", form,
            "--tokenizer", str(folder / "data"), "--dtype", "float32", *extra)  # fmt: skip


def write(name: str, value: object) -> None:
    (HERE / name).write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
