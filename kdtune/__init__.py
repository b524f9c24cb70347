"""kdtune: single-file recipes for knowledge distillation of language models.

Dimension letters in comments and docstrings: `b` batch, `s` sequence, `t` labelled tokens, `d` model width,
`v` vocabulary, `h` heads, `n` head size.
"""

__version__ = "0.1.0"
