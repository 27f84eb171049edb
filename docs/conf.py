"""Sphinx: `python -m sphinx -W -n -b html docs docs/_build/html`, and `-b doctest` for the examples."""

import importlib.util
import logging
import sys
from pathlib import Path

import torch
from docutils import nodes
from latex2mathml.converter import convert
from matplotlib import pyplot as plt

import rim_rnn

sys.path.insert(0, str(Path(__file__).parent))
import reliability

project = "rim-rnn"
author = "The rim-rnn authors"
copyright = f"2026, {author}"
release = version = rim_rnn.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinx_llms_txt",
]
exclude_patterns = ["_build"]
nitpicky = True
suppress_warnings = ["config.cache"]  # the gallery is given a function

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# The inventories come from the sites. Without network the plain-text ones beside this file, which hold only the names that
# these pages use, stand in for them: the pages build offline too, and an unknown name is still an error.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", (None, "inventories/python.txt")),
    "torch": ("https://docs.pytorch.org/docs/stable", (None, "inventories/torch.txt")),
}
intersphinx_timeout = 5


def plain(gallery_conf, fname):
    """Before each script of the gallery: pictures for a light and for a dark ground, and one thread, as for small layers."""
    ink = "#7d8590"
    edges = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    plt.rcParams.update({"savefig.transparent": True, "legend.framealpha": 0, **dict.fromkeys(edges, ink)})
    torch.set_num_threads(1)


# A notebook begins with README's lines that install, so that it runs where it is opened.
readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
install = readme.split("<!-- install -->\n```sh\n")[1].split("```")[0]
NOTEBOOKS = "https://colab.research.google.com/github/rim-rnn/rim-rnn/blob/main/examples/gallery/notebooks"

needs = {"onnx_runtime": ("onnxruntime", "onnxscript"), "recurrent_policy": ("sb3_contrib",)}
missing = [script for script, names in needs.items() if not all(map(importlib.util.find_spec, names))]
for name in ("onnx_ir", "onnxscript"):
    logging.getLogger(name).setLevel(logging.WARNING)  # else they tell the console of each node that they change
sphinx_gallery_conf = {
    "examples_dirs": "../examples/gallery",
    "gallery_dirs": "gallery",
    "filename_pattern": rf"/(?!({'|'.join(missing)})\.py)\w+\.py$",  # which ones run
    "reset_modules": ("matplotlib", plain),
    "image_srcset": ["2x"],
    "capture_repr": (),
    "first_notebook_cell": "".join(f"%{line}" for line in install.splitlines(keepends=True)).rstrip(),
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "min_reported_time": 3600,
}

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # one signature, as on the pages of torch.nn, instead of one per overload
maximum_signature_line_length = 60
napoleon_attr_annotations = False
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = "rim-rnn"
html_baseurl = "https://rim-rnn.readthedocs.io/en/latest/"  # where llms.txt says that the pages are
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_logo = "_static/logo.svg"
html_favicon = "_static/logo.svg"
html_theme_options = {
    "source_repository": "https://github.com/rim-rnn/rim-rnn/",
    "source_branch": "main",
    "source_directory": "docs/",
}


def equation(translator, node):
    """MathML, which browsers draw by themselves: the pages load nothing from elsewhere, and open from a disk."""
    block = isinstance(node, nodes.math_block)
    latex = node.astext().replace("{aligned}", "{align*}")  # the converter has this name alone
    mathml = convert(latex, display="block" if block else "inline")
    if "<mi>&</mi>" in mathml:
        raise ValueError(f"latex2mathml does not know an environment of: {latex}")
    translator.body.append(f'<div class="math">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def setup(app):
    """Equations; tables that are made when a page is read, which is whenever pages are built; notebooks of gallery pages."""

    def read(app, page, source):
        source[0] = reliability.fill(source[0]) if page in reliability.PAGES else source[0]

    def link(app, page, template, context, doctree):
        if page.startswith("gallery/"):
            context["page_source_suffix"] = ""
            if (name := page.removeprefix("gallery/")) != "index" and "body" in context:
                opens = f'<p><a class="reference external" href="{NOTEBOOKS}/{name}.ipynb">Open as a notebook in Colab</a></p>'
                context["body"] = context["body"].replace("</h1>", f"</h1>\n{opens}", 1)

    app.add_html_math_renderer("mathml", (equation, None), (equation, None))
    app.connect("source-read", read)
    app.connect("html-page-context", link)
    app.connect("env-get-outdated", lambda *_: list(reliability.PAGES))
