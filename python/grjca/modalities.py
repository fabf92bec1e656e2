"""Modalities of an experiment and the widths of their features."""

from __future__ import annotations

import re
from collections.abc import Mapping

from grjca.errors import UserError

MODALITIES = ("visual", "audio")
"""Modalities of the authors' experiment, of synthetic data, and of the face and voice networks."""
WIDTHS = {"visual": 512, "audio": 128}
"""Default modalities and the widths of their features."""
CHANNELS = {"visual": (512, 512, 256, 256)}
"""Default channels of encoders that differ from :data:`PLAIN_CHANNELS`."""
PLAIN_CHANNELS = (128, 128, 128, 128)
RESERVED = ("label", "mask", "length", "index")
"""Names in a window that cannot be modalities."""


def modalities_of(option: str, value: Mapping[str, int] | str) -> dict[str, int]:
    """Parse names and widths from a mapping or from text such as "visual:512, audio:128".

    Raises:
        UserError: for anything else; the message names ``option``.
    """
    pairs = [part.split(":") for part in value.split(",")] if isinstance(value, str) else list(value.items())
    widths: dict[str, int] = {}
    for pair in pairs:
        name, width = (str(pair[0]).strip(), str(pair[-1]).strip())
        usable = re.fullmatch("[a-z][a-z0-9_]{0,30}", name) and name not in (*RESERVED, *widths)
        if len(pair) != 2 or not usable or not re.fullmatch("[1-9][0-9]{0,8}", width):
            raise UserError(
                f"--{option}: expected names of small letters, each once, with the widths of their features, as in "
                f"visual:512, audio:128; got {value!r}."
            )
        widths[name] = int(width)
    if not 2 <= len(widths) <= 4:
        raise UserError(f"--{option}: expected two to four modalities, got {len(widths)}.")
    return widths
