"""``import-hf``: pretrained Qwen2 and Llama weights as a checkpoint to start training from."""

from __future__ import annotations

import shutil
from pathlib import Path

from sbn_lightning.checkpoints.tokenizers import TOKENIZER, beside
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.files import check_output, file_aside

# What an import reads: no code, and no weights in formats that can hold code.
PATTERNS = ["*.safetensors", "*.safetensors.index.json", "config.json", TOKENIZER]


def import_hf(input: str, output: str, overwrite: bool = False) -> None:
    """Turn a Hugging Face Qwen2 or Llama model into a checkpoint that training can start from.

    Writes the checkpoint and, beside it, its tokenizer as NAME.tokenizer.json for `prepare --tokenizer`.

    Args:
        input: Folder with config.json and safetensors, or the name of a model on the Hugging Face hub, like
            Qwen/Qwen2.5-0.5B.
        output: Checkpoint to write, like models/qwen2.5-0.5b.ckpt.
        overwrite: Replace the checkpoint if it is there.

    Raises:
        ConfigError: The model has a feature that is not supported, or the checkpoint is there already.
        DataError: A file is missing or damaged, or cannot be written.
    """
    target = Path(output)
    if target.is_dir():
        raise ConfigError(f"--output {output} is a folder; name a file in it, like {target / 'model.ckpt'}")
    check_output(target, overwrite)
    folder = _local(input)
    from sbn_lightning.checkpoints import lightning_file
    from sbn_lightning.formats.assemble import build_model
    from sbn_lightning.formats.huggingface.folder import read_hf

    print(f"reading {folder}", flush=True)
    config, state = read_hf(folder)
    model = build_model(config, state, str(folder))  # checks names and shapes
    with file_aside(target, overwrite) as file:
        lightning_file.write(config, model.state_dict(), file)
    scaled = "" if config.rope_scaling is None else f" with positions scaled by {config.rope_scaling.factor:g}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters:,} parameters ({model.embed.weight.dtype}): {config.n_layers} layers, d_model {config.d_model}, "
        f"d_ffn {config.d_ffn}, {config.n_heads} heads, {config.n_kv_heads} key/value heads, rope_theta "
        f"{config.rope_theta:g}{scaled}\nwritten to {target}"
    )
    if (folder / TOKENIZER).is_file():
        with file_aside(beside(target), overwrite=True) as file:
            shutil.copyfile(folder / TOKENIZER, file)
        print(f"tokenizer: {beside(target)}")
    else:
        beside(target).unlink(missing_ok=True)  # of the checkpoint that was replaced
        print(f"note: {folder} has no {TOKENIZER}")


def _local(source: str) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise DataError(
            f"{source} does not exist; give a folder, or a name on the Hugging Face hub like Qwen/Qwen2.5-0.5B"
        )
    from huggingface_hub import snapshot_download

    print(f"getting {source} from the Hugging Face hub", flush=True)
    try:
        return Path(snapshot_download(source, allow_patterns=PATTERNS))
    except Exception as error:  # no network, no such model, no access: each has its own class
        raise DataError(f"{source} is no folder here, and the hub gives: {str(error).splitlines()[0]}") from error
