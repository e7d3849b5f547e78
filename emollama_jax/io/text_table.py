"""Tables of plain text."""

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]], *, left: bool = False) -> list[str]:
    """One line a row: columns two spaces apart, the first flush left, the others flush right, or all flush `left`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        pad = str.ljust if left else str.rjust
        cells = [first.ljust(widths[0]), *(pad(cell, width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
