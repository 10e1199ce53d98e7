"""The shipped supervisor on real processes: one is hurt, all start again, and the losses are the undisturbed ones."""

from __future__ import annotations

from random import Random

import faults
import pytest
from supervised import ROOT, Run

CONFIG = str(ROOT / "configs/demo_base.py")
KEYS = {"data.size": 16, "batch_size": 8, "steps": 12, "log_every": 2, "checkpoint_every": 4, "sample.every": 0}
KEYS |= {"mesh.data": 1, "mesh.rules": "fsdp", "hosts.heartbeat_seconds": 10, "hosts.step_seconds": 120}


def _trained(workdir, processes, fault=None):
    run = Run(workdir, CONFIG, KEYS | {"mesh.fsdp": processes}, processes)
    run.start()
    if fault:
        assert run.wait_for(2), run.log.read_text()
        fault(run, Random(0))
    assert run.wait(1800) == 0, run.log.read_text()
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "fault"), [(2, faults.killed), (2, faults.stopped), (2, faults.told_to_end), (4, faults.killed)]
)
def test_a_run_survives_a_process(tmp_path, processes, fault):
    undisturbed = tmp_path.parent / f"undisturbed-{processes}"  # beside each other: they share what is compiled
    calm = Run(undisturbed, CONFIG, {}) if undisturbed.exists() else _trained(undisturbed, processes)
    disturbed = _trained(tmp_path.parent / f"{fault.__name__}-{processes}", processes, fault)
    assert "starting again" in disturbed.log.read_text()
    assert disturbed.rows() == calm.rows()
