"""The report of made-up results."""

import json
import math
from pathlib import Path

import pytest
import yaml

from research.reproduce.grid import read_grid
from research.reproduce.tables import Comparison, Noise, Results
from sbn_lightning.cli import main
from tests.research.fabricated import BEST, GRID, all_lines, line_of, loss_of, rows, write


def test_everything_is_there(capsys):
    status, text = write(all_lines(loss_of, noise=0.002))
    assert status == 0
    assert f"{len(all_lines(loss_of))} runs of 15.0M parameters, 50.3M tokens" in text
    assert "corpus f of 50.0M training" in text
    assert "## Not run" not in text
    assert "Not run." not in text
    images = sorted(path.name for path in Path("out/images").iterdir())
    names = ("ablations", "flip_rate", "perplexity", "ramps")
    assert images == [f"reproduction_{name}.png" for name in names]
    for name in names:
        assert f"(images/reproduction_{name}.png)" in text
        assert Path(f"out/images/reproduction_{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_figures_noise_and_the_paper():
    _, text = write(all_lines(loss_of, noise=0.002), "--plots", "false")
    row = next(row for row in rows(text, "ternary", "2:4") if len(row) == 9)
    assert row[3] == "3"
    assert float(row[5]) == pytest.approx(math.exp(0.2), abs=0.006)
    assert row[6].startswith("±0.")
    assert row[7:] == ["1.057", "worse, larger than the paper's"]
    (row,) = rows(text, "6:8", "mask_source: ternary")
    assert row[6:] == ["+22.5 %", "worse, smaller than the paper's"]
    assert rows(text, "6:8", "gamma_over: kept")[0][6:] == ["-", "better"]
    (row,) = rows(text, "6:8", "gradient: masked")
    assert row[5].startswith("±0.")
    assert row[7] == "below the noise, smaller than the paper's"
    assert rows(text, "2:4", "gradient: masked")[0][6:] == ["-", "below the noise"], "the paper has none at 2:4"
    assert rows(text, "2:8")[0][-1] == "ternary loses less, larger than the paper's"
    assert rows(text, "4:8")[0][-2:] == ["-", "ternary loses less"]
    best = {row[0]: row[2] for row in rows(text) if row[-1] == "best"}
    assert best == {"bf16-sparse": "0.002", "ternary": "0.004"}


def test_where_the_papers_figures_come_from_and_which_are_missing():
    _, text = write(all_lines(loss_of))
    head = text[: text.index("## Perplexity")]
    for words in ("second hand", "0.5B", "50 billion tokens of RefinedWeb"):
        assert words in head
    ablations = text[text.index("## Ablations") : text.index("## From dense")]
    assert "reported inconsistently" in ablations
    flips = text[text.index("reproduction_flip_rate.png") : text.index("## Bracket")]
    assert "high early, then settling" in flips
    assert "Here ternary 6:8 ends at 0.02 % as the method is, 0.02 % with masked gradients, 0.02 % with masks" in flips
    dense = math.exp(3)
    ours = f"{dense:.2f} → {dense * math.exp(0.1):.2f} (+10.5 %)"
    reported = ["25.99 → 26.31 (+1.2 %)", "20.11 → 20.35 (+1.2 %)", "17.70 → 17.87 (+1.0 %)"]
    assert rows(text, "ternary", ours) == [["ternary", ours, *reported]]
    _, text = write([line for line in all_lines(loss_of) if line["factors"]["pattern"] != "6:8"], "--plots", "false")
    assert rows(text, "ternary", "-") == [["ternary", "-", *reported]]


def test_noise_is_the_pooled_spread_of_seeds():
    lines = [line for line in all_lines(loss_of) if not line["varied"]]
    lines = [line for line in lines if line["factors"]["learning_rate"] == BEST[line["factors"]["family"]]]
    lines = [line for line in lines if line["factors"]["pattern"] in ("8:8", "2:4", "6:8", "2:8")]
    for line in lines:  # every cell has three seeds: -0.01, 0, 0.01
        line["validation"]["loss"] += 0.01 * (line["factors"]["seed"] - 2)
    results = Results(lines)
    assert results.noise("ternary") == Noise(pytest.approx(0.01), 8, None)
    assert results.noise("ternary", "6:8") == Noise(pytest.approx(0.01), 2, "6:8")
    assert results.noise("ternary", "7:8") == results.noise("ternary")
    compared = results.compare(results.cell("ternary", "6:8"), results.cell("ternary", "8:8"))
    assert compared.threshold == pytest.approx(2.776 * 0.01 * math.sqrt(2 / 3), rel=1e-3)  # Student's t for 2 + 2
    assert compared.difference == pytest.approx(0.1)
    one = [line for line in lines if line["factors"]["pattern"] != "8:8" or line["factors"]["seed"] == 1]
    compared = Results(one).compare(Results(one).cell("ternary", "6:8"), Results(one).cell("ternary", "8:8"))
    # 3 runs against 1, whose pattern has no noise of its own: Welch's 5 of 2 and the 4 of 2:4 and 2:8.
    assert compared.threshold == pytest.approx(2.571 * 0.01 * math.sqrt(4 / 3), rel=1e-3)
    _, text = write(one, "--plots", "false")
    assert rows(text, "ternary", "6:8", "1.00 %") == [["ternary", "6:8", "1.00 %", "2", "4.30"]]
    assert rows(text, "ternary", "all") == [["ternary", "all", "1.00 %", "6", "2.45"]]
    assert not rows(text, "ternary", "8:8", "1.00 %")


def test_a_pattern_that_trains_unsteadily_does_not_blur_the_others():
    lines = [line for line in all_lines(loss_of) if not line["varied"]]
    lines = [line for line in lines if line["factors"]["learning_rate"] == BEST[line["factors"]["family"]]]
    for line in lines:
        spread = 0.5 if line["factors"]["pattern"] == "2:8" else 0.001
        line["validation"]["loss"] += spread * (line["factors"]["seed"] - 2)
    results = Results(lines)
    steady = results.compare(results.cell("ternary", "2:4"), results.cell("ternary", "8:8"))
    unsteady = results.compare(results.cell("ternary", "2:8"), results.cell("ternary", "8:8"))
    assert steady.threshold < 0.003
    assert unsteady.threshold > 0.5


def test_the_familys_noise_is_without_the_pattern_compared_with():
    spreads = {"8:8": 0.001, "2:4": 0.02, "7:8": 0.0}
    lines = [line for line in all_lines(loss_of) if not line["varied"] and line["factors"]["family"] == "ternary"]
    lines = [line for line in lines if line["factors"]["learning_rate"] == BEST["ternary"]]
    lines = [line for line in lines if line["factors"]["pattern"] in spreads]
    for line in lines:
        line["validation"]["loss"] += spreads[line["factors"]["pattern"]] * (line["factors"]["seed"] - 2)

    def threshold(chosen, pattern, other):
        results = Results(chosen)
        cells = [results.cell("ternary", each) for each in (pattern, other)]
        assert results.compare(*cells).threshold == pytest.approx(results.compare(*cells[::-1]).threshold)
        return results.compare(*cells).threshold

    # The single 7:8 takes the noise of 2:4 against 8:8, and that of 8:8 against 2:4.
    assert threshold(lines, "7:8", "8:8") == pytest.approx(4.303 * math.hypot(0.02, 0.001 / math.sqrt(3)), rel=1e-3)
    assert threshold(lines, "7:8", "2:4") == pytest.approx(4.303 * math.hypot(0.001, 0.02 / math.sqrt(3)), rel=1e-3)
    # One degree beside those of 8:8: the family's three are the one estimate of both.
    fewer = [line for line in lines if line["factors"]["pattern"] != "2:4" or line["factors"]["seed"] < 3]
    pooled = math.sqrt((2 * 0.001**2 + 0.02**2 / 2) / 3)
    assert threshold(fewer, "7:8", "8:8") == pytest.approx(3.182 * pooled * math.sqrt(4 / 3), rel=1e-3)
    # No further degrees of freedom: none may count twice.
    alone = [line for line in lines if line["factors"]["pattern"] != "2:4"]
    assert threshold(alone, "7:8", "8:8") == pytest.approx(4.303 * 0.001 * math.sqrt(4 / 3), rel=1e-3)


def test_a_difference_of_differences_has_the_noise_of_both():
    gap = Comparison(0.05, 0.003, 8).less(Comparison(0.02, 0.004, 8))
    assert gap.difference == pytest.approx(0.03)
    assert gap.threshold == pytest.approx(2.145 * 0.005, rel=1e-3)  # 14 degrees of freedom
    assert Comparison(0.05, 0.003, 8).less(Comparison(0.02, None)).threshold is None


def test_lines_from_before_a_grid_had_a_factor_count_as_its_default():
    lines = [line for line in all_lines(loss_of, noise=0.01) if not line["varied"]]
    before = Results(lines).noise("ternary")
    for line in lines[::2]:
        line["factors"] = {name: value for name, value in line["factors"].items() if name != "schedule"}
    assert Results(lines).noise("ternary") == before


def test_an_effect_below_the_noise_is_called_that():
    _, text = write(all_lines(loss_of, noise=0.5), "--plots", "false")
    assert rows(text, "6:8", "mask_source: ternary")[0][7] == "below the noise, agrees with the paper"
    assert rows(text, "2:4")[0][-1].startswith("below the noise")


@pytest.mark.parametrize(
    ("ours", "paper", "expected"),
    [
        (0.12, 1.45, "worse, smaller than the paper's"),
        (0.12, 1.14, "worse, agrees with the paper"),
        (0.12, 1.05, "worse, larger than the paper's"),
        (0.12, 0.99, "worse, against the paper"),
        (-0.12, 1.02, "better, against the paper"),
        (-0.12, 0.89, "better, agrees with the paper"),
        (-0.12, 0.8, "better, smaller than the paper's"),
        (-0.01, 1.225, "below the noise, smaller than the paper's"),
        (-0.02, 1.02, "below the noise, smaller than the paper's"),
        (0.01, 1.02, "below the noise, agrees with the paper"),
        (0.12, 1.0, "worse, larger than the paper's"),
        (0.12, None, "worse"),
        (0.01, None, "below the noise"),
    ],
)
def test_verdicts(ours, paper, expected):
    compared = Comparison(ours, 0.01, 4)  # times 2.78
    assert compared.verdict(paper) == expected
    assert compared.noise == "±2.8 %"
    assert Comparison(ours, None).verdict(paper) == "one seed: noise not known"


def test_a_few_results_make_a_part():
    lines = [line for line in all_lines(loss_of) if line["factors"]["seed"] == 1 and not line["varied"]]
    few = [line for line in lines if line["factors"]["pattern"] in ("8:8", "6:8")]
    few = [line for line in few if line["factors"]["learning_rate"] == BEST[line["factors"]["family"]]]
    for line in few:
        line["probe"] = None
    status, text = write(few)
    assert status == 0
    assert "no cell has two seeds, noise is not known" in text
    assert next(row for row in rows(text, "ternary", "6:8") if len(row) == 9)[-1] == "one seed: noise not known"
    assert not Path("out/images/reproduction_ablations.png").exists()
    status, text = write(few[:1])
    assert status == 0


def test_what_was_not_run_by_group():
    groups = {
        "patterns": {"family": ["ternary", "bf16-sparse"], "pattern": ["8:8", "2:4"], "seed": [1, 2]},
        "again": {"family": "ternary", "pattern": "2:4", "seed": 2},
        "ramps": {"family": "ternary", "pattern": ["6:8", "2:4"], "ramp": ["walk", "share_50"], "seed": 1},
        "int8": {"family": "ternary", "pattern": "6:8", "gradients": "int8"},
    }
    grid = yaml.safe_load(GRID.read_text()) | {"recipe": str(GRID.parent / "base.yaml"), "groups": groups}
    Path("grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    lines = [line_of(run, 2.0) for run in read_grid("grid.yaml").runs()]

    def is_left(line):
        of = line["factors"]
        return of["ramp"] == "walk" or of["gradients"] == "int8" or (of["pattern"], of["seed"]) == ("2:4", 2)

    _, text = write([line for line in lines if not is_left(line)], "--plots", "false", grid="grid.yaml")
    text = text[text.index("## Not run") :]
    assert "5 of the grid's 13 runs:" in text
    assert rows(text)[2:] == [
        ["patterns", "2 of 8", "ternary 2:4 seed 2; bf16-sparse 2:4 seed 2"],
        ["again", "1 of 1", "all"],
        ["ramps", "2 of 4", "6:8 walk; 2:4 walk"],
        ["int8", "1 of 1", "all"],
    ]
    _, text = write(lines, "--plots", "false", grid="grid.yaml")
    assert "## Not run" not in text


def test_runs_of_another_corpus_count_as_not_run():
    *lines, last = all_lines(loss_of)
    last["data"]["fingerprint"] = "other"
    _, text = write([*lines, last], "--plots", "false")
    assert f"1 of the grid's {len(lines) + 1} runs:" in text


def test_without_a_grid_or_with_another(capsys):
    lines = all_lines(loss_of)[:3]
    status, text = write(lines, "--plots", "false", grid="nowhere.yaml")
    assert status == 0
    assert "nowhere.yaml is not there: the report does not list what was not run" in capsys.readouterr().err
    assert "Runs that are missing are not listed" in text
    assert "## Not run" not in text
    for line in lines:
        line["id"] += "x"
    _, text = write(lines, "--plots", "false")
    assert "runs: the results are of another grid, or were made with --override." in text


def test_lines_of_another_corpus_or_length_are_left_out():
    lines = all_lines(loss_of)
    other = json.loads(json.dumps(lines[0])) | {"steps": 10, "tokens": 10}
    other["validation"]["loss"] = 99.0
    _, text = write([other, *lines], "--plots", "false")
    assert "1 lines of another corpus, model or length are left out." in text
    assert f"{len(lines)} runs" in text


def test_errors_say_what_to_do(capsys, monkeypatch):
    assert main(["reproduce-report", "--results", "nothing.jsonl"]) == 1
    assert "nothing.jsonl holds no results yet" in capsys.readouterr().err
    monkeypatch.setattr("research.reproduce.plots.find_spec", lambda name: None)
    assert write(all_lines(loss_of))[0] == 1
    assert 'pip install -e ".[plots]" in a checkout of the repository, or pass --plots false' in capsys.readouterr().err
