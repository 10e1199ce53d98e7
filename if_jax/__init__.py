"""if_jax: the DeepFloyd IF text-to-image cascade in JAX and Flax.

`from if_jax import Cascade` draws; everything else is imported from its own module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from if_jax.inference.cascade import Cascade

__version__ = "0.1.0"
__all__ = ["Cascade", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports the cascade when it is first asked for, so that `import if_jax` itself costs nothing."""
    if name == "Cascade":
        from if_jax.inference.cascade import Cascade

        return Cascade
    raise AttributeError(f"module 'if_jax' has no attribute {name!r}")
