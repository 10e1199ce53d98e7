"""launch/tpu_vm, script by script, against a stand-in for gcloud."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import bucket
import pytest
import record_stores
import remote_sources
import tpu_cloud
from bucket import metadata_server
from tpu_cloud import COSTS, ROOT, SCRIPTS, TRAIN, Cloud, error_of

origin, cloud = tpu_cloud.origin, tpu_cloud.cloud


def test_a_run_from_nothing_to_nothing(cloud):
    created = cloud("create")
    assert created.returncode == 0 and COSTS in created.stderr
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE, TPU: READY"):
        assert f"request: {state}" in created.stderr
    call = json.loads((cloud.folder / "calls").read_text().splitlines()[1])
    assert {"--spot", "--runtime-version=v2-alpha-tpuv6e", "--node-id=if-base", "--project=p"} <= set(call)

    for _ in range(2):  # the second time all of it is there
        done = cloud("setup")
        assert done.returncode == 0 and "all 4 worker(s) are at" in done.stderr, done.stderr
    assert (cloud.folder / "worker-3/pip").read_text() == "install -q -e .[tpu]\n" * 2

    started = cloud("run")
    assert started.returncode == 0 and COSTS in started.stderr, started.stderr
    time.sleep(0.3)
    assert (cloud.folder / "arguments").read_text().splitlines() == ["train", *TRAIN]
    assert [cloud.starts(worker) for worker in range(4)] == [[cloud.commits[0]]] * 4
    assert "a run is going on on worker(s) 0 1 2 3" in error_of(cloud("run"))

    shown = cloud("status").stdout
    assert [f"worker {worker}: running: step 2" in shown for worker in range(4)] == [True] * 4
    hours, chips, bill = re.search(r"up for ([\d.-]+) h on (\d+) chips: .*, ([\d.-]+) at your 2", shown).groups()
    assert int(chips) == 16 and float(bill) == pytest.approx(float(hours) * 32, abs=0.2)
    assert "worker 2: step 2" in cloud("logs").stdout
    assert cloud("logs", "--worker", "1", "--lines", "1").stdout == "worker 1: step 1\nworker 1: step 2\n"

    fetched = cloud("fetch", "--out", "here")
    assert fetched.returncode == 0, fetched.stderr
    assert sorted(path.name for path in (cloud.folder / "here").iterdir()) == [
        "run",
        *(f"worker-{worker}.log" for worker in range(4)),
    ]
    assert not (cloud.folder / "here/run/checkpoints").exists()
    assert cloud("fetch", "--out", "all", "--checkpoints").returncode == 0
    assert (cloud.folder / "all/run/checkpoints").exists()

    stopped = cloud("stop")
    assert stopped.returncode == 0 and stopped.stdout.count(": stopped") == 4 and COSTS in stopped.stderr
    assert "worker 0: stopped 143: saved" in cloud("status").stdout
    assert "was stopped by hand" in cloud("watch").stderr

    cloud.plan("", "runs")
    assert cloud("run").returncode == 0
    deleted = cloud("delete", "--yes")
    assert deleted.returncode == 0 and deleted.stderr.count(": stopped") == 4, deleted.stderr
    assert cloud.state() == {} and "what is in --workdir stays" in deleted.stderr
    assert "nothing runs that costs money" in cloud("status").stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"NAME": None}, "NAME is missing"),
        ({"NAME": "My_TPU"}, 'NAME is "My_TPU": lower-case'),
        ({"TYPE": "''"}, "TYPE is missing"),
        ({"TYPE": "v5e-16"}, "gcloud calls it v5litepod-16"),
        ({"TYPE": "h100"}, 'TYPE is "h100"'),
        ({"ZONE": None}, "ZONE is missing"),
        ({"ZONE": "us-east5"}, 'ZONE is "us-east5": give a zone'),
        ({"TIER": "cheap"}, 'TIER is "cheap": spot, on-demand or reserved'),
        ({"ZOEN": "x"}, "unknown setting ZOEN"),
        ({"TRAIN": "(--config"}, "settings are not bash"),
        ({"TYPE": "v9x-8"}, "RUNTIME is missing: no usual image is known for TYPE v9x-8"),
    ],
)
def test_incomplete_settings_call_nothing(cloud, settings, message):
    cloud.settings(**settings)
    assert message in error_of(cloud("create"))
    assert "queued-resources create" not in cloud.calls()


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("()", "--config is missing in TRAIN"),
        ("(--config configs/no.py --workdir gs://b/r)", "configs/no.py: not in this checkout"),
        ("(--config configs/demo_base.py --workdir runs/a)", '--workdir "runs/a": all workers must see'),
        ("(--config configs/demo_base.py --workdir gs://BUCKET/a)", "put the name of your bucket"),
    ],
)
def test_train_arguments_are_checked_before_anything(cloud, train, message):
    cloud.settings(TRAIN=train)
    assert message in error_of(cloud("run")) and cloud.calls() == []


def test_a_slice_embeds_before_it_trains(cloud):
    cloud.set_up()
    for words, message in (
        ("()", "--config is missing in EMBED"),
        ("(--config configs/demo_sr.py --out states)", 'EMBED has --out "states": all workers must see it'),
    ):
        cloud.settings(EMBED=words)
        assert message in error_of(cloud("run", "--embed")) and cloud.calls() == []
    cloud.settings(EMBED="(--config configs/demo_sr.py --out gs://bucket/states)")
    cloud.plan("0", "runs")
    assert cloud("run", "--embed").returncode == 0
    time.sleep(0.3)
    arguments = ["embed", "--config", "configs/demo_sr.py", "--out", "gs://bucket/states"]
    assert (cloud.folder / "arguments").read_text().splitlines() == arguments
    assert "worker 3: ended 0: step 2" in cloud("status").stdout
    assert cloud("run").returncode == 0
    time.sleep(0.3)
    assert (cloud.folder / "arguments").read_text().splitlines() == ["train", *TRAIN]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself_and_refuses_what_it_does_not_know(cloud, script):
    helped = cloud(script, "--help")
    assert helped.returncode == 0 and f"usage: launch/tpu_vm/{script}.sh" in helped.stdout
    assert 'unexpected argument "sideways"' in error_of(cloud(script, "sideways"))
    assert "gcloud not found: install the Google Cloud CLI" in error_of(cloud(script, path=_without_gcloud(cloud)))
    missing = error_of(cloud(script, "--settings", "nowhere.sh"))
    assert "no settings at nowhere.sh: cp launch/tpu_vm/settings.example.sh" in missing
    assert cloud.calls() == []


def _without_gcloud(cloud: Cloud) -> str:
    tools = cloud.folder / "plain"
    tools.mkdir(exist_ok=True)
    for name in ("bash", "dirname", "basename", "sed", "grep", "git", "awk", "date", "mktemp", "rm"):
        (tools / name).symlink_to(shutil.which(name))
    return str(tools)


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_prints_every_command_and_calls_none(cloud, script):
    shown = cloud(script, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert cloud.calls() == []
    commands = [line for line in shown.stdout.splitlines() if line.startswith("gcloud ")]
    expected = {
        "create": ["queued-resources create"],
        "setup": ["tpu-vm ssh", "tpu-vm ssh"],
        "run": ["tpu-vm ssh", "tpu-vm ssh"],
        "stop": ["tpu-vm ssh"],
        "logs": ["tpu-vm ssh"],
        "status": ["tpu-vm ssh"],
        "fetch": ["storage rsync", "tpu-vm scp"],
        "delete": ["tpu-vm ssh", "queued-resources delete"],
        "watch": ["tpu-vm ssh", "queued-resources delete", "queued-resources create", *["tpu-vm ssh"] * 3]
        + ["tpu-vm ssh"] * 4,
    }
    verbs = [re.sub(r"^gcloud (compute tpus )?(\S+ \S+) .*", r"\2", line) for line in commands]
    assert [verb for verb in verbs if not verb.endswith(" describe")] == expected[script]
    assert shown.stdout.count("--project=p") == len(commands)


def test_printed_commands_are_those_that_run(cloud):
    """What --dry-run prints, a shell reads back as the words gcloud gets."""
    printed = cloud("create", "--dry-run", "--no-wait").stdout
    cloud("create", "--no-wait")
    called = [json.loads(line) for line in (cloud.folder / "calls").read_text().splitlines()]
    read = subprocess.run(["bash", "-c", f"gcloud() {{ printf '%s\\n' \"$@\"; }}; {printed.splitlines()[1]}"], **PIPES)
    assert read.stdout.splitlines() == called[1]


PIPES = {"capture_output": True, "text": True, "check": True}


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ("quota", "quota refused: ask for more v6e-16 (spot) in us-east5-b"),
        ("no_zone", "is ZONE us-east5-b right?"),
        ("no_type", "is TYPE v6e-16 right?"),
        ("denied", "has your account the role TPU Admin"),
    ],
)
def test_a_refused_request_leaves_nothing(cloud, event, message):
    cloud.events(f"queued-resources create 1 {event}")
    done = cloud("create")
    assert message in error_of(done) and "nothing runs that costs money" in done.stderr


def test_a_wrong_zone_is_not_taken_for_a_missing_slice(cloud):
    cloud.events("queued-resources describe 1 no_zone")
    assert "is ZONE us-east5-b right?" in error_of(cloud("create"))
    assert cloud.calls() == ["queued-resources describe"]


def test_a_request_that_fails_later_says_why_and_is_replaced_by_the_next_call(cloud):
    cloud.events("queued-resources describe 2 failed")
    done = cloud("create")
    assert "has failed: Quota limit 'TPUV6EPreemptible' has been exceeded. → quota refused" in error_of(done)
    assert "nothing runs that costs money; the request if-base is FAILED" in done.stderr
    cloud.events()
    assert cloud("create").returncode == 0


def test_a_request_left_in_the_queue_is_named_and_can_be_waited_for(cloud):
    done = cloud("create", "--no-wait")
    assert done.returncode == 0 and "waits in the queue and costs money once it is granted" in done.stderr
    again = cloud("create")
    assert again.returncode == 0 and cloud.calls().count("queued-resources create") == 1


def test_interrupting_create_says_what_stays(cloud):
    cloud.settings(POLL_SECONDS="0.5")
    script = ["bash", str(ROOT / "launch/tpu_vm/create.sh"), "--settings", str(cloud.folder / "settings.sh")]
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    waiting = subprocess.Popen(script, stderr=subprocess.PIPE, text=True, env=cloud.environment(), process_group=0)
    signal.signal(signal.SIGINT, heard)
    while not (cloud.folder / "cloud.json").exists() or not cloud.state():
        time.sleep(0.02)
    os.killpg(waiting.pid, signal.SIGINT)
    message = waiting.communicate(timeout=20)[1]
    assert waiting.returncode == 130 and "note: " in message and "delete.sh" in message


def test_a_slice_taken_away_while_it_is_waited_for(cloud):
    cloud.events("tpu-vm describe 1 suspend_node")
    assert "was preempted: launch/tpu_vm/create.sh" in error_of(cloud("create"))


def test_setup_that_fails_on_one_worker_names_it(cloud):
    cloud.granted()
    (cloud.folder / "fail").write_text("2")
    done = cloud("setup")
    assert "setup failed on worker(s) 2 of 4: worker 2: error: " in error_of(done)
    assert "No space left on device" in done.stderr and COSTS in done.stderr
    (cloud.folder / "fail").unlink()
    assert cloud("setup").returncode == 0


def test_setup_says_how_each_worker_reads_the_data(cloud):
    cloud.granted()
    lines = ["pass data speed: gs://b/t: 90.0 MB/s on this host", "warn data region: gs://b is in EU: billed → copy it"]
    (cloud.folder / "data").write_text("\n".join(["W tried again in 1 s", *lines]))
    done = cloud("setup")
    assert done.returncode == 0 and "next: launch/tpu_vm/run.sh" in done.stderr, done.stderr
    for worker in range(4):
        assert f"worker {worker}: data speed: gs://b/t: 90.0 MB/s on this host\n" in done.stderr
        assert f"worker {worker}: data region: gs://b is in EU: billed → copy it (warning)\n" in done.stderr
    (cloud.folder / "data").write_text(
        "fail data speed: gs://b/t: this account may not read it (403) → give it the role"
    )
    error = error_of(cloud("setup"))
    assert error.startswith("error: worker(s) 0 1 2 3 of 4 cannot read the data: worker ")
    assert error.count("error: data speed: gs://b/t: this account may not read it (403) → give it the role") == 4
    (cloud.folder / "data").write_text("Error: No such option: --data-only")
    assert "worker 0: error: if-jax doctor: Error: No such option" in error_of(cloud("setup"))


REAL = """#!/bin/bash
export JAX_PLATFORMS=cpu PYTHONPATH={root} {variables}
exec {python} -W ignore -m if_jax "$@"
"""


@pytest.mark.slow
def test_workers_read_a_sample_of_a_bucket(cloud, tmp_path):
    """The real doctor, on four workers in us-east5-b, of a bucket on localhost that is in europe-west4."""
    with bucket.serve() as (far, variables), metadata_server("us-east5-b") as host:
        far.location = "EUROPE-WEST4"
        remote_sources.upload(far, record_stores.write_tars(tmp_path / "tars", 40, 20), "tars")
        words = " ".join(f"{name}={value}" for name, value in (variables | {"GCE_METADATA_HOST": host}).items())
        cloud._program("tools/if-jax", REAL.format(root=ROOT, python=sys.executable, variables=words))
        train = (
            f"(--config {ROOT}/configs/demo_base.py --config.data.source=gs://bucket/tars --workdir gs://bucket/run)"
        )
        cloud.settings(TRAIN=train)
        cloud.granted()
        done = cloud("setup")
        assert done.returncode == 0, done.stderr
        for worker in range(4):
            assert re.search(rf"worker {worker}: data speed: gs://bucket/tars: [\d.]+ MB/s on this host", done.stderr)
            region = (
                f"worker {worker}: data region: gs://bucket is in EUROPE-WEST4, this machine in us-east5: every pass"
            )
            assert region in done.stderr
        far.trouble = lambda request: 403
        assert "worker 3: error: data speed: gs://bucket/tars: this account may not read it" in error_of(cloud("setup"))


def test_setup_with_a_commit_that_was_not_pushed(cloud):
    cloud.granted()
    done = cloud("setup", "--rev", "0" * 40)
    assert f"commit {'0' * 40} is not in {cloud.repo}: push it" in error_of(done) and COSTS in done.stderr


@pytest.mark.parametrize(("script", "message"), [("setup", "setup failed on worker(s) 1"), ("run", "do not answer")])
def test_an_unreachable_worker_is_named(cloud, script, message):
    cloud.set_up() if script == "run" else cloud.granted()
    cloud.events("tpu-vm ssh 1 lose 1")
    done = cloud(script)
    assert message in error_of(done) and "1 of 4" in error_of(done) and COSTS in done.stderr
    assert cloud.starts() == []
    assert "worker(s) 1 of 4 do not answer" in cloud("status").stdout


def test_a_worker_lost_between_check_and_start_ends_the_others(cloud):
    cloud.set_up()
    cloud.events("tpu-vm ssh 2 lose 1")
    done = cloud("run")
    assert "worker(s) 1 of 4 did not start, the others were ended" in error_of(done) and COSTS in done.stderr
    assert "running" not in cloud("status").stdout


def test_different_commits_start_nothing(cloud):
    cloud.set_up()
    git = ["git", "-C", str(cloud.folder / "worker-1/if_jax"), "checkout", "-q", cloud.commits[1]]
    subprocess.run(git, check=True)
    assert "the workers have different commits" in error_of(cloud("run")) and cloud.starts() == []


@pytest.mark.parametrize("script", ["setup", "run", "stop", "logs"])
def test_scripts_that_need_a_slice_say_what_there_is(cloud, script):
    assert "there is no TPU if-base in us-east5-b: launch/tpu_vm/create.sh" in error_of(cloud(script))
    cloud.granted()
    cloud.events("tpu-vm describe 2 preempt")
    assert "TPU if-base is PREEMPTED, not READY" in error_of(cloud(script))


def test_delete_asks_and_takes_back_a_request(cloud):
    cloud.granted()
    assert "nobody to ask: give --yes" in error_of(cloud("delete"))
    assert cloud.state()["request"] == "ACTIVE"
    cloud.events("queued-resources delete 1 offline")
    done = cloud("delete", "--yes", "--now")
    assert "network is unreachable" in error_of(done) and COSTS in done.stderr
    assert cloud("delete", "--yes", "--now").returncode == 0 and cloud.state() == {}


# The stand-in itself, and the real thing


@pytest.mark.parametrize(
    "words",
    [
        "compute tpus queued-resources make x --zone=us-east5-b",
        "compute tpus queued-resources create x --node=x --zone=us-east5-b",
        "compute tpus tpu-vm ssh x --workers=all --zone=us-east5-b",
        "compute tpus tpu-vm ssh x --tunnel-through-iap --zone=us-east5-b",
        "compute tpus tpu-vm describe x",
    ],
)
def test_the_stand_in_refuses_what_gcloud_refuses(cloud, words):
    called = subprocess.run([cloud.folder / "bin/gcloud", *words.split()], env=cloud.environment(), capture_output=True)
    assert called.returncode != 0 and b"ERROR" in called.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="no gcloud on this machine")
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_real_gcloud_accepts_every_command(cloud, script):
    """Its own parser reads them all before it finds that nobody is logged in."""
    environment = os.environ | {"CLOUDSDK_CONFIG": str(cloud.folder / "config"), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    for command in cloud(script, "--dry-run").stdout.split("\ngcloud "):
        command = command if command.startswith("gcloud ") else f"gcloud {command}"
        command = "\n".join(line for line in command.splitlines() if not line.startswith("# "))
        called = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
        assert called.returncode == 1 and "active account" in called.stderr, (command, called.stderr)
