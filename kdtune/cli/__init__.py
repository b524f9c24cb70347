"""The command line: one module per command, found by `main`. Nothing here imports torch; a recipe does."""
