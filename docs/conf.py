"""Sphinx configuration of the website (`make site`).

MyST reads the Markdown pages of docs/. Sphinx warns of broken links and anchors, and of pages that are in no menu. The
theme furo loads nothing from other hosts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pygments.lexers.special import TextLexer
from sphinx.addnodes import pending_xref

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx

project = "stable-audio-serve"
extensions = ["myst_parser"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "stable-audio-serve"
html_copy_source = False
html_use_index = False
html_show_copyright = False
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}


def _leave_folders_unlinked(app: Sphinx, document: nodes.document) -> None:
    """Replace links to folders of the repository by their text, because the site has no folders."""
    for link in list(document.findall(pending_xref)):
        if link["reftype"] == "myst" and (Path(app.env.doc2path(link["refdoc"])).parent / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def setup(app: Sphinx) -> None:
    """Sphinx calls this function to let the configuration register handlers and lexers."""
    app.connect("doctree-read", _leave_folders_unlinked)
    app.add_lexer("caddy", TextLexer)  # Pygments has no lexer for Caddy
