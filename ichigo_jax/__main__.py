"""Lists the commands: ``python -m ichigo_jax``."""

from __future__ import annotations

import ast
from pathlib import Path


def commands() -> dict[str, str]:
    """Name of each command to the first line of its description."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        source = file.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' in source and file.name != "__main__.py":
            found[file.stem] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return found


def main() -> None:
    print("python -m ichigo_jax.COMMAND --help\n")
    for name, description in commands().items():
        print(f"  {name:22}{description}")
    print("\npython -m converters --help: foreign model formats to model folders and back")


if __name__ == "__main__":
    main()
