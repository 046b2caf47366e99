"""Codebooks of speech tokenizers: grown by noisy copies before a training with more codes, merged after it.

The release made its 2560 codes this way: 512 codes were grown to 2048, trained on, and the first 512 put back behind them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from converters import engine, foreign
from converters.quantizer import USAGE
from converters.speech_tokenizer import KIND, read_folder
from ichigo_jax.errors import InputError
from ichigo_jax.models.speech_tokenizer import SpeechTokenizerConfig
from ichigo_jax.storage import atomic_write, read_json
from ichigo_jax.storage.model_folder import TOKENIZER_FOLDER, fingerprint, save_model

CODEBOOK = ("quantizer", "vq", "codebook")
EMBED, SIZE, AVERAGE = ((*CODEBOOK, name) for name in ("embed", "cluster_size", "embed_avg"))


def grow(source: Path, target: Path, copies: int, noise: float, seed: int) -> SpeechTokenizerConfig:
    """Writes a speech tokenizer with ``copies`` times as many codes.

    The first copy is exact; to each number of the others normal noise is added, and they are normalised again. The mask code
    comes last. A code's moving averages are divided among its copies, which will share its vectors.

    Args:
      source: a model folder.
      target: must not exist.
      copies: how often each code is there afterwards.
      noise: standard deviation; codes are unit vectors.
      seed: of the noise.

    Returns:
      The new config.

    Raises:
      InputError: a source that has no codebook, or fewer than two copies.
    """
    if copies < 2 or noise <= 0:
        raise InputError(f"--copies {copies} --noise {noise} found, expected at least 2 copies and noise above 0")
    config, state = _read(source)
    old = config.quantizer
    codes = np.setdiff1d(np.arange(old.codes), [] if old.mask_code is None else [old.mask_code])
    mask = np.setdiff1d(np.arange(old.codes), codes)

    random = np.random.default_rng(seed)
    embed, average = state[EMBED][:, codes], state[AVERAGE][:, codes] / copies
    lengths = np.linalg.norm(average, axis=-1, keepdims=True)
    embeds, averages = [embed], [average]
    for _ in range(copies - 1):
        shift = random.normal(scale=noise, size=embed.shape)
        moved = embed + shift
        embeds.append(moved / np.linalg.norm(moved, axis=-1, keepdims=True))
        averages.append(average + lengths * shift)
    sizes = [state[SIZE][:, codes] / copies] * copies
    grown = {
        EMBED: np.concatenate([*embeds, state[EMBED][:, mask]], axis=1),
        AVERAGE: np.concatenate([*averages, state[AVERAGE][:, mask]], axis=1),
        SIZE: np.concatenate([*sizes, state[SIZE][:, mask]], axis=1),
    }
    vq_codes = copies * len(codes)
    fields = {"vq_codes": vq_codes, "mask_code": None if old.mask_code is None else vq_codes}
    origin = {"made_by": "grow-codebook", "copies": copies, "noise": noise, "seed": seed}
    return _save(source, target, config, state, grown, fields, origin)


def merge(first: Path, second: Path, target: Path) -> SpeechTokenizerConfig:
    """Writes ``first`` with the codes of ``second`` behind its own.

    The mask code stays the first's, at its index; the second's is left out. Everything but the codes is the first's.

    Args:
      first: a model folder.
      second: a model folder; its codebooks must be of the same width and as many.
      target: must not exist.

    Returns:
      The new config.

    Raises:
      InputError: codebooks that do not fit together.
    """
    config, state = _read(first)
    other_config, other = _read(second)
    ours, theirs = config.quantizer, other_config.quantizer
    for name in ("codebook_dim", "num_quantizers"):
        if getattr(ours, name) != getattr(theirs, name):
            raise InputError(f"{second}: {name} {getattr(theirs, name)} found, expected {getattr(ours, name)}, as in {first}")
    codes = np.setdiff1d(np.arange(theirs.codes), [] if theirs.mask_code is None else [theirs.mask_code])
    merged = {path: np.concatenate([state[path], other[path][:, codes]], axis=1) for path in (EMBED, SIZE, AVERAGE)}
    origin = {"made_by": "merge-codebooks", "second": second.resolve().name}
    return _save(first, target, config, state, merged, {"vq_codes": ours.vq_codes + len(codes)}, origin)


def _read(source: Path) -> tuple[SpeechTokenizerConfig, dict[engine.Path, np.ndarray]]:
    config, state = read_folder(source)
    if config.quantizer.fsq_levels is not None:
        raise InputError(f"{source}: finite scalar quantisation found, expected a codebook")
    return config, state


def _save(
    source: Path,
    target: Path,
    config: SpeechTokenizerConfig,
    state: Mapping[engine.Path, np.ndarray],
    codebook: Mapping[engine.Path, np.ndarray],
    fields: Mapping[str, Any],
    origin: Mapping[str, Any],
) -> SpeechTokenizerConfig:
    """A copy of ``source`` with other codes."""
    config = dataclasses.replace(config, quantizer=dataclasses.replace(config.quantizer, **fields))
    state = {**state, **{path: array.astype(state[path].dtype) for path, array in codebook.items()}}
    provenance = {**origin, "source": source.resolve().name, "fingerprint": fingerprint(unflatten_dict(state))}
    provenance["source_fingerprint"] = read_json(source / "provenance.json").get("fingerprint")
    kept = foreign.read_tensors(source)
    if USAGE in kept:  # counted the codes of the last batch; there are others now
        kept[USAGE] = np.zeros(config.quantizer.codes, kept[USAGE].dtype)
    text = source / TOKENIZER_FOLDER
    with atomic_write(target) as partial:
        save_model(partial, KIND, config, unflatten_dict(state), provenance, text if text.is_dir() else None)
        foreign.write(partial, foreign.read_sections(source), kept)
    return config
