"""The lm-evaluation-harness on tasks made of local files; nothing is downloaded."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("lm_eval", reason='needs pip install -e ".[eval]"')

from lm_eval.tasks import TaskManager

from sbn_lightning.checkpoints.lightning_file import contents
from sbn_lightning.cli import main
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data.tokenizer import byte_tokenizer
from sbn_lightning.formats import load_model
from sbn_lightning.inference import generate
from sbn_lightning.models.transformer import TernaryTransformer
from tests.helpers import small_config

QUESTIONS = [
    {"question": "two and two", "choices": [" four", " five", " a bird"], "answer": 0},
    {"question": "the sky", "choices": [" is blue", " is seven"], "answer": 1},
    {"question": "a longer question than the others", "choices": [" y", " n"], "answer": 0},
]
TASKS = {
    "local_choice": """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "local_text": """
task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{choices[0]}}"
metric_list: [{metric: byte_perplexity}]
""",
    "local_writing": """
task: local_writing
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["STOP"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
BROKEN = """
task: broken
dataset_path: json
dataset_kwargs: {data_files: {test: DATA.missing}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, text in {**TASKS, "broken": BROKEN}.items():
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = TernaryTransformer(small_config(vocab_size=257, init_std=0.3, max_sequence_length=48))
    with torch.no_grad():
        model.embed.weight.mul_(0.05)  # otherwise an untrained model repeats its last token
    torch.save(contents(model.config, model.state_dict()), folder / "model.ckpt")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return str(folder / "model.ckpt")


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_model(checkpoint)


def log_probability(model, before, after):
    """The log probability, from the logits of one whole sequence at a time."""
    ids = [*before, *after]
    with torch.no_grad():
        logs = F.log_softmax(model(torch.tensor([ids[:-1]]))[0].double(), -1)
    return sum(float(logs[i - 1, ids[i]]) for i in range(len(before), len(ids)))


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_tasks_from_the_command_line(checkpoint, loaded, tasks, capsys):
    arguments = ["--checkpoint", checkpoint, "--device", "cpu", "--tasks", *TASKS, "--tasks_folder", str(tasks)]
    assert main(["evaluate", *arguments, "--batch_size", "2", "--output", "results.json"]) == 0
    results = json.loads(Path("results.json").read_text())["tasks"]
    assert set(results) == set(TASKS)
    model, right, nats, size = loaded.model, 0, 0.0, 0
    for row in QUESTIONS:
        question = row["question"].encode()
        scores = [log_probability(model, question, choice.encode()) for choice in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
        text = question + row["choices"][0].encode()
        nats -= log_probability(model, [256], text)
        size += len(text)
    assert results["local_choice"]["acc,none"] == pytest.approx(right / 3)
    assert results["local_text"]["byte_perplexity,none"] == pytest.approx(math.exp(nats / size), rel=1e-4)
    assert "local_choice" in capsys.readouterr().out


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def test_log_likelihoods(loaded):
    from sbn_lightning.evaluation.harness import HarnessModel

    harness = HarnessModel(loaded, batch_size=2)
    pairs = [("a question", " yes"), ("", "alone"), ("a much longer question", " n"), ("x" * 60, "yz")]
    found = harness.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (before, after), (total, _) in zip(pairs, found, strict=True):
        context = list(before.encode()) or [256]
        room = 49 - len(after)  # the model predicts the last token but does not read it
        assert total == pytest.approx(log_probability(loaded.model, context[-room:], after.encode()), rel=1e-4)
    with pytest.raises(ConfigError, match="49 tokens"):
        harness.loglikelihood(requests("loglikelihood", ("a", "y" * 49)), disable_tqdm=True)


def test_a_text_longer_than_the_context_is_scored_once(loaded):
    from sbn_lightning.evaluation.harness import HarnessModel

    text = "0123456789" * 7  # 70 tokens, of which 48 fit
    found = HarnessModel(loaded, batch_size=4).loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), True)
    ids = list(text.encode())
    expected = log_probability(loaded.model, [256], ids[:48])
    expected += log_probability(loaded.model, ids[21:48], ids[48:])
    assert found == [pytest.approx(expected, rel=1e-4)]


def test_texts_end_at_a_stop_string(loaded):
    from sbn_lightning.evaluation.harness import HarnessModel

    harness = HarnessModel(loaded, batch_size=2)
    (row,) = generate(loaded.model, [list(b"abc")], max_new_tokens=8, stop_tokens=[256])
    whole = byte_tokenizer().decode(row)
    options = {"max_gen_toks": 8, "do_sample": False, "until": []}
    arguments = [("abc", options), ("", options), ("abc", options | {"until": [whole[3]]}), ("z" * 99, options)]
    found = harness.generate_until(requests("generate_until", *arguments), disable_tqdm=True)
    assert found[0] == whole
    assert found[2] == whole.split(whole[3])[0]
    (long,) = generate(loaded.model, [list(b"z" * 40)], max_new_tokens=8, stop_tokens=[256])
    assert found[3] == byte_tokenizer().decode(long)
    sampled = harness.generate_until(
        requests("generate_until", ("abc", {"max_gen_toks": 8, "temperature": 5.0, "do_sample": True})), True
    )
    assert sampled != [whole]
    options = {"max_gen_toks": 8, "temperature": 5.0, "do_sample": True}
    repeated = harness.generate_until(requests("generate_until", *[("abc", options)] * 4), disable_tqdm=True)
    assert len(set(repeated)) == 4  # two batches of two texts; each text has draws of its own
    with pytest.raises(ConfigError, match="leaves no context"):
        harness.generate_until(requests("generate_until", ("abc", {"max_gen_toks": 48})), disable_tqdm=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "no_such_task", "--tasks_folder", "TASKS"], "no task no_such_task"),
        (["--tasks", "local_choice", "--tasks_folder", "missing"], "tasks_folder missing"),
        (["--tasks", "broken", "--tasks_folder", "TASKS"], "tasks broken failed in the lm-evaluation-harness"),
    ],
)
def test_errors_are_one_line(checkpoint, tasks, capsys, arguments, message, monkeypatch):
    # Without this, the harness would read its ten thousand own tasks only to report an unknown name.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    arguments = [str(tasks) if word == "TASKS" else word for word in arguments]
    assert main(["evaluate", "--checkpoint", checkpoint, "--device", "cpu", *arguments]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_harness_makes_the_model_by_its_name(checkpoint):
    """The harness's own command does this too, with arguments that it adds."""
    from lm_eval.api.registry import get_model

    from sbn_lightning.evaluation.harness import HarnessModel

    assert get_model("sbn_lightning") is HarnessModel
    added = {"batch_size": "4", "max_batch_size": None, "device": "cpu"}
    made = get_model("sbn_lightning").create_from_arg_obj({"checkpoint": checkpoint, "max_length": 40}, added)
    assert (made.batch_size, made.max_length, made.eot_token_id) == (4, 40, 256)
    for wrong, message in (({"batch_size": "auto"}, "batch_size='auto'"), ({"max_length": 49}, "max_length=49")):
        with pytest.raises(ConfigError, match=message):
            HarnessModel(checkpoint, device="cpu", **wrong)


def test_a_tokenizer_of_another_model_is_refused(loaded):
    from dataclasses import replace

    from sbn_lightning.checkpoints.text_files import TextFiles
    from sbn_lightning.evaluation.harness import HarnessModel

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["one more"])
    with pytest.raises(ConfigError, match="258 tokens, the model's vocab_size is 257"):
        HarnessModel(replace(loaded, text=TextFiles({"tokenizer.json": tokenizer.to_str()})))
