"""The process that compiles: started by `if_jax.planning.compiling`, so that a crash of the compiler ends nothing else.

Reads one JSON object a line, {"block", "generation"}, and answers each with one line that begins with `MARK`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

MARK = "if_jax.planning: "  # libtpu writes lines of its own


def main() -> None:
    """Answers until its input ends."""
    from if_jax.planning.blocks import Block
    from if_jax.planning.programs import compile_block
    from if_jax.planning.slices import GENERATIONS

    for line in sys.stdin:
        request = json.loads(line)
        fields = request["block"]
        block = Block(**fields | {"sizes": tuple((name, value) for name, value in fields["sizes"])})
        answer: dict[str, Any]
        try:
            answer = compile_block(block, GENERATIONS[request["generation"]])
        except Exception as error:  # the compiler's own errors have no common base, and each is only this block's
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main()
