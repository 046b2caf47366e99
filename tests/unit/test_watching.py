"""What a run tells of itself: each figure against one that is known otherwise."""

import contextlib
import dataclasses
import importlib.util
import json
import struct
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_step
from flax import nnx

from ichigo_jax.data.sources import numbered, source_names
from ichigo_jax.errors import InputError
from ichigo_jax.models.attention import CAUSAL, EVERYWHERE, MASKED_SCOPE, attend
from ichigo_jax.models.llama import Llama, LlamaConfig
from ichigo_jax.parallel import make_mesh
from ichigo_jax.parallel.chips import CHIPS, H100, chip_of
from ichigo_jax.tasks import mixture
from ichigo_jax.tasks.model_flops import model_flops
from ichigo_jax.train import make_step
from ichigo_jax.training import trackers
from ichigo_jax.training.flops import count_flops
from ichigo_jax.training.goodput import Goodput
from ichigo_jax.training.losses import cross_entropy_sums, token_cross_entropy, vocabulary_loss
from ichigo_jax.training.metrics import MetricsLog, parameter_norm
from ichigo_jax.training.run_config import load
from ichigo_jax.training.state import make_state, split
from ichigo_jax.training.watch import ProfiledSteps, StepWork, Watch, parse_profile
from ichigo_jax.training.watchdog import Watchdog

CONFIG = str(Path(__file__).parents[2] / "configs" / "nano_llama.py")
OUTPUT = SimpleNamespace(stall_seconds=0.0, tensorboard=False, wandb=None)

# ---- goodput ---------------------------------------------------------------------------------------------------------


class Clock:
    """Shows what it is set to."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


def starts(path):
    return json.loads(path.read_text())["starts"]


def test_a_step_taken_again_counts_once_and_each_restart_says_what_it_cost(tmp_path):
    path, clock = tmp_path / "goodput.json", Clock(1010.0)
    first = Goodput(path, 0, {}, began=1000.0, write=True, clock=clock)
    assert first.share() == 0.0
    clock.now = 1020.0
    first.first_step_done()
    clock.now = 1070.0  # 50 seconds of steps, of which a save took 10
    first.spend("saving", 10.0)
    assert first.share() == pytest.approx(40 / 70)
    kept = first.kept(step=9)
    clock.now = 1100.0
    first.note(step=15, now=True)
    assert first.productive_seconds() == 70.0
    # Killed here, and started again 100 seconds later from step 9, whose checkpoint was made at 1070.

    clock.now = 1205.0
    second = Goodput(path, 9, kept, began=1200.0, write=True, clock=clock)
    assert second.productive_seconds() == 40.0 and second.share() == pytest.approx(40 / 205)
    clock.now = 1230.0
    second.first_step_done()
    clock.now = 1260.0
    second.note(step=15, now=True)
    assert second.share() == pytest.approx((40 + 30) / 260)
    before, after = starts(path)
    assert before["startup_seconds"] == 20.0 and before["apart_seconds"] == {"saving": 10.0} and "away_seconds" not in before
    assert (after["away_seconds"], after["lost_steps"], after["lost_seconds"]) == (100.0, 6, 30.0)
    assert (after["from_step"], after["last_step"], after["startup_seconds"]) == (9, 15, 30.0)
    lost = 20 + 10 + 100 + 30 + 30  # all that is not productive: two start-ups, a save, lost steps, the time away
    assert 260 - lost == second.productive_seconds()


def test_what_comes_after_the_last_checkpoint_is_not_productive_when_a_run_ends_well(tmp_path):
    path, clock = tmp_path / "goodput.json", Clock(0.0)
    first = Goodput(path, 0, {}, began=0.0, write=True, clock=clock)
    first.first_step_done()
    clock.now = 40.0
    kept = first.kept(step=4)
    clock.now = 45.0
    first.spend("saving", 5.0)
    clock.now = 60.0
    first.finish()
    assert starts(path)[0]["apart_seconds"] == {"saving": 5.0, "finishing": 15.0}
    Goodput(path, 4, kept, began=70.0, write=True, clock=clock)
    assert starts(path)[1] | {"lost_steps": 0, "lost_seconds": 0.0, "away_seconds": 10.0} == starts(path)[1]


def test_a_start_that_never_saved_is_all_lost(tmp_path):
    path, clock = tmp_path / "goodput.json", Clock(0.0)
    first = Goodput(path, 0, {}, began=0.0, write=True, clock=clock)
    first.first_step_done()
    clock.now = 50.0
    first.note(step=5, now=True)
    second = Goodput(path, 0, {}, began=60.0, write=True, clock=clock)
    assert starts(path)[1] | {"lost_steps": 5, "lost_seconds": 50.0, "away_seconds": 10.0} == starts(path)[1]
    clock.now = 100.0
    assert second.share() == 0.0


def test_the_checkpoint_remembers_the_first_start_without_the_file(tmp_path):
    clock = Clock(200.0)
    resumed = Goodput(tmp_path / "gone.json", 3, {"productive_seconds": 80.0, "first_began": 100.0}, 190.0, False, clock)
    assert resumed.share() == pytest.approx(0.8) and not (tmp_path / "gone.json").exists()


# ---- utilisation -----------------------------------------------------------------------------------------------------


def test_masked_attention_counts_as_half_forwards_and_backwards():
    B, T, N, H = 2, 8, 4, 16
    qkv = [jnp.ones((B, T, N, H))] * 3
    products = 2 * 2 * B * N * T * T * H  # scores, and their sum of values

    def loss(masked, *qkv):
        return attend(*qkv, CAUSAL if masked else EVERYWHERE).sum()

    for masked, factor in ((False, 1.0), (True, 0.5)):
        forward = count_flops(lambda *qkv, masked=masked: loss(masked, *qkv), *qkv, halved=MASKED_SCOPE)
        both = count_flops(jax.grad(lambda *qkv, masked=masked: loss(masked, *qkv), (0, 1, 2)), *qkv, halved=MASKED_SCOPE)
        assert forward == factor * products and both == factor * 3 * products
        assert count_flops(lambda *qkv, masked=masked: loss(masked, *qkv), *qkv) == products


LLAMA = LlamaConfig("llama", 256, 32, 96, 3, 4, 2, 8, 128, 1e-5, 1e4, None, False, False, 0.02)


def language_run(**train):
    """Of a Llama whose operations are easily counted: 8 rows of 64 ids."""
    config = load(CONFIG, [])
    model = {"llama": dataclasses.asdict(LLAMA), "adapter": None, "base_dtype": None}
    data = {**config.data, "length": 64}
    return dataclasses.replace(
        config, init_from="nowhere", model=model, data=data, train=dataclasses.replace(config.train, batch_size=8, **train)
    )


def needed(llama, rows, length):
    """By hand: six for each weight in a matrix and token, twelve for each pair of a token and half of its row's."""
    D, N, K, H, F = 32, llama.num_attention_heads, llama.num_key_value_heads, llama.head_dim, llama.intermediate_size
    weights = llama.num_hidden_layers * (2 * D * (N + K) * H + 3 * D * F) + D * llama.vocab_size
    return 6 * weights * rows * length + 12 * llama.num_hidden_layers * N * H * rows * length * length / 2


