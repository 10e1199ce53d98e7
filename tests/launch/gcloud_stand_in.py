"""A `gcloud` that accepts only what the real one does, and plays a cloud in the folder $CLOUD.

Verbs and flags are those of Google Cloud SDK 528. Workers are folders with a home each; commands run in them for real.
$CLOUD/events holds lines "VERB N ACTION": what happens before the N-th call of that verb, once. Actions:

    quota, no_zone, no_type, denied, offline     this call is refused
    failed             the request fails instead of being granted
    preempt            the slice is taken away: request SUSPENDED, processes killed, disks gone
    suspend_node       the node is PREEMPTED, its request still ACTIVE
    repair, ready      the node is REPAIRING, or READY again
    lose N, find N     worker N cannot be reached, or can be again
    reboot N           the processes of worker N are gone, its disk is not
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys

# It is started some hundred times: pathlib, shutil and subprocess would double what that takes.

CLOUD = os.environ["CLOUD"]
ZONES, TYPES = {"us-east5-b"}, {"v6e-8": 1, "v6e-16": 4}
WIDE = {"--project", "--format", "--quiet"}  # flags of every command that are used here
SWITCHES = {"--quiet", "--spot", "--reserved", "--guaranteed", "--force", "--async", "--internal-ip", "--internal-ips"}
SWITCHES |= {"--recursive", "--recurse", "--compress", "--plain"}
SSH = {"--zone", "--worker", "--ssh-flag", "--ssh-key-file", "--internal-ip", "--plain", "--strict-host-key-checking"}
FLAGS = {
    "queued-resources create": {"--zone", "--node-id", "--accelerator-type", "--runtime-version", "--spot"}
    | {"--reserved", "--guaranteed", "--valid-until-duration", "--network", "--subnetwork", "--service-account"}
    | {"--internal-ips", "--metadata", "--labels", "--tags", "--async"},
    "queued-resources describe": {"--zone"},
    "queued-resources delete": {"--zone", "--force", "--async"},
    "tpu-vm describe": {"--zone"},
    "tpu-vm delete": {"--zone", "--async"},
    "tpu-vm ssh": SSH | {"--command", "--output-directory"},
    "tpu-vm scp": SSH - {"--ssh-flag"} | {"--scp-flag", "--recurse", "--compress"},
    "storage buckets": {"--location", "--member", "--role"},
    "storage rsync": {"--recursive", "--exclude", "--delete-unmatched-destination-objects"},
}


def main() -> None:
    words = sys.argv[1:]
    write("calls", json.dumps(words) + "\n", "a")
    words = words[2:] if words[:2] == ["compute", "tpus"] else words
    verb, words = " ".join(words[:2]), words[2:]
    if verb not in FLAGS:
        sys.exit(f"ERROR: (gcloud) Invalid choice: '{verb}'.")
    flags, names = parse(verb, words)
    if not verb.startswith("storage ") and "--zone" not in flags:
        refuse(verb, "The required property [zone] is not set.")
    cloud = load()
    for action in due(verb):
        happen(cloud, verb, action)
    store(cloud)
    globals()[verb.replace("-", "_").replace(" ", "_")](cloud, flags, *names)


def parse(verb: str, words: list[str]) -> tuple[dict, list[str]]:
    flags, names, words = {}, [], list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            names.append(word)
            continue
        flag, equals, value = word.partition("=")
        if flag not in FLAGS[verb] | WIDE:
            print(f"ERROR: (gcloud.{verb}) unrecognized arguments: {flag}", file=sys.stderr)
            sys.exit(2)
        if flag in SWITCHES:
            if equals:
                sys.exit(f"ERROR: (gcloud.{verb}) argument {flag}: ignored explicit argument '{value}'")
            value = True
        elif not equals:
            if not words or words[0].startswith("--"):
                sys.exit(f"ERROR: (gcloud.{verb}) argument {flag}: expected one argument")
            value = words.pop(0)
        flags[flag] = [*flags.get(flag, []), value] if flag == "--ssh-flag" else value
    if len(names) != (2 if verb in ("tpu-vm scp", "storage rsync", "storage buckets") else 1):
        sys.exit(f"ERROR: (gcloud.{verb}) unrecognized arguments: {names}")
    return flags, names


# The cloud: {"request": STATE, "node": STATE, "type": …, "lost": [N, …], "fails": BOOL}, or {} where nothing exists.


def load() -> dict:
    return json.loads(read("cloud.json") or "{}")


def store(cloud: dict) -> None:
    write("cloud.json.part", json.dumps(cloud))
    os.replace(f"{CLOUD}/cloud.json.part", f"{CLOUD}/cloud.json")


def read(name: str) -> str:
    """The text of a file of the cloud, "" where there is none."""
    try:
        with open(f"{CLOUD}/{name}") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def write(name: str, text: str, mode: str = "w") -> None:
    with open(f"{CLOUD}/{name}", mode) as file:
        file.write(text)


def due(verb: str) -> list[str]:
    """Actions of the events for this call, which are then over."""
    number = sum(json.loads(line)[2:4] == verb.split() for line in read("calls").splitlines())
    return [line.split(" ", 3)[3] for line in read("events").splitlines() if line.startswith(f"{verb} {number} ")]


def happen(cloud: dict, verb: str, action: str) -> None:
    word, _, number = action.partition(" ")
    zone = "us-east5-b"
    refusals = {
        "quota": "RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPreemptiblePerProjectPerZone' has been exceeded. Limit: 0",
        "no_zone": "NOT_FOUND: Location mars-1-a is not found or access is unauthorized.",
        "no_type": f"INVALID_ARGUMENT: Accelerator type v6e-16 not found in zone {zone}.",
        "denied": "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on resource",
        "offline": "There was a problem refreshing your current auth tokens: network is unreachable",
    }
    if word in refusals:
        store(cloud)
        refuse(verb, refusals[word])
    elif word == "failed":
        cloud["fails"] = True
    elif word == "preempt":
        cloud.update(request="SUSPENDED", node="PREEMPTED")
        wipe()
    elif word == "suspend_node":
        cloud["node"] = "PREEMPTED"
        wipe()
    elif word in ("repair", "ready"):
        cloud["node"] = {"repair": "REPAIRING", "ready": "READY"}[word]
    elif word == "lose":
        cloud["lost"].append(int(number))
    elif word == "find":
        cloud["lost"].remove(int(number))
    elif word == "reboot":
        kill(f"worker-{number}")
    else:
        sys.exit(f"no such event: {action}")


def refuse(verb: str, message: str) -> None:
    sys.exit(f"ERROR: (gcloud.compute.tpus.{verb.replace(' ', '.')}) {message}")


def absent(verb: str, kind: str, name: str) -> None:
    refuse(verb, f"NOT_FOUND: Resource 'projects/p/locations/us-east5-b/{kind}/{name}' was not found")


def kill(machine: str) -> None:
    with contextlib.suppress(ValueError, ProcessLookupError):  # nothing has run there, or no longer does
        os.killpg(int(read(f"{machine}/group")), signal.SIGKILL)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wipe() -> None:
    for machine in [name for name in os.listdir(CLOUD) if name.startswith("worker-")]:
        kill(machine)
        os.system(f"rm -rf {CLOUD}/{machine}")


# The verbs.


def queued_resources_create(cloud: dict, flags: dict, name: str) -> None:
    verb = "queued-resources create"
    for needed in ("--node-id", "--accelerator-type", "--runtime-version"):
        if needed not in flags:
            refuse(verb, f"argument {needed}: Must be specified.")
    if cloud:
        refuse(verb, f"ALREADY_EXISTS: Resource '{name}' already exists")
    if flags["--zone"] not in ZONES:
        happen(cloud, verb, "no_zone")
    if flags["--accelerator-type"] not in TYPES:
        happen(cloud, verb, "no_type")
    store({"request": "ACCEPTED", "node": None, "type": flags["--accelerator-type"], "lost": [], "fails": False})
    wipe()


def queued_resources_describe(cloud: dict, flags: dict, name: str) -> None:
    """Every look moves the request one step on."""
    if not cloud:
        absent("queued-resources describe", "queuedResources", name)
    steps = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    if flags["--format"] == "value(state.failedData.error.message)":
        return print("Quota limit 'TPUV6EPreemptible' has been exceeded." if cloud["request"] == "FAILED" else "")
    assert flags["--format"] == "value(state.state)", flags
    if cloud["request"] in steps[:-1]:
        cloud["request"] = "FAILED" if cloud["fails"] else steps[steps.index(cloud["request"]) + 1]
        if cloud["request"] == "ACTIVE":
            cloud["node"] = "READY"
            for worker in range(TYPES[cloud["type"]]):
                os.mkdir(f"{CLOUD}/worker-{worker}")
        store(cloud)
    print(cloud["request"])


def queued_resources_delete(cloud: dict, flags: dict, name: str) -> None:
    if not cloud:
        absent("queued-resources delete", "queuedResources", name)
    if cloud["request"] not in ("FAILED", "SUSPENDED", "ACCEPTED") and "--force" not in flags:
        refuse("queued-resources delete", "FAILED_PRECONDITION: the queued resource has nodes")
    wipe()
    store({})


def tpu_vm_describe(cloud: dict, flags: dict, name: str) -> None:
    if not cloud or not cloud["node"]:
        absent("tpu-vm describe", "nodes", name)
    answers = {
        "value(state)": cloud["node"],
        "value(networkEndpoints.len())": TYPES[cloud["type"]],
        'value(createTime.date(format="%s"))': "1795428000.123456",
    }
    print(answers[flags["--format"]])


def tpu_vm_delete(cloud: dict, flags: dict, name: str) -> None:
    absent("tpu-vm delete", "nodes", name)


def tpu_vm_ssh(cloud: dict, flags: dict, name: str) -> None:
    check_node(cloud, "tpu-vm ssh", name)
    who = flags.get("--worker", "0")
    workers = range(TYPES[cloud["type"]]) if who == "all" else [int(who)]
    started = {worker: run_on(worker, flags["--command"]) for worker in workers if worker not in cloud["lost"]}
    codes = []
    for worker in workers:
        print(f"SSH: Attempting to connect to worker {worker}...", file=sys.stderr)
        if worker in cloud["lost"]:
            print("Retrying: SSH command error: [/usr/bin/ssh] exited with return code [255].", file=sys.stderr)
            codes.append(255)
        elif code := os.waitstatus_to_exitcode(os.waitpid(started[worker], 0)[1]):
            print(f"##### Command execution on worker {worker} failed with exit status {code}.", file=sys.stderr)
            codes.append(code)
    sys.exit(codes[0] if codes else 0)


def run_on(worker: int, command: str) -> int:
    """What sshd does: a shell at home. Its process group is the machine, for `kill`."""
    machine = f"worker-{worker}"
    environment = {"HOME": f"{CLOUD}/{machine}", "HOSTNAME": f"t1v-n-1a2b3c4d-w-{worker}"}
    environment["PATH"] = os.environ["WORKER_PATH"]
    group = int(read(f"{machine}/group") or 0)
    if not group or not alive(group):
        group = 0
    process = os.fork()
    if not process:
        os.closerange(3, 64)  # what stays open here would keep the caller waiting
        os.setpgid(0, group)
        os.chdir(environment["HOME"])
        os.execve("/bin/bash", ["bash", "-c", command], environment)
    write(f"{machine}/group", str(group or process))
    return process


def tpu_vm_scp(cloud: dict, flags: dict, source: str, destination: str) -> None:
    name, _, path = source.partition(":")
    check_node(cloud, "tpu-vm scp", name)
    worker = int(flags["--worker"])
    if worker in cloud["lost"]:
        sys.exit("ERROR: (gcloud.compute.tpus.tpu-vm.scp) [/usr/bin/scp] exited with return code [255].")
    with open(destination, "w") as file:
        file.write(read(f"worker-{worker}/{path}"))


def check_node(cloud: dict, verb: str, name: str) -> None:
    if not cloud or not cloud["node"]:
        absent(verb, "nodes", name)
    if cloud["node"] in ("PREEMPTED", "TERMINATED", "STOPPED"):
        refuse(verb, f"This TPU has terminal state {cloud['node']}, so it cannot be used anymore.")


def storage_rsync(cloud: dict, flags: dict, source: str, destination: str) -> None:
    assert source.startswith("gs://"), source
    os.mkdir(f"{destination}/samples")
    if not flags.get("--exclude", "").startswith("^checkpoints/"):
        os.mkdir(f"{destination}/checkpoints")


def storage_buckets(cloud: dict, flags: dict, act: str, bucket: str) -> None:
    needed = {"create": {"--location"}, "add-iam-policy-binding": {"--member", "--role"}}[act]
    assert bucket.startswith("gs://") and flags.keys() == needed, (act, flags)


if __name__ == "__main__":
    main()
