"""Whether the recipe fits the devices: mesh, batch, memory."""

from __future__ import annotations

from jax.sharding import AbstractMesh, Mesh

from if_jax.config import Recipe
from if_jax.doctor.findings import Finding, Status, attempt
from if_jax.doctor.machine import memory_per_device
from if_jax.models.conditioning import CLIPShapes
from if_jax.models.t5 import T5Config
from if_jax.parallel import mesh as meshes
from if_jax.parallel import rules
from if_jax.training.memory import step_bytes

_ROOM = 0.9  # of the memory: the rest is the compiler's working space, fragments, and the batch


def mesh(recipe: Recipe) -> tuple[Finding, Mesh | None]:
    """The mesh of the recipe on all devices; None where it does not fit them."""

    def make() -> tuple[str, Mesh]:
        made = meshes.make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor)
        sizes = " × ".join(f"{name} {size}" for name, size in made.shape.items())
        return f"{sizes}, rules {recipe.mesh.rules}", made

    return attempt("mesh", "set --config.mesh.data=-1 --config.mesh.fsdp=1 --config.mesh.tensor=1", make)


def batch(recipe: Recipe, mesh: Mesh, processes: int) -> Finding:
    """Whether the batch divides over devices and processes."""

    def divide() -> tuple[str, None]:
        part = recipe.batch_size // recipe.accumulate
        rules.check_batch_size(part, mesh, rules.PRESETS[recipe.mesh.rules])
        if recipe.batch_size % processes:
            least = -(-recipe.batch_size // processes) * processes
            raise ValueError(
                f"batch_size {recipe.batch_size} does not divide over {processes} processes: use e.g. {least}"
            )
        return f"{recipe.batch_size} in {recipe.accumulate} part(s) over {mesh.size} device(s)", None

    return attempt("batch", "choose another --config.batch_size", divide)[0]


def memory(recipe: Recipe, text: T5Config | None, mesh: Mesh, clip: CLIPShapes | None = None) -> tuple[Finding, int]:
    """Whether a training step fits into a device, by estimate; and the bytes of one checkpoint.

    Args:
      recipe: what is to be trained.
      text: the frozen text encoder's configuration, where there is one.
      mesh: the recipe's, see `mesh`.
      clip: what is read of a CLIP, where one is read.
    """
    finding, sizes = attempt("memory", "report this recipe", lambda: ("", step_bytes(recipe, text, mesh, clip=clip)))
    if sizes is None:
        return finding, 0
    whole = sizes
    if recipe.mesh.rules != "dp":  # what is spread over the devices is whole in the checkpoint
        alone = AbstractMesh((1,) * len(meshes.AXES), meshes.AXES)
        whole = step_bytes(recipe, text, alone, clip=clip, activations=False)
    checkpoint = sum(whole[name] for name in ("parameters", "EMA", "moments"))
    limit, own = memory_per_device()
    return compare_memory(sizes, limit, own, recipe), checkpoint


def compare_memory(sizes: dict[str, int], limit: int, own: bool, recipe: Recipe) -> Finding:
    """Compares what a step takes with what a device has: what is certain fails, what is estimated warns.

    Args:
      sizes: bytes by kind, see `step_bytes`.
      limit: bytes of a device.
      own: whether they are the device's own, see `memory_per_device`.
      recipe: for its remedies.
    """
    activations = sizes["activations"]
    state = sum(sizes.values()) - activations
    where = f"{limit / 1e9:.1f} GB " + ("of the device" if own else "of system memory for each device")
    message = f"{state / 1e9:.2f} GB of state and gradients, "
    message += f"about {activations / 1e9:.2f} GB of activations (an estimate)"
    if state > limit:
        remedy = "--config.mesh.rules=fsdp --config.mesh.fsdp=DEVICES, or more devices, or optimizer.name=adafactor"
        return Finding("memory", "fail", f"{message}: the state alone exceeds the {where}", remedy)
    if state + activations > _ROOM * limit:
        remedy = f"--config.accumulate={2 * recipe.accumulate}"
        remedy += "" if recipe.remat == "blocks" else " or --config.remat=blocks"
        status: Status = "fail" if state + activations / 2 > limit else "warn"
        return Finding("memory", status, f"{message}: too much for {where}", remedy)
    return Finding("memory", "pass", f"{message}, of {where}")
