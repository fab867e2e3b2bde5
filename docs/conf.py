"""What Sphinx is told; tools/pages.py runs it."""

from pages import plain

import liger_aot

project = "liger-aot"
version = release = liger_aot.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = []
myst_heading_anchors = 3  # links to headings, as on the pages of a repository
default_role = "code"
smartquotes = False  # what stands here is code
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"liger-aot {version}"
html_show_copyright = False


def plain_text(app, what, name, obj, options, lines):
    lines[:] = plain(lines)


def setup(app):
    app.connect("autodoc-process-docstring", plain_text)
