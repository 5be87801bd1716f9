"""Generator, `sbn chat`, `sbn inspect` and `sbn probe` with models of transformers."""

import io
import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from sbn_lightning.checkpoints.text_files import TextFiles  # noqa: E402
from sbn_lightning.cli import main  # noqa: E402
from sbn_lightning.core.errors import ConfigError, SBNError  # noqa: E402
from sbn_lightning.data.tokenizer import byte_tokenizer  # noqa: E402
from sbn_lightning.evaluation.probes import make_tasks, probe  # noqa: E402
from sbn_lightning.formats.loaded import LoadedModel  # noqa: E402
from sbn_lightning.inference import Generator, generate  # noqa: E402
from sbn_lightning.integrations import convert  # noqa: E402
from sbn_lightning.integrations.huggingface import save_packed  # noqa: E402
from sbn_lightning.integrations.huggingface.inspection import dense_network  # noqa: E402
from sbn_lightning.integrations.huggingface.network import Network  # noqa: E402
from tests.integrations.families import build  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
)
PROMPTS = [list(range(5, 45)), [7, 8], [9] * 20, [60, 61, 62]]


def opened_family(name, **options):
    model = build(name, **options)
    convert(model, "2:4")
    network = Network(model.eval(), "ternary").requires_grad_(False)
    files = {"tokenizer.json": byte_tokenizer().to_str(), "chat_template.jinja": TEMPLATE}
    return LoadedModel(network, network.config, "hf", Path("made up"), TextFiles(files, Path("tokenizer.json")))


@pytest.fixture(scope="module")
def opened():
    return opened_family("qwen3", vocab_size=320, max_position_embeddings=256)


# Gemma 3 has windows, and DeepSeek compresses its keys.
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "deepseek-v3", "gpt2"])
def test_requests_that_join_and_leave_get_the_tokens_that_they_get_alone(family):
    opened = opened_family(family)
    counts = [9, 3, 12, 6]
    wanted = [
        generate(opened.model, [prompt], max_new_tokens=count)[0] for prompt, count in zip(PROMPTS, counts, strict=True)
    ]
    with Generator(opened, batch_size=2, prefill_chunk=16) as generator:  # the first prompt is read in three parts
        requests = [
            generator.submit(prompt, max_new_tokens=count, stop_tokens=[])
            for prompt, count in zip(PROMPTS, counts, strict=True)
        ]
        assert [request.result().tokens for request in requests] == wanted
        assert "row by row" in generator.decode_choice


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_common_beginning_gives_equal_tokens(family):
    opened = opened_family(family)
    first, second = list(range(10, 40)), [*range(10, 30), 5, 6]
    wanted = [generate(opened.model, [prompt], max_new_tokens=5)[0] for prompt in (first, second, second)]
    with Generator(opened, batch_size=1, keep_prefixes=True) as generator:
        found = [
            generator.submit(prompt, max_new_tokens=5, stop_tokens=[]).result().tokens
            for prompt in (first, second, second)
        ]
        assert generator.reused_tokens == 20 + 21  # windows are read again, where transformers cannot cut them
    assert found == wanted


def test_a_failure_ends_its_request_alone(opened, monkeypatch):
    wanted = generate(opened.model, [[5, 6]], max_new_tokens=4)[0]
    with Generator(opened, batch_size=2) as generator:
        forward = opened.model.hf.forward

        def fail(input_ids, **rest):
            if 99 in input_ids:
                raise RuntimeError("out of memory")
            return forward(input_ids=input_ids, **rest)

        monkeypatch.setattr(generator._decoder._model, "hf", fail)
        bad, good = (generator.submit(ids, max_new_tokens=4, stop_tokens=[]) for ids in ([99], [5, 6]))
        with pytest.raises(RuntimeError, match="out of memory"):
            bad.result()
        assert good.result().tokens == wanted
        assert generator.submit([5, 6], max_new_tokens=4, stop_tokens=[]).result().tokens == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode_step": "persistent"}, "runs without cuda_graph and decode_step=persistent"),
        ({"cuda_graph": True}, "runs without cuda_graph"),
        ({"max_length": 257}, "max_length=257 is outside 1 to the model's context of 256 tokens"),
        ({"batch_size": 0}, "batch_size=0 is below 1"),
        ({"prefill_chunk": 0}, "prefill_chunk=0 is below 1"),
    ],
)
def test_what_a_generator_refuses(opened, options, message):
    with pytest.raises(ConfigError, match=message):
        Generator(opened, **options)


def test_a_long_prompt_is_refused_before_it_runs(opened):
    with Generator(opened) as generator, pytest.raises(SBNError, match="has 256 tokens, which leaves no room"):
        generator.submit([5] * 256)