@pytest.mark.parametrize("train", [{}, {"remat": "full"}, {"remat": "dots", "accumulation": 4}, {"attention": "splash"}])
def test_a_language_models_flops_are_those_of_the_model_not_of_the_program(train):
    assert model_flops(language_run(**train)) == needed(LLAMA, 8, 64)


def test_an_adapters_base_has_no_weight_gradients():
    config = language_run()
    adapter = {"rank": 1, "alpha": 1.0, "rslora": False, "targets": ("q",), "train_also": ()}
    config = dataclasses.replace(config, model={**config.model, "adapter": adapter, "base_dtype": "float32"})
    tokens, adapter = 8 * 64, 3 * (32 + 4 * 8)
    attention = 12 * 3 * 4 * 8 * tokens * 64 / 2
    head = 2 * 32 * 256 * tokens  # its gradient is made with the loss, wanted or not
    frozen = (needed(LLAMA, 8, 64) - attention) * 2 / 3
    assert model_flops(config) == frozen + attention + head + 6 * adapter * tokens


def test_chips_are_told_by_their_devices_names():
    known = {
        "TPU v5 lite": CHIPS["v5e"],
        "TPU v5p": CHIPS["v5p"],
        "TPU v5": CHIPS["v5p"],
        "TPU v6 lite": CHIPS["v6e"],
        "NVIDIA H100 80GB HBM3": H100,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "NVIDIA GeForce RTX 4090": None,
        "cpu": None,
    }
    assert {name: chip_of(SimpleNamespace(device_kind=name)) for name in known} == known
    assert (
        chip_of(SimpleNamespace(device_kind="NVIDIA H200")).flops > chip_of(SimpleNamespace(device_kind="NVIDIA H200 NVL")).flops
    )
    assert chip_of(jax.devices("cpu")[0]) is None


# ---- the loop's figures ----------------------------------------------------------------------------------------------


def slow(batches, seconds):
    for batch in batches:
        time.sleep(seconds)
        yield batch


