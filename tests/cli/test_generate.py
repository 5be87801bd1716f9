"""``sbn generate`` as a user meets it."""

import copy
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sbn_lightning.checkpoints.lightning_file import contents
from sbn_lightning.cli import main
from sbn_lightning.cli.generate import _prompts
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data.tokenizer import byte_tokenizer
from sbn_lightning.inference import generate
from sbn_lightning.inference.opening import use_backend
from sbn_lightning.layers.packed import pack_layers
from sbn_lightning.models.transformer import TernaryTransformer
from tests.helpers import imported, imported_by_help, small_config
from tests.inference.test_decoder import make


@pytest.fixture(scope="module")
def model():
    return make(torch.float32, qkv_bias=True)


@pytest.fixture
def checkpoint(model, tmp_path):
    torch.save(contents(model.config, model.state_dict()), tmp_path / "model.ckpt")
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "model.ckpt")


def run(capsys, *arguments):
    status = main(["generate", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def expected_text(model, prompt, count):
    (row,) = generate(model, [list(prompt.encode())], max_new_tokens=count, stop_tokens=[256])
    return byte_tokenizer().decode(row)


@pytest.mark.parametrize("stream", ["true", "false"])
def test_one_prompt(model, checkpoint, capsys, stream):
    arguments = ["--checkpoint", checkpoint, "--prompt", "def f", "--max_new_tokens", "30", "--device", "cpu"]
    status, out, err = run(capsys, *arguments, "--stream", stream)
    assert status == 0
    assert out == expected_text(model, "def f", 30) + "\n"
    assert "prefill 5 tokens" in err
    assert "decode" in err


def test_prompts_as_blocks_and_as_json(model, checkpoint, capsys, tmp_path):
    (tmp_path / "more.txt").write_text("third: é\n--fourth\n", encoding="utf-8")
    arguments = ["--checkpoint", checkpoint, "--prompt", "a b", "--prompt=[x]", "--prompts_file", "more.txt"]
    arguments += ["--max_new_tokens", "12", "--device", "cpu", "--batch_size", "3"]
    prompts = ["a b", "[x]", "third: é", "--fourth"]
    texts = [expected_text(model, prompt, 12) for prompt in prompts]
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    pairs = enumerate(zip(prompts, texts, strict=True), start=1)
    assert out == "".join(f"=== prompt {i}: {prompt}\n{text}\n\n" for i, (prompt, text) in pairs)
    status, out, err = run(capsys, *arguments, "--json", "true")
    rows = json.loads(out)
    assert [row["prompt"] for row in rows] == prompts
    assert [row["text"] for row in rows] == texts
    assert all(row["finish"] == ("length" if row["tokens"] == 12 else "stop") for row in rows)
    assert f"prefill {sum(len(p.encode()) for p in prompts)} tokens" in err


def test_json_prompts_empty_prompt_and_stop_token(model, checkpoint, capsys, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps(["", "two\nlines"]), encoding="utf-8")
    arguments = ["--checkpoint", checkpoint, "--prompts_file", "prompts.json", "--max_new_tokens", "8"]
    arguments += ["--json", "true", "--device", "cpu"]
    _, out, _ = run(capsys, *arguments)
    first, second = generate(model, [[256], list(b"two\nlines")], max_new_tokens=8, stop_tokens=[256])
    assert json.loads(out)[0]["text"] == byte_tokenizer().decode(first)
    _, out, _ = run(capsys, *arguments, "--stop_token", byte_tokenizer().id_to_token(second[0]))
    assert json.loads(out)[1] == {"prompt": "two\nlines", "text": "", "tokens": 0, "finish": "stop"}


@pytest.mark.parametrize(
    "prompts",
    # YAML would read most of these texts as something else, for example as null.
    [["# sorts a list"], ["null"], ["~"], ["- a"], ["[x]"], ["a: b"], ["  x "], ["🙂", "\x7f", "a\n"]],
)
def test_prompts_are_taken_as_they_are_typed(checkpoint, capsys, prompts):
    arguments = ["--checkpoint", checkpoint, "--prompt", *prompts, "--max_new_tokens", "1", "--device", "cpu"]
    status, out, _ = run(capsys, *arguments, "--json", "true")
    assert status == 0
    assert [row["prompt"] for row in json.loads(out)] == prompts


def test_options_stand_in_any_order(checkpoint, capsys):
    """Options may be repeated. An option that takes a list collects all values; for others the last value counts."""
    arguments = ["--checkpoint", "nowhere", "--prompt", "a", "--max_new_tokens", "1", "--prompt", "b", "c"]
    arguments.append("--json=true")
    status, out, _ = run(capsys, *arguments, "--checkpoint", checkpoint, "--max_new_tokens", "2", "--device", "cpu")
    assert status == 0
    assert [(row["prompt"], row["tokens"]) for row in json.loads(out)] == [("a", 2), ("b", 2), ("c", 2)]


def test_help_after_other_options(checkpoint, capsys):
    with pytest.raises(SystemExit):
        run(capsys, "--checkpoint", checkpoint, "--prompt", "a", "-h")
    assert "usage: sbn generate" in capsys.readouterr().out


def test_a_line_of_a_file_is_a_prompt(checkpoint, capsys, tmp_path):
    lines = ["form\x0cfeed", "", "separator\u2028inside"]
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = ["--checkpoint", checkpoint, "--prompts_file", "lines.txt", "--max_new_tokens", "1", "--device", "cpu"]
    _, out, _ = run(capsys, *arguments, "--json", "true")
    assert [row["prompt"] for row in json.loads(out)] == lines


@pytest.mark.parametrize(
    ("name", "content"), [("p.txt", "one\ntwo\n"), ("p.json", '["one", "two"]'), ("p.txt.gz", "one\ntwo\n")]
)
def test_a_byte_order_mark_is_part_of_no_prompt(checkpoint, capsys, tmp_path, name, content):
    data = b"\xef\xbb\xbf" + content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    arguments = ["--checkpoint", checkpoint, "--prompts_file", name, "--max_new_tokens", "1", "--device", "cpu"]
    _, out, _ = run(capsys, *arguments, "--json", "true")
    assert [row["prompt"] for row in json.loads(out)] == ["one", "two"]


def test_batches_draw_differently(checkpoint, capsys):
    arguments = ["--checkpoint", checkpoint, "--prompt", "same", "same", "--batch_size", "1", "--temperature", "5"]
    _, out, _ = run(capsys, *arguments, "--json", "true", "--max_new_tokens", "12", "--device", "cpu")
    first, second = json.loads(out)
    assert first["text"] != second["text"]


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_generated(checkpoint, capsys):
    arguments = ["--checkpoint", checkpoint, "--prompt", "short", "y" * 64, "--batch_size", "1", "--device", "cpu"]
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    assert "prompt 2 of 2 has 64 tokens" in err


def test_a_tokenizer_that_cuts_and_pads_does_neither_here(checkpoint, capsys, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    _, _, err = run(capsys, "--checkpoint", checkpoint, "--prompt", "nine byte", "--max_new_tokens", "1")
    assert "prefill 9 tokens" in err


def test_a_reader_that_leaves_is_no_error(checkpoint):
    code = (
        f"import sys; from sbn_lightning.cli import main\nsys.exit(main(['generate', '--checkpoint', {checkpoint!r}, "
    )
    code += "'--prompt', 'x', '--max_new_tokens', '50', '--device', 'cpu']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt"),
        (["--prompt", "x", "--seed", str(1 << 63)], "seed=9223372036854775808"),
        (["--prompt", "x", "--device", "meta"], "device 'meta' cannot be used"),
        (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0"),
        (["--prompt", "x" * 64], "leaves no room"),
        (["--prompt", "x", "--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["--prompt", "x", "--stop_token", "nope"], "stop_token 'nope'"),
        (["--prompts_file", "missing.txt"], "missing.txt"),
        (["--prompt", "x", "--seed", "1", "stray"], "unrecognized arguments: stray"),
        (["--prompt", "x\udcff"], "is not UTF-8"),
        (["--prompt", "x", "--checkpoint", "x" * 300], "File name too long"),
        (["--prompt", "x", "--backend", "sparse", "--device", "cpu"], "sparse"),
        (["--prompt", "x", "--batch_size", "0"], "batch_size=0"),
    ],
)
def test_errors_are_one_line(checkpoint, capsys, arguments, message):
    status, _, err = run(capsys, "--checkpoint", checkpoint, *arguments)
    assert status == 1
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert message in line


@pytest.mark.parametrize("content", ["[" * 99_999, '["cut", null]', '{"a": 1}', '["' + "9" * 9 + '", 1]'])
def test_a_prompts_file_that_is_no_list_of_strings_is_one_line(capsys, content):
    Path("p.json").write_text(content)
    assert main(["generate", "--checkpoint", "absent", "--prompts_file", "p.json"]) == 1
    assert "error: prompts_file p.json is not " in capsys.readouterr().err


@pytest.mark.parametrize("place", ["~/absent", "$WEIGHTS/absent", "${WEIGHTS}/absent"])
def test_home_and_variables_in_paths_mean_what_they_mean_to_a_shell(capsys, monkeypatch, place):
    """The shell has not replaced them: bash leaves them in ``--checkpoint=~/absent`` and in quotes."""
    monkeypatch.setenv("HOME", "/elsewhere")
    monkeypatch.setenv("WEIGHTS", "/elsewhere")
    for words in ([f"--checkpoint={place}"], ["--checkpoint", place]):
        assert main(["generate", *words, "--prompt", "~/absent"]) == 1
        assert "error: /elsewhere/absent does not exist" in capsys.readouterr().err
    Path("list.json").write_text('["$HOME"]')
    assert _prompts("$HOME", "list.json") == ["$HOME", "$HOME"]


def test_options_of_sampling_without_a_temperature_are_not_passed_over_in_silence(checkpoint, capsys):
    arguments = ["--checkpoint", checkpoint, "--prompt", "a", "--max_new_tokens", "1", "--device", "cpu"]
    assert "top_p and top_k have no effect" in run(capsys, *arguments, "--top_p", "0.9")[2]
    assert "no effect" not in run(capsys, *arguments, "--top_p", "0.9", "--temperature", "1")[2]


def test_a_file_that_is_no_checkpoint(capsys, tmp_path):
    (tmp_path / "notes.md").write_text("# Notes")
    status, _, err = run(capsys, "--checkpoint", "notes.md", "--prompt", "x")
    assert status == 1
    assert err == (
        "error: notes.md is no checkpoint; give a .ckpt, the folder of a run, a packed or a Hugging Face folder, "
        "or a .gguf file\n"
    )


@pytest.mark.parametrize("backend", ["sparse", "int8"])
def test_a_packed_folder_is_refused_a_backend_in_the_words_of_its_checkpoint(checkpoint, capsys, backend):
    assert main(["export", "--checkpoint", checkpoint, "--output", "packed"]) == 0
    errors = []
    for model in (checkpoint, "packed"):
        options = ["--checkpoint", model, "--prompt", "x", "--device", "cpu", "--backend", backend]
        status, _, err = run(capsys, *options)
        assert status == 1
        errors.append([line for line in err.splitlines() if line.startswith("error: ")])
    assert errors[0] == errors[1]
    assert errors[0][0].startswith(f'error: backend "{backend}" cannot run on the CPU: ')


@pytest.mark.parametrize(
    ("pattern", "engine", "message"),
    [
        (
            "6:8",
            "sparse_gemm",
            r'backend "sparse" cannot run layer blocks\.0\.attention\.qkv: .* take 2:4, not 6:8; use auto',
        ),
        ("2:4", "cusparselt", "cannot run packed weights here: cusparselt reads no packed weights"),
        ("2:4", "sparse_gemm", None),
    ],
)
def test_packed_weights_and_sparse_tensor_cores(monkeypatch, pattern, engine, message):
    """The test pretends that the machine has sparse tensor cores."""
    from sbn_kernels.runtime.capability import Needs

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Needs, "missing", lambda self, index: None if self.op == engine else "is not here")
    latent = TernaryTransformer(small_config(pattern=pattern))
    packed = pack_layers(copy.deepcopy(latent))
    if message is None:
        for wanted, given in (("sparse", "kernels"), ("reference", "reference")):
            use_backend(packed, wanted, torch.float32)
            assert packed.blocks[0].mlp.down.backend == given
        return
    with pytest.raises(ConfigError, match=message) as refused:
        use_backend(packed, "sparse", torch.float32)
    if engine == "sparse_gemm":
        with pytest.raises(ConfigError) as expected:
            use_backend(latent, "sparse", torch.float32)
        assert str(refused.value) == str(expected.value)


def test_without_a_tokenizer(model, capsys, tmp_path):
    torch.save(contents(model.config, model.state_dict()), tmp_path / "alone.ckpt")
    status, _, err = run(capsys, "--checkpoint", "alone.ckpt", "--prompt", "x", "--device", "cpu")
    assert status == 1
    assert "pass --tokenizer" in err


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_help_imports_nothing_heavy(command):
    heavy, output = imported_by_help(command, ["torch", "lightning", "litdata", "transformers", "lm_eval"])
    assert heavy == []
    assert "--checkpoint" in output


def test_running_imports_no_lightning(checkpoint):
    code = f"import sys; from sbn_lightning.cli import main\nmain(['generate', '--checkpoint', {checkpoint!r}, "
    code += "'--prompt', 'x', '--max_new_tokens', '1', '--device', 'cpu'])\n"
    assert imported(code, ["lightning", "litdata", "transformers"])[0] == []
