"""English and code for a small experiment, without a download: Python's own documentation as JSON lines.

The documents are the topics of the language reference (``pydoc_data.topics``) and the docstrings of each module of the
standard library. Python ships both, under the licence of the Python Software Foundation
(https://docs.python.org/3/license.html)::

    python examples/python_docs.py data/python_docs.jsonl
    python cli.py prepare --input data/python_docs.jsonl --text_key text --tokenizer bpe --output data/python_docs
"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def documents() -> Iterator[str]:
    """Yield the topics, and then the docstrings of one module after the other. No docstring comes twice."""
    yield from (text.strip() for _, text in sorted(topics.topics.items()))
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for file in sorted(library.rglob("*.py")):
        if SKIPPED & set(file.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # Some files of the library are broken on purpose.
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        new = list(dict.fromkeys(text for text in docstrings if text and len(text) > 80 and text not in seen))
        seen.update(new)
        if new:
            yield "\n\n".join(new)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/python_docs.py FILE.jsonl")
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    texts = list(documents())
    with target.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    print(f"{len(texts)} documents, {sum(map(len, texts)):,} characters written to {target}")


if __name__ == "__main__":
    main()
