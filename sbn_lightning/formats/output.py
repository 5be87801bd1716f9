"""Check where an export or an import may write: to a free place, or in place of an earlier export."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.files import atomic_folder

# The names of the files that an export writes into a folder. A folder that holds any other file is never replaced.
EXPORTED = re.compile(
    r"(generation_|tokenizer_)?config\.json|tokenizer\.json|(special_tokens_map|added_tokens)\.json|"
    r"README\.md|chat_template\.jinja|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|model-(TQ[12]|Q[24])_0\.gguf"
)


def check_output(target: Path, overwrite: bool) -> None:
    """Check that ``target`` is free, or that it may be replaced.

    Args:
        target: The file or folder to write.
        overwrite: Whether the user allows to replace a file or an earlier export.

    Raises:
        ConfigError: If a file or an earlier export is there and ``overwrite`` is False, or if ``target`` is a folder
            that holds anything but an export.
    """
    names = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    if foreign := [name for name in names if not EXPORTED.fullmatch(name)]:
        raise ConfigError(f"{target} holds {foreign[0]}, which is no export's; give another --output")
    if (names or target.is_file()) and not overwrite:
        raise ConfigError(f"{target} is there already; give another --output, or --overwrite to replace it")


@contextmanager
def output_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder to write into; it becomes ``target`` when the block ends without an error.

    Raises:
        ConfigError: If :func:`check_output` refuses ``target``, or ``target`` is a file.
        DataError: If the folder cannot be written.
    """
    check_output(target, overwrite)
    if target.is_file():
        raise ConfigError(f"{target} is a file, where a folder would be written; give another --output")
    with write_errors_named(target), atomic_folder(target) as aside:
        yield aside


@contextmanager
def write_errors_named(target: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block into an error of one line. The block writes ``target`` as a whole.

    Raises:
        DataError: If the block raises ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}; nothing there was changed") from error
