"""By hand: does llama.cpp give the next tokens that we give?

    pip install llama-cpp-python          # builds llama.cpp; a C++ compiler, about 6 minutes on 2 cores
    python cli.py export --checkpoint RUN --format gguf --output out
    python tests/formats/by_hand_llama.py RUN out/model-TQ2_0.gguf

The script compares twice. Along a real text, both programs choose the next token at every place. From short prompts,
both generate greedily, so that each token depends on those before. llama.cpp rounds activations in blocks of 256
features and not by token, so it may choose the other token where two tokens are about equally likely. The script prints
how far apart the two tokens were, in standard deviations of the logits. Exits with 1 unless both tokenizers agree and
every difference is such a near tie.
"""

import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

from sbn_lightning.formats import load_model

PROMPTS = ("import os\n", "def __init__(self, ", "    for i in range(", '"""Return the ', "class Error(Exception):\n")
NEW_TOKENS = 64
NEAR_TIE = 0.1


@torch.no_grad()
def main(checkpoint: str, gguf: str) -> int:
    from llama_cpp import Llama

    loaded = load_model(checkpoint)
    tokenizer = loaded.need_tokenizer()
    length = min(256, loaded.config.max_sequence_length)
    theirs = Llama(gguf, n_ctx=length, n_batch=length, logits_all=True, verbose=False)

    def compare(tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return our choices, theirs, and by how much their choice is below ours in our logits."""
        theirs.reset()
        theirs.eval(tokens)
        other = torch.from_numpy(np.array(theirs.scores[: len(tokens)]))
        ours = loaded.model(torch.tensor([tokens]))[0]
        best, given = ours.argmax(-1), other.argmax(-1)
        behind = ours.max(-1).values - ours.gather(-1, given.unsqueeze(-1)).squeeze(-1)
        print(f"  logits differ by {float((ours - other).std() / ours.std()):.2%} of their standard deviation")
        return best, given, behind / ours.std(-1)

    text = Path(textwrap.__file__).read_text(encoding="utf-8")
    tokens = tokenizer.encode(text).ids
    same_tokenizer = theirs.tokenize(text.encode(), add_bos=False) == tokens
    print(f"a text of {len(tokens)} tokens: tokenised {'alike' if same_tokenizer else 'differently'}")
    best, given, behind = compare(tokens[:length])
    worst = float(behind.max())
    print(
        f"  next tokens: {int((best == given).sum())} of {length} alike; the others by at most {worst:.3f} deviations"
    )
    for prompt in PROMPTS:
        print(f"{prompt!r}")
        start = tokenizer.encode(prompt).ids
        written = list(start)
        for _ in range(NEW_TOKENS):
            written.append(int(loaded.model(torch.tensor([written]))[0, -1].argmax()))
        best, given, behind = (values[len(start) - 1 : -1] for values in compare(written))
        alike = int((best == given).long().cumprod(0).sum())
        print(f"  {alike} of {NEW_TOKENS} tokens alike {tokenizer.decode(written[len(start) :])[:60]!r}")
        worst = max(worst, float(behind.max()))
    return int(not same_tokenizer or worst > NEAR_TIE)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
