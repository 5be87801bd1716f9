"""Requests that join and leave a batch get what they would get alone.

Models are float64, so that a rounded activation is the same integer whatever the order of a sum."""

import threading
import time
from pathlib import Path

import pytest
import torch

from sbn_lightning.checkpoints.text_files import TextFiles
from sbn_lightning.core.errors import ConfigError, DataError, SBNError
from sbn_lightning.data.tokenizer import byte_tokenizer
from sbn_lightning.formats.loaded import LoadedModel
from sbn_lightning.formats.packed import write_packed
from sbn_lightning.inference import Generator, QueueFullError, Sampling, generate, stream
from sbn_lightning.inference.head import use_head
from sbn_lightning.inference.opening import open_model
from sbn_lightning.inference.request import Request
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.transformer import TernaryTransformer
from tests.inference.test_decoder import PROMPTS, make, without_cache

MORE = [*PROMPTS, [4, 4], [30, 31, 32, 33], [99]]


@pytest.fixture(scope="module")
def opened():
    model = make(qkv_bias=True)
    text = TextFiles({"tokenizer.json": byte_tokenizer().to_str()}, Path("tokenizer.json"))
    return LoadedModel(model, model.config, "checkpoint", Path("made up"), text)


def open_without_tokenizer(opened):
    return LoadedModel(opened.model, opened.config, "checkpoint", Path("made up"), TextFiles())


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("prefill_chunk", [2, 2048])
def test_greedy_tokens_are_those_of_a_loop_without_a_cache(opened, run_ahead, prefill_chunk):
    counts = [24, 3, 11, 1, 20, 7]
    with Generator(opened, batch_size=2, max_length=48, prefill_chunk=prefill_chunk) as generator:
        generator._engine._run_ahead = run_ahead  # As on a GPU: a step is under way while the last one is read.
        requests = [
            generator.submit(prompt, max_new_tokens=count, stop_tokens=())
            for prompt, count in zip(MORE, counts, strict=True)
        ]
        found = [request.result(60) for request in requests]
    assert [each.finish for each in found] == ["length"] * 6
    expected = [without_cache(opened.model, prompt, n) for prompt, n in zip(MORE, counts, strict=True)]
    assert [each.tokens for each in found] == expected
    assert [each.text for each in found] == [byte_tokenizer().decode(tokens) for tokens in expected]


@pytest.mark.parametrize("limits", [{"top_p": 0.95, "top_k": 100}, {}], ids=["limited", "drawn"])
def test_draws_are_those_of_the_request_alone(opened, limits):
    sampling = {"temperature": 2.0, **limits}
    alone = [
        list(stream(opened.model, prompt, max_new_tokens=9, sampling=Sampling(**sampling), seed=i))
        for i, prompt in enumerate(MORE)
    ]
    with Generator(opened, batch_size=4, max_length=32) as generator:
        greedy = generator.submit([5, 6], max_new_tokens=9, stop_tokens=())
        together = generator.generate(MORE, max_new_tokens=9, stop_tokens=(), **sampling)
        assert greedy.result().tokens == without_cache(opened.model, [5, 6], 9)
    assert [each.tokens for each in together] == alone
    assert len(set(map(tuple, alone))) == len(MORE)
    assert generate(opened.model, MORE, max_new_tokens=9, sampling=Sampling(**sampling)) == alone


def test_pieces_come_while_the_text_is_written_and_can_be_read_twice(opened):
    with Generator(opened, batch_size=1, max_length=40) as generator:
        request = generator.submit("def f(", max_new_tokens=30, stop_tokens=())
        first = next(iter(request))
        assert not request.done or request.result().text.startswith(first)
        pieces = list(request)
        again = list(request)
    assert pieces == again
    assert len(pieces) > 1
    (row,) = generate(opened.model, [list(b"def f(")], max_new_tokens=30)
    assert "".join(pieces) == byte_tokenizer().decode(row)
    assert request.speed.prompt_tokens == 6
    assert request.speed.new_tokens == 30
    assert request.speed.prefill_seconds > 0


def test_a_stop_token_and_a_stop_string_end_a_request(opened):
    (row,) = generate(opened.model, [list(b"ab")], max_new_tokens=40)
    text = byte_tokenizer().decode(row)
    stop = text[5:8]
    with Generator(opened, batch_size=3, max_length=60) as generator:
        by_token = generator.submit("ab", max_new_tokens=40, stop_tokens=[row[4]])
        by_string = generator.submit("ab", max_new_tokens=40, stop_tokens=(), stop=["never", stop])
        by_text = generator.submit("ab", max_new_tokens=40, stop_tokens=(), stop=stop)
        end = row.index(row[4])
        assert (by_token.result().tokens, by_token.result().finish) == (row[:end], "stop")
        assert by_string.result().text == by_text.result().text == text[: text.index(stop)]
        assert by_string.result().finish == "stop"
        assert "".join(by_string) == text[: text.index(stop)]


