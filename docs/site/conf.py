"""How sphinx builds the pages that stage.py has laid out."""

import jaxalign

project = "jaxalign"
author = "The jaxalign authors"
release = version = jaxalign.__version__
html_title = f"jaxalign {release}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]

# ---- Markdown: links and anchors as a code host has them -----------------------------
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
highlight_language = "none"
smartquotes_action = "D"  # dashes alone: quotes in texts are those of gin and Python

# ---- Docstrings: Google's style, one backtick is code --------------------------------
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autoclass_content = "class"
autodoc_class_signature = "mixed"

# ---- Looks ---------------------------------------------------------------------------
html_theme = "sphinx_book_theme"
html_theme_options = {"show_toc_level": 2, "use_download_button": False}
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_last_updated_fmt = ""


def setup(app):
    from pygments.lexers.python import PythonLexer

    app.add_lexer("gin", PythonLexer)
    app.connect("autodoc-process-signature", without_a_constructor)


def without_a_constructor(app, what, name, obj, options, signature, returned):
    """A protocol is called by nobody."""
    if what == "class" and getattr(obj, "_is_protocol", False):
        return "", returned
    return signature, returned
