"""The networks, their presets and their FLOPs (Flax Linen; the only package that defines modules)."""
