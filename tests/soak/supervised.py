"""A training run of several real processes under `launch/local.sh`, watched from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Run:
    """One run folder and whoever trains in it."""

    def __init__(
        self, workdir: Path, config: str, keys: dict[str, object], processes: int = 2, devices: int = 1
    ) -> None:
        self.workdir, self.checkpoints = workdir.absolute(), workdir.absolute() / "checkpoints"
        self.log = workdir.with_suffix(".log")
        words = [f"--config.{key}={value}" for key, value in keys.items()]
        self._command = ["bash", str(ROOT / "launch/local.sh"), str(processes), "--", "--config", config, *words]
        self._command += ["--workdir", str(self.workdir)]
        self._devices = devices  # of each process
        self._supervisor: subprocess.Popen | None = None
        self.starts = 0

    def start(self) -> None:
        """Starts the supervisor."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        cache = str(self.workdir.parent / "compiled")
        environment = os.environ | {
            "PYTHON": sys.executable,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(self._devices),
        }
        environment |= {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": cache}
        with self.log.open("a") as log:
            self._supervisor = subprocess.Popen(
                self._command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self.starts += 1

    def ended(self) -> int | None:
        """The supervisor's exit code, None while it runs."""
        return self._supervisor.poll()

    def end(self, seconds: float = 300) -> int:
        """Tells it to end, as a user does; the supervisor's exit code."""
        self._supervisor.terminate()
        return self.wait(seconds)

    def wait(self, seconds: float) -> int:
        """The supervisor's exit code, once it has ended."""
        return self._supervisor.wait(seconds)

    def processes(self) -> dict[int, int]:
        """The living training processes: {number: pid}."""
        pids = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().decode().split("\0")
                alive = (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            except OSError:  # it has just ended
                continue
            if alive and str(self.workdir) in words and "--process" in words and "if_jax" in words:
                pids[int(words[words.index("--process") + 1])] = int(path.name)
        return pids

    def rows(self) -> list[dict[str, float]]:
        """The finished rows of metrics.jsonl that hold a loss, without what depends on the clock."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{name: row[name] for name in ("step", "loss", "grad_norm")} for row in rows if "loss" in row]

    def step(self) -> int:
        """The last step that was logged."""
        rows = self.rows()
        return int(rows[-1]["step"]) if rows else 0

    def wait_for(self, step: int, seconds: float = 3600) -> bool:
        """Whether the step is reached before the run ends."""
        end = time.monotonic() + seconds
        while self.step() < step:
            if self.ended() is not None:
                return False
            if time.monotonic() > end:
                raise TimeoutError(f"step {step} was not reached in {seconds:g} s: see {self.log}")
            time.sleep(0.05)
        return True
