"""GGUF files, which llama.cpp runs."""

from pathlib import Path


def is_gguf(file: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    with open(file, "rb") as stream:
        return stream.read(4) == b"GGUF"
