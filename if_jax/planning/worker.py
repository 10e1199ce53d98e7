"""The process that compiles: started by `if_jax.planning.compiling`, so that a crash of the compiler ends nothing else.

Reads one JSON object a line, {"block", "generation"} or {"whole", "text", "slice", "slices"}, and answers each with one
line that begins with `MARK`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

MARK = "if_jax.planning: "  # libtpu writes lines of its own


def main() -> None:
    """Answers until its input ends."""
    for line in sys.stdin:
        answer: dict[str, Any]
        try:
            answer = _answer(json.loads(line))
        except Exception as error:  # the compiler's own errors have no common base, and each is only this block's
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(MARK + json.dumps(answer), flush=True)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    if "whole" in request:
        from if_jax.config import to_recipe
        from if_jax.models.t5 import T5Config
        from if_jax.planning.estimate import Case
        from if_jax.planning.slices import parse_slice
        from if_jax.planning.whole import compile_whole

        text = T5Config(**request["text"]) if request["text"] else None
        return compile_whole(Case(to_recipe(request["whole"]), text, parse_slice(request["slice"], request["slices"])))
    from if_jax.planning.blocks import Block
    from if_jax.planning.programs import compile_block
    from if_jax.planning.slices import GENERATIONS

    fields = request["block"]
    block = Block(**fields | {"sizes": tuple((name, value) for name, value in fields["sizes"])})
    return compile_block(block, GENERATIONS[request["generation"]])


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main()
