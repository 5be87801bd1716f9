"""The study of sizes: a stopped trial continues, variants do what they say, and the fit finds a slope that is there."""

import math
import time
from dataclasses import asdict, replace

import pytest
import torch

from research.sizes.__main__ import work
from research.sizes.fit import fit, gaps
from research.sizes.report import MARK, write_report
from research.sizes.train import FILE, Setting, Training, make_optimizers, read_rows
from research.sizes.trials import (
    PARAMETERS,
    ROUNDS,
    SIZES,
    VARIANT_TOKENS,
    Size,
    Trial,
    learning_rate,
    tokens_of,
)
from research.sizes.variants import candidates
from sbn_lightning.layers.sparse_bit_linear import ternary_layers
from sbn_lightning.sparsity.pattern import NMPattern, nonzeros_per_group

TOKENS = 8 * 2 * 12  # twelve steps


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "2M", Size(64, 1, 1, 64))


@pytest.fixture
def setting(tmp_path):
    text = torch.randint(300, (400,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    return Setting(
        text, text[:60], tmp_path, torch.device("cpu"), vocab_size=300, length=8, batch=2, held_out_batches=2,
        compile=False, graphs=False,
    )  # fmt: skip


def trial(pattern="2:4", **options):
    return Trial("2M", options.pop("family", "ternary"), pattern, TOKENS, 1e-2, **options)


def test_a_stopped_trial_ends_where_an_uninterrupted_one_does(setting):
    one = trial(shrink=0.1)
    stopped = replace(setting, output=setting.output / "stopped")
    assert Training(one, setting).run()
    assert not Training(one, stopped).run(deadline=time.monotonic())
    assert (stopped.output / "states" / one.name / "state.pt").is_file()
    assert Training(one, stopped).run()
    whole, again = read_rows(setting.output / FILE)[0], read_rows(stopped.output / FILE)[0]
    assert whole["loss"] == again["loss"]
    assert whole["tokens"] == TOKENS
    assert not (stopped.output / "states" / one.name / "state.pt").exists()


def test_an_epoch_reads_each_row_once(setting):
    training = Training(trial(), setting)
    steps = (len(setting.train) - 9) // 8 // 2
    text = torch.arange(400, dtype=torch.int32)
    training.setting = replace(setting, train=text)
    first = torch.cat([training._batch(step) for step in range(steps)])
    assert len(first[:, :-1].unique()) == first[:, :-1].numel()
    assert not torch.equal(training._batch(0), training._batch(steps))


@pytest.mark.parametrize("pattern", ["3:4", "2:4"])
def test_exact_codes_have_exactly_n_of_m(setting, pattern):
    training = Training(trial(pattern, variant="exact"), setting)
    training.advance(3)
    for layer in ternary_layers(training.model).values():
        codes, gamma = layer.ternary()
        assert (nonzeros_per_group(codes, 4) == int(pattern[0])).all()
        assert torch.equal(codes != 0, layer.mask)
        if layer.split_sizes is None:
            assert gamma.item() == pytest.approx(layer.weight.abs()[layer.mask].mean().item(), rel=1e-5)


def test_a_learned_mask_moves_and_keeps_the_pattern(setting):
    training = Training(trial(variant="learned"), setting)
    training.advance(9)
    assert not training.learned
    training.advance(1)
    logits = [one.logits.detach().clone() for one in training.learned]
    assert training.run()
    assert any(not torch.equal(before, one.logits) for before, one in zip(logits, training.learned, strict=True))
    for layer, one in zip(ternary_layers(training.model).values(), training.learned, strict=True):
        assert torch.equal(layer.mask, one.mask())
        assert (nonzeros_per_group(layer.mask, 4) == 2).all()
        assert layer.hold_mask


def test_candidates_are_all_masks_of_a_group():
    masks = candidates(NMPattern(2, 4))
    assert masks.shape == (6, 4)
    assert (masks.sum(-1) == 2).all()
    assert len(masks.unique(dim=0)) == 6


def test_muon_trains_the_matrices_and_adamw_the_rest(setting):
    training = Training(trial(variant="muon"), setting)
    adamw, muon = training.optimizers
    matrices = [p for name, p in training.model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(p) for p in matrices]
    assert not {id(p) for p in adamw.param_groups[0]["params"]} & {id(p) for p in matrices}
    plain = make_optimizers(training.model, trial())
    assert len(plain) == 1
    assert training.run()


def test_workers_do_each_trial_once_and_leave_what_does_not_fit(setting, capsys):
    chosen = [trial(), trial("8:8", family="bf16")]
    work(setting, chosen, seconds=60)
    work(setting, chosen, seconds=60)
    rows = read_rows(setting.output / FILE)
    assert [row["trial"] for row in rows] == [asdict(one) for one in chosen]
    work(setting, [trial(seed=2)], seconds=5)  # below the time that a trial takes besides its steps
    assert len(read_rows(setting.output / FILE)) == 2


def test_rounds_have_no_trial_twice_and_follow_the_rule():
    for one in ROUNDS.values():
        assert len({trial.name for trial in one}) == len(one)
    assert learning_rate("15M", "ternary") == pytest.approx(learning_rate("31M", "ternary") * 768 / 512, rel=1e-2)
    assert tokens_of("15M", 20) == pytest.approx(20 * PARAMETERS["15M"], rel=1e-3)


def rows_of(slope, of_tokens=0.0, sizes=("2M", "5M", "9M", "15M"), each=(20,), noise=0.003, at=0.05, seeds=4):
    """Rows whose gap between 2:4 and dense is known."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for size in sizes:
        for ratio in each:
            gap = at + slope * math.log10(PARAMETERS[size] / PARAMETERS["15M"]) + of_tokens * math.log10(ratio / 20)
            for seed in range(1, seeds + 1):
                for pattern, loss in (("8:8", 3.0), ("2:4", 3.0 + gap)):
                    one = Trial(size, "ternary", pattern, tokens_of(size, ratio), learning_rate(size, "ternary"), seed)
                    drawn = loss + noise * float(torch.randn((), generator=generator))
                    rows.append({"name": one.name, "trial": asdict(one), "loss": drawn, "tokens": one.tokens})
    return rows


def test_the_fit_finds_the_slope_within_its_interval():
    places = gaps(rows_of(-0.03, each=(10, 20)), "ternary", "2:4")
    assert [(one.size, one.each) for one in places[:3]] == [("2M", 10), ("2M", 20), ("5M", 10)]
    found = fit(places)
    slope, of_tokens = found.line["a decade of size"], found.line["a decade of tokens"]
    assert slope.low < -0.03 < slope.high < 0
    assert of_tokens.low < 0 < of_tokens.high
    assert found.power["a decade of size"].high < 0
    assert 0.002 < found.deviation < 0.008  # sqrt(2) * 0.003


def test_gaps_pair_seeds_and_leave_other_learning_rates_out():
    rows = rows_of(0.0, sizes=("2M",), noise=0.0, seeds=2)
    rows.append({**rows[0], "trial": rows[0]["trial"] | {"lr": 0.5, "pattern": "2:4", "seed": 1}, "loss": 9.0})
    rows = [row for row in rows if not (row["trial"]["pattern"] == "8:8" and row["trial"]["seed"] == 2)]
    (place,) = gaps(rows, "ternary", "2:4")
    assert len(place.values) == 1  # the second seed has no dense model
    assert fit([place]) is None


def test_the_report_keeps_the_words_above_its_mark(tmp_path):
    rows = rows_of(-0.03, each=(10, 20))
    for seed in (1, 2):
        for variant, loss in (("", 3.0), ("muon", 2.9)):
            one = Trial("15M", "ternary", "2:4", VARIANT_TOKENS, learning_rate("15M", "ternary"), seed, variant=variant)
            rows.append({"name": one.name, "trial": asdict(one), "loss": loss + 0.001 * seed, "tokens": one.tokens})
    for row in rows:
        row |= {"epochs": 1.0, "tokens_per_second": 1e6}
    page = tmp_path / "page.md"
    page.write_text(f"# Words\n\nKept.\n\n{MARK}\n\nOld tables.\n", encoding="utf-8")
    write_report(rows, page, tmp_path / "images")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Words\n\nKept.\n\n")
    assert "Old tables" not in text
    assert "| ternary | 2:4 | muon | 0.004 | 2 | 2.9015 | -0.1000 ±" in text
    assert "better" in text
    assert (tmp_path / "images" / "sizes_gap.png").stat().st_size > 1000
