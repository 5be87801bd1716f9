"""The study of sizes: a stopped trial continues, variants do what they say, and the fit finds a slope that is there."""

import importlib
import math
import time
from dataclasses import asdict, replace

import pytest
import torch

from research.queue import append_row, read_rows
from research.reproduce.noise import t_factor
from research.sizes import __main__ as program
from research.sizes.__main__ import ALONE, bench, speed, work
from research.sizes.fit import family_differences, fit, gaps
from research.sizes.rates import AT_15M, best_rates, is_complete, learning_rate, resolve, sweep
from research.sizes.report import MARK, family_table, write_report
from research.sizes.rounds import ROUNDS
from research.sizes.train import FILE, ON_THE_WAY, Setting, Training, make_model, make_optimizer
from research.sizes.trials import PARAMETERS, SIZES, Size, Trial, tokens_of
from research.sizes.variants import candidates
from sbn_lightning.layers.sparse_bit_linear import ternary_layers
from sbn_lightning.sparsity.pattern import NMPattern, nonzeros_per_group

TOKENS = 8 * 2 * 12  # twelve steps


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", Size(128, 1, 1, 64))
    monkeypatch.setitem(PARAMETERS, "tiny", 100_000)
    monkeypatch.setitem(ALONE, "tiny", 1e6)


