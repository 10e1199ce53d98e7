"""Every test runs on the CPU, with eight fake devices, so that a mesh is a mesh."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

jax.config.update("jax_num_cpu_devices", 8)
