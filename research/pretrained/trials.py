"""What the study compares: each trial is one training, and differs from its neighbours in one thing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

# A trial of this many tokens chooses learning rates and losses for the long ones.
SHORT = 1_500_000
# About the mean magnitude of a weight in the blocks of SmolLM2-135M.
MEAN_WEIGHT = 0.145


@dataclass(frozen=True)
class Trial:
    """One training.

    Args:
        name: The name of the trial.
        tokens: The number of tokens to train on. 0 only measures the model as it is at the start.
        pattern: The pattern N:M of ternary and masked layers.
        linear: The kind of the blocks' linear layers.
        start: ``"weights"`` starts from the published weights, ``"random"`` from new ones.
        distillation: The options of a distillation, without the teacher; None trains on the text alone.
        lr: The peak learning rate of the matrices in the blocks.
        other_lr: The peak learning rate of the embedding and the norms.
        relative: Whether ``lr`` is a share of the mean magnitude of each layer's weight at the start of training.
        weight_decay: The weight decay of the matrices in the blocks.
        warmup: The share of training in which the learning rate rises; it rises for 50 steps at most.
        rounding: The share of training at which everything is rounded; 0 rounds from the first step.
        ramp: The shares of training at which masks begin and at which they have the pattern, in steps of one weight a
            group. None has the pattern from the first step.
        masked_decay: The decay of masked weights, which falls to zero over the first half of training.
        sub_norms: Whether norms are inserted before the output and the down projection.
        learnable_scales: Whether gamma of each matrix has a factor that is trained, at the rate of the matrices.
        activation_bits: The bits of a rounded token; None leaves tokens as they are.
        layers: The fields of the rules for layers of another kind.
        untied: Noise on the first weights of the masked layers, as a share of each matrix's standard deviation.
        seed: The seed of new weights, of noise on the first weights and of the choice of text.
        probed: Whether the probes are asked at the end.
    """

    name: str
    tokens: int
    pattern: str = "6:8"
    linear: Literal["ternary", "masked", "dense"] = "ternary"
    start: Literal["weights", "random"] = "weights"
    distillation: dict[str, Any] | None = None
    lr: float = 1e-3
    other_lr: float = 1e-3
    relative: bool = False
    weight_decay: float = 0.0
    warmup: float = 0.05
    rounding: float = 0.0
    ramp: tuple[float, float] | None = None
    masked_decay: float = 0.0
    sub_norms: bool = False
    learnable_scales: bool = False
    activation_bits: int | None = 8
    layers: list[dict[str, Any]] = field(default_factory=list)
    untied: float = 0.0
    seed: int = 1
    probed: bool = True

    @property
    def folder(self) -> str:
        """The name of the trial's folder."""
        return self.name.replace(" ", "_").replace(":", "of")


# Noise that makes equal weights different. In a file of 4 bits a weight, many weights of a group have equal magnitudes,
# and without noise the first step decides the masks of all these groups.
UNTIED = 0.01
LOGITS = {"logits": 1.0}
BOTH = {"logits": 1.0, "language_model": 0.5}
# From whom a student learns: the text, the teacher, or the teacher and half as much the text.
WAYS: dict[str, dict[str, Any] | None] = {"plain": None, "distilled": LOGITS, "both": BOTH}


def untrained() -> list[Trial]:
    """Return the models as they are before any training: the dense one, and its conversions."""
    return [
        Trial("dense", 0, linear="dense"),
        *(Trial(f"masked {p}", 0, p, "masked") for p in ("6:8", "2:4")),
        *(Trial(f"ternary {p}", 0, p) for p in ("8:8", "6:8", "2:4")),
    ]


def short(tokens: int = SHORT) -> list[Trial]:
    """Return the trials that choose the learning rate, the losses and the way of rounding."""
    plain = Trial("plain", tokens)
    distilled = replace(plain, distillation=LOGITS)
    ways = [
        ("distilled", distilled, 0.3, 1e-3), ("plain", plain, 0.3, 1e-3), ("distilled", distilled, 0.6, 1e-3),
        ("plain", plain, 0.6, 1e-3), ("distilled", distilled, 0.6, 3e-3), ("distilled", distilled, 0.3, 3e-4),
    ]  # fmt: skip
    return [
        replace(trial, name=f"short {way} rounding {end} lr {lr:g}", rounding=end, lr=lr, probed=False)
        for way, trial, end, lr in ways
    ]


