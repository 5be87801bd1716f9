"""The search for a run's newest state, on folders of small files."""

import os
from pathlib import Path

import pytest
import torch

from sbn_lightning.checkpoints.resume import newest_state
from sbn_lightning.checkpoints.search import Place, locate, newest_first, newest_run, steps_done
from sbn_lightning.core.errors import ConfigError, DataError

NOW = 1_700_000_000


def save(path, step, age=0, saves_to=None):
    """Write the parts of a checkpoint that the search reads. ``age`` is in seconds before ``NOW``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    callbacks = {"ModelCheckpoint{}": {"dirpath": str(saves_to)}} if saves_to else {}
    contents = {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "optimizer_states": [], "global_step": step}
    torch.save(contents | {"callbacks": callbacks}, path)
    os.utime(path, (NOW - age, NOW - age))
    return path


def continued(place, **options):
    lines = []
    found = newest_state(place, lines.append, **options)
    return (found.path if found else None), lines


@pytest.mark.parametrize("version", ["version_3", "job7", "2026-11-28"])
def test_versions_of_any_name(version):
    last = save(f"logs/v/{version}/checkpoints/last.ckpt", 10)
    assert continued(Place(Path("logs/v"))) == (last, [])
    assert continued(Place(Path("logs/v"), version)) == (last, [])


def test_a_given_version_is_that_one_and_what_is_passed_over_is_named():
    old = save("logs/v/job7/checkpoints/last.ckpt", 10)
    path, (line,) = continued(Place(Path("logs/v"), "job8"))
    assert path is None
    assert "no checkpoint in logs/v/job8/checkpoints yet, training starts anew" in line
    assert f"passed over {old.parent} (another folder than" in line
    new = save("logs/v/job8/checkpoints/last.ckpt", 2, age=100)
    assert continued(Place(Path("logs/v"), "job8")) == (new, [])
    assert continued(Place(Path("logs/v"))) == (old, [])  # the newest file


def test_metric_names_with_slashes_make_sub_folders():
    folder = Path("logs/m/version_0/checkpoints")
    save(folder / "step=5-val/loss=5.43.ckpt", 5, age=60)
    best = save(folder / "step=10-val/loss=5.43.ckpt", 10)
    assert continued(Place(Path("logs/m"))) == (best, [])
    last = folder / "last.ckpt"
    last.write_bytes(b"cut")
    path, (line,) = continued(Place(Path("logs/m")))
    assert path == best
    assert line.endswith(f"(kept as last.ckpt.damaged); continuing from {best}")
    for given in ("logs", "logs/m", "logs/m/version_0", folder, best.parent, best):
        assert locate(given) == best


def test_a_folder_of_checkpoints_that_the_recipe_gives():
    fixed = save("new/step=3.ckpt", 3)
    save("logs/v/version_0/checkpoints/last.ckpt", 10)
    assert continued(Place(Path("logs/v"), fixed=Path("new"))) == (fixed, [])
    fixed.unlink()
    path, (line,) = continued(Place(Path("logs/v"), fixed=Path("new")))
    assert path is None
    assert "passed over logs/v/version_0/checkpoints" in line


def test_slurm_checkpoints_belong_to_the_run_that_wrote_them():
    own, other = Path("logs/B/version_2/checkpoints"), Path("logs/A/version_0/checkpoints")
    foreign = save("hpc_ckpt_2.ckpt", 90, saves_to=other)
    path, (line,) = continued(Place(Path("logs/B")))
    assert path is None
    assert f"passed over {foreign} (of the run that saves to {other})" in line
    mine = save("hpc_ckpt_1.ckpt", 7, saves_to=own.resolve())
    assert continued(Place(Path("logs/B"))) == (mine, [])
    assert continued(Place(Path("logs/B"), "version_1"))[0] is None
    newer = save(own / "last.ckpt", 8, age=-10)
    assert continued(Place(Path("logs/B"))) == (newer, [])
    older = save(own / "last.ckpt", 6, age=10)
    assert newest_first([mine, older]) == [mine, older]
    unknown = save("hpc_ckpt_3.ckpt", 1)
    assert f"{unknown} (of an unknown run)" in "".join(Place(Path("logs/C")).passed_over())


def test_the_file_that_was_written_last_is_the_newest_state():
    """The same holds if a run went back to an earlier step, or stopped saving ``last.ckpt``."""
    folder = Path("logs/v/version_0/checkpoints")
    far = save(folder / "step=10.ckpt", 10, age=60)
    back = save(folder / "last.ckpt", 6)
    assert newest_first([far, back]) == [back, far]
    later = save(folder / "step=12.ckpt", 12, age=-60)
    assert newest_first([far, back, later])[0] == later


def test_a_copy_that_shuffled_the_times_still_ends_with_the_last_checkpoint():
    folder = Path("logs/v/version_0/checkpoints")
    copied = [save(folder / "last.ckpt", 10, age=2), save(folder / "step=10.ckpt", 10, age=1)]
    copied.append(save(folder / "step=8.ckpt", 8))
    assert newest_first(copied)[0].name == "last.ckpt"


def test_the_newest_run_is_the_one_that_saved_last():
    save("logs/v/version_1/checkpoints/last.ckpt", 5, age=100)
    resumed = save("logs/v/version_0/checkpoints/last.ckpt", 50)
    assert newest_run(Place(Path("logs/v")).runs()) == resumed.parent


def test_what_an_earlier_release_left_elsewhere_is_named():
    left = save("~/lg/v/version_0/checkpoints/last.ckpt", 5)
    path, (line,) = continued(Place(Path("home/lg/v"), formerly=Path("~/lg/v")))
    assert path is None
    assert f"passed over {left.parent}" in line


def test_nothing_to_read_is_an_error_without_training():
    with pytest.raises(ConfigError, match=r"no checkpoint in logs/v/\*/checkpoints"):
        continued(Place(Path("logs/v")), training=False)


def test_half_written_and_damaged_files_are_named():
    folder = Path("logs/v/version_0/checkpoints")
    folder.mkdir(parents=True)
    for name in ("last.ckpt.123.tmp", "last.ckpt.damaged"):
        (folder / name).touch()
    _, (line,) = continued(Place(Path("logs/v")))
    assert "last.ckpt.123.tmp (only half written)" in line
    assert "last.ckpt.damaged (put aside as damaged)" in line


def test_a_reader_passes_over_what_is_damaged_and_touches_nothing():
    good = save("logs/v/version_0/checkpoints/step=4.ckpt", 4, age=9)
    bad = Path("logs/v/version_0/checkpoints/last.ckpt")
    bad.write_bytes(b"")
    told = []
    assert locate("logs/v", told.append) == good
    assert told == [f"{bad} is empty; looking for an older state of the run"]
    assert bad.exists()
    good.unlink()
    assert locate("logs/v", told.append) == bad  # the function that reads the file reports what is wrong


def test_a_folder_of_several_runs_is_refused_with_their_names():
    for name in "AB":
        save(f"logs/{name}/version_0/checkpoints/last.ckpt", 1)
    with pytest.raises(DataError, match=r"logs holds several runs: give one of logs/A, logs/B"):
        locate("logs")
    Path("none").mkdir()
    with pytest.raises(DataError, match="none holds no checkpoint"):
        locate("none")
    assert locate("nowhere") == Path("nowhere")  # the function that reads the file reports that the file is missing


def test_steps_of_a_file_that_cannot_be_read():
    Path("bad.ckpt").write_bytes(b"PK")
    assert steps_done(Path("bad.ckpt")) is None


def test_a_folder_of_shards_that_was_never_complete_is_no_checkpoint(tmp_path):
    """A run that was killed while its first checkpoint was written starts anew with the same command."""
    folder, lines = tmp_path / "run" / "version_0" / "checkpoints", []
    (folder / "step=1.ckpt").mkdir(parents=True)
    (folder / "step=1.ckpt" / "__0_0.distcp").write_bytes(b"half")
    assert newest_state(Place(tmp_path / "run"), lines.append) is None
    assert "training starts anew" in lines[0]
    assert lines[0].endswith("passed over " + str(folder / "step=1.ckpt") + " (only half written)")
    with pytest.raises(DataError, match="is not complete"):
        newest_state(Place(tmp_path / "run"), lines.append, training=False)
    (folder / "last.ckpt").write_bytes(b"")  # A file was whole once.
    with pytest.raises(DataError, match=r"step=1.ckpt is not complete .*delete them to start anew"):
        newest_state(Place(tmp_path / "run"), lines.append)
