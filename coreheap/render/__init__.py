"""One report, many renderings: text for a terminal, a JSON document, rows for pipelines.

Knows: how a value is shown. Does not know: how any value came about; nothing here reads a core.

Import the module of the rendering you need; only the terminal ones import rich, so the others start quickly.
"""