def test_a_loops_figures_are_those_of_what_it_did(tmp_path):
    size, steps = 64, 6
    x = jnp.ones((size, size))
    multiply = jax.jit(lambda x: x @ x / size)
    flops = count_flops(multiply, x)
    assert flops == 2 * size**3
    work = StepWork(tokens=100, chips=2, model_flops=flops, peak_flops=1e6)
    batches = slow(iter(range(100)), 0.02)
    with Watch(tmp_path, OUTPUT, work, None, began=time.time()) as watch:
        watch.begin(0, {})
        for step in range(1, steps + 1):
            watch.next_batch(batches)
            x = multiply(x)
            time.sleep(0.2 if step == 1 else 0.03)  # the first stands for a compilation
            watch.took(step, x)
        with watch.apart("evaluation", x):
            time.sleep(0.3)
        found = watch.measured()
        idle = watch.measured()
    seconds = found["step_seconds"]
    assert 0.05 <= seconds < 0.12, "neither the first step nor what is apart is in it"
    assert found["steps_per_second"] == pytest.approx(1 / seconds)
    assert found["tokens_per_second_per_chip"] == pytest.approx(100 / seconds / 2)
    assert found["mfu"] == pytest.approx(flops / (seconds * 2 * 1e6))
    assert found["data_wait_seconds"] >= 0.1 and found["data_wait_share"] == pytest.approx(
        found["data_wait_seconds"] / 5 / seconds
    )
    assert 0.2 < found["goodput"] < 0.6, "about 0.25 of 0.75 seconds"
    assert idle.keys() == {"goodput"}, "nothing is said of steps where there were none"
    (start,) = starts(tmp_path / "goodput.json")
    assert start["last_step"] == steps and start["apart_seconds"]["evaluation"] >= 0.3 and start["startup_seconds"] >= 0.2


