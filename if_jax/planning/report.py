"""A plan as one screen of text, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from if_jax.planning.estimate import Case, StepTime, Time
from if_jax.planning.memory import ROOM, Memory
from if_jax.planning.wording import digits, unknowns, value_range, wrap

_DAY = 86400
_MUCH_TEXT = 0.2  # of a step's computing: worth keeping what the text encoder says


@dataclass(frozen=True)
class Plan:
    """All that is known of a recipe on a slice."""

    case: Case
    memory: Memory
    time: StepTime | None  # None where it does not fit, and nothing was compiled for it
    libtpu: str
    compile_seconds: float  # that the blocks took, whenever that was
    blocks: int
    price: float | None = None  # of a chip for an hour, in the user's money
    config: str = "RECIPE"  # as the command line names it
    changes: tuple[str, ...] = ()  # what the plan had to change in the recipe, as words of the command line
    note: str = ""  # why


def as_text(plan: Plan) -> str:
    """The plan for a reader who has not read the documentation, at most a screen of it."""
    rows = [*_head(plan), "", *_memory(plan)]
    if plan.time:
        rows += ["", *_time(plan, plan.time), "", *_result(plan, plan.time)]
    rows += ["", *_caveats(plan)]
    return "\n".join([*rows, "", *next_steps(plan)] if plan.memory.fits else rows)


def as_table(plans: Sequence[Plan]) -> str:
    """The best of a search beside each other, and how each is started.

    Args:
      plans: of one recipe on one slice, the best first.
    """
    best = plans[0]
    cells = [("mesh", "parts × pictures", "remat", "GB", "step s", "% of peak", "days", "chip-hours")]
    for plan in plans:
        case, time = plan.case, plan.time
        assert time is not None
        sizes = case.mesh.shape
        cells.append(
            (
                f"data {sizes['data']} × fsdp {sizes['fsdp']}",
                f"{case.recipe.accumulate} × {case.rows}",
                case.recipe.remat,
                f"{plan.memory.total / 1e9:.1f}",
                f"{digits(time.step.middle)} ({digits(time.step.best)}-{digits(time.step.worst)})",
                f"{100 * time.peak_share.middle:.0f}",
                digits(time.step.middle * case.recipe.steps / _DAY),
                digits(_chip_hours(case, time).middle),
            )
        )
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    limit = best.memory.limit / 1e9
    rows = [
        _head(best)[0],
        f"Batch {best.case.recipe.batch_size}; a device has {limit:.1f} GB. The fastest that fit:",
        "",
    ]
    rows += [f"{number or ' '}  {line}" for number, line in enumerate(table)]
    rows += ["", *_caveats(best)]
    for number, plan in enumerate(plans, 1):
        rows += ["", f"{number}.", *next_steps(plan)]
    return "\n".join(rows)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan's numbers, in bytes, seconds and shares."""
    case, time = plan.case, plan.time
    result: dict[str, Any] = {
        "slice": case.slice.name,
        "slices": case.slice.count,
        "chips": case.slice.chips,
        "hosts": case.slice.hosts,
        "mesh": dict(case.mesh.shape),
        "rules": case.recipe.mesh.rules,
        "batch_size": case.recipe.batch_size,
        "accumulate": case.recipe.accumulate,
        "pictures_at_a_time": case.rows,
        "remat": case.recipe.remat,
        "changed": list(plan.changes),
        "libtpu": plan.libtpu,
        "memory_bytes": plan.memory.kinds,
        "memory_limit": plan.memory.limit,
        "fits": plan.memory.fits,
        "whole_step_bytes": plan.memory.whole,
    }
    if time is None:
        return result
    return result | {
        "step_seconds": _three(time.step),
        "seconds_by_kind": time.by_kind,
        "seconds_by_block": [{"block": name, "times": times, "seconds": sec} for name, times, sec in time.by_block],
        "collective_seconds": time.collectives,
        "share_of_peak": _three(time.peak_share),
        "pictures_a_second": case.recipe.batch_size / time.step.middle,
        "run_days": _three(time.step.times(case.recipe.steps / _DAY)),
        "chip_hours": _three(_chip_hours(case, time)),
        "cost": _three(_chip_hours(case, time).times(plan.price)) if plan.price else None,
        "blocks_without_figures": time.failed,
        "operations_without_estimate": time.unestimated,
        "compile_seconds": plan.compile_seconds,
    }


def next_steps(plan: Plan) -> list[str]:
    """The commands that start what was planned."""
    case = plan.case
    name = plan.config.rpartition("/")[2].partition(":")[0].removesuffix(".py")
    words = " ".join([f"--config {plan.config} --workdir gs://BUCKET/runs/{name}", *plan.changes])
    price = f"; PRICE={plan.price:g}" if plan.price else ""
    rows = wrap(f"To start it: if-jax train {words}", indent="             ")
    rows += wrap(
        f"On the slice: launch/tpu_vm/settings.sh with TYPE={case.slice.accelerator_type}{price}; TRAIN=({words})",
        indent="             ",
    )
    return rows


