"""A run that ends its own process at a chosen point; started by test_loop.py.

Usage: python killed_run.py FOLDER POINT, where POINT is "never", "after_epoch", "before_save",
"in_save" or "slow" (slow enough to be killed from outside).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from adaptivenet.training import Checkpoints, EarlyStopping, Interrupted, JsonlTracker, fit
from tests.training.problems import population

EPOCHS = 6


def before_epoch(state, epoch, last):
    """A hook whose effect depends on the metrics of the epoch before, to the last bit."""
    if last is None:
        return state
    return state._replace(
        params=jax.tree.map(
            lambda leaf: leaf * (1 - 1e-3 * last["loss"].reshape(-1, *(1,) * (leaf.ndim - 1))),
            state.params,
        )
    )


def run(folder, point="never"):
    problem = population(members=2)

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def after_epoch(state, epoch):
        if point == "after_epoch" and epoch == 3:
            die()
        if point == "slow":
            time.sleep(0.3)
        return state

    class Killed(Checkpoints):
        def save(self, epoch, tree, meta=None):
            if epoch == 4 and point == "before_save":
                die()
            if epoch == 4 and point == "in_save":
                from etils import epath

                # The last step of orbax is to rename the finished folder.
                for owner in (os, Path, type(epath.Path(folder))):
                    for name in ("rename", "replace"):
                        if hasattr(owner, name):
                            setattr(owner, name, lambda *args, **options: die())
            super().save(epoch, tree, meta)

    return fit(
        problem.state,
        **problem.arguments(),
        epochs=EPOCHS,
        before_epoch=before_epoch,
        after_epoch=after_epoch,
        early_stopping=EarlyStopping(patience=50),
        tracker=JsonlTracker(Path(folder) / "metrics.jsonl"),
        checkpoints=Killed(Path(folder) / "checkpoints", fingerprint="one"),
        name="arm",
    )


def flatten(result):
    """All the bits that a resumed run must share, by name."""
    leaves = jax.tree_util.tree_leaves_with_path((result.state, result.best.params))
    bits = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    bits.update(
        {f"best {name}": getattr(result.best, name) for name in ("epoch", "value", "stopped")}
    )
    bits.update({f"history {k}": v for k, v in result.history.items() if k != "seconds"})
    return bits


if __name__ == "__main__":
    try:
        finished = run(sys.argv[1], sys.argv[2])
    except Interrupted as error:
        print(error)
        raise SystemExit(130) from None
    np.savez(Path(sys.argv[1]) / "result.npz", **flatten(finished))
