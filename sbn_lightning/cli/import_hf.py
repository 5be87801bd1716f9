"""``sbn import-hf``: pretrained weights of Hugging Face or GGUF as a checkpoint to start training from."""

from __future__ import annotations

from pathlib import Path

from sbn_lightning.checkpoints.text_files import NAMES
from sbn_lightning.checkpoints.tokenizers import TOKENIZER, beside
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.files import write_text
from sbn_lightning.formats.output import check_output, write_errors_named

# The files of a hub's repository that an import reads: no code, and no weights in formats that can hold code.
PATTERNS = ["*.safetensors", "*.safetensors.index.json", "config.json", *NAMES]


def import_hf(input: str, output: str, overwrite: bool = False) -> None:
    """Turn a Hugging Face model, or a GGUF file, into a checkpoint that training can start from.

    The families are Llama, Qwen2 and Qwen2.5, Qwen3, Mistral, SmolLM3, OLMo-2 and BitNet b1.58 2B4T. Models of other
    families train in their own classes, see the recipe from_hugging_face.

    The checkpoint carries the tokenizer, the chat template and the stop tokens of the model. The tokenizer is also
    written to a file beside the checkpoint, NAME.tokenizer.json, for `prepare --tokenizer`.

    Args:
        input: A folder with config.json and safetensors, a .gguf file, or the name of a model on the Hugging Face hub,
            like Qwen/Qwen2.5-0.5B.
        output: The checkpoint to write, like models/qwen2.5-0.5b.ckpt.
        overwrite: Replace the checkpoint if it is there.

    Raises:
        ConfigError: The model has a feature that is not supported, or the checkpoint is there already.
        DataError: A file is missing or damaged, or cannot be written.
    """
    target = Path(output)
    if target.is_dir():
        raise ConfigError(f"--output {output} is a folder; name a file in it, like {target / 'model.ckpt'}")
    check_output(target, overwrite)
    source = _local(input)
    from sbn_lightning.checkpoints import lightning_file
    from sbn_lightning.formats.load import load_model
    from sbn_lightning.layers.packed import PackedTernaryLinear

    print(f"reading {source}", flush=True)
    loaded = load_model(source)  # Loading checks the names and shapes of tensors.
    if any(isinstance(layer, PackedTernaryLinear) for layer in loaded.model.modules()):
        raise ConfigError(
            f"{source} holds packed ternary weights, which are not copied into a checkpoint; give the folder itself to "
            "export, generate, evaluate or model.init_from"
        )
    model, config = loaded.model, loaded.config
    with write_errors_named(target):
        lightning_file.write(config, model.state_dict(), target, loaded.text)
    scaling = config.rope_scaling
    scaled = "" if scaling is None else f" with positions scaled by {scaling.factor:g} ({scaling.rope_type})"
    options = "".join(f", {name} {value}" for name, value in config.beyond_plain_blocks().items())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters:,} parameters ({model.embed.weight.dtype}): {config.n_layers} layers, d_model {config.d_model}, "
        f"d_ffn {config.d_ffn}, {config.n_heads} heads, {config.n_kv_heads} key/value heads, rope_theta "
        f"{config.rope_theta:g}{scaled}{options}\nwritten to {target}"
    )
    if TOKENIZER in loaded.text.contents:
        with write_errors_named(beside(target)):
            write_text(beside(target), loaded.text.contents[TOKENIZER])
        template = "with" if loaded.text.chat_template else "no"
        print(f"tokenizer: {beside(target)}, {template} chat template, stop tokens {loaded.text.stop_ids or 'unknown'}")
    else:
        beside(target).unlink(missing_ok=True)  # An old tokenizer would belong to the replaced checkpoint.
        other = (source / "tokenizer.model").is_file()
        way = "; AutoTokenizer.save_pretrained of transformers makes one of its tokenizer.model" if other else ""
        print(f"note: {source} has no {TOKENIZER}{way}")


def _local(source: str) -> Path:
    """The file or folder on this machine; a model of the hub is downloaded."""
    path = Path(source)
    if path.exists():
        return path
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or source.endswith((".gguf", ".safetensors")):
        raise DataError(
            f"{source} does not exist; give a folder, a .gguf file, or a name on the Hugging Face hub like "
            "Qwen/Qwen2.5-0.5B"
        )
    from huggingface_hub import snapshot_download

    print(f"getting {source} from the Hugging Face hub", flush=True)
    try:
        return Path(snapshot_download(source, allow_patterns=PATTERNS))
    except Exception as error:  # A missing model, network or permission has its own class.
        raise DataError(f"{source} is no folder here, and the hub gives: {str(error).splitlines()[0]}") from error
