"""Sphinx settings; build with `make docs`."""

from cribsheet import __version__

project = "cribsheet"
author = "the cribsheet contributors"
copyright = "the cribsheet contributors, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "cribsheet"
html_static_path = ["_static"]
html_css_files = ["lines.css"]
html_show_sourcelink = False

# what is copied is what is typed: no prompts, and nothing of what is printed
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_line_continuation_character = "\\"
copybutton_selector = "div.highlight:not(.highlight-text *) pre"  # not on what a block printed

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]

default_role = "code"  # the docstrings mark code with single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
