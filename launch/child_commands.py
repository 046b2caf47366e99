"""Commands that a launcher runs as child processes, after it has shown them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def command(module: str, *arguments: object) -> None:
    """Shows a command as a user would type it, and runs it from the repository; its failure ends this process too."""
    words = ["-m", module, *map(str, arguments)]
    print(f"$ python {shlex.join(words)}", flush=True)
    process = subprocess.Popen([sys.executable, *words], cwd=REPOSITORY)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the command got it too, and saves what it has
        code = process.wait()
        print("interrupted; the same command goes on from here")
    if code:
        sys.exit(code if code > 0 else 128 - code)
