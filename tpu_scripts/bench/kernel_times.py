"""The kernels of a trace of JAX's profiler, by the time that they take.

    python tpu_scripts/bench/kernel_times.py FOLDER      # as given to jax.profiler.trace

Read from the trace by JAX itself, so that nothing else has to be installed; for pictures, open the folder in XProf.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


def kernel_times(folder: Path) -> list[dict[str, Any]]:
    """Names, milliseconds and calls of what the device ran in the newest trace under a folder, longest first.

    Numbers at the end of XLA's names are left out: `loop_add_fusion_12` counts as `loop_add_fusion`. Without a device
    in the trace, which is so on a CPU, the operations of XLA's threads are counted.
    """
    from jax.profiler import ProfileData

    traces = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise FileNotFoundError(f"{folder}: no *.xplane.pb, which jax.profiler.trace writes")
    planes = list(ProfileData.from_file(str(traces[-1])).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    lines = [line for plane in devices for line in plane.lines if line.name.startswith("Stream")]
    if not lines:
        lines = [line for plane in planes if plane.name == "/host:CPU" for line in plane.lines if "XLA" in line.name]
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for line in lines:
        for event in line.events:
            if event.name.startswith(("end: ", "Thunk", "Threadpool")):  # notes of a CPU's threads
                continue
            name = re.sub(r"([._]\d+)+$", "", event.name)
            seconds[name] += event.duration_ns / 1e9
            calls[name] += 1
    total = sum(seconds.values())
    return [
        {"kernel": name, "ms": 1e3 * took, "calls": calls[name], "share": took / total}
        for name, took in sorted(seconds.items(), key=lambda item: -item[1])
    ]


def table(kernels: list[dict[str, Any]], most: int = 25) -> str:
    """Markdown: the kernels that take longest."""
    text = "| kernel | ms | calls | share |\n|---|---:|---:|---:|\n"
    for each in kernels[:most]:
        text += f"| {each['kernel'][:80]} | {each['ms']:.2f} | {each['calls']} | {each['share']:.1%} |\n"
    return text


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    print(table(kernel_times(Path(sys.argv[1]))))
