"""Eight simulated CPU devices for every test, whatever else the machine has."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is compiled here is not what users would compile
# The tests spend their time in compiling, not in running: this halves it.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")

import jax

jax.config.update("jax_num_cpu_devices", 8)
