"""The text files of a model: its tokenizer, its chat template, and the tokens at which a text ends.

A Hugging Face folder keeps these files beside the weights, and so does a packed folder. A checkpoint is one file, so it
holds their contents by name under :data:`KEY`: a run that is moved to another machine still finds its tokenizer. Every
reader of a model returns a :class:`TextFiles`, and every writer writes one, so that nothing is lost on the way.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbn_lightning.checkpoints.tokenizers import TOKENIZER, beside, data_folders_of_run
from sbn_lightning.core.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KEY = "text_files"  # The entry of a checkpoint that holds the files.
CONFIG = "config.json"  # Only the token ids in this file are stored. The rest describes the weights.
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
# What a folder may hold beside the tokenizer.
TOKENIZER_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", GENERATION, CHAT_TEMPLATE)
NAMES = (TOKENIZER, *TOKENIZER_FILES)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class TextFiles:
    """The contents of a model's text files.

    Attributes:
        contents: The text of each file by its name, one of :data:`NAMES`. ``config.json`` holds only the ids of the
            tokens that begin, end and pad a text.
        source: The file that the tokenizer was read from, for messages; None without a tokenizer.
    """

    contents: Mapping[str, str] = field(default_factory=dict)
    source: Path | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, without the truncation and padding that its file may ask for; None if there is none.

        Raises:
            DataError: If the file is not a tokenizer.
        """
        if TOKENIZER not in self.contents:
            return None
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(self.contents[TOKENIZER])
        except Exception as error:  # The library raises bare Exception for every malformed file.
            reason = str(error).splitlines()[0]
            raise DataError(f"{self.source} is not a Hugging Face tokenizer.json: {reason}") from error
        # Truncation and padding make batches of one length. Here they would cut prompts, or fill them up.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @property
    def token_ids(self) -> dict[str, Any]:
        """What ``config.json`` says of :data:`TOKEN_IDS`: an id, or a list of ids for ``eos_token_id``."""
        return self._json(CONFIG)

    @property
    def generation(self) -> dict[str, Any]:
        """``generation_config.json``; empty if the model has none."""
        return self._json(GENERATION)

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        """``tokenizer_config.json``; empty if the model has none."""
        return self._json(TOKENIZER_CONFIG)

    @property
    def stop_ids(self) -> list[int]:
        """The ids of the tokens that end a text. As in transformers, the generation config comes before the config."""
        found = self._id("eos_token_id")
        return [] if found is None else [found] if isinstance(found, int) else list(found)

    @property
    def bos_id(self) -> int | None:
        """The id of the token that begins a text, if the model has one."""
        found: int | None = self._id("bos_token_id")
        return found

    @property
    def pad_id(self) -> int | None:
        """The id of the token that fills up a batch, if the model has one."""
        found: int | None = self._id("pad_token_id")
        return found

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of a chat, if the model has one."""
        if CHAT_TEMPLATE in self.contents:
            return self.contents[CHAT_TEMPLATE]
        found = self.tokenizer_config.get("chat_template")
        if isinstance(found, list):  # The model has several templates, each with a name.
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            found = named.get("default")
        return found if isinstance(found, str) else None

    def ending_with(self, eos_id: int) -> TextFiles:
        """These files, with one more token that ends a text."""
        if eos_id in self.stop_ids:
            return self
        ids: list[int] = [*self.stop_ids, eos_id]
        changed = {CONFIG: json.dumps(self.token_ids | {"eos_token_id": ids if len(ids) > 1 else eos_id})}
        if "eos_token_id" in self.generation:
            changed[GENERATION] = json.dumps(self.generation | {"eos_token_id": ids}, indent=2)
        return replace(self, contents={**self.contents, **changed})

    def write(self, folder: Path) -> None:
        """Write the files into a folder, except for ``config.json``: each format has its own.

        Raises:
            OSError: If a file cannot be written.
        """
        for name, text in self.contents.items():
            if name != CONFIG:
                (folder / name).write_bytes(text.encode("utf-8"))

    def _id(self, name: str) -> Any:
        found = self.generation.get(name)
        return self.token_ids.get(name) if found is None else found

    def _json(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads(self.contents.get(name, "{}"))
        except ValueError as error:
            raise DataError(f"the model's {name} is damaged: {error}") from error
        return values if isinstance(values, dict) else {}


def text_of_run(carried: TextFiles, data: Any) -> TextFiles:
    """The text files to save with the checkpoints of a run.

    Args:
        carried: The files that came with the weights that the run started from; empty in a run from scratch.
        data: The data of the run. The tokenizer of prepared tokens is saved if none came with the weights, and the
            token that ends their documents ends a text.

    Returns:
        The files; ``carried`` where the data have no tokenizer, or their tokenizer cannot be read.
    """
    try:
        eos_id = getattr(data, "eos_id", None)
        if eos_id is None:
            return carried
        if TOKENIZER not in carried.contents and (tokenizer := getattr(data, "tokenizer", None)) is not None:
            carried = replace(carried, contents={**carried.contents, TOKENIZER: tokenizer.to_str(pretty=True)})
        return carried.ending_with(eos_id)
    except DataError as error:  # A bad tokenizer must not make a save fail.
        warnings.warn(f"checkpoints are saved without a tokenizer: {error}", stacklevel=2)
        return carried


def only_token_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a ``config.json`` that say which tokens begin, end and pad a text."""
    return {name: values[name] for name in TOKEN_IDS if values.get(name) is not None}


