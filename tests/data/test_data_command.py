"""``sbn prepare`` as it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from sbn_lightning.cli import main
from tests.data.helpers import write_corpus


@pytest.mark.parametrize("overwrite", [["--overwrite"], ["--overwrite", "true"], ["--overwrite=true"]])
def test_overwrite_alone_is_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str], overwrite: list[str]) -> None:
    corpus = write_corpus(tmp_path / "in", files=5)
    words = ["prepare", "--input", str(corpus), "--output", str(tmp_path / "out"), "--tokenizer", "byte"]
    assert main([*words, "--num_workers", "1"]) == 0
    assert main([*words, "--val_fraction", "0.4"]) == 1
    assert "other inputs or options; pass --overwrite to replace it" in capsys.readouterr().err
    assert main([*words, "--val_fraction", "0.4", "--overwrite", "false"]) == 1
    assert main([*words[:3], *overwrite, *words[3:], "--val_fraction", "0.4"]) == 0
