"""One colour and one marker per implementation, in every figure of every run.

Both follow from the name alone, so a figure of last month and one of today can be laid side by side and no list of
implementations has to be kept. Two names that fall on the same colour differ by their marker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

# Paul Tol's "muted" scheme and Okabe and Ito's, which are told apart with every common colour vision deficiency, then
# more of the same lightness: as many as there are backends to show. Where two come close, the markers differ.
COLOURS = (
    "#332288", "#44AA99", "#117733", "#999933", "#D55E00", "#CC6677", "#882255", "#AA4499",
    "#0072B2", "#E69F00", "#56B4E9", "#000000", "#8C564B", "#7F7F7F", "#E31A1C", "#7CB518",
    "#F781BF", "#17BECF", "#6A3D9A", "#F0C808", "#4F6D7A", "#B8A1E0",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
# Chosen so that the usual backends have a colour each, and the fastest of them colours far apart.
SALT = "3935826"
APPROXIMATE = " (approximate)"
"""What a run's frame adds to the names of approximations."""
# Chosen so that those of this repository have colours of their own beside the backends they are compared with.
APPROXIMATE_SALT = "65951"


class Style(NamedTuple):
    colour: str
    marker: str

    @property
    def size(self) -> float:
        """Of the marker, in points; a star's points make it look smaller than it is."""
        return 8.0 if self.marker == "*" else 5.5


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each name. Only where two names fall on the same colour and marker does the later one in the
    alphabet move on to the next free marker; its colour stays."""
    found: dict[str, Style] = {}
    for name in sorted(set(names)):
        salt = APPROXIMATE_SALT if name.endswith(APPROXIMATE) else SALT
        draw = int.from_bytes(hashlib.sha256(f"{salt}{name}".encode()).digest()[:8])
        colour, start = COLOURS[draw % len(COLOURS)], draw // len(COLOURS)
        choices = [Style(colour, MARKERS[(start + step) % len(MARKERS)]) for step in range(len(MARKERS))]
        taken = set(found.values())
        found[name] = next((style for style in choices if style not in taken), choices[0])
    return found
