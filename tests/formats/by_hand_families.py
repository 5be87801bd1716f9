"""By hand: does llama.cpp compute what we compute, for each family and each kind of positions?

    pip install llama-cpp-python          # builds llama.cpp; a C++ compiler, about 6 minutes on 2 cores
    python -m tests.formats.by_hand_families

The script makes small random ternary models, writes each as GGUF, and compares the logits of 200 tokens with those of
our model without quantised activations. llama.cpp rounds activations in blocks of 32 features to 8 bits, which moves
logits by a few per cent of their standard deviation. An option that llama.cpp does not know moves them by tens of per
cent. Exits with 1 if a model differs by more than 8 %, or if llama.cpp does not load a file.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbn_lightning.formats import load_model
from sbn_lightning.formats.gguf.write import write_gguf
from sbn_lightning.formats.packed import ternary_layers
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.transformer import TernaryTransformer
from tests.formats.models import save

SHAPE: dict[str, Any] = {"vocab_size": 257, "d_model": 128, "n_layers": 4, "d_ffn": 256, "max_sequence_length": 256}
TOKENS = 200
LARGEST = 0.08  # of the logits' standard deviation
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "yarn"}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
SMOLLM3 = {"layers_without_rope": (3,)}
OLMO2 = {"qk_norm": "projection", "post_norm": True, "tie_embeddings": False}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, biases, wide heads": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "head_dim": 64},
    "llama, linear": {"rope_scaling": {"factor": 4.0, "rope_type": "linear"}},
    "llama, YaRN": {"rope_scaling": YARN},
    "llama, YaRN, attention_factor": {"rope_scaling": {**YARN, "attention_factor": 1.6}},
    "llama, llama3": {"rope_scaling": LLAMA3},
    "qwen2": {"qkv_bias": True},
    "qwen2, llama3": {"qkv_bias": True, "rope_scaling": LLAMA3},
    "qwen2, YaRN": {"qkv_bias": True, "rope_scaling": YARN},
    "qwen3": {"qk_norm": "head", "head_dim": 64},
    "qwen3, YaRN, untied": {"qk_norm": "head", "head_dim": 64, "rope_scaling": YARN, "tie_embeddings": False},
    "smollm3": SMOLLM3,
    "smollm3, YaRN, wide heads": {**SMOLLM3, "head_dim": 64, "rope_scaling": YARN},
    "olmo2": OLMO2,
    "olmo2, YaRN": {**OLMO2, "rope_scaling": YARN},
    "bitnet, SiLU": {"sub_norms": True},
}


@torch.no_grad()
def make_model(options: dict[str, Any]) -> TernaryTransformer:
    """A random model in which norms and biases do not have their initial values."""
    torch.manual_seed(0)
    model = TernaryTransformer(TransformerConfig(**SHAPE, init_std=0.15, **options)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@torch.no_grad()
def difference(options: dict[str, Any], folder: Path) -> tuple[float, int]:
    """How far the logits of llama.cpp are from ours, in our standard deviations, and how many next tokens are equal."""
    from llama_cpp import Llama

    loaded = load_model(save(make_model(options), folder / "m.ckpt"))
    write_gguf(loaded, folder, "Q4_0", embedding_bits=32)
    for layer in ternary_layers(loaded.model).values():
        layer.activation_bits = None
    tokens = torch.randint(257, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    ours = loaded.model(tokens)[0]
    file = str(folder / "model-Q4_0.gguf")
    other = Llama(file, n_ctx=TOKENS + 8, n_batch=TOKENS + 8, logits_all=True, verbose=False, n_threads=1)
    other.eval(tokens[0].tolist())
    theirs = torch.from_numpy(np.array(other.scores[:TOKENS]))
    other.close()
    return float((ours - theirs).std() / ours.std()), int((ours.argmax(-1) == theirs.argmax(-1)).sum())


def main() -> int:
    worst = 0.0
    for name, options in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            differs, same = difference(options, Path(folder))
        print(f"{name}: logits differ by {differs:.2%} of their deviation, {same} of {TOKENS} next tokens are equal")
        worst = max(worst, differs)
    return int(worst > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
