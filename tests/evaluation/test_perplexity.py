"""Perplexity equals that of the guide of transformers, which runs here with transformers' own model and loss."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.evaluation import perplexity, score, scoring
from sbn_lightning.evaluation.scoring import score_ends
from sbn_lightning.evaluation.sliding import Perplexity, windows
from sbn_lightning.formats import load_model
from sbn_lightning.models.transformer import TernaryTransformer
from tests.helpers import small_config

TEXT = np.random.default_rng(0).integers(0, 128, 301).astype(np.uint16)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of transformers, and our model read from its files."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    published = Qwen2ForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("qwen2")
    published.save_pretrained(folder)
    return published, load_model(folder).model


@torch.no_grad()
def guide(model, tokens, window, stride, labels_of_a_window):
    """The loop of the guide. ``labels_of_a_window(valid, whole)`` weighs the mean loss of a window."""
    ids = torch.tensor(tokens.astype(np.int64))[None]
    total, count, previous = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        target = ids[:, begin:end].clone()
        target[:, : -(end - previous)] = -100
        loss = model(ids[:, begin:end], labels=target).loss.item()
        labels = labels_of_a_window(int((target != -100).sum()), end - begin)
        total, count, previous = total + loss * labels, count + labels, end
        if end == ids.shape[1]:
            break
    return math.exp(total / count), count


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (64, 64), (32, 1), (20, 7), (64, 63), (2, 1)])
def test_equals_the_guide(models, window, stride):
    published, ours = models
    # If all labels of a window are valid, the shift drops the first label.
    expected, count = guide(published, TEXT, window, stride, lambda valid, whole: valid - (valid == whole))
    result = perplexity(ours, TEXT, window=window, stride=stride, batch_size=3)
    assert result.perplexity == pytest.approx(expected, rel=1e-4)
    assert result.scored == count
    if stride < window:
        assert count == len(TEXT) - 1


def test_differs_from_the_guides_own_weights_by_little(models):
    published, ours = models
    as_printed, _ = guide(published, TEXT, 64, 32, lambda valid, whole: valid - 1)
    assert perplexity(ours, TEXT, window=64, stride=32).perplexity == pytest.approx(as_printed, rel=0.01)
    # With a single window, and with windows that do not overlap, there is no difference.
    for tokens, stride in ((TEXT[:60], 32), (TEXT, 64)):
        as_printed, _ = guide(published, tokens, 64, stride, lambda valid, whole: valid - 1)
        assert perplexity(ours, tokens, window=64, stride=stride).perplexity == pytest.approx(as_printed, rel=1e-4)


def test_batches_and_chunks_change_nothing(models, monkeypatch):
    _, ours = models
    expected = perplexity(ours, TEXT, window=40, stride=11, batch_size=1)
    monkeypatch.setattr(scoring, "LOGITS", 128 * 5)
    result = perplexity(ours, TEXT, window=40, stride=11, batch_size=64)
    assert result.scored == expected.scored
    assert result.total == pytest.approx(expected.total, rel=1e-6)


@pytest.mark.parametrize("linear", ["ternary", "masked", "dense"])
def test_scores_of_tokens_and_of_ends(linear):
    torch.manual_seed(0)
    model = TernaryTransformer(small_config(linear=linear)).double().eval()
    rows = [[1, 2, 3, 4, 5], [7, 8], [9] * 30]
    counts = [2, 1, 29]
    for row, count, (total, best) in zip(rows, counts, score_ends(model, rows, counts), strict=True):
        with torch.no_grad():
            expected = F.log_softmax(model(torch.tensor([row]))[0, :-1], -1)
        picked = expected.gather(-1, torch.tensor(row[1:])[:, None])[-count:, 0]
        assert total == pytest.approx(float(picked.sum()), rel=1e-9)
        assert best == (expected.argmax(-1)[-count:].tolist() == row[-count:])
        values, greedy = score(model, torch.tensor([row]), len(row) - count)
        torch.testing.assert_close(values[0], picked)
        assert greedy.all() == best


def test_a_text_that_the_model_would_write_is_greedy():
    model = TernaryTransformer(small_config()).double().eval()
    row = [3]
    for _ in range(6):
        row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    ((_, best), (_, worse)) = score_ends(model, [row, [*row[:-1], (row[-1] + 1) % 320]], [6, 6])
    assert best
    assert not worse


def test_windows_by_hand():
    assert list(windows(10, 4, 2)) == [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    assert list(windows(9, 4, 4)) == [(0, 4, 1), (4, 8, 5), (8, 9, 9)]
    assert list(windows(3, 4, 2)) == [(0, 3, 1)]
    assert list(windows(11, 4, 3)) == [(0, 4, 1), (3, 7, 4), (6, 10, 7), (9, 11, 10)]


def test_numbers_of_a_result():
    result = Perplexity(tokens=9, scored=8, total=8 * math.log(16), window=4, stride=2)
    assert result.perplexity == pytest.approx(16)
    assert result.bits_per_byte(12) == pytest.approx(4 * 9 / 12)
    assert Perplexity(2, 1, 1e6, 4, 2).perplexity == math.inf


@pytest.mark.parametrize(
    ("options", "tokens", "error", "message"),
    [
        ({"window": 65, "stride": 3}, [1, 2, 3], ConfigError, "window=65 .*max_sequence_length=64"),
        ({"window": 1, "stride": 1}, [1, 2, 3], ConfigError, "window=1"),
        ({"window": 8, "stride": 9}, [1, 2, 3], ConfigError, "stride=9"),
        ({"window": 8, "stride": 0}, [1, 2, 3], ConfigError, "stride=0"),
        ({"window": 8, "stride": 4, "batch_size": 0}, [1, 2, 3], ConfigError, "batch_size=0"),
        ({"window": 8, "stride": 4}, [1], DataError, "1 tokens"),
        ({"window": 8, "stride": 4}, [1, 128], DataError, "another tokenizer"),
    ],
)
def test_refuses(models, options, tokens, error, message):
    with pytest.raises(error, match=message):
        perplexity(models[1], np.array(tokens), **options)


def test_a_broken_model_is_an_error():
    model = TernaryTransformer(small_config())
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    with pytest.raises(DataError, match="not numbers"):
        perplexity(model, np.array([1, 2, 3]), window=8, stride=4)
