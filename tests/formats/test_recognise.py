"""If a path holds no model, the error names what the path does hold."""

import json
import os

import pytest

from sbn_lightning.cli import main
from sbn_lightning.core.errors import DataError
from sbn_lightning.formats.load import load_model, read_config
from sbn_lightning.formats.recognise import recognise
from tests.formats.models import make_model, save

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def hf(folder, linear="dense", *more):
    save(make_model(linear=linear), folder.parent / "of.ckpt")
    arguments = ["--checkpoint", str(folder.parent / "of.ckpt"), "--output", str(folder)]
    assert main(["export", *arguments, "--format", "hf", *more]) == 0
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.ckpt", POINTER, r"model\.ckpt is a git-LFS pointer and not the file itself: run `git lfs pull`"),
        ("model.gguf", POINTER, r"model\.gguf is a git-LFS pointer"),
        ("model.safetensors", POINTER, r"model\.safetensors is a git-LFS pointer"),
        ("config.json", POINTER, r"config\.json is a git-LFS pointer"),
        ("config.json", "{", r"config\.json is damaged"),
        ("model.gguf", "GGUF and nothing", r"model\.gguf is damaged, or is not GGUF"),
        ("other.txt", "text", r"other\.txt is no checkpoint; give a \.ckpt"),
    ],
)
def test_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_model(tmp_path / name)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no model: neither a checkpoint nor config.json is there"),
        (["a.gguf", "b.gguf"], r"it has 2 GGUF files; give one of them, such as .*a\.gguf"),
        (["model.safetensors"], r"it has weights \(model\.safetensors\) and no config\.json"),
        (["a/version_0/checkpoints/last.ckpt", "b/job/checkpoints/last.ckpt"], "holds several runs: give one of .*b"),
        (["meta.json"], "it is a folder of prepared tokens"),
        (["inner/config.json"], "give the folder in it, .*inner"),
    ],
)
def test_folders(tmp_path, names, message):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("x")
    with pytest.raises(DataError, match=message):
        recognise(folder)


def test_a_run_is_searched_as_training_searches(tmp_path, capsys):
    """The version has a name of the user's, metrics make sub-folders, and the last checkpoint is damaged."""
    folder = tmp_path / "run" / "job7" / "checkpoints"
    for step in (5, 10):
        newest = folder / f"step={step}-val" / "loss=5.4.ckpt"
        newest.parent.mkdir(parents=True)
        save(make_model(), newest)
        os.utime(newest, (step, step))
    (folder / "last.ckpt").write_text("cut short")
    for place in (tmp_path / "run", folder.parent, folder):
        assert recognise(place) == ("lightning", newest)
        assert "last.ckpt is damaged" in capsys.readouterr().err
    assert load_model(tmp_path / "run").config == make_model().config
    capsys.readouterr()
    assert main(["export", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "packed")]) == 0
    assert capsys.readouterr().err.count("last.ckpt is damaged") == 1


def test_what_exists_is_never_said_not_to_exist(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("gone")
    for name, message in (("pipe", "is neither a file nor a folder"), ("link", "is a link to gone, which does not")):
        with pytest.raises(DataError, match=message):
            recognise(tmp_path / name)
    with pytest.raises(DataError, match=r"absent does not exist; give a \.ckpt"):
        recognise(tmp_path / "absent")


def test_a_file_of_a_folder_stands_for_the_folder(tmp_path):
    folder = hf(tmp_path / "hf")
    for name in ("config.json", "model.safetensors"):
        assert recognise(folder / name) == ("hf", folder)
        assert main(["import-hf", "--input", str(folder / name), "--output", f"{name}.ckpt"]) == 0


def test_parts_without_an_index(tmp_path, capsys):
    """All parts together are a model. The error names a missing part."""
    folder = hf(tmp_path / "hf")
    weights = folder / "model.safetensors"
    weights.rename(folder / "model-00001-of-00001.safetensors")
    assert load_model(folder).format == "hf"
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model-00003-of-00003.safetensors")
    with pytest.raises(DataError, match=r"has 1 of 3 parts of a model and no .*index\.json: part 1 is missing"):
        load_model(folder)
    (folder / "model-00003-of-00003.safetensors").rename(folder / "adapter.safetensors")
    with pytest.raises(DataError, match=r"adapter\.safetensors is not a name that transformers gives"):
        load_model(folder)
    (folder / "adapter.safetensors").rename(folder / "model.gguf")
    with pytest.raises(DataError, match=r"model\.gguf is a model by itself: give the file"):
        load_model(folder)


def test_a_pointer_in_the_place_of_weights(tmp_path):
    folder = hf(tmp_path / "hf")
    (folder / "model.safetensors").write_text(POINTER)
    with pytest.raises(DataError, match=r"model\.safetensors is a git-LFS pointer"):
        load_model(folder)


def test_another_type_of_model_is_pointed_to_the_callback(tmp_path, capsys):
    folder = hf(tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "gemma"}))
    assert main(["import-hf", "--input", str(folder), "--output", "m.ckpt"]) == 1
    assert "model_type 'gemma'" in (told := capsys.readouterr().err)
    assert "add the callback TernarySparseConversion" in told


@pytest.mark.parametrize("format", ["lightning", "packed", "hf-bitnet"])
def test_the_shape_is_read_without_the_weights(tmp_path, format):
    model = make_model(pattern="2:4")
    place = save(model, tmp_path / "m.ckpt")
    if format != "lightning":
        assert main(["export", "--checkpoint", str(place), "--output", "out", "--format", format]) == 0
        place = tmp_path / "out"
    found = read_config(place)
    assert recognise(place).format == format
    assert (found.d_model, found.pattern, found.linear) == (32, model.config.pattern, "ternary")