@pytest.fixture(scope="module")
def folder(opened, tmp_path_factory):
    """The model as a Hugging Face folder with 2-bit weights."""
    place = tmp_path_factory.mktemp("packed")
    save_packed(opened.model.hf, place)
    for name, text in opened.text.contents.items():
        (place / name).write_text(text)
    return place


def test_chat_talks_with_a_folder(opened, folder, monkeypatch, capsys):
    written = "<user>how are you today\n<A>"
    (tokens,) = generate(opened.model, [list(written.encode())], max_new_tokens=8, stop_tokens=[256])
    first = byte_tokenizer().decode(tokens)
    monkeypatch.setattr("sys.stdin", io.StringIO("how are you today\nand then\n"))
    assert main(["chat", "--checkpoint", str(folder), "--device", "cpu", "--max_new_tokens", "8"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(first)
    assert "Traceback" not in printed.err


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    place = tmp_path_factory.mktemp("text") / "text.txt"
    place.write_text("a few words of text, to look at, and some more\n" * 3)
    return str(place)


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("qwen3", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("phi3", ["o_proj", "q", "k", "v", "gate", "up", "down_proj"]),
        ("gpt2", ["q", "k", "v", "c_proj", "c_fc"]),
    ],
)
def test_inspect_measures_what_a_conversion_does(family, parts, text, monkeypatch, tmp_path, capsys):
    model = build(family, vocab_size=320).eval()
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense/tokenizer.json").write_text(byte_tokenizer().to_str())
    # Our own transformer can be a Qwen3, and is not asked here.
    monkeypatch.setattr("sbn_lightning.integrations.opening.needs_transformers", lambda found: True)
    options = ["--data", text, "--max_tokens", "60", "--window", "20", "--pattern", "2:4", "--json", "true"]
    assert main(["inspect", "--checkpoint", str(tmp_path / "dense"), *options]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    found = {(one["section"], one["converted"], one["variant"]): one["loss"] for one in results}
    assert [name for section, name, variant in found if (section, variant) == ("parts", "ternary")] == parts
    rows = torch.tensor(byte_tokenizer().encode(Path(text).read_text()).ids[:63]).view(3, 21)

    def loss():
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())

    assert found["whole", "nothing", None] == pytest.approx(float(loss()), abs=1e-5)
    convert(model, "2:4", exclude=("lm_head", "*.1.*"))
    assert found["blocks", "block 0", "ternary"] == pytest.approx(float(loss()), abs=1e-5)
    assert found["cumulative", "block 0", "ternary"] == found["blocks", "block 0", "ternary"]
    convert(model, "2:4")
    assert found["whole", "everything", "ternary"] == pytest.approx(float(loss()), abs=1e-5)
    assert found["cumulative", "blocks 0 to 1", "ternary"] == found["whole", "everything", "ternary"]


def test_inspect_refuses_packed_weights_and_experts(folder, text, tmp_path, capsys):
    assert main(["inspect", "--checkpoint", str(folder), "--data", text]) != 0
    assert "packed weights have no latent weights left to convert" in capsys.readouterr().err
    build("qwen2-moe", vocab_size=320).save_pretrained(tmp_path / "experts")
    (tmp_path / "experts/tokenizer.json").write_text(byte_tokenizer().to_str())
    assert main(["inspect", "--checkpoint", str(tmp_path / "experts"), "--data", text]) != 0
    assert "inspect does not know the parts of a mixture of experts" in capsys.readouterr().err


def test_latent_weights_are_inspected_as_dense_ones():
    network = opened_family("qwen3").model
    dense = dense_network(network)
    plain = build("qwen3").eval()
    tokens = torch.arange(12)[None]
    assert torch.equal(dense(tokens), plain(tokens).logits)


def test_probe_asks_a_model_of_transformers(tmp_path, capsys):
    model = build("gpt2", vocab_size=320, n_positions=64).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_str())
    options = ["--checkpoint", str(tmp_path), "--tasks", "copy", "--length", "60", "--rows", "3", "--device", "cpu"]
    assert main(["probe", *options, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["results"]
    tasks = make_tasks(byte_tokenizer(), 60, 3, names=["copy"])
    with torch.inference_mode():
        (wanted,) = probe(lambda tokens: model(tokens).logits, tasks, batch_size=8)
    assert found["log_probability"] == pytest.approx(wanted.log_probability, abs=1e-5)
    assert main(["probe", *options, "--length", "65"]) == 1
    assert "length=65 is above the model's max_sequence_length=64" in capsys.readouterr().err
