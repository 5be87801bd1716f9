"""By hand: does llama.cpp cut text in the way that we name in the GGUF file?

    pip install llama-cpp-python          # builds llama.cpp; a C++ compiler, about 20 minutes on 2 cores
    python -m tests.formats.by_hand_ways

For each way to cut text, the script trains a small tokenizer, exports it in a GGUF file with a model of one layer, and
loads the file into llama.cpp. It does the same with the SentencePiece tokenizer of the tests. Exits with 1 unless all
texts give the same tokens.
"""

import sys
import textwrap
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sbn_lightning.checkpoints.text_files import TextFiles
from sbn_lightning.formats.gguf.pre_tokenizers import PRE_TOKENIZERS, PROBE, Way, pre_tokenizer_of
from sbn_lightning.formats.gguf.write import write_gguf
from sbn_lightning.formats.load import LoadedModel
from tests.formats.models import make_model
from tests.formats.test_gguf import sentencepiece

CODE = Path(textwrap.__file__).read_text(encoding="utf-8")
TEXTS = (PROBE, CODE, "  12  345 ab'tis it's IT'S x=1;\n\n  y\t\tz", "日本語 한국어 नमस्ते 12345678")


def trained(way: Way) -> Tokenizer:
    """A small BPE tokenizer that cuts text in the given way."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=way.ignores_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer_of(way), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([PROBE + CODE] * 3, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def agree(name: str, tokenizer: Tokenizer, texts: tuple[str, ...]) -> bool:
    """Whether llama.cpp gives the same tokens for all texts."""
    from llama_cpp import Llama

    model = make_model(vocab_size=tokenizer.get_vocab_size(), pattern="2:4", n_layers=1)
    text = TextFiles({"tokenizer.json": tokenizer.to_str()}, Path(name))
    with TemporaryDirectory() as folder:
        write_gguf(LoadedModel(model, model.config, "lightning", Path(name), text), Path(folder), "Q4_0")
        theirs = Llama(f"{folder}/model-Q4_0.gguf", n_ctx=64, vocab_only=True, verbose=False)
        same = [
            theirs.tokenize(one.encode(), add_bos=False, special=False)
            == tokenizer.encode(one, add_special_tokens=False).ids
            for one in texts
        ]
    print(f"{name:<16} {'alike' if all(same) else f'differs in text {same.index(False)}'}", flush=True)
    return all(same)


if __name__ == "__main__":
    results = [agree(way.name, trained(way), TEXTS) for way in PRE_TOKENIZERS]
    results.append(agree("SentencePiece", sentencepiece(), ("abc ab", "cab  é", "bcb\n", " a", "aab ab abc")))
    sys.exit(not all(results))
