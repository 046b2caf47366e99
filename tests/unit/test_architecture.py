"""The direction of imports, and what must not be imported at all."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the bottom up; a package may import its own and those before it.
LAYERS = [
    {"errors", "arguments", "jaxlib_faults", "configuration", "storage", "vocab", "parallel"},
    {"audio", "text"},
    {"models"},
    {"decoding", "data", "synthesis"},
    {"inference", "evaluation"},
    {"training"},
    {"tasks"},
    {"train"},
    {"planning"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
COMMAND = len(LAYERS)


def imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


PACKAGE_FILES = sorted((ROOT / "ichigo_jax").rglob("*.py"))


@pytest.mark.parametrize("file", PACKAGE_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down(file):
    part = file.relative_to(ROOT / "ichigo_jax").with_suffix("").parts[0]
    level = LEVEL.get(part, COMMAND)
    for name in imports(file):
        package, _, rest = name.partition(".")
        assert package not in ("torch", "converters", "torchaudio"), f"{file} imports {name}"
        if part != "serving":
            assert package not in ("fastapi", "uvicorn", "gradio", "starlette"), f"{file} imports {name}"
        imported = rest.partition(".")[0]
        if package == "ichigo_jax" and imported in LEVEL:
            assert LEVEL[imported] <= level, f"{file} imports {name}, which lies above it"


@pytest.mark.parametrize("file", sorted((ROOT / "converters").rglob("*.py")), ids=lambda file: file.name)
def test_converters_use_models_and_what_lies_below(file):
    for name in imports(file):
        package, _, rest = name.partition(".")
        imported = rest.partition(".")[0]
        if package == "ichigo_jax" and imported:
            highest = "tasks" if file.name == "checkpoints.py" else "inference"  # a run's checkpoint is read by its task
            assert LEVEL.get(imported, COMMAND) <= LEVEL[highest], f"{file} imports {name}"


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, ichigo_jax; print([m for m in ('jax', 'flax', 'transformers', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_sound_tokens_are_spelled_in_one_place():
    for file in [*PACKAGE_FILES, *(ROOT / "converters").rglob("*.py")]:
        if file.name != "vocab.py":
            text = file.read_text(encoding="utf-8")
            assert "sound_{" not in text and "sound_%" not in text and "duration_{" not in text, file
