"""Layers, conversion, backends, formats and inference work where neither Lightning nor litdata is installed."""

import subprocess
import sys
import textwrap

import pytest

# Put in front of a program, this makes the import of a package fail as if the package were not installed.
BLOCKER = """
    import sys

    class Absent:
        NAMES = {"lightning", "litdata", "lightning_utilities", "pytorch_lightning", "torchmetrics"}

        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in self.NAMES:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Absent())
"""


def run(program, folder):
    """Run a program in a fresh interpreter, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:sbn_lightning", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_blocker_blocks(tmp_path):
    program = textwrap.dedent(BLOCKER) + "import lightning"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert "No module named 'lightning'" in done.stderr


ROOMS = ("core", "sparsity", "backends", "layers", "models", "formats", "inference", "schedule")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """What importing every file of each room came to. torch is imported once, and each room in a fork of its own."""
    program = textwrap.dedent(BLOCKER) + textwrap.dedent(
        f"""
        import importlib, os, pkgutil, traceback
        import torch, torch._dynamo  # most rooms import both

        HOSTS = {{"transformers", "torchao", "vllm", "gguf"}}  # other people's packages, if they are not installed

        def import_all(name):
            room = importlib.import_module(name)
            count = 1
            for module in pkgutil.walk_packages(room.__path__, name + "."):
                try:
                    importlib.import_module(module.name)
                except ModuleNotFoundError as error:
                    if error.name not in HOSTS:
                        raise
                count += 1
            return count

        for room in {ROOMS}:
            if (child := os.fork()) == 0:
                try:
                    print(room, import_all("sbn_lightning." + room), flush=True)
                except BaseException:
                    traceback.print_exc()
                os._exit(0)
            os.waitpid(child, 0)
        """
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:sbn_lightning", "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("rooms"),
        timeout=240,
    )
    return dict(line.split() for line in done.stdout.splitlines()), done.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_every_file_of_a_room_imports(room, imported):
    counts, errors = imported
    assert int(counts.get(room, 0)) > 1, errors


def test_a_model_is_converted_trained_saved_packed_and_exported(tmp_path):
    program = textwrap.dedent(BLOCKER) + textwrap.dedent(
        """
        from pathlib import Path

        import torch
        from torch import nn
        from sbn_lightning import TernaryTransformer, TransformerConfig
        from sbn_lightning import convert, load_sparse, revert, save_sparse, use_kernels
        from sbn_lightning.checkpoints.text_files import TextFiles
        from sbn_lightning.formats import load_model
        from sbn_lightning.formats.packed import write_packed
        from sbn_lightning.layers.packed import pack_layers

        def build():
            return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

        torch.manual_seed(0)
        model = build()
        convert(model, "2:4")
        use_kernels(model, "cpu")
        x, y = torch.randn(64, 16), torch.randn(64, 8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]

        torch.save(model.state_dict(), "model.pt")
        model.load_state_dict(torch.load("model.pt", weights_only=True))
        save_sparse(model, "folder")
        again = build()
        load_sparse(again, "folder")
        with torch.no_grad():
            assert torch.equal(again(x), model(x))
        revert(model)
        assert ((model[0].weight.view(-1, 4) != 0).sum(1) <= 2).all()

        config = TransformerConfig(
            vocab_size=64, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ffn=64, pattern="2:4"
        )
        model = TernaryTransformer(config).eval()
        Path("packed").mkdir()
        write_packed(model, Path("packed"), TextFiles(), embedding_bits=32)
        tokens = torch.arange(16)[None]
        with torch.no_grad():
            assert torch.equal(load_model("packed").model(tokens), pack_layers(model)(tokens))
        assert "lightning" not in sys.modules and "litdata" not in sys.modules
        print("done")
        """
    )
    assert run(program, tmp_path).strip() == "done"


@pytest.mark.parametrize("module", ["sbn_lightning", "sbn_kernels"])
def test_the_package_itself_imports_nothing_heavy(module, tmp_path):
    """Importing the package must be cheap. The test counts modules, because times vary."""
    heavy = {"torch", "lightning", "litdata", "triton", "transformers", "torchmetrics", "jsonargparse"}
    printed = run(f"import {module}, sys; print(*sys.modules)", tmp_path).split()
    assert not heavy & set(printed)


def test_layers_need_no_more_than_torch(tmp_path):
    heavy = {"lightning", "litdata", "transformers", "torchmetrics", "jsonargparse", "tensorboard"}
    program = "import torch, sys; from sbn_lightning import SparseBitLinear, convert_linears; print(*sys.modules)"
    assert not heavy & set(run(program, tmp_path).split())