@pytest.fixture
def setting(tmp_path):
    text = torch.randint(300, (400,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    return Setting(
        text, text[:60], tmp_path, torch.device("cpu"), vocab_size=300, length=8, batch=2, held_out_batches=2,
        compile=False, graphs=False,
    )  # fmt: skip


def trial(pattern="2:4", **options):
    return Trial("tiny", options.pop("family", "ternary"), pattern, TOKENS, 1e-2, **options)


def test_a_stopped_trial_ends_where_an_uninterrupted_one_does(setting):
    one = trial(shrink=0.1)
    stopped = replace(setting, output=setting.output / "stopped")
    assert Training(one, setting).run()
    assert not Training(one, stopped).run(deadline=time.monotonic())
    assert (stopped.output / "states" / one.name / "state.pt").is_file()
    assert Training(one, stopped).run()
    whole, again = read_rows(setting.output / FILE)[0], read_rows(stopped.output / FILE)[0]
    assert whole["loss"] == again["loss"]
    before, after = (
        [(row["steps"], row["loss"]) for row in read_rows(at.output / ON_THE_WAY)] for at in (setting, stopped)
    )
    assert [steps for steps, _ in before] == [2, 3, 5, 6, 8, 9, 11]
    assert before == after
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


def test_the_scale_is_of_the_matrices_alone(setting):
    training = Training(trial(variant="muon", scale=2.0), setting)
    rates = {group["muon"]: group["peak"] for group in training.optimizers[0].param_groups}
    assert rates == {True: 2e-2, False: 1e-2}
    assert training.run()
    plain = make_optimizer(training.model, trial(scale=0.5))
    assert [group["peak"] for group in plain.param_groups] == [5e-3, 1e-2]


def test_workers_do_each_trial_once_and_leave_what_does_not_fit(setting, capsys):
    chosen = [trial(), trial("8:8", family="bf16")]
    work(setting, chosen, seconds=60)
    work(setting, chosen, seconds=60)
    rows = read_rows(setting.output / FILE)
    assert [row["trial"] for row in rows] == [asdict(one) for one in chosen]
    work(setting, [trial(seed=2)], seconds=5)  # below the time that a trial takes besides its steps
    assert len(read_rows(setting.output / FILE)) == 2


def test_the_speed_is_that_of_as_many_processes():
    rows = [row_of(trial(seed=seed), 3.0, processes=8, tokens_per_second=seed) for seed in (1, 2, 3)]
    assert speed(trial(), rows, 8) == 2
    assert speed(trial(), rows, 2) == ALONE["tiny"] / 2


def row_of(one, loss, **more):
    common = {"tokens_per_second": 1e6, "text_tokens": 1000, "processes": 1}
    return {"name": one.name, "trial": asdict(one), "loss": loss, "tokens": one.tokens} | common | more


def swept(best=16e-3):
    """Rows of a sweep in which one rate of each family is the best one."""
    return [row_of(one, 3.0 + (one.lr != (best if one.family == "ternary" else best / 2))) for one in sweep()]


def test_the_rule_goes_through_the_best_rates_of_both_sizes():
    rows = swept()
    assert is_complete(rows)
    best = best_rates(rows)
    assert best == {"ternary": 16e-3, "bf16": 8e-3}
    assert learning_rate("2M", "ternary", best) == 16e-3
    assert learning_rate("15M", "ternary", best) == AT_15M["ternary"]
    assert learning_rate("5M", "bf16", best) == 4e-3
    assert learning_rate("31M", "ternary", best) == pytest.approx(4e-3 * 512 / 768, rel=1e-2)
    assert learning_rate("5M", "ternary", best_rates(swept(4e-3))) == 4e-3
    assert not is_complete(rows[1:])
    assert best_rates([])["ternary"] == 8e-3


def test_trials_by_the_rule_wait_for_the_sweep(setting):
    waiting = replace(trial(), lr=0.0)
    for row in swept(8e-3):
        append_row(setting.output / FILE, row)
    work(setting, [waiting, trial(seed=3)], seconds=60)
    rows = read_rows(setting.output / FILE)[len(sweep()) :]
    assert [row["trial"]["lr"] for row in rows] == [8e-3, 1e-2]
    assert rows[0]["name"] == resolve(waiting, best_rates(rows + swept(8e-3))).name


def test_rounds_know_their_sizes():
    for one in ROUNDS["main"]:
        assert one.size in PARAMETERS
        assert one.tokens % 32_768 == 0
    assert tokens_of("15M", 20) == pytest.approx(20 * PARAMETERS["15M"], rel=1e-3)


def rows_of(slope, of_tokens=0.0, sizes=("2M", "5M", "9M", "15M"), each=(20,), noise=0.003, at=0.05, seeds=4):
    """Rows whose gap between 2:4 and dense is known."""
    generator = torch.Generator().manual_seed(0)
    rows = swept()
    best = best_rates(rows)
    for size in sizes:
        for ratio in each:
            gap = at + slope * math.log10(PARAMETERS[size] / PARAMETERS["15M"]) + of_tokens * math.log10(ratio / 20)
            for seed in range(1, seeds + 1):
                for pattern, loss in (("8:8", 3.0), ("2:4", 3.0 + gap)):
                    one = Trial(
                        size, "ternary", pattern, tokens_of(size, ratio), learning_rate(size, "ternary", best), seed
                    )
                    rows = [row for row in rows if row["name"] != one.name]
                    rows.append(row_of(one, loss + noise * float(torch.randn((), generator=generator))))
    return rows


def test_the_fit_finds_the_slope_within_its_interval():
    places = gaps(rows_of(-0.03, each=(10, 20)), "ternary", "2:4")
    assert all(len(one.values) == 4 for one in places)
    assert [(one.size, one.each) for one in places[:3]] == [("2M", 10), ("2M", 20), ("5M", 10)]
    found = fit(places)
    slope, of_tokens = found.line["a decade of size"], found.line["a decade of tokens"]
    assert slope.low < -0.03 < slope.high < 0
    assert of_tokens.low < 0 < of_tokens.high
    assert found.power["a decade of size"].high < 0
    assert all(0.002 < one.noise.deviation < 0.008 for one in places)  # sqrt(2) * 0.003
    assert all(abs(one.error - t_factor(one.noise.freedom) * one.deviation) < 1e-12 for one in places)


def test_the_noise_of_single_runs_comes_from_the_nearest_place_that_knows_it():
    rows = rows_of(-0.03, sizes=("2M",)) + rows_of(-0.03, sizes=("5M", "15M"), seeds=1)[len(sweep()) :]
    small, middle, large = (one for one in gaps(rows, "ternary", "2:4") if one.each == 20)
    assert middle.noise == small.noise
    assert small.noise.freedom == 3
    assert large.noise.source == "the runs of reproduction.md"
    assert 0.003 < large.noise.deviation < 0.03
    assert fit(gaps(rows_of(0.0, sizes=("2M", "5M", "9M"), seeds=1), "ternary", "2:4")) is None  # Nobody knows it.


def test_two_seeds_of_both_families_show_the_noise_of_a_size():
    rows = rows_of(-0.03, sizes=("5M",), seeds=2)
    of_bf16 = [row | {"trial": row["trial"] | {"family": "bf16"}} for row in rows if row["trial"]["size"] == "5M"]
    rate = learning_rate("5M", "bf16", best_rates(rows))
    for row in of_bf16:
        row["trial"] |= {"lr": rate}
    assert gaps(rows, "ternary", "2:4")[-1].noise is None  # one degree of freedom
    found = gaps(rows + of_bf16, "ternary", "2:4")[-1].noise
    assert (found.source, found.freedom) == ("both families at 5M", 2)


@pytest.mark.parametrize(("seeds", "source"), [(3, "both families at 9M"), (5, "2:4 at 9M")])
def test_three_seeds_that_happen_to_agree_do_not_outweigh_the_other_family(seeds, source):
    found = gaps(of_both_families(("9M",), 0.0, seeds), "ternary", "2:4")[-1].noise
    assert (found.source, found.freedom) == (source, 4)


def of_both_families(sizes, extra, seeds=4):
    """Rows of both families, in which BF16 pays ``extra`` nats more for 2:4 than ternary models do."""
    rows = rows_of(-0.03, sizes=sizes, seeds=seeds)
    of_bf16 = []
    for row in rows_of(-0.03, sizes=sizes, seeds=seeds, at=0.05 + extra)[len(swept()) :]:
        rate = learning_rate(row["trial"]["size"], "bf16", best_rates(rows))
        of_bf16.append(row | {"trial": row["trial"] | {"family": "bf16", "lr": rate}})
    return rows + of_bf16


@pytest.mark.parametrize(
    ("extra", "verdict"), [(0.04, "BF16 pays more"), (-0.04, "ternary pays more"), (0.0, "within noise")]
)
def test_the_difference_of_the_families_is_told_from_noise(extra, verdict):
    rows = of_both_families(("2M", "5M", "15M"), extra)
    _, *places = family_differences(rows, "2:4")  # The first place is that of the sweep.
    assert [place.size for place in places] == ["2M", "5M", "15M"]
    assert all(place.mean == pytest.approx(extra, abs=1e-9) for place in places)  # Both have the same draws.
    text = family_table(rows)
    assert text.count(f"| {verdict} |") >= 3
    assert not any(f"| {other} |" in text for other in {"BF16 pays more", "ternary pays more"} - {verdict})
    assert "Change of this difference with ten times the size, nats: 2:4 " in text


def test_families_with_one_estimate_of_the_noise_share_its_degrees_of_freedom():
    rows = of_both_families(("5M",), 0.04, seeds=2)
    *_, place = family_differences(rows, "2:4")
    bf16, ternary = (gaps(rows, family, "2:4")[-1] for family in ("bf16", "ternary"))
    assert bf16.noise == ternary.noise
    assert place.noise.freedom == bf16.noise.freedom == 2
    assert place.deviation == pytest.approx(2**0.5 * bf16.deviation)


def test_gaps_pair_seeds_and_leave_other_learning_rates_out():
    rows = rows_of(0.0, sizes=("2M",), noise=0.0, seeds=2)
    rows.append(row_of(Trial("2M", "ternary", "2:4", tokens_of("2M", 20), 0.5), 9.0))
    rows = [row for row in rows if not (row["trial"]["pattern"] == "8:8" and row["trial"]["seed"] == 2)]
    (place,) = (place for place in gaps(rows, "ternary", "2:4") if place.each == 20)
    assert len(place.values) == 1  # the second seed has no dense model
    of_other_text = [row | {"text_tokens": 2000} if row["trial"]["pattern"] == "2:4" else row for row in rows]
    assert not gaps(of_other_text, "ternary", "2:4")
    assert fit([place]) is None


@pytest.mark.parametrize("study", ["sizes", "pretrained"])
def test_a_report_of_a_file_that_is_not_there_writes_nothing(study, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"{MARK}\n\nFigures.\n", encoding="utf-8")
    words = ["--output", str(page), "--images", str(tmp_path)] if study == "sizes" else []
    monkeypatch.setattr("sys.argv", ["research", "report", str(tmp_path / "nope.jsonl"), *words])
    with pytest.raises(SystemExit):
        importlib.import_module(f"research.{study}.__main__").main()
    assert "nope.jsonl holds no results" in capsys.readouterr().err
    assert "Figures." in page.read_text(encoding="utf-8")


def test_the_report_keeps_the_words_above_its_mark(tmp_path):
    rows = rows_of(-0.03, sizes=("2M", "9M", "15M"))
    for seed in (1, 2):
        for variant, loss in (("", 3.0), ("muon", 2.9)):
            one = Trial("5M", "ternary", "2:4", tokens_of("5M", 10), 8e-3, seed, variant=variant)
            rows.append(row_of(one, loss + 0.001 * seed))
    for row in rows:
        row["epochs"] = 1.0
    page = tmp_path / "page.md"
    page.write_text(f"# Words\n\nKept.\n\n{MARK}\n\nOld tables.\n", encoding="utf-8")
    write_report(rows, page, tmp_path / "images")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Words\n\nKept.\n\n")
    assert "Old tables" not in text
    assert "| ternary | 2:4 | muon | 0.008 | 2 | 2.9015 | -0.1000 ±" in text
    assert "better" in text
    assert (tmp_path / "images" / "sizes_gap.png").stat().st_size > 1000


def test_sizes_have_the_parameters_that_the_table_says(setting):
    here = replace(setting, device=torch.device("meta"), vocab_size=8192)
    for size, expected in PARAMETERS.items():
        if size != "tiny":
            model = make_model(Trial(size, "bf16", "8:8", 1, 1e-3), here)
            assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_steps_of_chosen_sizes_alone_are_timed(setting, monkeypatch):
    kinds = [(size, family, "2:4", "bf16", False, "auto") for size, family in (("15M", "bf16"), ("tiny", "ternary"))]
    monkeypatch.setattr(program, "BENCHES", kinds)
    bench(setting, seconds=600.0, steps=2, sizes=["tiny"])
    (row,) = read_rows(setting.output / "bench.jsonl")
    assert row["what"].startswith("tiny ternary 2:4")
    assert row["ms"] > 0
