"""``python -m ichigo_jax`` lists every command that there is."""

import subprocess
import sys
from pathlib import Path

from ichigo_jax.__main__ import commands

ROOT = Path(__file__).parents[2]


def test_every_command_is_listed_with_what_it_does():
    listed = subprocess.run([sys.executable, "-m", "ichigo_jax"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert listed.stderr == ""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, description in commands().items():
        assert f"  {name} " in listed.stdout and len(description) > 20 and description in listed.stdout
        assert f"python -m ichigo_jax.{name} " in readme, "README's table has every command"
    assert {"train", "tokenize", "transcribe", "generate", "evaluate", "plan", "synthesize"} <= commands().keys()
