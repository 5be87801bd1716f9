"""Every format imports and exports the text files that belong to a model."""

import json
import shutil

import pytest
import torch

from sbn_lightning.checkpoints import lightning_file
from sbn_lightning.checkpoints.text_files import TextFiles, only_token_ids, read_folder, text_of_run
from sbn_lightning.checkpoints.tokenizers import beside
from sbn_lightning.cli import main
from sbn_lightning.core.errors import DataError
from sbn_lightning.data.tokenizer import byte_tokenizer
from sbn_lightning.formats import load_model
from sbn_lightning.formats.load import read_text
from tests.formats.models import make_model, save

TEMPLATE = (
    "{% for message in messages %}{{ '<|turn|>' + message['role'] + '\n' + message['content'] + '<|stop|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
TURN, STOP, PAD = 257, 258, 259
GENERATION = {"bos_token_id": TURN, "eos_token_id": [STOP, 256], "pad_token_id": PAD, "temperature": 0.3}


def chat_files():
    """The text files of a small chat model, as in a repository of the hub."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|turn|>", "<|stop|>", "<|pad|>"])
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|turn|>", "eos_token": "<|stop|>"}
    described |= {"pad_token": "<|pad|>", "model_max_length": 64}
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(described),
        "special_tokens_map.json": json.dumps({"eos_token": "<|stop|>"}),
        "generation_config.json": json.dumps(GENERATION),
        "chat_template.jinja": TEMPLATE,
    }


@pytest.fixture
def hub(tmp_path):
    """The Hugging Face folder of a chat model."""
    save(make_model(linear="dense"), tmp_path / "plain.ckpt", tokenizer=False)
    assert main(["export", "--checkpoint", "plain.ckpt", "--output", "hub", "--format", "hf"]) == 0
    for name, text in chat_files().items():
        (tmp_path / "hub" / name).write_text(text, encoding="utf-8")
    config = json.loads((tmp_path / "hub/config.json").read_text())
    config |= {"bos_token_id": TURN, "eos_token_id": STOP, "pad_token_id": PAD}
    (tmp_path / "hub/config.json").write_text(json.dumps(config))
    return tmp_path / "hub"


def carried_by(path):
    """The text files of a model, in a form that can be compared."""
    text = load_model(path).text
    assert read_text(path).contents == text.contents
    return text


def test_in_from_a_hub_and_out_again(hub):
    expected = chat_files()
    assert main(["import-hf", "--input", str(hub), "--output", "m.ckpt"]) == 0
    text = carried_by("m.ckpt")
    assert {name: text.contents[name] for name in expected} == expected
    assert text.token_ids == {"bos_token_id": TURN, "eos_token_id": STOP, "pad_token_id": PAD}
    assert (text.stop_ids, text.bos_id, text.pad_id) == ([STOP, 256], TURN, PAD)
    assert main(["export", "--checkpoint", "m.ckpt", "--output", "back", "--format", "hf"]) == 0
    again = carried_by("back")
    assert again.contents == text.contents
    values = json.loads((hub / "config.json").read_text())
    assert only_token_ids(json.loads((hub.parent / "back/config.json").read_text())) == only_token_ids(values)


@pytest.mark.parametrize("format", ["packed", "hf-bitnet"])
def test_a_ternary_model_carries_them_on(hub, format):
    text = carried_by(hub)
    model = make_model(pattern="2:4")
    lightning_file.write(model.config, model.state_dict(), hub.parent / "t.ckpt", text)
    assert main(["export", "--checkpoint", "t.ckpt", "--output", "out", "--format", format]) == 0
    assert carried_by("out").contents == text.contents
    assert main(["export", "--checkpoint", "out", "--output", "twice", "--format", "packed"]) == 0
    assert carried_by("twice").contents == text.contents


def test_gguf_carries_what_it_has_names_for(hub):
    pytest.importorskip("gguf")
    model = make_model(pattern="2:4", d_model=256, d_ffn=256, n_layers=1)
    lightning_file.write(model.config, model.state_dict(), hub.parent / "t.ckpt", carried_by(hub))
    assert main(["export", "--checkpoint", "t.ckpt", "--output", "out", "--format", "gguf"]) == 0
    import gguf

    fields = gguf.GGUFReader(hub.parent / "out/model-TQ2_0.gguf").fields
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos", "eot", "padding")}
    assert ids == {"bos": TURN, "eos": STOP, "eot": 256, "padding": PAD}
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    text = carried_by("out")
    assert (text.stop_ids, text.bos_id, text.pad_id, text.chat_template) == ([STOP, 256], TURN, PAD, TEMPLATE)


def test_transformers_reads_the_template_and_the_stop_tokens(hub):
    transformers = pytest.importorskip("transformers")
    assert main(["import-hf", "--input", str(hub), "--output", "m.ckpt"]) == 0
    assert main(["export", "--checkpoint", "m.ckpt", "--output", "back", "--format", "hf"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained("back")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|turn|>user\nhi<|stop|>\n<|turn|>assistant\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (TURN, STOP, PAD)
    model = transformers.AutoModelForCausalLM.from_pretrained("back")
    assert model.generation_config.eos_token_id == [STOP, 256]
    assert (model.config.eos_token_id, model.config.pad_token_id) == (STOP, PAD)


def test_generate_stops_where_the_config_says(hub, capsys):
    """The config decides, not the list of well-known names: <|endoftext|> is in the vocabulary as well."""
    from sbn_lightning.inference import generate

    assert main(["import-hf", "--input", str(hub), "--output", "m.ckpt"]) == 0
    (row,) = generate(load_model("m.ckpt").model, [[97]], max_new_tokens=30)
    for count in (3, 7):  # take the fourth and the eighth token that the model generates as its end tokens
        stop = row[count]
        where = row.index(stop)
        saved = torch.load("m.ckpt", weights_only=True)
        saved["text_files"]["generation_config.json"] = json.dumps({"eos_token_id": stop})
        torch.save(saved, "n.ckpt")
        capsys.readouterr()
        arguments = ["--checkpoint", "n.ckpt", "--prompt", "a", "--max_new_tokens", "30", "--device", "cpu"]
        assert main(["generate", *arguments, "--json", "true"]) == 0
        (result,) = json.loads(capsys.readouterr().out)
        assert (result["tokens"], result["finish"]) == (where, "stop")


def test_a_prompt_as_a_chat(hub, capsys):
    from sbn_lightning.inference.chat import as_chat

    assert as_chat(carried_by(hub), 'say "é" <b>') == '<|turn|>user\nsay "é" <b><|stop|>\n<|turn|>assistant\n'
    arguments = ["generate", "--checkpoint", str(hub), "--prompt", "hi", "--max_new_tokens", "2", "--device", "cpu"]
    assert main([*arguments, "--chat", "true"]) == 0
    assert "prefill 21 tokens" in capsys.readouterr().err  # 18 bytes and three special tokens
    (hub / "chat_template.jinja").write_text("{{ raise_exception('no turns') }}")
    assert main([*arguments, "--chat", "true"]) == 1
    assert "chat template refuses the prompt: no turns" in capsys.readouterr().err
    (hub / "chat_template.jinja").unlink()
    assert main([*arguments, "--chat", "true"]) == 1
    assert "has no chat template" in capsys.readouterr().err


def test_a_template_in_the_tokenizer_config():
    """transformers 4 writes the template there, alone or as a list."""
    for template in (TEMPLATE, [{"name": "default", "template": TEMPLATE}, {"name": "tools", "template": "x"}]):
        text = TextFiles({"tokenizer_config.json": json.dumps({"chat_template": template})})
        assert text.chat_template == TEMPLATE


class Data:
    """The part of a data module that a run asks for."""

    eos_id = 256

    def __init__(self, broken=False):
        self.broken = broken

    @property
    def tokenizer(self):
        if self.broken:
            raise DataError("gone")
        return byte_tokenizer()


def test_a_run_from_scratch_saves_the_tokenizer_of_its_data():
    text = text_of_run(TextFiles(), Data())
    assert text.tokenizer.encode("a").ids == [97]
    assert text.stop_ids == [256]
    assert text_of_run(text, Data()) is text
    with pytest.warns(UserWarning, match="saved without a tokenizer: gone"):
        assert text_of_run(TextFiles(), Data(broken=True)).contents == {}


def test_a_run_from_a_chat_model_stops_at_both_ends():
    """It stops at the end token of the chat and at the end token of the documents it was trained on."""
    contents = chat_files() | {
        "config.json": json.dumps({"eos_token_id": STOP}),
        "generation_config.json": json.dumps({"eos_token_id": STOP, "temperature": 0.3}),
    }
    text = text_of_run(TextFiles(contents), Data())
    assert text.stop_ids == [STOP, 256]
    assert text.token_ids["eos_token_id"] == [STOP, 256]
    assert text.generation == {"eos_token_id": [STOP, 256], "temperature": 0.3}
    assert text.contents["tokenizer.json"] == contents["tokenizer.json"]


def test_a_tokenizer_that_was_given_brings_its_own_files(hub, tmp_path):
    byte_tokenizer().save(str(tmp_path / "other.json"))
    given = load_model(hub, tokenizer=tmp_path / "other.json").text
    assert set(given.contents) == {"tokenizer.json"}
    assert load_model(save(make_model(), tmp_path / "m.ckpt"), tokenizer=hub).text.chat_template == TEMPLATE
    with pytest.raises(DataError, match=r"nowhere.json; give a tokenizer.json"):
        load_model(hub, tokenizer="nowhere.json")


def test_old_checkpoints_find_the_tokenizer_near_them(tmp_path):
    path = save(make_model(), tmp_path / "m.ckpt")
    assert load_model(path).tokenizer_path == beside(path)
    shutil.move(beside(path), tmp_path / "tokenizer.json")
    assert load_model(path).tokenizer_path == tmp_path / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a Hugging Face tokenizer\.json"):
        load_model(path)


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"chat_template\.jinja is damaged: it is not UTF-8"):
        read_folder(tmp_path)
