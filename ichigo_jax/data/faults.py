"""What a data set holds that cannot be used: recorded, skipped, never fatal and never silent."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from ichigo_jax.errors import InputError
from ichigo_jax.storage import json_lines, json_object, writing


class FaultLog:
    """Remembers the clips or rows that could not be used, each once, as JSON lines; reading goes on without them.

    Args:
      path: the file, to which a resumed run adds what is new; None: nothing is written.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._lock = threading.Lock()
        written = path.read_bytes() if path is not None and path.exists() else b""
        self._seen = _places(written)
        self._half_a_line = bool(written) and not written.endswith(b"\n")  # a run was killed while it wrote

    def __call__(self, where: str, fault: str) -> None:
        with self._lock:
            if where not in self._seen:
                self._seen.add(where)
                if self.path is not None:
                    with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                        file.write("\n" * self._half_a_line + json.dumps({"path": where, "error": fault}) + "\n")
                    self._half_a_line = False


def _places(written: bytes) -> set[str]:
    places = set()
    for line in json_lines(written):
        try:
            row = json_object(line) or {}
        except InputError:
            continue
        if isinstance(row.get("path"), str):
            places.add(row["path"])
    return places
