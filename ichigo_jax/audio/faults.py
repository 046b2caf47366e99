"""What can be wrong with a clip: refused (``AudioError``) or used with a warning (``AudioWarning``)."""

from __future__ import annotations

from ichigo_jax.errors import InputError, InputWarning


class AudioError(InputError):
    """A clip that cannot be used; the message names it. Corpora record such a clip and skip it."""


class AudioWarning(InputWarning):
    """A clip that is used although something about it looks wrong; the message is one line and names it."""