def test_a_request_is_cancelled_in_the_queue_and_while_it_writes(opened):
    with Generator(opened, batch_size=1, max_length=64) as generator:
        running = generator.submit([1, 2], max_new_tokens=60, stop_tokens=())
        waiting = generator.submit([3, 4], max_new_tokens=60, stop_tokens=())
        after = generator.submit([5, 6], max_new_tokens=4, stop_tokens=())
        waiting.cancel()
        next(iter(running))
        running.cancel()
        assert running.result(60).finish == "cancelled"
        assert waiting.result(60).tokens == []
        assert after.result(60).tokens == without_cache(opened.model, [5, 6], 4)
        assert 1 <= len(running.result().tokens) < 60
        tokens = running.result().tokens
        assert tokens == without_cache(opened.model, [1, 2], len(tokens))


def test_an_error_of_one_request_does_not_hurt_the_others(opened, monkeypatch):
    take = Request.take

    def spoiled(self, token):
        if self.prompt == [7, 7] and len(self.written) == 2:
            raise RuntimeError("the tokenizer broke")
        take(self, token)

    monkeypatch.setattr(Request, "take", spoiled)
    with Generator(opened, batch_size=2, max_length=40) as generator:
        extend = generator._decoder.extend

        def scarce(row, tokens, start):
            if tokens == [8, 8]:
                raise torch.OutOfMemoryError("out of memory")
            return extend(row, tokens, start)

        monkeypatch.setattr(generator._decoder, "extend", scarce)
        good, broken, big, late = (
            generator.submit(prompt, max_new_tokens=10, stop_tokens=()) for prompt in ([1], [7, 7], [8, 8], [2])
        )
        assert good.result(60).tokens == without_cache(opened.model, [1], 10)
        assert late.result(60).tokens == without_cache(opened.model, [2], 10)
        with pytest.raises(RuntimeError, match="the tokenizer broke"):
            broken.result(60)
        with pytest.raises(torch.OutOfMemoryError):
            list(big)


def test_a_step_that_fails_ends_its_requests_and_not_the_generator(opened, monkeypatch):
    with Generator(opened, batch_size=2, max_length=40) as generator:
        step, failures = generator._decoder.step_next, [RuntimeError("the device failed")]
        monkeypatch.setattr(
            generator._decoder, "step_next", lambda tokens: step(tokens) if not failures else raise_(failures.pop())
        )
        request = generator.submit([1], max_new_tokens=10, stop_tokens=())
        with pytest.raises(RuntimeError, match="the device failed"):
            request.result(60)
        assert generator.submit([1], max_new_tokens=10, stop_tokens=()).result(60).tokens == without_cache(
            opened.model, [1], 10
        )


def test_steps_read_the_tokens_that_the_decoder_has_chosen_without_a_copy(opened, monkeypatch):
    with Generator(opened, batch_size=2, max_length=40) as generator:
        decoder, own = generator._decoder, []
        step = decoder.step_next
        monkeypatch.setattr(
            decoder, "step_next", lambda tokens: own.append(tokens is decoder._plain.tokens) or step(tokens)
        )
        requests = [generator.submit(prompt, max_new_tokens=9, stop_tokens=()) for prompt in MORE[:4]]
        found = [request.result().tokens for request in requests]
    assert found == [without_cache(opened.model, prompt, 9) for prompt in MORE[:4]]
    assert own == [False] + [True] * (len(own) - 1)


def raise_(error):
    raise error


def test_a_common_beginning_is_read_once_and_gives_equal_tokens(opened):
    beginning = [(7 * i) % 250 for i in range(20)]
    prompts = [[*beginning, 1, 2], [*beginning, 1, 2, 3, 4], [9, 9], [*beginning, 5]]
    with Generator(opened, batch_size=2, max_length=40, keep_prefixes=True) as generator:
        for prompt in prompts:
            found = generator.submit(prompt, max_new_tokens=6, stop_tokens=()).result(60)
            assert found.tokens == without_cache(opened.model, prompt, 6)
        assert generator.reused_tokens == 22 + 20
        assert generator.speed.prompt_tokens == sum(map(len, prompts)) - 42
        # The answer of a turn is the beginning of the next prompt.
        talk = [*prompts[3], *found.tokens, 11]
        before = generator.reused_tokens
        assert generator.submit(talk, max_new_tokens=3, stop_tokens=()).result(60).tokens == without_cache(
            opened.model, talk, 3
        )
        assert generator.reused_tokens - before == len(talk) - 2