def without_warmup(tokens: int = SHORT) -> list[Trial]:
    """Return the short trials that round from the first step; all but one, which has the shortest warm-up."""
    plain = Trial("plain", tokens)
    distilled = replace(plain, distillation=LOGITS)
    both = replace(plain, distillation=BOTH)
    trials = [
        replace(distilled, name="distilled lr 0.003", lr=3e-3),
        replace(plain, name="plain lr 0.003", lr=3e-3),
        replace(distilled, name="distilled lr 0.01", lr=1e-2),
        replace(plain, name="plain lr 0.01", lr=1e-2),
        replace(plain, name="plain lr 0.001", lr=1e-3),
        replace(both, name="distilled and text lr 0.003", lr=3e-3),
        replace(distilled, name="distilled rounding 0.3 lr 0.003", lr=3e-3, rounding=0.3),
        replace(distilled, name="distilled sub_norms lr 0.003", lr=3e-3, sub_norms=True),
        replace(distilled, name="distilled hidden lr 0.003", lr=3e-3, distillation={"logits": 1.0, "hidden": 1.0}),
    ]
    return [replace(trial, name=f"short {trial.name}", probed=False) for trial in trials]


def long(tokens: int, done: Sequence[dict[str, Any]]) -> list[Trial]:
    """Return the trials of the comparison in the order of their value, with what was best in the short ones.

    Args:
        tokens: The number of tokens of each trial.
        done: The last row of each short trial.
    """
    start = Trial("start", tokens, lr=1e-3, rounding=0.3)
    ways = {
        "distilled": best(done, "short distilled") or replace(start, distillation=LOGITS),
        "plain": best(done, "short plain") or start,
        "scratch": Trial("scratch", tokens, lr=2e-3, start="random", weight_decay=0.1),
    }
    order = [
        ("distilled", "6:8", 1), ("plain", "6:8", 1), ("distilled", "2:4", 1), ("plain", "2:4", 1),
        ("distilled", "8:8", 1), ("scratch", "6:8", 1), ("distilled", "6:8", 2), ("plain", "6:8", 2),
        ("plain", "8:8", 1),
    ]  # fmt: skip
    trials = [
        replace(ways[way], name=f"{way} {p} seed {seed}", tokens=tokens, pattern=p, seed=seed, probed=True)
        for way, p, seed in order
    ]
    trials.append(Trial("dense fine-tuned", tokens, linear="dense", lr=3e-4, other_lr=3e-4))
    distilled = replace(ways["distilled"], tokens=tokens, probed=True)
    # The decay of an optimiser step at the peak was 0.08 in the study of sparse pretraining.
    decay = 0.08 / (distilled.lr * (MEAN_WEIGHT if distilled.relative else 1.0))
    trials.append(replace(distilled, name="distilled 2:4 decay", pattern="2:4", masked_decay=decay))
    both = {**(distilled.distillation or LOGITS), "language_model": 0.5}
    trials.append(replace(distilled, name="distilled and text 6:8", pattern="6:8", distillation=both))
    return trials


def lengthy(longest: int, tokens: int) -> list[Trial]:
    """Return the long comparison in the order of its value.

    Text alone has its best rate of the short trials, 1e-3; the others have 3e-3.

    Args:
        longest: The number of tokens of the two most important trials.
        tokens: The number of tokens of the others.
    """
    both = Trial("both", tokens, distillation=BOTH, lr=3e-3, rounding=0.6)
    plain = Trial("plain", tokens, lr=1e-3, rounding=0.6)
    dense = Trial("dense", tokens, linear="dense", lr=3e-4, other_lr=3e-4)
    # What is left unrounded shows why copying is lost.
    attention = [{"match": "*.attention.*", "linear": "dense"}]
    trials = [
        replace(both, pattern="2:4", tokens=longest),
        replace(both, pattern="8:8", tokens=longest),
        replace(both, pattern="2:4"),
        replace(both, pattern="8:8"),
        replace(both, pattern="6:8"),
        dense,
        replace(both, name="both, learnable scales", pattern="2:4", learnable_scales=True),
        replace(plain, pattern="2:4"),
        replace(plain, pattern="6:8"),
        replace(both, name="both, attention dense", pattern="2:4", layers=attention),
        replace(both, name="both, tokens not rounded", pattern="2:4", activation_bits=None),
        replace(both, pattern="2:4", seed=2),
        replace(both, pattern="8:8", seed=2),
        replace(both, pattern="2:4", seed=3),
        replace(both, pattern="8:8", seed=3),
        replace(plain, name="plain at 3e-3", pattern="2:4", lr=3e-3),
        replace(both, name="both, hidden", pattern="2:4", distillation={**BOTH, "hidden": 1.0}),
        replace(both, name="both, sub_norms", pattern="2:4", sub_norms=True),
        replace(both, name="both, untied", pattern="2:4", untied=UNTIED),
        replace(
            both, name="both, untied, relations", pattern="2:4", untied=UNTIED, distillation=BOTH | {"relations": 1.0}
        ),
    ]
    named = [
        replace(trial, name=f"{trial.tokens // 1_000_000}M {trial.name} {trial.pattern} seed {trial.seed}")
        for trial in trials
    ]
    return list({trial.name: trial for trial in named}.values())


