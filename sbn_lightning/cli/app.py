"""Find the command that the user typed, run it, and print errors in one line.

Commands that train go to a LightningCLI. The others are plain functions whose signature and docstring make their
command line; they must not wait for Lightning's import, so nothing heavy is imported here.
"""

from __future__ import annotations

import codecs
import errno
import inspect
import json
import os
import re
import select
import sys
from collections.abc import Collection
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from traceback import format_exception
from types import TracebackType

from sbn_lightning.core.errors import SBNError
from sbn_lightning.core.files import expanded

TRAINING = {
    "fit": "train a model",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "predict": "log-likelihoods of the prediction split's tokens, for a prediction writer among the callbacks",
    "fabric": "train a model in a loop on Lightning Fabric, from the same recipe",
}
TOOLS = {
    "prepare": ("sbn_lightning.data.tokenization.prepare", "prepare", "turn text into tokenised litdata shards"),
    "teacher-logits": (
        "sbn_lightning.cli.teacher_logits",
        "teacher_logits",
        "store a teacher's likely next tokens with the text",
    ),
    "import-hf": ("sbn_lightning.cli.import_hf", "import_hf", "start from a Hugging Face model"),
    "export": ("sbn_lightning.cli.export", "export", "write a model to run elsewhere, or packed"),
    "generate": ("sbn_lightning.cli.generate", "generate_text", "continue prompts with a trained model"),
    "chat": ("sbn_lightning.cli.chat", "chat", "talk with a chat model in the terminal"),
    "evaluate": ("sbn_lightning.cli.evaluate", "evaluate", "perplexity, sparsity report, lm-eval tasks"),
    "probe": ("sbn_lightning.cli.probe", "probe", "copying, induction, sums, rare identifiers, with their noise"),
    "inspect": ("sbn_lightning.cli.inspect", "inspect", "what a conversion does to a model, by part and by block"),
    "consolidate": (
        "sbn_lightning.checkpoints.sharded",
        "consolidate",
        "a sharded checkpoint, which is a folder, as one file",
    ),
    "recipes": ("sbn_lightning.cli.recipes", "recipes", "list the recipes of the package, or copy one to edit"),
    "env": ("sbn_lightning.cli.env", "env", "what a bug report needs: versions, GPU, which kernels run here"),
    "reproduce": ("research.reproduce.command", "reproduce", "run a grid of trainings: the paper's claims"),
    "reproduce-corpus": ("research.reproduce.corpus", "reproduce_corpus", "this machine's Python files as text"),
    "reproduce-report": ("research.reproduce.command", "reproduce_report", "tables and plots of its results"),
}

# The options of tools whose values are paths. A shell replaces ~ and $VARIABLE in some places only: bash leaves
# --output=~/tokens as it is, and nothing is replaced in quotes.
PATHS = {
    "checkpoint",
    "data",
    "folders",
    "grid",
    "images",
    "input",
    "output",
    "prompts_file",
    "results",
    "tasks_folder",
    "template",
    "text",
    "tokenizer",
}


