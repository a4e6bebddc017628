"""Options that the step is compiled with, by platform, each with its reason and what it was measured to do."""

OPTIONS: dict[str, dict[str, str]] = {
    "tpu": {
        # Gradients travel as all-to-alls (see `maxi.fsdp`); by default those block. Qwen3-0.6B's step on 16 v5e: -15 ms.
        "xla_tpu_enable_async_all_to_all": "true",
        # Room on the chip for larger fusions around matmuls; the default is 16 MiB of 128. The same step: -14 ms.
        "xla_tpu_scoped_vmem_limit_kib": "32768",
    },
}
"""Platform -> XLA's options. None changes a result."""


def options(platform: str) -> dict[str, str] | None:
    """What to give `jax.jit` as `compiler_options` for the step."""
    return OPTIONS.get(platform)
