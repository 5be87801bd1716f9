"""The command line: which command, and errors in one line.

Commands that train go to a LightningCLI. The others are plain functions whose signature and docstring make their
command line; they must not wait for Lightning's import, so nothing heavy is imported here.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module

from sbn_lightning.errors import SBNError

TRAINING = {
    "fit": "train a model",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "predict": "log-likelihoods of the prediction split's tokens",
    "fabric": "train a model in a loop on Lightning Fabric, from the same recipe",
}
TOOLS = {
    "prepare": ("sbn_lightning.data", "prepare", "turn text into tokenised litdata shards"),
}


def usage() -> str:
    """The overview that ``--help`` prints."""
    commands = TRAINING | {name: text for name, (_, _, text) in TOOLS.items()}
    lines = [f"  {name:<10} {text}" for name, text in commands.items()]
    return "\n".join(
        [
            "usage: sbn COMMAND [options]",
            "",
            *lines,
            "",
            "sbn COMMAND --help lists a command's options.",
            "For example: sbn fit --config recipes/sparse_pretrain.yaml",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments after the program's name; the process's own if None.

    Returns:
        The exit status: 0, or 1 after an error that was printed in one line. ``SBN_DEBUG=1`` prints the traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    command, rest = argv[0], argv[1:]
    try:
        if command in TOOLS:
            _run_tool(command, rest)
        elif command in TRAINING:
            # Before torch is imported. Threads that spin at barriers starve each other where cores are shared: on two
            # busy cores a training step took 3 times as long as with threads that sleep.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            from sbn_lightning.training_cli import run

            run(argv)
        else:
            raise SBNError(f"no command {command!r}; there are {', '.join([*TRAINING, *TOOLS])}")
    except SBNError as error:
        if os.environ.get("SBN_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run_tool(command: str, argv: list[str]) -> None:
    from jsonargparse import auto_cli

    from sbn_lightning.parsing import OneLineErrors

    module, name, _ = TOOLS[command]
    function = getattr(import_module(module), name)
    auto_cli(function, args=_gather_lists(argv), as_positional=False, prog=f"sbn {command}", parser_class=OneLineErrors)


def _gather_lists(argv: list[str]) -> list[str]:
    """``--input a b`` -> ``--input ["a", "b"]``: what a shell makes of ``*.txt``, as jsonargparse reads it."""
    gathered: list[str] = []
    values: list[str] = []
    for word in [*argv, "--"]:
        if not word.startswith("--"):
            values.append(word)
            continue
        gathered += [json.dumps(values)] if len(values) > 1 else values
        values = []
        gathered.append(word)
    return gathered[:-1]
