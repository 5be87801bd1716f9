"""Prompts in chunks, in single rows and in buckets give the logits and the cache of a prompt that is read at once."""

from contextlib import contextmanager

import pytest
import torch
from sbn_kernels import prompt as prompt_kernels

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.inference import Decoder, attention, generate
from sbn_lightning.inference.attention import has_kernel
from sbn_lightning.inference.buckets import Inputs, PromptGraphs, bucket_of, inputs_of, to_device
from sbn_lightning.layers.packed import pack_layers
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.transformer import TernaryTransformer
from tests.inference.test_decoder import PROMPTS, make, without_cache

WINDOWS = [{"sliding_window": 3}, {"sliding_window": 6, "sliding_layers": (1,), "layers_without_rope": (1,)}]


@pytest.fixture(scope="module")
def model():
    return make(qkv_bias=True, max_sequence_length=128)


def tokens_of(length, seed=0):
    return torch.randint(320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("chunk", [1, 4, 9, 100])
def test_chunks_give_the_logits_and_the_cache_of_one_go(model, chunk):
    whole, parts = Decoder(model, 3, 40), Decoder(model, 3, 40, prefill_chunk=chunk)
    torch.testing.assert_close(parts.prefill(PROMPTS), whole.prefill(PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        for a, b in zip(parts._layers, whole._layers, strict=True):
            torch.testing.assert_close(a.keys[row, :, : len(prompt)], b.keys[row, :, : len(prompt)])
            torch.testing.assert_close(a.values[row, :, : len(prompt)], b.values[row, :, : len(prompt)])
    token = torch.tensor([1, 2, 3])
    torch.testing.assert_close(parts.step(token), whole.step(token))


@pytest.mark.parametrize("options", [{}, {"linear": "dense"}, {"n_kv_heads": 1, "pattern": "2:4"}, *WINDOWS], ids=str)
def test_greedy_tokens_in_chunks(options):
    model = make(**options)
    expected = [without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=12, prefill_chunk=4) == expected


def test_chunks_in_compiled_blocks():
    model = make(n_layers=1)
    expected = generate(model, PROMPTS[2:], max_new_tokens=3)
    model.compile_blocks(backend="eager")
    assert generate(model, PROMPTS[2:], max_new_tokens=3, prefill_chunk=4) == expected


def test_a_row_starts_while_others_go_on(model):
    """Rows 0 and 2 write; row 1 is read in two parts between their steps, and then writes as well."""
    prompts = [tokens_of(9, 1), tokens_of(30, 2), tokens_of(3, 3)]
    decoder = Decoder(model, 3, 60)
    logits = [decoder.extend(row, prompts[row], 0)[0] for row in (0, 2)]
    written = {row: [int(each.argmax())] for row, each in zip((0, 2), logits, strict=True)}
    decoder.growing.copy_(torch.tensor([1, 0, 1]))

    def step(rows):
        tokens = torch.zeros(3, dtype=torch.int64)
        for row in rows:
            tokens[row] = written[row][-1]
        for row, logit in enumerate(decoder.step(tokens)):
            if row in rows:
                written[row].append(int(logit.argmax()))

    step([0, 2])
    decoder.extend(1, prompts[1][:13], 0)
    step([0, 2])
    written[1] = [int(decoder.extend(1, prompts[1][13:], 13).argmax())]
    decoder.growing.fill_(1)
    for _ in range(5):
        step([0, 1, 2])
    assert decoder.lengths.tolist() == [9 + 7, 30 + 5, 3 + 7]
    for row in range(3):
        assert written[row] == without_cache(model, prompts[row], len(written[row]))


def test_a_row_takes_another_prompt_behind_what_it_keeps(model):
    beginning, one, other = tokens_of(20), [1, 2, 3], [9, 8, 7, 6]
    decoder, fresh = Decoder(model, 1, 60), Decoder(model, 1, 60)
    decoder.extend(0, beginning + one, 0)
    again = decoder.extend(0, other, 20)
    torch.testing.assert_close(again, fresh.prefill([beginning + other]))
    token = torch.tensor([5])
    torch.testing.assert_close(decoder.step(token), fresh.step(token))


def test_buckets():
    assert [bucket_of(n, 4096) for n in (1, 64, 65, 80, 81, 128, 129, 1000, 1025, 2048)] == [
        64, 64, 80, 80, 96, 128, 160, 1024, 1280, 2048,
    ]  # fmt: skip
    assert bucket_of(2049, 4096) is None
    assert bucket_of(100, 100) is None
    assert [bucket_of(n, 4096, 8) for n in (70, 2048)] == [80, 2048]
    assert bucket_of(2048, 4096, 9) is None
    for length in range(1, 2049):
        bucket = bucket_of(length, 2048)
        assert bucket is not None
        assert length <= bucket <= max(64, 1.25 * length)
    assert len({bucket_of(length, 2048) for length in range(1, 2049)}) == 21


@pytest.mark.parametrize("length", [1, 50, 64, 70])
def test_padding_to_a_bucket_changes_nothing(model, length):
    """The same row, logits and further steps as without padding, although another prompt was in the row before."""
    prompt = tokens_of(length, length)
    padded, plain = Decoder(model, 2, 100), Decoder(model, 2, 100)
    for decoder in (padded, plain):
        decoder.prefill([tokens_of(90, 5), tokens_of(40, 6)])
    graphs = PromptGraphs(model, padded._layers, None, cuda_graph=False)
    bucket = bucket_of(length, padded.slots)
    with torch.no_grad():
        for _ in range(2):
            logits = graphs.read(prompt, 1, bucket)
    padded.lengths[1] = length
    torch.testing.assert_close(logits, plain.extend(1, prompt, 0))
    for a, b in zip(padded._layers, plain._layers, strict=True):
        torch.testing.assert_close(a.keys[1, :, :length], b.keys[1, :, :length])
        torch.testing.assert_close(a.values[1, :, :length], b.values[1, :, :length])
        assert torch.equal(a.keys[0], b.keys[0])
    for token in (3, 4):
        tokens = torch.tensor([1, token])
        torch.testing.assert_close(padded.step(tokens), plain.step(tokens))


def test_a_part_of_a_prompt_in_a_graph_stands_behind_the_tokens_of_its_row(model):
    """The number of tokens before is read from the inputs, so the second part, behind fewer tokens, is right, too."""
    prompt = tokens_of(90, 5)
    padded, plain = Decoder(model, 2, 120), Decoder(model, 2, 120)
    for decoder in (padded, plain):
        decoder.prefill([tokens_of(20, 6), prompt[:30]])
    graphs = PromptGraphs(model, padded._layers, None, cuda_graph=False)
    with torch.no_grad(), patched_attend():
        for start in (30, 17):
            logits = graphs.read(prompt[start : start + 40], 1, 64, start)
            torch.testing.assert_close(logits, plain.extend(1, prompt[start : start + 40], start))
    for mine, theirs in zip(padded._layers, plain._layers, strict=True):
        assert torch.equal(mine.keys[0], theirs.keys[0])
        torch.testing.assert_close(mine.keys[1, :, :57], theirs.keys[1, :, :57])


@contextmanager
def patched_attend():
    """The kernel's twin in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_kernels, "attend", prompt_kernels.attend_reference)
        patch.setattr(attention, "has_kernel", lambda keys: True)
        yield


def test_a_graph_is_captured_at_the_second_prompt_of_a_bucket(model, monkeypatch):
    decoder = Decoder(model, 1, 100)
    decoder.prefill([[1]])
    graphs = PromptGraphs(model, decoder._layers, None, cuda_graph=True)
    captured = []

    class Replay:
        def replay(self):
            captured.append("replay")

    def capture(kind):
        captured.append(kind.bucket)
        return Replay(), torch.zeros(kind.prompts, 320)

    monkeypatch.setattr(graphs, "_capture", capture)
    with torch.no_grad():
        for length in (5, 70, 6, 64, 72):
            graphs.read([1] * length, 0, bucket_of(length, decoder.slots))
    assert captured == [64, "replay", "replay", 80, "replay"]


def test_prompts_together_in_a_bucket_give_the_logits_of_a_plain_prefill(model):
    """The second batch is padded to the bucket of the first, and rows that were longer are forgotten."""
    decoder, plain = Decoder(model, 3, 100), Decoder(model, 3, 100)
    decoder.prefill([tokens_of(90, 5), tokens_of(40, 6), tokens_of(96, 7)])
    graphs = PromptGraphs(model, decoder._layers, None, cuda_graph=False)
    for lengths in ((70, 3, 66), (5, 80, 41)):
        prompts = [tokens_of(length, length) for length in lengths]
        padded = torch.zeros(3, max(lengths), dtype=torch.int64)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        with torch.no_grad():
            logits = graphs.read_all(padded, torch.tensor(lengths), 80)
        decoder.lengths.copy_(torch.tensor(lengths))
        torch.testing.assert_close(logits, plain.prefill(prompts))
        tokens = torch.tensor([1, 2, 3])
        torch.testing.assert_close(decoder.step(tokens), plain.step(tokens))


def test_a_batch_captures_a_graph_when_its_bucket_comes_again(model, monkeypatch):
    decoder = Decoder(model, 2, 128)
    decoder._reader.use_graph = True
    captured = []

    def replay(self, kind):
        captured.append(kind)
        return torch.zeros(2, 320)

    monkeypatch.setattr(PromptGraphs, "_replay", replay)
    for length in (5, 70, 60, 128, 72, 128):
        decoder.prefill([[1] * length, [2]])
    assert captured == [(2, 64, False), (2, 80, False), (2, 128, False)]
    decoder._reader.forget()  # Weights have changed, so the next batch is a first one again.
    decoder.prefill([[1] * 72, [2]])
    decoder.prefill_chunk = 16
    decoder.prefill([[1] * 70, [2]])
    assert len(captured) == 3


def test_integers_arrive_on_every_device():
    assert to_device([3, -1], torch.device("cpu")).tolist() == [3, -1]
    assert to_device([3, -1], torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_inputs_of_kernels_begin_at_multiples_of_16_bytes(count):
    """A kernel is launched faster then, and is compiled for this case alone."""
    all = torch.arange(3 * (count + count % 2) + 64 * count)
    inputs = Inputs(all, count)
    for view in (inputs.last, inputs.rows, inputs.before, inputs.tokens):
        assert view.data_ptr() % 16 == 0
    assert inputs.tokens.shape == (count, 64)
    assert inputs.tokens[-1, -1] == all[-1]


def test_the_inputs_of_one_prompt():
    given = inputs_of([5, 6, 7], 4, 9, torch.device("cpu"), 5)
    assert (given.last.tolist(), given.rows.tolist(), given.before.tolist()) == ([2], [4], [9])
    assert given.tokens.tolist() == [[5, 6, 7, 0, 0]]


def test_refuses(model):
    with pytest.raises(ConfigError, match="prefill_chunk=0"):
        Decoder(model, 1, 8, prefill_chunk=0)
    with pytest.raises(ConfigError, match="tokens 6 to 9 do not fit into a row of 8 tokens"):
        Decoder(model, 1, 8).extend(0, [1, 2, 3], 6)
    with pytest.raises(ConfigError, match="a new decoder holds no tokens"):
        Decoder(model, 1, 8).extend(0, [1, 2, 3], 2)
    for row in (-1, 2):
        with pytest.raises(ConfigError, match=f"row {row} is outside 0 to 1"):
            Decoder(model, 2, 8).extend(row, [1], 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("options", [{}, {"linear": "dense", "qkv_bias": True}], ids=str)
def test_prompt_graphs_give_the_logits_of_a_plain_prefill(options):
    """Each bucket is read three times: without a graph, while its graph is captured, and from the graph."""
    model = make(**options, max_sequence_length=512).cuda()
    decoder, plain = Decoder(model, 2, 300), Decoder(model, 1, 300, cuda_graph=False)
    decoder.prefill([[1], [2]])
    for length in (10, 70, 20, 72, 30, 74, 200, 210, 205):
        prompt = tokens_of(length, length)
        expected = plain.extend(0, prompt, 0)
        torch.testing.assert_close(decoder.extend(1, prompt, 0), expected)
        torch.testing.assert_close(
            decoder.step(torch.tensor([0, 3]).cuda())[1], plain.step(torch.tensor([3]).cuda())[0]
        )
    assert len(decoder._reader.graphs._graphs) == 3
    together = Decoder(model, 2, 300)
    for lengths in ((70, 9), (80, 70), (66, 79), (10, 70), (80, 80)):
        prompts = [tokens_of(length, length) for length in lengths]
        expected = torch.cat([plain.extend(0, prompt, 0) for prompt in prompts])
        torch.testing.assert_close(together.prefill(prompts), expected)
        assert together.lengths.tolist() == list(lengths)
    assert list(together._reader.graphs._graphs) == [(2, 80, False)]


def test_packed_layers_without_a_kernel_read_prompts_with_the_blocks():
    model = pack_layers(make(torch.bfloat16, qkv_bias=True).requires_grad_(False))
    decoder = Decoder(model, 1, 40)
    logits = decoder.prefill([PROMPTS[0]])
    assert decoder._reader.prompt_pass is None
    assert torch.isfinite(logits).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("pattern", "backend"), [("2:4", "sparse"), ("6:8", "int8")])
def test_a_pass_of_fused_kernels_gives_the_logits_of_the_blocks(pattern, backend, monkeypatch):
    from sbn_kernels.gemm.sm90.split_k import choose_parts

    from sbn_lightning.backends.selection import engines
    from sbn_lightning.inference import prompt_pass, reader
    from sbn_lightning.inference.opening import use_backend

    if backend not in engines(torch.device("cuda"))[0]:
        pytest.skip(f"backend {backend!r} does not run here")
    assert choose_parts(96, 256, 2048, 132)[0] > 1  # The sums of the last product of a block come in parts.
    torch.manual_seed(0)
    options = {"d_model": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ffn": 2048, "vocab_size": 320}
    config = TransformerConfig(**options, qkv_bias=True, pattern=pattern, init_std=0.08, max_sequence_length=256)
    model = TernaryTransformer(config).cuda().bfloat16().eval().requires_grad_(False)
    use_backend(model, backend, torch.bfloat16)
    prompts = [tokens_of(90, 5), tokens_of(40, 6)]
    ours = Decoder(model, 2, 200)
    logits = [ours.prefill(prompts)]
    # The second prompt of a bucket captures a graph, and the third replays the graph. The same holds for batches.
    logits += [ours.extend(i % 2, prompts[i % 2], 0) for i in range(4)]
    logits += [ours.prefill(prompts) for _ in range(2)]
    assert set(ours._reader.graphs._graphs) == {(1, 96, False), (1, 64, False), (2, 96, False)}
    # The rest of a prompt whose beginning is in the cache: without a graph, with its capture, and from the graph.
    for start in (50, 39, 47):
        ours.extend(1, prompts[0][:start], 0)
        logits.append(ours.extend(1, prompts[0][start:], start))
    assert ((1, 64, True) in ours._reader.graphs._graphs) == has_kernel(ours._layers[0].keys)
    ours.extend(1, prompts[1], 0)  # The row has its own prompt again.
    with monkeypatch.context() as patch:
        patch.setattr(prompt_pass, "_MOST_EARLY", 0)
        assert torch.equal(Decoder(model, 2, 200).prefill(prompts), logits[0])  # Early launches change no bit.
    assert ours._reader.prompt_pass is not None
    monkeypatch.setattr(reader, "make_pass", lambda model: None)
    plain = Decoder(model, 2, 200)
    expected = plain.prefill(prompts)
    assert plain._reader.prompt_pass is None
    for _ in range(2):  # From a graph; the kernels are those of the very first prompts.
        assert torch.equal(plain.prefill(prompts), expected)
    singles = [expected[i % 2 : i % 2 + 1] for i in range(4)]
    all_expected = [expected, *singles, expected, expected, *[expected[:1]] * 3]
    for got, wanted in zip(logits, all_expected, strict=True):
        assert (got - wanted).float().norm() < 0.05 * wanted.float().norm()
    assert torch.equal(ours.lengths, plain.lengths)
    for mine, theirs in zip(ours._layers, plain._layers, strict=True):
        assert (mine.keys[1, :, :40] - theirs.keys[1, :, :40]).float().norm() < 0.05 * theirs.keys[
            1, :, :40
        ].float().norm()
