"""The study from published weights: a stopped trial continues, and long trials take what was best in short ones."""

import json
import time
from dataclasses import asdict, replace

import pytest
import torch

from research.pretrained.__main__ import choose_trials, make_parser, trial_of_this_process
from research.pretrained.corpus import licences
from research.pretrained.plan import _plan, _try, longest
from research.pretrained.report import copying, report, tasks
from research.pretrained.train import FILE, Setting, Training, make_model, make_optimizer
from research.pretrained.trials import LOGITS, Trial, best, long, short, untrained, without_warmup
from research.queue import append_row, read_rows
from sbn_lightning.checkpoints import lightning_file
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.masked_linear import masked_layers
from sbn_lightning.models.transformer import TernaryTransformer
from tests.helpers import small_config

TOKENS = 8 * 2 * 6  # six steps


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = TernaryTransformer(small_config(linear="dense", n_layers=1))
    path = tmp_path_factory.mktemp("weights") / "dense.ckpt"
    torch.save(lightning_file.contents(model.config, model.state_dict()), path)
    return str(path)


@pytest.fixture
def setting(weights, tmp_path):
    text = torch.randint(300, (400,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    held_out = {"code": text[:40], "english": text[40:80]}
    device = torch.device("cpu")
    return Setting(weights, text, held_out, tmp_path / "out", device, length=8, batch=2, marks=(48,), compile=False)


def ends(setting):
    return {row["trial"]["name"]: row for row in read_rows(setting.output / FILE) if row["finished"]}


def test_a_stopped_trial_ends_where_an_uninterrupted_one_does(setting):
    trial = Trial("distilled 6:8", TOKENS, distillation=LOGITS, rounding=0.5, masked_decay=1.0, sub_norms=True)
    trial = replace(trial, learnable_scales=True, ramp=(0.2, 0.7))
    assert Training(trial, setting).run()
    whole = ends(setting)[trial.name]
    assert [row["tokens"] for row in read_rows(setting.output / FILE)] == [48, 96]
    stopped = replace(setting, output=setting.output / "stopped")
    assert not Training(trial, stopped).run(deadline=time.monotonic())
    assert Training(trial, stopped).run()
    assert ends(stopped)[trial.name]["held_out"] == whole["held_out"]
    assert whole["rounding"] == [1.0, 1.0]
    assert whole["first_batch"]["anew"] == pytest.approx(whole["first_batch"]["trained"], rel=1e-4)


def test_measured_only(setting):
    calls = []
    probed = replace(
        setting, probe=lambda logits: calls.append(logits(torch.zeros(2, 8, dtype=torch.long)).shape) or []
    )
    for trial in untrained():
        assert Training(trial, probed).run()
    found = ends(setting)
    assert found.keys() == {"dense", "masked 6:8", "masked 2:4", "ternary 8:8", "ternary 6:8", "ternary 2:4"}
    assert {tuple(shape) for shape in calls} == {(2, 8, 320)}
    assert len({round(row["loss"], 6) for row in found.values()}) == 6


def test_the_report_has_each_trial_and_its_probes():
    row = {"trial": {"name": "plain 6:8", "tokens": 3_000_000}, "tokens": 1_000_000, "finished": False, "loss": 2.5}
    row |= {"perplexity": {"code": 14.321, "english": 5030.0}, "tokens_per_second": 81234}
    probed = {"task": "copy", "setting": "distance 32", "accuracy": 0.25, "error": 0.01}
    lines = report([row, row | {"tokens": 3_000_000, "finished": True, "probe": [probed]}]).splitlines()
    assert lines[2] == "| plain 6:8 | 1.0M of 3.0M | 2.500 | 14.32 | 5,030 | 81,234 |"
    assert lines[3].startswith("| plain 6:8 | 3.0M | 2.500 |")
    assert lines[-1] == "| plain 6:8 | 0.250 ± 0.010 |"
    assert lines[-3] == "| trial | copy distance 32 |"


def test_the_report_has_tasks_and_copying():
    task = {"acc": 0.5, "acc_error": 0.1}
    answers = [{"trial": "a", "tokens": 2_000_000, "tasks": {"names": task}, "induction_heads": [[3, 1, 0.75]]}]
    assert tasks(answers).splitlines()[2] == "| a | 2.0M | 0.500 ± 0.100 | 0.750 (block 3, head 1) |"
    asked = [{"task": "copy", "setting": "distance 32", "accuracy": 0.25, "error": 0.01}]
    heads = [[18, 6, 0.782], [1, 2, 0.5]]
    rows = [{"converted": "nothing", "variant": None, "pattern": "2:4", "probe": asked, "heads": heads}]
    lines = copying([*rows, {**rows[0], "converted": "q and k", "variant": "ternary"}]).splitlines()
    assert lines[2] == "| nothing | - | 0.250 ± 0.010 | 0.78, 0.50 |"
    assert lines[3].startswith("| q and k | ternary 2:4 |")


def test_a_relative_learning_rate_is_a_share_of_each_weight(setting):
    training = Training(Trial("relative", TOKENS, lr=0.1, relative=True), setting)
    rest, *matrices = make_optimizer(training.model, training.trial).param_groups
    assert len(matrices) == 4
    for group in matrices:
        assert group["peak"] == pytest.approx(0.1 * float(group["params"][0].detach().abs().mean()))
    assert rest["peak"] == 1e-3


def test_noise_unties_the_first_weights_a_little(setting):
    usual = make_model(Trial("usual", TOKENS, "2:4"), setting)
    untied = [make_model(Trial("untied", TOKENS, "2:4", untied=0.01, seed=seed), setting) for seed in (1, 1, 2)]
    for (name, layer), *others in zip(masked_layers(usual), *map(masked_layers, untied), strict=True):
        first, again, other = (found.weight for _, found in others)
        assert torch.equal(first, again), name
        assert not torch.equal(first, other), name
        noise, scale = (first - layer.weight).detach().std(), layer.weight.detach().std()
        assert float(noise / scale) == pytest.approx(0.01, rel=0.1), name
    assert torch.equal(usual.embed.weight, untied[0].embed.weight)


def test_long_trials_take_what_was_best_in_the_short_ones(setting):
    for i, trial in enumerate(short(64)):
        append_row(
            setting.output / FILE, {"trial": asdict(trial), "finished": True, "loss": 9.0 - i, "tokens_per_second": 100}
        )
    rows = read_rows(setting.output / FILE)
    lowest = best(rows, "short distilled")
    assert lowest.name == "short distilled rounding 0.3 lr 0.0003"
    plans = [_plan(setting, [trial.name for trial in short(64)], time.monotonic() + 60, 1, 640) for _ in range(2)]
    assert plans[0] == plans[1] == long(640, rows)  # the second one reads the file
    by_name = {trial.name: trial for trial in plans[0]}
    name = "distilled 2:4 seed 1"
    assert by_name[name] == replace(lowest, name=name, pattern="2:4", tokens=640, probed=True)
    assert by_name["plain 6:8 seed 2"] == replace(by_name["plain 6:8 seed 1"], name="plain 6:8 seed 2", seed=2)
    assert by_name["plain 6:8 seed 1"].rounding == best(rows, "short plain").rounding == 0.6
    assert json.loads((setting.output / "plan.json").read_text())[0]["name"] == "distilled 6:8 seed 1"
    assert len({trial.name for trial in [*short(64), *without_warmup(64)]}) == 15


def test_the_length_is_what_fits():
    trials = [Trial("a", 1), Trial("b", 1, distillation=LOGITS)]
    speeds = {"plain": 1e6, "distilled": 5e5}
    assert longest(speeds, 50 + 100 + 2 * 15, trials, 1, 1.0) == 50_000_000
    assert longest(speeds, 100 + 15, trials, 2, 1.0) == 50_000_000
    assert longest(speeds, 1, trials, 2, 1.0) == 2_000_000


@pytest.mark.parametrize(("speed", "tokens"), [(1e6, 50_000_000), (1e5, 5_000_000)])
def test_until_speeds_are_measured_the_expected_one_counts(setting, speed, tokens):
    setting.output.mkdir()
    plan = _plan(replace(setting, expected_speed=speed), [], time.monotonic() + 400, 1, None)  # six trials one by one
    assert {trial.tokens for trial in plan} == {tokens}


def test_a_trial_begins_if_it_fits_at_the_expected_speed(setting, capsys):
    trial = Trial("long", 50_000_000, pattern="3:5")  # cannot be built, so nothing is trained here
    _try(trial, replace(setting, expected_speed=1e5), time.monotonic() + 210, later=0.0)
    seen = capsys.readouterr()
    assert "left out: long needs about 515 s at 100,000 tokens a second" in seen.out
    assert not seen.err
    _try(trial, replace(setting, expected_speed=3e5), time.monotonic() + 210, later=0.0)
    assert "ConfigError" in capsys.readouterr().err


def test_a_trial_that_fails_or_is_done_does_not_stop_the_others(setting, capsys):
    deadline = time.monotonic() + 1000
    _try(Trial("wrong", TOKENS, pattern="3:5"), setting, deadline)
    assert "ConfigError" in capsys.readouterr().err
    for _ in range(2):
        _try(Trial("right", TOKENS), setting, deadline)
    assert len([row for row in read_rows(setting.output / FILE) if row["finished"]]) == 1


def test_a_trial_without_a_teacher_shares_none(setting):
    with pytest.raises(ConfigError, match="trial 'plain 6:8' has no teacher"):
        Training(Trial("plain 6:8", TOKENS), replace(setting, together=True))


def test_licences_of_installed_packages():
    assert sum(licences().values()) > 5


def test_the_command_line_chooses_trials(monkeypatch):
    def chosen(*words):
        return choose_trials(make_parser().parse_args(["work", "--weights", "model.ckpt", *words]))

    assert chosen() is None
    assert len(chosen("--options", "3000000", "6000000")) == len(chosen("--options", "3000000")) + 2
    slow = chosen("--options", "3000000", "--only", "slow start")
    assert [trial.warmup for trial in slow] == [0.25] * len(slow)
    assert chosen("--lengthy", "2000000", "1000000")[0].name == "2M both 2:4 seed 1"
    for words, message in [
        (("--only", "slow start"), "--only chooses among the trials of --options, --lengthy or --trials"),
        (("--options", "1", "--only", "quick"), "--only quick: no trial has such a name; there are 1e-06M both"),
        (("--options", "1", "2", "3"), "--options takes one or two numbers of tokens, not 3"),
    ]:
        with pytest.raises(ConfigError, match=message):
            chosen(*words)
    with pytest.raises(ConfigError, match="--together needs torchrun"):
        trial_of_this_process(slow)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert trial_of_this_process(slow) == slow[1]
    with pytest.raises(ConfigError, match="2 processes, but 1 trials"):
        trial_of_this_process(slow[:1])
