"""The soak: the demo's base stage in two real processes, hurt from outside, ends as the undisturbed run does.

    python tests/soak/run.py --faults 10 --seed 0 [--steps 600] [--workdir DIR]
    python tests/soak/run.py --faults 3 --slice                 # a tiny net, three minutes

Two runs of one recipe, text encoder included, parameters sharded over both processes (fsdp), under `launch/local.sh`:
one is left alone, the other is hit at seeded random steps (`faults.py`). The last line is JSON:

    bit_identical     parameters, optimizer state and every EMA of the last checkpoint are equal, bit for bit
    lost, repeated    steps whose losses are missing in the disturbed run's metrics, or are there twice or otherwise
    goodput           share of the disturbed run's wall time that went into steps that count
    restart_s         median time from a fault that ends processes to the next step
    blocking_save_s   mean time a step waits for a checkpoint to be taken
    young_daly        goodput to expect at one fault in three hours, from the last two, saving at the best interval
    faults            the faults that struck, in order

Exit code 0 where nothing was lost.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import jax
import numpy as np
from faults import FAULTS, slow_host
from orbax.checkpoint import v1 as ocp
from supervised import ROOT, Run

from if_jax.tracking import goodput

HOSTS = {"heartbeat_seconds": 10, "step_seconds": 90, "start_seconds": 120}
KEYS = {"batch_size": 8, "log_every": 1, "sample.every": 0, "mesh.data": 1, "mesh.fsdp": 2, "mesh.rules": "fsdp"}
KEYS |= {"data.size": 16, "optimizer.warmup_steps": 10} | {f"hosts.{name}": value for name, value in HOSTS.items()}
THREE_HOURS = 3 * 3600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--slice", action="store_true", help="a tiny net in place of the demo's")
    parser.add_argument("--workdir", type=Path)
    options = parser.parse_args()
    work = options.workdir or Path(tempfile.mkdtemp(prefix="soak-"))
    steps = options.steps or (24 if options.slice else 600)
    config = ROOT / "tests/tiny_recipe.py" if options.slice else ROOT / "configs/demo_base.py"
    keys = KEYS | {"steps": steps, "checkpoint_every": max(2, steps // 24)}
    keys |= {"data.size": 8} if options.slice else {}
    calm, hurt = (Run(work / name, str(config), keys) for name in ("undisturbed", "disturbed"))
    calm.start()
    if code := calm.wait(4 * 3600):
        sys.exit(f"the undisturbed run ended with code {code}: see {calm.log}")
    struck, restarts = disturb(hurt, plan(options.faults, steps, Random(options.seed)))
    report = compare(calm, hurt, steps) | costs(hurt, restarts) | {"faults": struck}
    if not options.workdir and report["bit_identical"]:
        shutil.rmtree(work)
    print(json.dumps(report))
    sys.exit(0 if report["bit_identical"] and not report["lost"] + report["repeated"] else 1)


def plan(count: int, steps: int, rng: Random) -> list[tuple[int, Any, Random]]:
    """(step, fault, its generator): every kind in turn, one in each of `count` equal parts of the run."""
    edges = np.linspace(0.05 * steps, 0.95 * steps, count + 1)
    order = [FAULTS[i % len(FAULTS)] for i in range(count)]
    rng.shuffle(order)
    steps_at = [max(1, int(rng.uniform(a, b))) for a, b in pairwise(edges)]
    return [(step, fault, Random(rng.random())) for step, fault in zip(steps_at, order, strict=True)]


def disturb(run: Run, planned: list[tuple[int, Any, Random]]) -> tuple[list[str], list[float]]:
    """Runs to the end through all faults; their names, and the seconds from each that ended processes to a new step."""
    struck, restarts = [], []
    run.start()
    for step, fault, rng in planned:
        if not run.wait_for(step):
            sys.exit(f"the disturbed run ended with code {run.ended()} before step {step}: see {run.log}")
        before, began = run.processes(), time.monotonic()
        print(f"step {run.step()}: {fault.__name__}", file=sys.stderr, flush=True)
        fault(run, rng)
        struck.append(fault.__name__)
        if fault is not slow_host:
            _wait_for_new_steps(run, set(before.values()))
            restarts.append(time.monotonic() - began)
    if code := run.wait(4 * 3600):
        sys.exit(f"the disturbed run ended with code {code}: see {run.log}")
    return struck, restarts


def _wait_for_new_steps(run: Run, gone: set[int], seconds: float = 900) -> None:
    """Until processes that are none of `gone` have made a step; a supervisor that gave up is started again."""
    end, lowest = time.monotonic() + seconds, None
    while time.monotonic() < end:
        if run.ended() is not None:
            if run.ended() == 0:
                return
            run.start()  # what an operator does once there is room on the disk
        pids = set(run.processes().values())
        if pids and not pids & gone:
            step = run.step()  # falls when the metrics are cut back to the checkpoint, then rises
            lowest = step if lowest is None else min(lowest, step)
            if step > lowest:
                return
        time.sleep(0.05)
    sys.exit(f"no step within {seconds:g} s of a fault: see {run.log}")


def compare(calm: Run, hurt: Run, steps: int) -> dict[str, Any]:
    """What the faults did to the result: nothing, if all is well."""
    wanted = {row["step"]: row for row in calm.rows()}
    seen = Counter(row["step"] for row in hurt.rows())
    lost = [step for step in wanted if step not in seen]
    other = [row["step"] for row in hurt.rows() if row != wanted.get(row["step"])]
    repeated = sorted({step for step, count in seen.items() if count > 1} | set(other))
    states = [jax.tree.leaves_with_path(final_state(run.checkpoints, steps)) for run in (calm, hurt)]
    unequal = [
        jax.tree_util.keystr(path)
        for (path, calm_leaf), (_, hurt_leaf) in zip(*states, strict=True)
        if calm_leaf.tobytes() != hurt_leaf.tobytes() or calm_leaf.dtype != hurt_leaf.dtype
    ]
    for path in unequal[:5]:
        print(f"differs: {path}", file=sys.stderr)
    identical = not unequal and len(wanted) == steps
    return {"bit_identical": identical, "lost": len(lost), "repeated": len(repeated), "arrays": len(states[0])}


def costs(hurt: Run, restarts: list[float]) -> dict[str, Any]:
    """What the faults cost, by the run's own account and by our clock."""
    account = goodput.account(goodput.read_events(str(hurt.workdir)))
    restart = median(restarts) if restarts else 0.0
    report = {"goodput": account.goodput, "restart_s": restart, "blocking_save_s": account.blocking_save}
    if account.blocking_save > 0:
        report["young_daly"] = goodput.best_interval(account.blocking_save, restart, THREE_HOURS)[1]
    rounded = {name: round(value, 4) for name, value in report.items()}
    return rounded | {"badput_s": {name: round(took, 1) for name, took in account.badput.items() if took >= 0.05}}


def final_state(checkpoints: Path, step: int) -> Any:
    """Every array of a checkpoint (parameters, optimizer state, averages, step) on this machine."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.training.Checkpointer(checkpoints) as opened:
        if opened.latest is None or opened.latest.step != step:
            sys.exit(f"{checkpoints} does not end with step {step}")
        stored = opened.checkpointables_metadata(step).metadata["state"]
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), stored)
        return jax.device_get(opened.load_checkpointables(step, {"state": abstract})["state"])


if __name__ == "__main__":
    main()
