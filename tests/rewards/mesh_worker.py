"""Training by rewards on four simulated devices and on one; run by test_mesh.py in a process of its own.

python -m tests.rewards.mesh_worker OUT.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.xla_flags import devices

os.environ["XLA_FLAGS"] = devices(4)

import jax
import numpy as np

from kandinsky_jax import rewards
from kandinsky_jax.parallel.mesh import default_mesh
from tests.rewards import small


def runs(mesh: jax.sharding.Mesh | None) -> dict[str, object]:
    """The metrics of both kinds of training, and the norm of what was learned."""
    sampler, embeds = small.sampler(), small.embeds(4)
    draft = rewards.DraftConfig(updates=3, batch_size=8, gradient_steps=2, learning_rate=1e-2)
    ddpo = rewards.DDPOConfig(epochs=2, samples_per_epoch=16, sample_batch_size=8, train_batch_size=8, min_count=4)
    found: dict[str, object] = {}
    for name, train, config in (("draft", rewards.train_draft, draft), ("ddpo", rewards.train_ddpo, ddpo)):
        result = train(sampler, embeds, small.redness, config, mesh=mesh, quiet=True)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(result.changes)]
        found[name] = {"history": result.history, "changes": [float(np.abs(leaf).sum()) for leaf in leaves]}
    return found


if __name__ == "__main__":
    mesh = default_mesh()
    assert mesh is not None
    assert mesh.size == 4
    Path(sys.argv[1]).write_text(json.dumps({"mesh": runs(mesh), "alone": runs(None)}))
