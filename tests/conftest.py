"""Eight CPU devices for every test, set before jax starts."""

import os

# Tiny programs: compiling is all the time there is, so it is done quickly rather than well.
FLAGS = " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
os.environ["HF_HUB_OFFLINE"] = "1"