def usage() -> str:
    """The overview that ``--help`` prints."""
    commands = TRAINING | {name: text for name, (_, _, text) in TOOLS.items()}
    lines = [f"  {name:<16} {text}" for name, text in commands.items()]
    return "\n".join(
        [
            "usage: sbn COMMAND [options]",
            "",
            *lines,
            "",
            "sbn COMMAND --help lists a command's options.",
            "For example: sbn fit --config sparse_pretrain",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the program's name. None takes the arguments of the process.

    Returns:
        The exit status: 0; 1 after an error that was printed in one line; 130 after Ctrl-C. ``SBN_DEBUG=1`` prints the
        traceback of such an error.
    """
    if argv is None:
        argv = sys.argv[1:]
        sys.excepthook = print_without_secrets
        escape_what_cannot_be_printed()
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"sbn_lightning {version('sbn-lightning')}")
        return 0
    command, rest = argv[0], argv[1:]
    # This must be set before torch is imported. Threads that spin at barriers starve each other where cores are shared.
    # On two busy cores a training step took 3 times as long as with threads that sleep, and a token 4 to 8 times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if command in TOOLS:
            _run_tool(command, rest)
        elif command in TRAINING:
            from sbn_lightning.cli.training import run

            run(argv)
        else:
            raise SBNError(f"no command {command!r}; there are {', '.join([*TRAINING, *TOOLS])}")
    except SBNError as error:
        if os.environ.get("SBN_DEBUG"):
            raise
        from sbn_lightning.cli.redaction import without_secrets

        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        goes_on = (
            "; --ckpt_path last continues from the last checkpoint, if there is one" if command in TRAINING else ""
        )
        print(f"interrupted{goes_on}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 1
    except OSError as error:
        # An error inside a training keeps its traceback, unless it is about a place that may not be written or read.
        is_refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        if (command in TRAINING and not is_refused) or error.filename is None or os.environ.get("SBN_DEBUG"):
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def escape_what_cannot_be_printed() -> None:
    r"""Make output in an encoding that lacks a character print an escape such as ``\u00e9`` in its place.

    The escapes are those of JSON, so that what a command prints as JSON stays JSON.
    """
    codecs.register_error("json-escape", _as_json_escapes)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="json-escape")


def _as_json_escapes(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{int.from_bytes(units[i : i + 2], 'big'):04x}" for i in range(0, len(units), 2)), error.end


def print_without_secrets(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an exception that nobody caught, without secrets: a message may quote a URL with its password."""
    from sbn_lightning.cli.redaction import without_secrets

    print(without_secrets("".join(format_exception(kind, error, traceback))), end="", file=sys.stderr)


def _reader_is_gone() -> bool:
    """Return whether nobody reads the output any more, as after ``| head``. Later output is then thrown away."""
    ends = select.poll()
    ends.register(sys.stdout, 0)  # With mask 0 poll reports errors only.
    gone = bool(ends.poll(0))
    if gone:  # Otherwise Python prints another error when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _run_tool(command: str, argv: list[str]) -> None:
    from jsonargparse import auto_cli

    from sbn_lightning.cli.parsing import OneLineErrors

    module, name, _ = TOOLS[command]
    if module.startswith("research."):
        _find_research(command)
    function = getattr(import_module(module), name)
    parameters = inspect.signature(function).parameters
    if [*parameters] == ["argv"]:  # The command parses its words itself, as `recipes copy NAME` does.
        function(argv)
        return
    kinds = {name: str(about.annotation) for name, about in parameters.items()}
    flags = {name for name, kind in kinds.items() if kind in ("bool", "<class 'bool'>")}
    words = _gather_lists(argv, {name: "list[" in kind for name, kind in kinds.items()}, flags)
    auto_cli(function, args=words, as_positional=False, prog=f"sbn {command}", parser_class=OneLineErrors)


def _find_research(command: str) -> None:
    """Make the folder ``research`` importable. The folder is part of the repository and not of the wheel."""
    root = Path(__file__).parents[2]
    if not (root / "research").is_dir():
        raise SBNError(
            f"{command} needs the folder research/ of the repository, which an installed package does not have: clone "
            "the repository, pip install -e it, and run the command there"
        )
    if str(root) not in sys.path:
        sys.path.append(str(root))


def _gather_lists(argv: list[str], takes_list: dict[str, bool], flags: Collection[str] = ()) -> list[str]:
    """Turn ``--input a b`` and ``--input a --input b`` into ``--input=["a", "b"]``, which jsonargparse reads as a list.

    A shell turns ``--input *.txt`` into the first form. An option that takes a list gets one for a single value too,
    because jsonargparse reads a bare value as YAML, and the prompt ``# sorts a list`` is a comment in YAML. Any other
    option gets its last value. ``~`` and ``$VARIABLE`` are replaced in paths.

    Args:
        argv: The arguments as typed.
        takes_list: Whether an option takes a list, by the option's name.
        flags: The names of the options that are true or false; such an option without a value is true.
    """
    gathered: dict[str, list[str]] = {}
    rest: list[str] = []
    values, is_list = rest, True
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            is_list = takes_list.get(name[2:], False)
            values = gathered.setdefault(name, [])
            if not is_list:
                values.clear()
            values += [value] if equals else []
        elif not values or (is_list and word != "-h"):
            values.append(word)
        else:
            rest.append(word)
    for name, values in gathered.items():
        if name[2:] in PATHS:
            values[:] = map(expanded, values)
        if not values and name[2:] in flags:
            values.append("true")
        # Name and value are joined with "=", because a value may begin with dashes.
        rest.append(f"{name}={_quoted(values) if takes_list.get(name[2:]) else values[0]}" if values else name)
    return rest


def _quoted(values: list[str]) -> str:
    """Return values as a JSON list that a YAML parser reads the same way. A single value may be a JSON list already.

    JSON can write one character as two escapes, and YAML cannot read that. YAML demands an escape for a character that
    cannot be printed.
    """
    if len(values) == 1 and values[0].startswith("["):
        with suppress(ValueError):
            values = json.loads(values[0])
    text = json.dumps(values, ensure_ascii=False)
    return re.sub("[\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]", lambda found: f"\\u{ord(found[0]):04x}", text)
