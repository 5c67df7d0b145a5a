"""What the compiler does and how long it takes, through `logging` under the name ``hesscale_fx``.

``TORCH_LOGS=hesscale_fx`` shows it, as does any handler at level INFO.
"""

from __future__ import annotations

import logging
import time

log = logging.getLogger("hesscale_fx")


class Stages:
    """Times one stage after the other.

    Example:
        >>> stages = Stages()
        >>> stages.done("capture", "12 nodes")
    """

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()

    def done(self, stage: str, what: str = "") -> None:
        """Log a stage that ends now and began when the one before ended."""
        now = time.perf_counter()
        extra = f", {what}" if what else ""
        log.info("%s: %.2fs%s", stage, now - self._last, extra, stacklevel=2)
        self._last = now

    def total(self) -> None:
        """Log the sum."""
        log.info("total: %.2fs", time.perf_counter() - self._start, stacklevel=2)
