"""Reading the TPU compiler's estimates out of the text of a real compile."""

from __future__ import annotations

from pathlib import Path

import pytest

from if_jax.planning.hlo_cycles import read_cycles

# libtpu 0.0.52 for v5e, stack frames left out: five steps of tanh(h @ w) under one scan, then a 3×3 convolution.
SCAN = (Path(__file__).parent / "scan.hlo").read_text()


def test_a_loop_counts_as_often_as_its_condition_says() -> None:
    once = read_cycles(SCAN.replace("constant(5)", "constant(1)"))
    five, nine = read_cycles(SCAN), read_cycles(SCAN.replace("constant(5)", "constant(9)"))
    body = once.by_kind["dense"]
    assert body == 5700
    assert five.by_kind["dense"] == 5 * body and nine.by_kind["dense"] == 9 * body
    assert nine.total - five.total == five.total - once.total > 4 * body  # layout is changed in it as well


def test_kinds_add_up_and_products_are_told_apart() -> None:
    cycles = read_cycles(SCAN)
    assert cycles.total == sum(cycles.by_kind.values()) == 54226
    assert cycles.by_kind["convolution"] == 7453
    assert cycles.unestimated == {}


def test_a_kernel_and_a_collective_are_named() -> None:
    head, tail = SCAN.split("ENTRY ")
    first, rest = tail.split("\n", 1)
    lines = [
        '  %k.1 = bf16[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"',
        "  %r.1 = f32[8]{0} all-reduce(%p), replica_groups={}, to_apply=%add",
        "  %g.1 = f32[8]{0} all-gather-start(%p), dimensions={0}",
        "  %g.2 = f32[8]{0} all-gather-done(%g.1)",
        '  %c.1 = bf16[8]{0} custom-call(%p), custom_call_target="ConcatBitcast"',
        "  %s.1 = s32[] shift-left(%p, %p)",
    ]
    cycles = read_cycles("ENTRY ".join([head, "\n".join([first, *lines, rest])]))
    assert cycles.unestimated == {"tpu_custom_call": 1, "all-reduce": 1, "all-gather": 1}
    assert cycles.total == 54226


def test_of_the_branches_the_dearest_counts() -> None:
    """As in the training step, whose update is a branch."""

    def region(name: str, cycles: int) -> str:
        return f'%{name} (a: f32[]) -> f32[] {{\n  ROOT %f = f32[] fusion(%a), "estimated_cycles":"{cycles}"\n}}\n'

    branches = "branch_computations={%small, %large}"
    entry = f"ENTRY %main (a: f32[]) -> f32[] {{\n  ROOT %c = f32[] conditional(%a, %b, %b), {branches}\n}}\n"
    assert read_cycles(region("small", 10) + region("large", 70) + entry).total == 70


@pytest.mark.parametrize(("text", "match"), [("", "no ENTRY"), ("ENTRY %m (a: f32[]) -> f32[] {\n}", "no estimated")])
def test_another_text_is_refused(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_cycles(text)
