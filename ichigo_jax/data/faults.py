"""What a data set holds that cannot be used: recorded, skipped, never fatal and never silent."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path

from ichigo_jax.errors import writing


class FaultLog:
    """Remembers the clips or rows that could not be used, each once, as JSON lines; reading goes on without them.

    Args:
      path: the file, to which a resumed run adds what is new; None: nothing is written.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._lock = threading.Lock()
        self._seen = _places(path) if path is not None and path.exists() else set()

    def __call__(self, where: str, fault: str) -> None:
        with self._lock:
            if where not in self._seen:
                self._seen.add(where)
                if self.path is not None:
                    with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"path": where, "error": fault}) + "\n")


def _places(path: Path) -> set[str]:
    places = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a run that was killed may leave half a line
            places.add(json.loads(line)["path"])
    return places
