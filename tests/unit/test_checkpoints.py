"""Checkpoints that are damaged, of another model, or on a full disk."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ichigo_jax.errors import InputError
from ichigo_jax.training import checkpoint
from ichigo_jax.training.checkpoint import Checkpoints, check_address
from ichigo_jax.training.state import TrainState

ROOT = Path(__file__).parents[2]


def state(step, size=4):
    params = {"layer": {"weight": jnp.full((size, 3), float(step))}}
    fields = {"step": jnp.int32(step), "params": params, "frozen": {}, "buffers": {"code": jnp.ones(2)}}
    fields["opt_state"] = optax.adam(1e-3).init(params)
    others = {name: jnp.zeros((), jnp.int32) for name in TrainState.__dataclass_fields__ if name not in fields}
    return TrainState(**fields, **others)


def target(size=4):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state(0, size))


def saved(folder, steps, kept=10, keep_every=0, best=None, metrics=()):
    checkpoints = Checkpoints(folder, kept, keep_every, best)
    for step in steps:
        checkpoints.save(state(step), step, {"sizes": [step]}, dict(metrics).get(step, {}))
    checkpoints.close()
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def resume(folder, size=4):
    checkpoints = Checkpoints(folder, 10, 0, None)
    try:
        return checkpoints.restore(target(size))
    finally:
        checkpoints.close()


def test_the_newest_is_taken_with_what_belongs_to_it(tmp_path):
    assert resume(tmp_path / "none") is None
    assert saved(tmp_path / "run", (2, 4)) == [2, 4]
    found = resume(tmp_path / "run")
    assert (found.step, found.data, int(found.state.step)) == (4, {"sizes": [4]}, 4)
    for one, other in zip(jax.tree.leaves(found.state), jax.tree.leaves(state(4))):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("best", "kept"), [("wer", [4, 10]), ("-wer", [2, 10]), (None, [10])])
def test_the_best_is_kept_beside_the_newest(tmp_path, best, kept):
    metrics = {2: {"wer": 0.9}, 4: {"wer": 0.1, "loss": 3}, 6: {"loss": 1}, 8: {"wer": np.float32(0.5)}}
    assert saved(tmp_path / "run", (2, 4, 6, 8, 10), kept=1, best=best, metrics=metrics) == kept
    assert resume(tmp_path / "run").step == 10


def test_the_newest_and_those_at_intervals_are_kept(tmp_path):
    assert saved(tmp_path, range(1, 9), kept=2, keep_every=3) == [3, 6, 7, 8]


def test_going_back_leaves_nothing_newer(tmp_path):
    saved(tmp_path / "run", (2, 4, 6, 8))
    checkpoints = Checkpoints(tmp_path / "run", 10, 0, None)
    assert checkpoints.go_back_to(1) is None and checkpoints.restore(target()).step == 8, "not where nothing would be left"
    assert checkpoints.go_back_to(5) == 4 and checkpoints.restore(target()).step == 4
    checkpoints.save(state(60), 6, {"sizes": []}, {})
    checkpoints.close()
    assert int(resume(tmp_path / "run").state.step) == 60, "a step that is taken again is saved again"


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", ["truncated", "removed", "metadata"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(damage, tmp_path, capsys):
    saved(tmp_path, (2, 4, 6))
    if damage == "metadata":
        for path in (tmp_path / "6").rglob("_METADATA"):
            path.write_text("{")
    else:
        for path in (tmp_path / "6" / "state").rglob("d/*"):
            path.write_bytes(path.read_bytes()[:10]) if damage == "truncated" else path.unlink()
    found = resume(tmp_path)
    assert (found.step, int(found.state.step)) == (4, 4)
    assert "6 cannot be read" in capsys.readouterr().err
    assert (tmp_path / "6.unreadable").is_dir() and not (tmp_path / "6").exists(), "nothing is destroyed"
    assert saved(tmp_path, (6, 8)) == [2, 4, 6, 8], "and the run goes on over it"


def test_one_that_is_damaged_again_is_set_aside_under_another_name(tmp_path):
    saved(tmp_path, (2, 4))
    (tmp_path / "4.unreadable").mkdir()
    (tmp_path / "4.unreadable" / "kept").touch()
    for path in (tmp_path / "4" / "state").rglob("d/*"):
        path.unlink()
    assert resume(tmp_path).step == 2
    assert (tmp_path / "4.unreadable" / "kept").exists() and (tmp_path / "4.unreadable1" / "state").is_dir()


def test_an_address_that_cannot_be_used_is_refused_in_one_line(monkeypatch):
    check_address(None)
    check_address("some/folder")
    for address in ("s3://bucket/folder", "gs://bucket", "gs://bucket/", "gs:///folder", "https://host/folder"):
        with pytest.raises(InputError, match=f"{address!r} found, expected a folder or gs://BUCKET/FOLDER"):
            check_address(address)
    with pytest.raises(InputError, match=r"without \* \? \["):
        check_address("gs://bucket/run*")
    monkeypatch.setattr(checkpoint.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="without the package gcsfs; run: pip install gcsfs, or choose a folder"):
        check_address("gs://bucket/folder")


def test_when_none_can_be_read_nothing_is_begun_anew(tmp_path):
    saved(tmp_path, (2, 4))
    for path in tmp_path.rglob("d/*"):
        path.unlink()
    with pytest.raises(InputError, match=r"none of the checkpoints of steps \[2, 4\] can be read"):
        resume(tmp_path)


def test_another_model_is_refused_and_nothing_renamed(tmp_path):
    saved(tmp_path, (2,))
    with pytest.raises(InputError, match=r"2 does not fit this config: .*weight has shape \[4, 3\], expected \[5, 3\]"):
        resume(tmp_path, size=5)
    assert (tmp_path / "2").is_dir()


FULL_DISK = """
import sys, resource, signal
sys.path[:0] = [{tests!r}]
import jax, jax.numpy as jnp, dataclasses
from test_checkpoints import state
from ichigo_jax.errors import InputError
from ichigo_jax.training.checkpoint import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpoints(__import__("pathlib").Path(sys.argv[1]), 2, 0, None)
checkpoints.save(state(1), 1, {{}}, {{}})
checkpoints._manager.wait_until_finished()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
big = dataclasses.replace(state(2), frozen={{"x": jax.random.normal(jax.random.key(0), (100_000,))}})
try:
    checkpoints.save(big, 2, {{}}, {{}})
    checkpoints.close()
except InputError as error:
    print(error)
"""


def test_a_full_disk_is_told_of_and_costs_nothing(tmp_path):
    """The size of a file is bounded, which fails in the same place as a full disk."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    code = FULL_DISK.format(tests=str(ROOT / "tests" / "unit"))
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert "a checkpoint could not be written" in result.stdout, result.stderr[-2000:]
    assert len(result.stdout.splitlines()) == 1
    assert resume(tmp_path).step == 1
    json.dumps(resume(tmp_path).data)
