"""Builds of jaxlib that compute wrong results on CPUs, and the flag that makes them right.

jaxlib 0.10.2 hands reductions to a library that drops elements of some, from 32,769 rows on (jax#39103), and that crashes on
some of rank 7 and more (jax#39257, jax#40412). Without that library, which a flag of XLA turns off, it is right. XLA reads its
flags when JAX first looks for devices, so this has to come before; it imports nothing, as ``import ichigo_jax`` must not.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys

WRONG_ON_CPUS = {"0.10.2": "jax#39103"}
FLAG = "--xla_cpu_experimental_ynn_fusion_type="


def avoid() -> str | None:
    """Sets the flag in this process's ``XLA_FLAGS`` where it is needed.

    Returns:
      What is wrong, in one line, where it is too late for that or where the user has set the flag to something else; else None.
    """
    try:
        version = importlib.metadata.version("jaxlib")
    except importlib.metadata.PackageNotFoundError:
        return None
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if version not in WRONG_ON_CPUS or (platforms and "cpu" not in platforms.split(",")):
        return None
    flags = os.environ.get("XLA_FLAGS", "")
    set_to = [flag.removeprefix(FLAG) for flag in flags.split() if flag.startswith(FLAG)]
    if set_to and not set_to[-1]:
        return None
    found = f"jaxlib {version} found, which computes wrong results on CPUs ({WRONG_ON_CPUS[version]})"
    if set_to:
        return f"{found} with XLA_FLAGS={FLAG}{set_to[-1]}; leave that flag out, or install another jaxlib"
    if _devices_are_known():
        return f"{found}, after JAX has started; set XLA_FLAGS={FLAG} before it does, or install another jaxlib"
    os.environ["XLA_FLAGS"] = f"{flags} {FLAG}".strip()
    return None


def _devices_are_known() -> bool:
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()
