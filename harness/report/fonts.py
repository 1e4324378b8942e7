"""Which names matplotlib can draw: fonts for scripts that its own has no letters of.

In: a name. Out: the name, or what stands for it. Invariants: two names that differ at their start or end stay two; nothing is drawn as empty boxes.
"""

from functools import cache

MAX_NAME = 60  # characters of a class's name in a plot
# With letters of Chinese, Japanese, Korean, Arabic, Hebrew, Devanagari, Thai, where they are installed; first come first served.
OTHER_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Source Han Sans", "WenQuanYi Micro Hei"),
    *("WenQuanYi Zen Hei", "Droid Sans Fallback", "IPAGothic", "IPAexGothic", "VL Gothic", "TakaoPGothic", "Unifont"),
    *("Hiragino Sans", "PingFang SC", "MS Gothic", "SimHei", "Malgun Gothic", "NanumGothic", "Arial Unicode MS"),
    *("Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Thai"),
)


@cache
def families() -> tuple[str, ...]:
    """Fonts for a figure: matplotlib's own, then what this machine has for other scripts."""
    from matplotlib import font_manager  # slow to import, used once a run

    installed = set(font_manager.get_font_names())
    return ("DejaVu Sans", *(name for name in OTHER_FONTS if name in installed))


@cache
def _letters() -> frozenset[int]:
    from matplotlib import font_manager

    files = [font_manager.findfont(name) for name in families()]
    return frozenset(code for file in files for code in font_manager.get_font(file).get_charmap())


def drawable(name: str, most: int = MAX_NAME) -> str:
    """A name as matplotlib draws it unchanged: what stands between two dollars would be a formula. Long ones lose their middle.

    A letter that no font here has is written as its number, as in Python.
    """
    half = (most - 3) // 2
    short = name if len(name) <= most else f"{name[:half]}...{name[-half:]}"
    known = short if short.isascii() else "".join(c if ord(c) in _letters() else _number(c) for c in short)
    return known.replace("$", r"\$")


def _number(letter: str) -> str:
    return letter.encode("ascii", errors="backslashreplace").decode()
