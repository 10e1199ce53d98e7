"""One recipe on other numbers of processes and devices: the same samples in the same order, the same losses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from supervised import ROOT, Run

CONFIG = str(ROOT / "tests/tiny_recipe.py")
KEYS = {"steps": 8, "checkpoint_every": 100, "hosts.step_seconds": 300, "hosts.start_seconds": 300}
KEYS |= {"validation.every": 8, "validation.samples": 8, "validation.batch_size": 8, "mesh.data": -1}


def _losses(run, steps=KEYS["steps"]):
    """{step: (loss, gradient norm)}, each step once, and the evaluation losses by timestep."""
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, steps + 1)), run.log.read_text()
    lines = (run.workdir / "metrics.jsonl").read_text().splitlines()
    validations = [json.loads(line) for line in lines if "validation" in line]
    evaluation = {name: value for name, value in validations[-1].items() if name.startswith("validation")}
    assert len(validations) == 1 and len(evaluation) > 1
    return np.array([[row["loss"], row["grad_norm"]] for row in rows]), np.array(list(evaluation.values()))


@pytest.mark.slow  # two minutes
def test_one_two_and_four_processes_train_alike(tmp_path):
    keys = KEYS | {"mesh.fsdp": 2, "mesh.rules": "fsdp"}
    trained = []
    for processes in (1, 2, 4):
        run = Run(tmp_path / f"run-{processes}", CONFIG, keys, processes, devices=4 // processes)
        run.start()
        assert run.wait(1200) == 0, run.log.read_text()
        trained.append(_losses(run))
    # Four summands may be added in another order across processes than within one.
    for steps, evaluation in trained[1:]:
        np.testing.assert_allclose(steps, trained[0][0], rtol=1e-6)
        np.testing.assert_allclose(evaluation, trained[0][1], rtol=1e-6)


@pytest.mark.slow  # two minutes
def test_the_number_of_devices_changes_in_mid_run(tmp_path):
    """8, 4, 2 and 8 devices in turn: a batch's gradient is summed in another order, so the last bits may differ."""
    keys = KEYS | {
        "steps": 24,
        "validation.every": 24,
    }  # it goes on for some steps before it hears that it is to end
    steady = Run(tmp_path / "steady", CONFIG, keys, 1, devices=8)
    steady.start()
    assert steady.wait(1200) == 0, steady.log.read_text()
    changing = tmp_path / "changing"
    for devices, until in ((8, 2), (4, 8), (2, 14), (8, None)):
        run = Run(changing, CONFIG, keys, 1, devices=devices)
        run.start()
        if until:
            assert run.wait_for(until), run.log.read_text()
            assert run.end() in (143, -15), run.log.read_text()  # one to a shell
        else:
            assert run.wait(1200) == 0, run.log.read_text()
    for expected, actual in zip(_losses(steady, 24), _losses(run, 24), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
