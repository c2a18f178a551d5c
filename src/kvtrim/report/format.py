"""Figures as people read them."""


def size(count: int | float | None) -> str:
    """Bytes: 22.7 MiB."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def seconds(value: float | None) -> str:
    """A duration: 8.31 s or 45.2 ms."""
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def ratio(value: float | None) -> str:
    """Relative to a reference: x0.51."""
    return "-" if value is None else f"x{value:.2f}"


def spread(value: float | None, limits: list[float] | None, scale: float = 1.0) -> str:
    """A median and, behind it, the least and the most: 45.2 (44.9 to 47.0)."""
    if value is None or limits is None:
        return "-"
    low, high = (scale * limit for limit in limits)
    return f"{_three(scale * value)} ({_three(low)} to {_three(high)})"


def _three(value: float) -> str:
    """Three digits, more before the point."""
    places = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{places + (abs(value) < 1)}f}"


def markdown(columns: list[tuple[str, str]], rows: list[list[str]]) -> str:
    """A Markdown table; each column is (heading, "left" or "right")."""
    rule = ["---:" if side == "right" else "---" for _, side in columns]
    lines = [[heading for heading, _ in columns], rule, *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"
