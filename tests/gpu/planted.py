"""Faults planted into PTX, and what has to notice them."""

from __future__ import annotations

import re
from typing import NamedTuple

from emulator.errors import Fault


class Planted(NamedTuple):
    """A change of a kernel's text that breaks it.

    Attributes:
        name: what was done.
        kernel: part of the name of the kernel that it is done to.
        pattern, replacement: as of `re.sub`, over the kernel's text.
        noticed: what the machine must raise; None = the results must differ from the right ones.
        count: occurrences that are replaced; 0 = all; negative = the last ones alone.
    """

    name: str
    kernel: str
    pattern: str
    replacement: str
    noticed: type[Fault] | None
    count: int = 0

    def edit(self, text: str) -> str:
        """The broken text; that of other kernels unchanged."""
        found = re.search(rf"\.entry\s+\w*{self.kernel}.*?^\}}", text, re.MULTILINE | re.DOTALL)
        if found is None:
            return text
        own = found[0]
        places = list(re.finditer(self.pattern, own, re.MULTILINE))
        assert places, f"{self.name}: there is nothing to change"
        chosen = places[self.count :] if self.count < 0 else places[: self.count or None]
        for place in reversed(chosen):
            own = own[: place.start()] + place.expand(self.replacement) + own[place.end() :]
        return text[: found.start()] + own + text[found.end() :]
