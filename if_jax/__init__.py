"""if_jax: the DeepFloyd IF text-to-image cascade in JAX and Flax.

`from if_jax import Cascade` draws; everything else is imported from its own module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from if_jax.inference.cascade import Cascade

    __version__: str

__all__ = ["Cascade", "__version__"]


def __getattr__(name: str) -> Any:
    """Looks names up when they are first asked for, so that `import if_jax` itself costs nothing."""
    if name == "__version__":
        from importlib.metadata import version

        return version("if_jax")
    if name == "Cascade":
        from if_jax.inference.cascade import Cascade

        return Cascade
    raise AttributeError(f"module 'if_jax' has no attribute {name!r}")
