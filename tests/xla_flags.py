"""XLA flags for tests that mostly compile small programs."""

from importlib.metadata import version

# Machine code that is made quickly and runs slower. What is computed is decided before, and stays.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):  # newer ones do not know the flag, and end
    QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"


def devices(count: int) -> str:
    """The flags of a process with so many CPU devices."""
    return f"--xla_force_host_platform_device_count={count} {QUICK_TO_COMPILE}"
