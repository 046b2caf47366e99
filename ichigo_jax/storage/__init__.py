"""What is kept on disk: files that are written whole or not at all, JSON, model folders and their arrays."""

from ichigo_jax.storage.files import STANDARD_OUTPUT, atomic_write, check_output, is_stream, open_output, writing
from ichigo_jax.storage.json_files import json_lines, json_object, read_json, read_json_lines, write_json, write_json_line

__all__ = [
    "STANDARD_OUTPUT",
    "atomic_write",
    "check_output",
    "is_stream",
    "json_lines",
    "json_object",
    "open_output",
    "read_json",
    "read_json_lines",
    "write_json",
    "write_json_line",
    "writing",
]