def options(tokens: int, longer: int | None = None) -> list[Trial]:
    """Return the comparison of the options with a growing rounding, in the order of its value.

    The first trials have the recipe's options, with and without learned scales. The next ones add one option to learned
    scales, or to the recipe's options. At 3 million tokens and 3e-3, 8 of 16 trials had a loss above 4 after the first
    million, and ended above 3. So the last trials have a slow start: the learning rate rises for a quarter of training.
    The teacher itself is asked for its answers to the tasks.

    Args:
        tokens: The number of tokens of each trial.
        longer: The number of tokens of two more trials, with and without learned scales. None leaves them out.
    """
    both = Trial("both", tokens, "2:4", distillation=BOTH, lr=3e-3, rounding=0.6, probed=False)
    scales = replace(both, name="both, learnable scales", learnable_scales=True)
    twice = [] if longer is None else [replace(trial, tokens=longer) for trial in (scales, both)]
    losses: dict[str, dict[str, Any]] = {
        "hidden": {"hidden": 1.0}, "relations": {"relations": 1.0}, "reverse": {"divergence": "reverse"},
        "temperature 2": {"temperature": 2.0}, "top 16": {"top_k": 16},
    }  # fmt: skip
    trials = [
        scales,
        both,
        *twice,
        replace(both, name="both at 1e-3", lr=1e-3),
        replace(scales, name=f"{scales.name}, at 1e-3", lr=1e-3),
        replace(scales, seed=2),
        *(replace(scales, name=f"{scales.name}, {name}", distillation=BOTH | more) for name, more in losses.items()),
        replace(scales, name=f"{scales.name}, sub_norms", sub_norms=True),
        replace(scales, name=f"{scales.name}, ternary first", rounding=0.4, ramp=(0.4, 0.6)),
        replace(scales, name="text alone, learnable scales", distillation=None),
        replace(scales, seed=3),
        replace(both, seed=2),
        replace(both, name="both, sub_norms", sub_norms=True),
        replace(both, name="both, ternary first", rounding=0.4, ramp=(0.4, 0.6)),
        replace(both, name="text alone at 3e-3", distillation=None),
        replace(both, name="text alone at 1e-3", distillation=None, lr=1e-3),
        *slow_starts(both, losses),
        *(replace(both, name="both, untied", untied=UNTIED, seed=seed) for seed in (1, 2, 3, 4)),
    ]
    named = [
        replace(trial, name=f"{trial.tokens / 1e6:g}M {trial.name} {trial.pattern} seed {trial.seed}")
        for trial in trials
    ]
    return [*named, Trial("dense", 0, linear="dense")]


def slow_starts(both: Trial, losses: dict[str, dict[str, Any]]) -> list[Trial]:
    """Return the options again, one at a time, with a learning rate that rises for a quarter of training.

    Args:
        both: The trial with the recipe's options.
        losses: The options of the distillation to try, by name.
    """
    slow = replace(both, name=f"{both.name}, slow start", warmup=0.25)
    scales = replace(slow, name=f"{slow.name}, learnable scales", learnable_scales=True)
    options = {
        name: replace(slow, name=f"{slow.name}, {name}", distillation=BOTH | more) for name, more in losses.items()
    }
    text = replace(slow, name="text alone, slow start", distillation=None)
    first = [slow, scales, options["relations"]]
    return [
        slow,
        replace(slow, seed=2),
        scales,
        replace(scales, seed=2),
        options["relations"],
        replace(options["relations"], seed=2),
        options["top 16"],
        text,
        *(trial for name, trial in options.items() if name not in ("relations", "top 16")),
        replace(slow, name=f"{slow.name}, sub_norms", sub_norms=True),
        *(replace(trial, seed=3) for trial in first),
    ]


def best(rows: Iterable[dict[str, Any]], prefix: str) -> Trial | None:
    """Return the trial with the lowest loss among finished ones whose name starts with ``prefix``; None if none is."""
    fitting = [row for row in rows if row["trial"]["name"].startswith(prefix) and row["finished"]]
    return Trial(**min(fitting, key=lambda row: row["loss"])["trial"]) if fitting else None
