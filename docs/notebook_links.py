"""Links of notebooks: a link to a Markdown file or a notebook leads to its page of the site.

mkdocs rewrites the links of Markdown pages only. A notebook's links name files, so that they work in the repository as
well.
"""

import posixpath
import re
from typing import Any

LINK = re.compile(r'href="([^":#]+\.(?:md|ipynb))')


def on_page_content(html: str, *, page: Any, files: Any, **kwargs: Any) -> str:
    """Rewrites the links of one notebook. mkdocs calls this function for each page."""
    name = page.file.src_uri
    if not name.endswith(".ipynb"):
        return html

    def to_page(match: re.Match[str]) -> str:
        file = files.get_file_from_path(posixpath.normpath(posixpath.join(posixpath.dirname(name), match[1])))
        return f'href="{file.url_relative_to(page.file)}' if file else match[0]

    return LINK.sub(to_page, html)
