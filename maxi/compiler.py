"""Options that the step is compiled with, by platform, each with its reason and what it was measured to do."""

from collections.abc import Mapping


def options(platform: str, mesh: Mapping[str, int], deterministic: bool = False) -> dict[str, str | bool] | None:
    """What to give `jax.jit` as `compiler_options` for a step on a mesh of these sizes. None changes a result, but that
    `deterministic` makes it the same every time."""
    if platform == "gpu" and deterministic:
        # By default sums by atomic additions, and kernels that are chosen by timing them, may differ from run to run.
        return {"xla_gpu_deterministic_ops": True}
    if platform == "cpu":
        # Weights and moments are updated one after the other from the old ones. Without this analysis XLA:CPU copies all
        # moments first, because it does not see which of those updates comes last: Qwen2.5-0.5B's step, 1 x 512, then needs
        # 5.07 GiB beside its state, and 3.71 with it.
        return {"xla_cpu_copy_insertion_use_region_analysis": True}
    if platform != "tpu":
        return None
    # Room on the chip for larger fusions around matmuls; the default is 16 MiB of 128. Qwen3-0.6B's step on 16 v5e: -14 ms.
    chosen: dict[str, str | bool] = {"xla_tpu_scoped_vmem_limit_kib": "32768"}
    # Gathers run beside the computation on a v5e by themselves, on a v5p only when told: 153 instead of 161 ms on 64 of them.
    chosen["xla_enable_async_all_gather"] = "true"
    if all(size == 1 for axis, size in mesh.items() if axis != "fsdp"):
        # Gradients travel as all-to-alls (see `maxi.fsdp`), which block by default. The same step: -15 ms. The compiler
        # refuses it for groups of some of a slice's chips ("limited ICI").
        chosen["xla_tpu_enable_async_all_to_all"] = "true"
    return chosen
