"""Configuration of the documentation: Sphinx reads this file."""

import inspect
import os
import re
import sys
import warnings
from importlib.metadata import version as installed_version
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.util import logging
from sphinx.util.inspect import stringify_signature

os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).parent))  # gallery_order

project = "curvlinops"
author = "the curvlinops authors"
copyright = "the curvlinops authors"
version = release = installed_version("curvlinops")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery/**/*.ipynb", "gallery/**/*.py", "gallery/**/*.zip"]

html_theme = "furo"
html_title = f"curvlinops {release}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_math_renderer = "mathml"
pygments_style = "friendly"
pygments_dark_style = "native"

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True}
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "within_subsection_order": "gallery_order.number_of",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "show_memory": False,
    "write_computation_times": False,
    "remove_config_comments": True,
}
# Matplotlib says so when plt.show() is called without a window; the gallery collects the figures by itself.
warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")


def changelog_to_rst(app, relative_path, parent_docname, content):
    """Translate the little Markdown that CHANGELOG.md uses (headings, code, links) when a page includes it."""
    if relative_path.suffix != ".md":
        return
    text = content[0]
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", text)
    text = re.sub(r"\[([^]]+)\]\(([^)]+)\)", r"`\1 <\2>`__", text)
    for level, underline in {"###": "~", "##": "-", "#": "="}.items():
        text = re.sub(rf"^{level} (.+)$", lambda m, u=underline: f"{m[1]}\n{u * len(m[1])}", text, flags=re.MULTILINE)
    content[0] = text


def visit_math(translator, node):
    """Write a formula as MathML, which browsers show on their own: pages need no script and no network."""
    as_block = isinstance(node, nodes.math_block)
    formula = node.astext()
    if r"\\" in formula:
        formula = rf"\begin{{aligned}}{formula}\end{{aligned}}"
    try:
        translator.body.append(latex2mathml.tex2mathml(formula, as_block=as_block))
    except (MathError, AttributeError) as error:
        logging.getLogger(__name__).warning("formula %r: %s", formula, error, location=node)
    raise nodes.SkipNode


def signature_of_init(app, what, name, obj, options, signature, return_annotation):
    """Show a class with the arguments of its ``__init__``; autodoc would take those of an inherited ``__new__``."""
    if what == "class" and inspect.isfunction(obj.__init__):
        _, *arguments = inspect.signature(obj.__init__).parameters.values()
        signature = stringify_signature(inspect.Signature(arguments), show_annotation=False)
    return signature, return_annotation


def setup(app):
    """Connect the three."""
    app.connect("autodoc-process-signature", signature_of_init)
    app.connect("include-read", changelog_to_rst)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
