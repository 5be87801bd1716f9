"""The small corpus, written and prepared once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.helpers import prepare_small, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The corpus, prepared with the byte tokenizer in several shards. Do not change this folder: copy it."""
    output = tmp_path_factory.mktemp("prepared") / "bytes"
    prepare_small(corpus, output)
    return output