def read_folder(folder: Path, token_ids: Mapping[str, Any] | None = None) -> TextFiles:
    """Read the text files of a folder.

    Args:
        folder: The folder.
        token_ids: The ids that the folder's ``config.json`` holds; see :func:`only_token_ids`.

    Raises:
        DataError: If a file cannot be read, or is not UTF-8.
    """
    contents = {name: _text(folder / name) for name in NAMES if (folder / name).is_file()}
    if token_ids:
        contents[CONFIG] = json.dumps(dict(token_ids))
    return TextFiles(contents, folder / TOKENIZER if TOKENIZER in contents else None)


def find_text_files(model: Path, own: TextFiles, given: str | Path | None) -> TextFiles:
    """The text files of a model: what the user gave, what the model carries, or what lies near its checkpoint.

    A checkpoint of version 0.1 carries no files. Its tokenizer is looked for beside the checkpoint
    (``NAME.tokenizer.json``), in its folder, and in the prepared data that the run's ``config.yaml`` names.

    Args:
        model: The checkpoint file, or the folder of the model.
        own: The files that the model carries.
        given: A ``tokenizer.json``, or a folder with one, that the user named.

    Raises:
        DataError: If ``given`` is not a tokenizer, or a tokenizer that was found is damaged.
    """
    if given is not None:
        file = Path(given)
        file = file / TOKENIZER if file.is_dir() else file
        if not file.is_file():
            raise DataError(f"no tokenizer at {file}; give a tokenizer.json, or a folder written by `prepare`")
        # The ids and the template of another tokenizer would not fit this one.
        neighbours = read_folder(file.parent) if file.name == TOKENIZER else TextFiles()
        return TextFiles({**neighbours.contents, TOKENIZER: _text(file)}, file)
    if TOKENIZER in own.contents or model.is_dir():
        return own
    candidates = [beside(model), model.parent / TOKENIZER]
    for folder in (model.parent, model.parent.parent):
        candidates += [data / TOKENIZER for data in data_folders_of_run(folder / "config.yaml")]
    for candidate in candidates:
        if candidate.is_file():
            return TextFiles({**own.contents, TOKENIZER: _text(candidate)}, candidate)
    return own


def find_tokenizer(model: Path, given: str | Path | None) -> tuple[Path | None, Tokenizer | None]:
    """The file and the tokenizer that :func:`find_text_files` finds for a model that carries no files."""
    text = find_text_files(model, read_folder(model) if model.is_dir() else TextFiles(), given)
    return text.source, text.tokenizer


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is damaged: it is not UTF-8") from error
