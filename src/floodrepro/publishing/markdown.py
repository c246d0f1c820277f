"""Figures and tables as a card shows them."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ("", "")) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def figure(value: str | float | int | None) -> str:
    """A figure to four significant digits, or four decimals from 1 on; a dash for none."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) >= 0.1 or value == 0 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
