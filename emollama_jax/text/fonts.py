"""The fonts in which matplotlib draws a text."""

DEFAULT_FONT = "DejaVu Sans"  # comes with matplotlib


def find_fonts(text: str) -> list[str] | None:
    """Find installed fonts that draw a text together, the default one first; None where none does."""
    from matplotlib import font_manager

    missing = lambda path, wanted: {c for c in wanted if not font_manager.get_font(path).get_char_index(ord(c))}
    left = missing(font_manager.findfont(DEFAULT_FONT), set(text))
    if not left:
        return [DEFAULT_FONT]
    others = sorted((font.name, font.fname) for font in font_manager.fontManager.ttflist)
    fits = (name for name, path in others if not name.startswith("Last Resort") and not missing(path, left))
    return [DEFAULT_FONT, found] if (found := next(fits, None)) else None
