"""The language model's benchmark runs, on next to nothing, and counts as it says."""

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield importlib.import_module("language_model")


@pytest.mark.slow
def test_against_transformers(benchmark):
    pytest.importorskip("torch")
    tiny = dataclasses.replace(
        benchmark.small(),
        vocab_size=300,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    tables = benchmark.against_transformers(tiny, rows=8, length=16, prompt=6, answer=5, repeats=2)
    (training,), (decoding,) = tables["training"], tables["decoding"]
    assert training["largest_relative_difference_of_losses"] < 1e-4 and training["times_transformers"] > 0
    assert decoding["equal_answers"]
    exact, int8, *int4 = tables["quantized"]
    assert exact["relative_logit_error"] == 0 < int8["relative_logit_error"] < min(row["relative_logit_error"] for row in int4)
    assert exact["megabytes"] > int8["megabytes"] > max(row["megabytes"] for row in int4)


def test_rows_are_as_training_has_them(benchmark):
    rows = benchmark.rows_of(np.array([[5, 6, 7, 8, 9]], np.int32), (3, 2))
    assert {name: value.tolist() for name, value in rows.items()} == {
        "tokens": [[5, 6, 7, 8, 9]],
        "targets": [[6, 7, -100, 9, -100]],
        "positions": [[0, 1, 2, 0, 1]],
        "segment_ids": [[1, 1, 1, 2, 2]],
    }


def test_operations_are_counted_as_told(benchmark):
    """Llama 3.1 8B has 8,030,261,248 parameters, with its own 128,256 rows; 525,336,576 of them are looked up."""
    llama = dataclasses.replace(benchmark.llama_8b(32), vocab_size=128256)
    norms = 65 * 4096
    assert benchmark.weights_in_matrices(llama) == 8_030_261_248 - 525_336_576 - norms
    pairs = 3 * (2 * 3 // 2 + 4 * 5 // 2)
    expected = 6 * benchmark.weights_in_matrices(llama) * 3 * 6 + 12 * 32 * 4096 * pairs
    assert benchmark.step_flops(llama, (2, 4), rows=3) == expected
