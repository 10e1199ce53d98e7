"""Compiled programs on disk: found again by what they follow from, and never trusted beyond that."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from if_jax.training import executable_cache

# The devices in another order than JAX lists them in, as on a torus.
MESH = Mesh(jax.devices()[::-1], ("data",))


def _on_the_mesh(x):
    return jax.device_put(x, NamedSharding(MESH, PartitionSpec("data")))


@pytest.fixture
def traced(tmp_path):
    """(A maker of programs, how often it has traced one); the cache is a folder of its own."""
    times = []

    def lower(scale):
        times.append(scale)
        return jax.jit(lambda tree: {"y": scale * tree["x"]}, donate_argnums=0).lower({"x": _on_the_mesh(jnp.zeros(8))})

    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    yield lower, times
    jax.config.update("jax_compilation_cache_dir", before)


def _run(lower, scale, *follows_from):
    arguments = {"x": _on_the_mesh(jnp.arange(8.0))}
    result = executable_cache.compiled(lambda: lower(scale), MESH, *follows_from)(arguments)
    assert arguments["x"].is_deleted()  # donated, also where the program was read
    assert len(result["y"].sharding.device_set) == 8
    return result["y"].tolist()[:3]


def test_a_program_is_traced_once(traced):
    lower, times = traced
    assert _run(lower, 2, "recipe", 1) == _run(lower, 2, "recipe", 1) == [0, 2, 4]
    assert times == [2]


def test_what_it_follows_from_tells_programs_apart(traced, monkeypatch):
    lower, times = traced
    assert _run(lower, 2, "recipe") == [0, 2, 4]
    assert _run(lower, 3, "another recipe") == [0, 3, 6]
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    _run(lower, 2, "recipe")
    monkeypatch.delenv("XLA_FLAGS")
    jax.config.update("jax_default_matmul_precision", "highest")
    _run(lower, 2, "recipe")
    jax.config.update("jax_default_matmul_precision", None)
    monkeypatch.setattr(executable_cache.hosts, "code_hash", lambda: "other code")
    _run(lower, 2, "recipe")
    assert times == [2, 3, 2, 2, 2]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"\x00" * 99])
def test_a_damaged_file_is_compiled_anew_and_mended(traced, tmp_path, damage):
    lower, times = traced
    _run(lower, 2, "recipe")
    (path,) = (tmp_path / "cache").glob("if_jax-step-*")
    path.write_bytes(damage(path.read_bytes()))
    assert _run(lower, 2, "recipe") == _run(lower, 2, "recipe") == [0, 2, 4]
    assert times == [2, 2]


def test_a_folder_that_cannot_be_written_costs_nothing_else(traced, tmp_path):
    lower, times = traced
    (tmp_path / "cache").write_text("a file")
    assert _run(lower, 2, "recipe") == [0, 2, 4]
    assert times == [2]


@pytest.mark.usefixtures("traced")
def test_what_the_cache_of_jax_gave_is_not_kept():
    """On a CPU such a program, written and read, fails at its first call: a function is not found."""

    def lower_loop():
        def loop(tree):
            x = jax.lax.fori_loop(0, 3, lambda _, x: x * jnp.sin(x), jnp.sort(tree["x"]))
            return {"y": x + tree["x"].sum()}

        return jax.jit(loop).lower({"x": _on_the_mesh(jnp.zeros(8))})

    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    arguments = {"x": _on_the_mesh(jnp.arange(8.0))}
    first = lower_loop().compile()(arguments)["y"].tolist()  # now JAX's cache has it
    for _ in range(2):  # compiled and kept, then read
        assert executable_cache.compiled(lower_loop, MESH, "recipe")(arguments)["y"].tolist() == first
    assert jax.config.jax_enable_compilation_cache
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