def _head(plan: Plan) -> list[str]:
    case, recipe = plan.case, plan.case.recipe
    shape = "×".join(map(str, case.slice.shape))
    many = f"{case.slice.count} slices of " if case.slice.count > 1 else ""
    mesh = " × ".join(f"{name} {size}" for name, size in case.mesh.shape.items())
    rows = [
        f"{recipe.unet} on {many}{case.slice.name}: {case.slice.chips} chips ({shape}) in {case.slice.hosts} host(s)",
        f"A step is {recipe.batch_size} pictures: {case.ways} devices × {recipe.accumulate} part(s) × {case.rows} "
        "pictures at a time.",
        f"Mesh {mesh}, rules {recipe.mesh.rules}, remat {recipe.remat}.",
    ]
    if plan.note:
        rows += wrap(f"NOTE: {plan.note}", indent="      ")
    return rows


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    cells = [f"{name} {size / 1e9:.2f}" for name, size in memory.kinds.items() if size]
    rows = wrap("Memory of a device, GB: " + ", ".join(cells), indent="  ")
    total, limit = memory.total / 1e9, memory.limit / 1e9
    room = memory.limit - memory.total
    verdict = f"fits, {room / 1e9:.1f} to spare" if memory.fits else f"DOES NOT FIT, {-room / 1e9:.1f} too much"
    if memory.fits and memory.total > ROOM * memory.limit:
        verdict = f"may just fit, {room / 1e9:.1f} to spare: the activations are an estimate"
    rows.append(f"  together {total:.1f} of the {limit:.1f} that a program may use: {verdict}")
    if memory.whole:
        rows.append(f"  compiled whole, the step takes {memory.whole / 1e9:.2f} by the compiler's own account")
    return rows


def _time(plan: Plan, time: StepTime) -> list[str]:
    total = sum(time.by_kind.values())
    rows = [f"Time of a step, {total:.3g} s of computing"]
    kinds = sorted(time.by_kind.items(), key=lambda row: -row[1])
    rows += wrap("by kind:  " + ", ".join(f"{name} {sec / total:.0%}" for name, sec in kinds), "  ", "            ")
    largest = [f"{times}× {name} {sec / total:.0%}" for name, times, sec in time.by_block[:5]]
    rows += wrap("by block: " + "; ".join(largest), "  ", "            ")
    travel = ", ".join(f"{name} {sec:.3g} s" for name, sec in time.collectives.items() if sec)
    rows += wrap("between chips, meanwhile: " + (travel or "nothing"), "  ", "            ")
    return rows


def _result(plan: Plan, time: StepTime) -> list[str]:
    case, steps = plan.case, plan.case.recipe.steps
    batch = case.recipe.batch_size
    rate = Time(batch / time.step.middle, batch / time.step.worst, batch / time.step.best)
    days, hours = time.step.times(steps / _DAY), _chip_hours(case, time)
    unit, scale = ("days", 1.0) if days.middle >= 2 else ("hours", 24.0)
    rows = [
        ("step", value_range(time.step, "s")),
        ("pictures a second", value_range(rate)),
        ("share of the chips' peak", value_range(time.peak_share.times(100), "%")),
        (f"{steps:,} steps", value_range(days.times(scale), unit)),
        ("chip-hours", value_range(hours)),
    ]
    if plan.price:
        rows.append((f"cost at {plan.price:g} a chip-hour", value_range(hours.times(plan.price))))
    lines = ["                            estimate   (best to worst)"]
    lines += [f"  {name:<26}{value}" for name, value in rows]
    share = time.by_kind.get("text encoder", 0.0) / sum(time.by_kind.values())
    if share > _MUCH_TEXT and case.text and not case.recipe.new_words.tokens and not case.recipe.lora.text_encoder:
        lines += wrap(
            f"HINT: {share:.0%} of the computing is the frozen text encoder. `if-jax embed` keeps what it says once; "
            "data.embeddings then leaves it out of every step.",
            indent="      ",
        )
    return lines


def _caveats(plan: Plan) -> list[str]:
    time, generation = plan.time, plan.case.slice.generation.name
    if time is None:
        return wrap("Parameters to text encoder are exact; activations are estimated. Nothing was compiled.", "")
    rows = wrap(
        f"How sure: by cycles that the TPU compiler (libtpu {plan.libtpu}) notes for {plan.blocks} blocks on "
        f"{generation}; no TPU was used. Worst: those cycles, and nothing computed while chips exchange. Best: all but "
        "matrix products 2.7 times faster, as one published time says, and the exchange hidden. The exchange is a "
        "model, not measured. "
        "Not counted: reading data, samples, validation, checkpoints, faults.",
        indent="  ",
    )
    return [*rows, *unknowns(plan.libtpu, time.failed, time.unestimated)]


def _chip_hours(case: Case, time: StepTime) -> Time:
    return time.step.times(case.recipe.steps * case.slice.chips / 3600)


def _three(time: Time) -> dict[str, float]:
    return {"estimate": time.middle, "best": time.best, "worst": time.worst}
