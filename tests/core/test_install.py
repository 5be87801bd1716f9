"""Nobody is told to install this package from an index: it is on none, and a stranger could register the name."""

import re
from pathlib import Path

import pytest

from sbn_lightning.core.install import how_to_install
from sbn_lightning.formats.huggingface.sbn import model_card

ROOT = Path(__file__).parents[2]
BY_NAME = re.compile(r"""pip install [^\n`]*?(?<![-\w/.])["']?sbn[-_]lightning(?!\.)(\[|["'`\s]|$)""")
CARD = {"architecture": "A", "modules": {"a": {"pattern": "2:4", "activation_bits": 8}}, "remark": None} | {
    "zeros": 0.5,
    "perplexity": None,
}


@pytest.mark.parametrize(
    "text", ['pip install "sbn-lightning[hf]"', "pip install sbn-lightning", "pip install -U sbn_lightning"]
)
def test_the_search_finds_what_it_is_for(text):
    assert BY_NAME.search(text)


def test_no_page_message_or_card_installs_the_package_by_its_name():
    folders = ("sbn_lightning", "kernels", "docs", "recipes", "examples", "research", "benchmarks")
    files = [
        file
        for folder in folders
        for file in (ROOT / folder).rglob("*")
        if file.suffix in {".py", ".md", ".yaml", ".ipynb"}
    ]
    files += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    assert len(files) > 300
    found = [str(file) for file in files if file.name != "LOG.md" and BY_NAME.search(file.read_text(encoding="utf-8"))]
    assert found == []
    assert "pip install" not in model_card(CARD)
    assert "from its own repository" in model_card(CARD)


def test_the_extras_that_messages_name_exist():
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", section, re.MULTILINE)
    named = set()
    for file in (*(ROOT / "sbn_lightning").rglob("*.py"), *(ROOT / "research").rglob("*.py")):
        named |= set(re.findall(r"how_to_install\(['\"](\w+)", file.read_text(encoding="utf-8")))
    assert {"hf", "eval", "export", "liger", "plots"} <= named <= set(extras)
    assert how_to_install("hf") == 'pip install -e ".[hf]" in a checkout of the repository'
