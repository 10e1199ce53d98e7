"""The plan of drawing as one screen of text, and as JSON."""

from __future__ import annotations

from if_jax.planning.drawing import DrawingPlan
from if_jax.planning.estimate import Time
from if_jax.planning.wording import digits, unknowns, value_range, wrap


def as_text(plan: DrawingPlan) -> str:
    """The plan for a reader who has not read the documentation."""
    where, total = plan.slice, sum(plan.memory.values())
    rows = [
        *wrap(
            f"{plan.nets.name} on {where.name}: {where.chips} chip(s), each draws {plan.batch} picture(s) at a time",
            "  ",
        ),
        "",
        *wrap("Memory of a device, GB: " + ", ".join(f"{k} {v / 1e9:.2f}" for k, v in plan.memory.items()), "  "),
        f"  together {total / 1e9:.1f} of the {where.device_memory / 1e9:.1f} that a program may use: "
        + ("fits" if plan.fits else "DOES NOT FIT: plan a smaller --batch"),
        "",
        f"  {'':<14}{'draws':<9}{'calls':>5}{'% of peak':>12}   seconds a batch (best to worst)",
    ]
    for row in plan.parts:
        part, draws = row.part, f"{row.part.size} px" if row.part.size else ""
        share = f"{100 * row.peak_share.middle:.0f}"
        rows.append(f"  {part.name:<14}{draws:<9}{part.calls:>5}{share:>12}   {value_range(row.time, 's')}")
    pictures = where.devices * plan.batch
    rate = Time(*(pictures / seconds for seconds in (plan.total.middle, plan.total.best, plan.total.worst)))
    results = [
        ("from prompts to pictures", value_range(plan.total, "s")),
        ("pictures a second", value_range(rate)),
        ("a thousand pictures", value_range(plan.chip_hours, "chip-hours")),
    ]
    if plan.price:
        results.append((f"at {plan.price:g} a chip-hour", value_range(plan.chip_hours.times(plan.price))))
    rows += ["", *(f"  {name:<26}{value}" for name, value in results), ""]
    largest = sorted(plan.computing.by_block, key=lambda row: -row[2])[:4]
    share = ", ".join(f"{label} {seconds / plan.total.middle:.0%}" for label, _, seconds in largest)
    rows += wrap(f"Most of it: {share}", "  ")
    rows += wrap(
        f"How sure: by cycles that the TPU compiler (libtpu {plan.libtpu}) notes for {plan.blocks} blocks on "
        f"{where.generation.name}; no TPU was used. Best: all but matrix products 2.7 times faster, as one published "
        "time says. Weights and computing in bfloat16. Not counted: the sampler's own arithmetic, reading weights, "
        f"writing pictures. {digits(sum(part.part.calls for part in plan.parts))} network calls.",
        "  ",
    )
    return "\n".join([*rows, *unknowns(plan.libtpu, plan.computing.failed, plan.computing.unestimated)])


def as_json(plan: DrawingPlan) -> dict[str, object]:
    """The plan's numbers, in bytes and seconds."""

    def three(time: Time) -> dict[str, float]:
        return {"estimate": time.middle, "best": time.best, "worst": time.worst}

    return {
        "cascade": plan.nets.name,
        "slice": plan.slice.name,
        "chips": plan.slice.chips,
        "batch": plan.batch,
        "libtpu": plan.libtpu,
        "memory_bytes": plan.memory,
        "memory_limit": plan.slice.device_memory,
        "fits": plan.fits,
        "parts": [
            {
                "name": row.part.name,
                "size": row.part.size,
                "calls": row.part.calls,
                "seconds": three(row.time),
                "share_of_peak": three(row.peak_share),
            }
            for row in plan.parts
        ],
        "batch_seconds": three(plan.total),
        "pictures_a_second": plan.slice.devices * plan.batch / plan.total.middle,
        "chip_hours_a_thousand": three(plan.chip_hours),
        "cost_a_thousand": three(plan.chip_hours.times(plan.price)) if plan.price else None,
        "blocks_without_figures": plan.computing.failed,
        "operations_without_estimate": dict(plan.computing.unestimated),
    }
