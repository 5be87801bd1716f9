"""Train a tiny recipe on the command line, kill it with SIGKILL again and again, and compare with an undisturbed run.

    python tests/faults/kill.py --kills 20 --loop fit

Every start is the same command, with ``--ckpt_path last``. One kill in three waits for a checkpoint to be half
written, one in five comes while the process is starting, and the others come at random moments of training. At the end
losses, samples and masks of every micro-batch, and weights and optimiser of the last checkpoint, are compared to the
last bit.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from sbn_lightning.cli import main as sbn  # noqa: E402
from tests.faults.recorder import read  # noqa: E402
from tests.preloaded import Preloaded  # noqa: E402

CHECKPOINTS = "logs/sparse_pretrain/version_*/checkpoints"


def command(tokens, steps, loop="fit", *more):
    """The command line of a tiny run that saves after every step."""
    options = {
        "data.path": tokens,
        "data.batch_size": 2,
        "data.sequence_length": 16,
        "data.num_workers": 0,
        "model.config.vocab_size": 320,
        "model.config.d_model": 32,
        "model.config.n_layers": 1,
        "model.config.d_ffn": 64,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": 7,
        "trainer.limit_val_batches": 2,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.num_sanity_val_steps": 0,
        "checkpoint.every_n_train_steps": 1,
        "trainer.callbacks+": "tests.faults.recorder.Recorder",
        "trainer.callbacks.path": "record.txt",
        "ckpt_path": "last",
    }
    words = [f"--{key}={value}" for key, value in options.items()]
    return [
        sys.executable,
        str(ROOT / "cli.py"),
        loop,
        "--config",
        str(ROOT / "recipes/sparse_pretrain.yaml"),
        *words,
        *more,
    ]


def start(words, folder):
    """Start the command in ``folder``, and append its output to ``log.txt`` there."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(folder / "log.txt", "ab") as log:
        output = {"stdout": log, "stderr": subprocess.STDOUT}
        # A process group of its own, so that a signal reaches all its processes.
        return subprocess.Popen(words, cwd=folder, env=environment, start_new_session=True, **output)


def fork(words, folder):
    """Do the same as :func:`start`, in a process that need not import anything."""
    return Preloaded(main_of_sbn, [words[2:]], folder, folder / "log.txt")


def main_of_sbn(words):
    sys.argv = ["sbn"]
    return sbn(words)


def wait_for(process, condition, pause=0.002, limit=120):
    """Wait for ``condition`` or for the end of the process. Return whether the process still runs."""
    end = time.monotonic() + limit
    while process.poll() is None and not condition():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(pause)
    return process.poll() is None


def size(path):
    return path.stat().st_size if path.exists() else 0


def last_checkpoint(folder):
    (path,) = folder.glob(f"{CHECKPOINTS}/last.ckpt")
    return torch.load(path, weights_only=True)


def kill_once(words, folder, kind, rng, longest, begin):
    """Start the command and kill it. Return whether the command was still running at the kill."""
    record = folder / "record.txt"
    before = size(record)
    process = begin(words, folder)
    if kind == "start":
        time.sleep(rng.uniform(0.0, 5.0 if begin is start else 0.5))
    else:
        wait_for(process, lambda: size(record) > before)
        time.sleep(rng.uniform(0.0, longest))
        if kind == "write":
            wait_for(process, lambda: any(folder.glob(f"{CHECKPOINTS}/*.tmp")), pause=0)
    running = process.poll() is None
    process.kill()
    process.wait()
    # The process may have finished before the kill, but may not have failed.
    assert running or process.returncode == 0, (folder / "log.txt").read_text()[-2000:]
    return running


def compare(calm, killed):
    """Assert that two finished runs are the same to the last bit. Return the number of micro-batches."""
    expected, got = read(calm / "record.txt"), read(killed / "record.txt")
    assert got == expected, f"differ at {sorted(key for key in expected if got.get(key) != expected[key])[:5]}"
    a, b = last_checkpoint(calm), last_checkpoint(killed)
    assert a["global_step"] == b["global_step"]
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(a[key], b[key]), key
    return len(expected)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def run(folder, tokens, kills, steps, loop="fit", seed=0, longest=0.5, report=print, begin=start):
    """Train once undisturbed and once with kills, and compare the two runs.

    Each process is begun with ``begin``, which is :func:`start` or :func:`fork`.

    Returns:
        How many kills met a running process.
    """
    rng, words = random.Random(seed), command(tokens, steps, loop)
    calm, killed = folder / "calm", folder / "killed"
    for place in (calm, killed):
        place.mkdir()
    process = begin(words, calm)
    assert process.wait() == 0, (calm / "log.txt").read_text()[-2000:]
    hits = 0
    for number in range(kills):
        kind = "write" if number % 3 == 0 else "start" if number % 5 == 2 else "train"
        running = kill_once(words, killed, kind, rng, longest, begin)
        hits += running
        reached = max(read(killed / "record.txt"), default=(0, 0))[0] if size(killed / "record.txt") else 0
        left = [path.name for path in killed.glob(f"{CHECKPOINTS}/*.tmp")]
        report(f"kill {number + 1}: {kind}, step {reached}{', left ' + ', '.join(left) if left else ''}")
        if not running:
            break
    process = begin(words, killed)
    assert process.wait() == 0, (killed / "log.txt").read_text()[-2000:]
    report(f"{compare(calm, killed)} micro-batches, weights, masks and optimiser equal to the last bit")
    return hits


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--loop", choices=["fit", "fabric"], default="fit")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    from sbn_lightning.data import prepare

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(input="stdlib", output=f"{name}/tokens", tokenizer="byte", max_bytes=200_000, num_workers=1)
        hits = run(folder, folder / "tokens", arguments.kills, arguments.steps, arguments.loop, arguments.seed)
        print(f"{hits} of {arguments.kills} kills met a running process")


if __name__ == "__main__":
    main()
