"""A little SVG: a card that is readable on light and dark pages, and shapes on it."""

from __future__ import annotations

from xml.sax.saxutils import escape

INK, PALE = "#1f2430", "#6b7280"
BLUE, ORANGE, GREEN, GREY = "#3559c7", "#b45309", "#2f855a", "#d5d9e2"


class Card:
    """A drawing on a white card.

    Attributes:
        width: In pixels.
        height: In pixels.

    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height = width, height
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'role="img" font-family="system-ui, sans-serif" font-size="13">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        ]

    def box(
        self, x: float, y: float, width: float, height: float, color: str, text: str
    ) -> None:
        """A filled box with one line of text in its middle."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" '
            f'fill="{color}"/>'
        )
        dark = color != GREY
        self.text(
            x + width / 2,
            y + height / 2 + 4.5,
            text,
            "#ffffff" if dark else INK,
            "middle",
        )

    def text(
        self, x: float, y: float, text: str, color: str = INK, anchor: str = "start"
    ) -> None:
        """One line; ``anchor`` as SVG has it."""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{color}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )

    def path(self, points: list[tuple[float, float]], color: str, width: float) -> None:
        """A polyline."""
        steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(
            f'<polyline points="{steps}" fill="none" stroke="{color}" '
            f'stroke-width="{width:g}" stroke-linejoin="round"/>'
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """A line with a head, along an axis."""
        self.path([(x, y), (to_x, to_y)], PALE, 1.5)
        along = 6 if to_x + to_y > x + y else -6
        if y == to_y:
            head = [(to_x - along, y - 4), (to_x, y), (to_x - along, y + 4)]
        else:
            head = [(x - 4, to_y - along), (x, to_y), (x + 4, to_y - along)]
        self.path(head, PALE, 1.5)

    def __str__(self) -> str:
        return "\n".join([*self._parts, "</svg>", ""])
