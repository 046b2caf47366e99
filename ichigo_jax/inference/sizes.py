"""Sizes that batches are rounded up to, so that few programs are compiled."""


def power_of_two(size: int) -> int:
    """The next one: 5 -> 8, 8 -> 8."""
    return 1 << (size - 1).bit_length()
