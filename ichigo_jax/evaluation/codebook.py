"""How evenly a codebook is used."""

from __future__ import annotations

import numpy as np


def codebook_statistics(counts: np.ndarray) -> dict[str, float]:
    """Share of codes in use, entropy in bits, and perplexity (2 to the entropy), from how often each code occurred.

    ``[5, 5, 0, 0]`` -> ``{"codes_used_fraction": 0.5, "codebook_entropy_bits": 1.0, "codebook_perplexity": 2.0}``.

    Args:
      counts: [C], the mask code left out.
    """
    counts = np.asarray(counts, np.float64)
    shares = counts[counts > 0] / max(counts.sum(), 1.0)
    entropy = float(-(shares * np.log2(shares)).sum())
    return {
        "codes_used_fraction": float((counts > 0).mean()),
        "codebook_entropy_bits": entropy,
        "codebook_perplexity": 2.0**entropy,
    }
