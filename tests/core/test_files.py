"""A file or folder is either complete or absent, whatever happens while it is written."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sbn_lightning.core import files


@pytest.fixture
def small_files() -> Iterator[None]:
    """Limit files to 10,000 bytes. Beyond that the system reports the error of a full disk."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with files.atomic_file(target) as aside:
        aside.write_text("half")
        assert not target.exists()
        aside.write_text("whole")
    assert target.read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    files.write_text(target, "old")

    def fail() -> None:
        with files.atomic_stream(target) as stream:
            stream.write(b"new")
            raise error

    with pytest.raises(error):
        fail()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.usefixtures("small_files")
def test_torch_save_tells_why_it_could_not_write(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large"), files.atomic_stream(tmp_path / "a.pt") as stream:
        torch.save(torch.zeros(100_000), stream)
    assert not os.listdir(tmp_path)


def test_an_error_that_is_not_the_disks_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="local"), files.atomic_stream(tmp_path / "a.pt") as stream:
        torch.save(lambda: None, stream)


def test_a_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    (tmp_path / "step.ckpt").write_text("step")
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "step.ckpt")
    files.write_text(tmp_path / "last.ckpt", "last")
    assert (tmp_path / "step.ckpt").read_text() == "step"
    assert (tmp_path / "last.ckpt").read_text() == "last"


def test_a_folder_takes_the_place_of_the_old_one_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for content in ("first", "second"):
        with files.atomic_folder(target) as aside:
            (aside / "sub").mkdir()
            (aside / "sub" / content).write_text(content)
    assert [path.name for path in (target / "sub").iterdir()] == ["second"]
    assert os.listdir(tmp_path) == ["out"]


def test_the_old_folder_gets_its_name_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    with files.atomic_folder(target) as aside:
        (aside / "a").write_text("old")
    original = Path.replace

    def interrupted(self: Path, to: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return original(self, to)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(target) as aside:
        (aside / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_leftovers_of_one_file_are_removed(tmp_path: Path) -> None:
    for name in ("a[1].ckpt.tmp", "a[1].ckpt.77.tmp", "a1.ckpt.77.tmp", "a[1].ckpt"):
        (tmp_path / name).touch()
    files.remove_leftovers(tmp_path / "a[1].ckpt")
    assert sorted(os.listdir(tmp_path)) == ["a1.ckpt.77.tmp", "a[1].ckpt"]