def test_without_a_known_chip_there_is_no_utilisation_and_memory_is_told_where_known(tmp_path, monkeypatch):
    stats = [{"bytes_in_use": 5, "peak_bytes_in_use": 9}, None]
    devices = [SimpleNamespace(id=number, memory_stats=lambda found=found: found) for number, found in enumerate(stats)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    with Watch(tmp_path, OUTPUT, StepWork(1, 1, None, None), None, began=time.time()) as watch:
        watch.begin(7, {})
        for step in (8, 9):
            watch.next_batch(iter([0]))
            watch.took(step, jnp.zeros(()))
        found = watch.measured()
    assert "mfu" not in found and "step_seconds" in found
    assert (found["memory_bytes/0"], found["memory_peak_bytes/0"]) == (5, 9) and "memory_bytes/1" not in found


def test_the_norm_of_parameters_is_summed_in_full_precision():
    params = {"a": jnp.full((1000, 1000), 0.01, jnp.bfloat16), "b": {"c": jnp.zeros(3)}}
    assert float(parameter_norm(params)) == pytest.approx(1000 * float(jnp.bfloat16(0.01)), rel=1e-5)


# ---- profile ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "3", "3:", ":3", "0:3", "5:4", "1:2:3", "a:b", "-1:3", "5:21"])
def test_profile_ranges_that_are_none(text):
    with pytest.raises(InputError, match="--profile .* expected START:STOP with 1 <= START <= STOP <= 20"):
        parse_profile(text, 20)


def test_the_steps_of_a_profile_are_traced(tmp_path):
    assert parse_profile("2:3", 20) == ProfiledSteps(2, 3) and parse_profile("20:20", 20) == (20, 20)
    double, x = jax.jit(lambda x: x + x), jnp.ones(4)
    with Watch(tmp_path, OUTPUT, StepWork(1, 1, None, None), ProfiledSteps(2, 3), began=time.time()) as watch:
        watch.begin(0, {})
        found = []
        for step in range(1, 5):
            watch.next_batch(iter([0]))
            x = double(x)
            watch.took(step, x)
            found.append(len([*tmp_path.glob("profile/**/*.xplane.pb")]))
    assert found == [0, 0, 1, 1], "written when step 3 is done, once"


def test_a_profile_that_the_run_stops_within_is_written(tmp_path):
    with Watch(tmp_path, OUTPUT, StepWork(1, 1, None, None), ProfiledSteps(2, 30), began=time.time()) as watch:
        watch.begin(4, {})  # resumed within
        watch.next_batch(iter([0]))
        watch.took(5, jnp.ones(()))
    assert [*tmp_path.glob("profile/**/*.xplane.pb")]


# ---- stalls ----------------------------------------------------------------------------------------------------------


def a_step_that_hangs(seconds):
    time.sleep(seconds)


def test_a_stall_is_told_once_with_where_it_hangs(tmp_path):
    path = tmp_path / "err"
    with path.open("w") as file, Watchdog(0.2, file) as watchdog:
        for step in range(1, 8):
            time.sleep(0.06)  # longer than 0.2 together, and no stall
            watchdog.beat(step)
        assert path.read_text() == ""
        a_step_that_hangs(0.7)
        watchdog.beat(8)
        a_step_that_hangs(0.4)
    text = path.read_text()
    assert text.count("stalled: ") == 2 and "after step 7" in text and "after step 8" in text
    assert text.count("in a_step_that_hangs") == 2


def test_a_step_that_hangs_on_the_device_is_noticed_before_anything_is_logged(tmp_path, capfd):
    def hang(x):
        time.sleep(0.8)
        return x

    on_device = jax.jit(lambda x: jax.pure_callback(hang, jax.ShapeDtypeStruct((), jnp.float32), x))
    output = SimpleNamespace(**{**vars(OUTPUT), "stall_seconds": 0.3})
    with Watch(tmp_path, output, StepWork(1, 1, None, None), None, began=time.time()) as watch:
        watch.begin(0, {})
        for step in range(1, 5):
            watch.next_batch(iter([0]))
            watch.took(step, on_device(jnp.float32(0)) if step == 2 else jnp.float32(1))
    err = capfd.readouterr().err
    assert err.count("stalled: ") == 1 and "after step 1;" in err and "in hang" in err


def test_no_watching_where_it_is_off(capfd):
    with Watchdog(0.0) as watchdog:
        time.sleep(0.1)
        watchdog.beat(1)
    assert capfd.readouterr().err == ""


# ---- trackers --------------------------------------------------------------------------------------------------------


def records(content):
    """Of a TFRecord file: length, checksum, record, checksum."""
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield content[12 : 12 + length]
        content = content[16 + length :]


def test_tensorboard_has_what_the_log_has_and_forgets_what_is_taken_again(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    log = MetricsLog(tmp_path / "metrics.jsonl", 0, [trackers.TensorBoard(tmp_path / "tensorboard", 0)])
    log.write(1, {"loss": 2.5, "memory_bytes/0": 7})
    log.write(2, {"loss": 1.5})
    log.close()
    trackers.TensorBoard(tmp_path / "tensorboard", 1).close()
    events = []
    for file in sorted((tmp_path / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns):
        events += [Event.FromString(record) for record in records(file.read_bytes())]
    scalars = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert scalars == [(1, "loss", 2.5), (1, "memory_bytes/0", 7.0), (2, "loss", 1.5)]
    assert [event.step for event in events if event.session_log.status] == [2], "what has this step or a later one is purged"


def test_wandb_goes_on_with_the_run_of_the_workdir(tmp_path, monkeypatch):
    begun, logged = [], []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished"))

    def init(**options):
        begun.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    sys.modules["wandb"].init = init
    config = load(CONFIG, ["--config.output.wandb=ears"])
    for start in (0, 3):
        log = MetricsLog(tmp_path / "metrics.jsonl", start, trackers.make_trackers(config, tmp_path, start))
        log.write(start + 1, {"loss": np.float32(2.0)})
        log.close()
    assert logged == [(1, {"loss": 2.0}), "finished", (4, {"loss": 2.0}), "finished"]
    assert begun[0] == begun[1] and begun[0]["project"] == "ears" and begun[0]["resume"] == "allow"
    assert begun[0]["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert begun[0]["config"]["train"]["steps"] == 150

    def refuse(**options):
        raise RuntimeError("no API key\nand more")

    sys.modules["wandb"].init = refuse
    with pytest.raises(
        InputError, match=r"'ears' found, but W&B does not begin \(no API key\); run: wandb login, or set"
    ) as error:
        trackers.make_trackers(config, tmp_path, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("field", "package"), [("tensorboard=true", "tensorboardX"), ("wandb=ears", "wandb")])
def test_a_tracker_that_is_not_installed_is_told_of_in_one_line(monkeypatch, field, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    output = load(CONFIG, [f"--config.output.{field}"]).output
    with pytest.raises(InputError, match=f"^output.{field.split('=')[0]} .* run: pip install {package}, or unset it$"):
        trackers.check_trackers(output)
    trackers.check_trackers(load(CONFIG, []).output)


# ---- the loss of each source -----------------------------------------------------------------------------------------


def test_examples_of_a_mixture_tell_their_source_and_else_are_as_they_were():
    rows = [[{"x": np.int32(1)}, {"x": np.int32(2)}], [{"x": np.int32(3)}]]
    first, second = numbered(rows)
    assert [first[0], first[1], second[0]] == [{"x": 1, "source": 0}, {"x": 2, "source": 0}, {"x": 3, "source": 1}]
    assert (len(first), len(second)) == (2, 1) and numbered(rows[:1])[0] is rows[0]
    assert source_names(["data/a.parquet", "data/b.parquet", "old/b.jsonl"]) == ["a", "b-1", "b-2"]


def test_the_loss_of_each_source_is_the_mean_over_its_targets_in_parts_or_not():
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(size=(8, 5, 7)), jnp.float32)
    targets = random.integers(0, 7, (8, 5))
    targets[:3, 2:] = -100
    batch = {"targets": jnp.asarray(targets), "source": jnp.asarray([0, 2, 2, 0, 2, 0, 2, 2])}
    data = SimpleNamespace(sources=("a", "b", "c"))
    of_tokens, totals = token_cross_entropy(logits, batch["targets"]), mixture.source_totals(batch, data)
    whole = mixture.source_metrics(batch, of_tokens, totals)
    halves = [
        mixture.source_metrics({name: value[part] for name, value in batch.items()}, of_tokens[part], totals)
        for part in (slice(0, 4), slice(4, 8))
    ]
    found = mixture.source_report({"loss": 1.0, **jax.tree.map(jnp.add, *halves)}, ["x/a.jsonl", "x/b.jsonl", "x/c.jsonl"])
    assert found == pytest.approx(mixture.source_report({"loss": 1.0, **whole}, ["a", "b", "c"]), rel=1e-6)
    assert found.keys() == {"loss", "loss/a", "loss/c"}, "the batch has nothing of b"
    for number, name in ((0, "loss/a"), (2, "loss/c")):
        rows = np.flatnonzero(np.asarray(batch["source"]) == number)
        loss, *_ = cross_entropy_sums(logits[rows], batch["targets"][rows])
        assert found[name] == pytest.approx(float(loss) / (targets[rows] != -100).sum(), rel=1e-6)
    assert mixture.source_report({"loss": 1.0}, ["only"]) == {"loss": 1.0}
    assert mixture.source_totals({"targets": batch["targets"]}, data) == {}


def test_a_mixtures_step_is_the_same_step_and_tells_the_losses():
    optimizer, plain = optax.sgd(0.5), test_step.batch()
    task = test_step.task(("a.parquet", "b.parquet"))
    mixed = {**plain, "source": jnp.asarray([0, 1, 1, 0, 1, 1, 1, 0], jnp.int32)}
    model = Llama(test_step.CONFIG, nnx.Rngs(0))
    graphdef, *parts = split(model, ())
    state = make_state(*parts, optimizer, test_step.WINDOW)
    step = jax.jit(make_step(task, test_step.run_config(2), graphdef, optimizer))
    (expected, _), (found, metrics) = step(state, plain), step(state, mixed)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    report = task.report(jax.device_get(metrics))
    totals = {"targets": jnp.float32(1.0)}
    for number, name in enumerate("ab"):
        rows = {key: value[mixed["source"] == number] for key, value in plain.items()}
        loss = task.loss(model, rows, totals, jax.random.key(0))[1]["cross_entropy"] / (rows["targets"] != -100).sum()
        assert report[f"loss/{name}"] == pytest.approx(float(loss), rel=1e-5)


MESHES = [None, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2, "context": 2}]


@pytest.mark.parametrize(("chunk", "mesh"), [(None, None), *((7, mesh) for mesh in MESHES)])
def test_the_vocabulary_loss_tells_each_tokens_part(chunk, mesh):
    random = np.random.default_rng(1)
    hidden, kernel = (jnp.asarray(random.normal(size=size), jnp.float32) for size in ((8, 6, 8), (8, 16)))
    targets = jnp.asarray(np.where(random.random((8, 6)) < 0.3, -100, random.integers(0, 11, (8, 6))))
    expected = token_cross_entropy((hidden @ kernel)[..., :11], targets)

    def loss(hidden):
        sums = vocabulary_loss(hidden, kernel, targets, 11, chunk, 1e-3)
        return sums.loss, sums

    with jax.set_mesh(make_mesh(mesh)) if mesh else contextlib.nullcontext():
        both = jax.jit(loss)(hidden)[1], jax.jit(jax.value_and_grad(loss, has_aux=True))(hidden)[0][1]
    for found in both:
        np.testing.assert_allclose(found.of_tokens, expected, rtol=1e-5, atol=1e-6)
        assert float(found.cross_entropy) == pytest.approx(float(expected.sum()), rel=1e-6)
