"""``sbn chat`` as a user meets it, and the conversation behind it."""

import io
from pathlib import Path

import pytest
import torch

from sbn_lightning.checkpoints.lightning_file import contents
from sbn_lightning.checkpoints.text_files import TextFiles
from sbn_lightning.cli import main
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data.tokenizer import byte_tokenizer
from sbn_lightning.formats.loaded import LoadedModel
from sbn_lightning.inference import Generator, generate
from sbn_lightning.inference.conversation import Conversation
from sbn_lightning.inference.request import Request
from tests.inference.test_decoder import make

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
)


@pytest.fixture(scope="module")
def opened():
    model = make(qkv_bias=True, max_sequence_length=512)
    files = {"tokenizer.json": byte_tokenizer().to_str(), "chat_template.jinja": TEMPLATE}
    return LoadedModel(model, model.config, "checkpoint", Path("made up"), TextFiles(files, Path("tokenizer.json")))


@pytest.fixture
def checkpoint(opened, tmp_path):
    model = make(torch.float32, qkv_bias=True, max_sequence_length=512)
    torch.save(contents(model.config, model.state_dict()), tmp_path / "model.ckpt")
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_str())
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    return str(tmp_path / "model.ckpt")


def talk(monkeypatch, capsys, checkpoint, text, *options):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    options = ["--device", "cpu", "--max_new_tokens", "8", "--template", "template.jinja", *options]
    status = main(["chat", "--checkpoint", checkpoint, *options])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def answer(model, prompt, count):
    (tokens,) = generate(model, [list(prompt.encode())], max_new_tokens=count, stop_tokens=[256])
    return byte_tokenizer().decode(tokens)


def ask(conversation, message, **limits):
    request, dropped = conversation.ask(message, **limits)
    conversation.keep(request)
    return request, dropped


def test_answers_are_those_of_the_whole_conversation_read_from_scratch(opened):
    with Generator(opened, batch_size=1, max_length=512, keep_prefixes=True) as generator:
        conversation = Conversation(generator, opened, system="be kind")
        written, known = "<system>be kind\n", 0
        for message in ("how are you today?", "and then", "é"):
            written += f"<user>{message}\n<A>"
            expected = answer(opened.model, written, 12)
            before, length = generator.reused_tokens, len(written.encode())
            request, dropped = ask(conversation, message, max_new_tokens=12)
            assert (request.result().text, dropped) == (expected, 0)
            # All of the last turn's prompt was in the cache, but for the end that the template writes anew.
            assert generator.reused_tokens - before >= known
            known = length - len("A>")
            written = written.removesuffix("<A>") + f"<assistant>{expected}\n"
        conversation.reset()
        request, _ = ask(conversation, "again", max_new_tokens=5)
        assert request.result().text == answer(opened.model, "<system>be kind\n<user>again\n<A>", 5)


def test_a_full_context_drops_the_oldest_turns(opened):
    with Generator(opened, batch_size=1, max_length=128, keep_prefixes=True) as generator:
        conversation = Conversation(generator, opened)
        dropped = [ask(conversation, f"message {i} {'x' * 20}", max_new_tokens=4)[1] for i in range(6)]
        assert dropped[0] == 0
        assert set(dropped) == {0, 2}
        assert conversation.messages[0]["role"] == "user"
        before = list(conversation.messages)
        with pytest.raises(ConfigError, match="fit beside an answer in a sequence of 128 tokens"):
            conversation.ask("y" * 200)
        assert conversation.messages == before


def test_a_conversation_in_the_terminal(opened, checkpoint, monkeypatch, capsys):
    text = "hello\n\n/reset\nhello\nmore\n/quit\nnever read\n"
    status, out, err = talk(monkeypatch, capsys, checkpoint, text, "--speed", "true")
    first = answer(opened.model, "<user>hello\n<A>", 8)
    second = answer(opened.model, f"<user>hello\n<assistant>{first}\n<user>more\n<A>", 8)
    assert status == 0
    assert out == f"{first}\n{first}\n{second}\n"
    assert "/reset forgets the conversation" in err
    assert err.count("tokens were in the cache") == 3


def test_ctrl_c_stops_an_answer_and_not_the_program(opened, checkpoint, monkeypatch, capsys):
    pieces, calls = Request.__iter__, []

    def interrupted(self):
        calls.append(self)
        yield next(pieces(self))
        if len(calls) == 1:
            raise KeyboardInterrupt
        yield from list(pieces(self))[1:]

    monkeypatch.setattr(Request, "__iter__", interrupted)
    options = ["--max_new_tokens", "60", "--max_length", "200"]
    status, out, err = talk(monkeypatch, capsys, checkpoint, "hello\n/reset\nhello\n", *options)
    assert status == 0
    assert err.count("[stopped]") == 1
    assert calls[0].result().finish in ("cancelled", "length")
    assert calls[1].result().text == answer(opened.model, "<user>hello\n<A>", 60)
    assert out.endswith(calls[1].result().text + "\n\n")


def test_ctrl_c_without_an_answer_goes_on(checkpoint, monkeypatch, capsys):
    lines = iter([KeyboardInterrupt(), "", EOFError()])

    def read(prompt):
        if isinstance(line := next(lines), BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    status, _, err = talk(monkeypatch, capsys, checkpoint, "")
    assert status == 0
    assert err.count("/quit or Ctrl-D ends") == 2


def test_an_error_ends_a_message_and_not_the_conversation(opened, checkpoint, monkeypatch, capsys):
    text = f"{'z' * 600}\nbad \udcff\nhello\n"
    status, out, err = talk(monkeypatch, capsys, checkpoint, text)
    assert status == 0
    assert out == answer(opened.model, "<user>hello\n<A>", 8) + "\n\n"
    assert "error: the message makes a prompt of" in err
    assert "error: the message is not UTF-8" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "has no chat template"),
        (["--template", "missing.jinja"], "missing.jinja"),
        (["--template", "template.jinja", "--temperature", "-1"], "temperature=-1.0"),
        (["--template", "template.jinja", "--max_length", "4096"], "max_length=4096 is outside"),
    ],
)
def test_errors_are_one_line(checkpoint, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    status = main(["chat", "--checkpoint", checkpoint, "--device", "cpu", *arguments])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert status == 1
    assert message in line
