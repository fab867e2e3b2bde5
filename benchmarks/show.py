"""A table in the terminal: with rich where it is installed, else in plain text."""

import sys


def table(title, head, rows, right=()):
    """rows of strings under `head`; the columns named in `right` are numbers."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        print(title)
        for line in (head, *rows):
            cells = (c.rjust(w) if h in right else c.ljust(w) for h, c, w in zip(head, line, widths, strict=True))
            print("  ".join(cells).rstrip())
        return
    drawn, natural = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False), 0
    for name, *cells in zip(head, *rows, strict=True):
        drawn.add_column(escape(name), justify="right" if name in right else "left", overflow="fold")
        natural += max(map(len, [name, *cells])) + 3
    for line in rows:
        drawn.add_row(*map(escape, line))
    Console(width=None if sys.stdout.isatty() else max(natural, len(title))).print(drawn)
