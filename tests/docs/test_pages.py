"""Everything that README and documentation name exists: names, recipes, environment variables, commands."""

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import sbn_lightning
from sbn_lightning.cli.app import TOOLS, TRAINING

ROOT = Path(__file__).parents[2]
# An entry of the log may name what existed only when the entry was written.
PAGES = [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "LOG.md")]
HOSTS = ("torchao", "transformers", "vllm")  # hosts of integrations, which need not be installed
SOURCES = [path for folder in ("sbn_lightning", "kernels/sbn_kernels") for path in (ROOT / folder).rglob("*.py")]


def blocks(page, *languages):
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
    return [text for language, text in found if language in languages]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_on_a_page_imports_names_that_exist(page):
    for block in blocks(page, "python"):
        code = re.sub(r"^\s+\.\.\.$", "", block, flags=re.M)  # "..." stands for what a page leaves out inside brackets
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("sbn_lightning", "sbn_kernels"):
                try:
                    module = import_module(node.module)
                except ModuleNotFoundError as error:
                    if error.name not in HOSTS:
                        raise
                    continue
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module} has no {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_command_on_a_page_exists(page):
    for block in blocks(page, "", "bash", "sh"):
        for command in re.findall(r"(?:^|\s)(?:sbn|cli\.py) ([a-z][\w-]*)", block):
            assert command in TOOLS or command in TRAINING, command


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_option_of_a_command_on_a_page_exists(page):
    inline = re.findall(r"`((?:sbn|python cli\.py) [^`]*)`", page.read_text())
    for text in [*blocks(page, "", "bash", "sh"), *inline]:
        for line in text.replace("\\\n", " ").splitlines():
            typed = re.search(r"(?:sbn|cli\.py) ([a-z][\w-]*)([^#|]*)", line)
            if typed is None or typed[1] not in TOOLS:
                continue  # The options of training commands are in no signature.
            module, function, _ = TOOLS[typed[1]]
            known = inspect.signature(getattr(import_module(module), function)).parameters
            for option in re.findall(r"\s--([\w-]+)", typed[2]):
                assert option in known or option == "help", line


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_on_a_page_exists(page):
    for block in blocks(page, "", "bash", "sh"):
        for config in re.findall(r"--config (?:recipes/)?([\w.]+_\w+?)(?:\.yaml)?(?=\s|$)", block):
            assert (ROOT / "recipes" / f"{config}.yaml").is_file(), config


def test_every_recipe_is_described():
    page = (ROOT / "docs" / "guides" / "recipes.md").read_text()
    assert all(f"`{path.stem}`" in page for path in (ROOT / "recipes").glob("*.yaml"))


def test_every_callback_is_described():
    guide, api = ((ROOT / "docs" / name).read_text() for name in ("guides/own_project.md", "api/callbacks.md"))
    callbacks = import_module("sbn_lightning.callbacks")
    gone = {"UnshardedAccumulation"}  # It does nothing any more.
    for name in set(callbacks.__all__) & set(sbn_lightning.__all__) - gone:
        assert f"::: sbn_lightning.callbacks.{name}\n" in api
        assert name in guide or name == "SparseWeightAveraging"  # the guide names only one of the two averaging classes


def test_every_environment_variable_is_described():
    page = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text()
    read = {
        name
        for path in SOURCES
        for name in re.findall(r"(?:environ(?:\.\w+)?|getenv)[(\[]\s*\"([A-Z_]+)\"", path.read_text())
    }
    assert "SBN_DEBUG" in read
    assert not [name for name in sorted(read) if f"`{name}" not in page]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 175


def test_benchmark_pages_are_those_of_the_csvs():
    command = [sys.executable, ROOT / "benchmarks" / "pages.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_page_of_the_simulator_is_what_the_simulator_says():
    command = [sys.executable, ROOT / "benchmarks" / "simulate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