def test_the_queue_is_bounded(opened, monkeypatch):
    hold = threading.Event()
    with Generator(opened, batch_size=1, max_length=40, queue_size=2) as generator:
        step = generator._decoder.step_next
        monkeypatch.setattr(generator._decoder, "step_next", lambda tokens: hold.wait(60) and step(tokens))
        first = generator.submit([1], max_new_tokens=3, stop_tokens=())
        while not first.written:  # Then the only row is taken.
            time.sleep(0.001)
        waiting = [generator.submit([2], max_new_tokens=1, stop_tokens=()) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests are waiting"):
            generator.submit([3], max_new_tokens=1, wait=False)
        late: list[Request] = []
        thread = threading.Thread(target=lambda: late.append(generator.submit([3], max_new_tokens=1, stop_tokens=())))
        thread.start()
        time.sleep(0.05)
        assert not late
        hold.set()
        thread.join(60)
        assert [len(request.result(60).tokens) for request in (first, *waiting, *late)] == [3, 1, 1, 1]


def test_many_threads_submit_and_read(opened):
    texts = {}
    with Generator(opened, batch_size=3, max_length=40) as generator:

        def use(i):
            texts[i] = "".join(generator.submit([i + 1, i + 2], max_new_tokens=8, stop_tokens=()))

        threads = [threading.Thread(target=use, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for i in range(8):
        assert texts[i] == byte_tokenizer().decode(without_cache(opened.model, [i + 1, i + 2], 8))


def test_closing_ends_what_runs_and_takes_no_more(opened):
    generator = Generator(opened, batch_size=1, max_length=64)
    running = generator.submit([1], max_new_tokens=60, stop_tokens=())
    waiting = generator.submit([2], max_new_tokens=60, stop_tokens=())
    generator.close()
    assert waiting.result(1).finish == "cancelled"
    assert running.result(1).finish in ("cancelled", "length")
    with pytest.raises(SBNError, match="is closed"):
        generator.submit([1])
    generator.close()


@pytest.mark.parametrize(
    ("prompt", "limits", "message"),
    [
        ([1] * 40, {}, "the prompt has 40 tokens, which leaves no room in a sequence of 40 tokens"),
        ([], {}, "the prompt is empty"),
        ([3, 320], {}, "token id 320, the model's vocab_size is 320"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([1], {"top_p": 0.0}, "top_p=0.0"),
        ([1], {"seed": -1}, "seed=-1"),
        ([1], {"seed": 1.0}, r"seed=1\.0 is not an integer"),
        ([1], {"stop": ["a", ""]}, "a stop string is empty"),
    ],
)
def test_refuses(opened, prompt, limits, message):
    with Generator(opened, batch_size=1, max_length=40) as generator, pytest.raises(ConfigError, match=message):
        generator.submit(prompt, **limits)


def test_a_model_without_a_tokenizer_takes_token_ids(opened):
    with Generator(open_without_tokenizer(opened), batch_size=1, max_length=40) as generator:
        request = generator.submit([1, 2], max_new_tokens=5)
        assert request.result(60).tokens == without_cache(opened.model, [1, 2], 5)
        assert list(request) == []
        with pytest.raises(ConfigError, match="stop strings need a tokenizer"):
            generator.submit([1, 2], stop=["x"])
    with pytest.raises(ConfigError, match="queue_size=0"):
        Generator(opened, queue_size=0)
    with pytest.raises(ConfigError, match="prefill_chunk=0"):
        Generator(opened, prefill_chunk=0)


def test_a_prompt_of_several_is_named_before_anything_runs(opened):
    with Generator(opened, batch_size=1, max_length=40) as generator:
        with pytest.raises(ConfigError, match="prompt 1 has 50 tokens"):
            generator.generate([[1], [2] * 50])
        assert generator.speed.sequences == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed model with a tokenizer on disk."""
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=320, d_model=64, n_layers=1, n_heads=4, n_kv_heads=2, d_ffn=96, max_sequence_length=64, init_std=0.2
    )
    model = TernaryTransformer(config).eval()
    path = tmp_path_factory.mktemp("packed")
    write_packed(model, path, TextFiles({"tokenizer.json": byte_tokenizer().to_str()}, Path("tokenizer.json")))
    return path


@pytest.mark.parametrize("head_bits", [16, 8])
def test_from_checkpoint_opens_a_model_and_passes_options_on(folder, head_bits):
    with Generator.from_checkpoint(str(folder), device="cpu", head_bits=head_bits, batch_size=2) as generator:
        done = generator.submit("def f(", max_new_tokens=6, stop_tokens=()).result(60)
        assert generator.max_length == 64
        assert generator.decode_choice.startswith("the layers of the model; the persistent kernel needs")
    opened = open_model(str(folder), device="cpu")
    use_head(opened.model, head_bits)
    assert done.tokens == generate(opened.model, [list(b"def f(")], max_new_tokens=6)[0]
    assert done.text == byte_tokenizer().decode(done.tokens)


def test_from_checkpoint_says_what_is_wrong(folder, tmp_path):
    with pytest.raises(DataError, match="nothing"):
        Generator.from_checkpoint(str(tmp_path / "nothing"), device="cpu")
    with pytest.raises(ConfigError, match="max_length=65 is outside 1 to"):
        Generator.from_checkpoint(str(folder), device="cpu", max_length=65)
    with pytest.raises(ConfigError, match="persistent"):
        Generator.from_checkpoint(str(folder), device="cpu", decode_step="persistent")
