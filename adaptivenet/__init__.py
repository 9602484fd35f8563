"""adaptivenet: networks that compress themselves, as optax transformations.

The public API in one screen. Each name below is a submodule, loaded when it is first used, so that
``import adaptivenet`` costs next to nothing beyond what ``import jax`` costs;
``an.with_posterior`` is :func:`adaptivenet.posterior.with_posterior`::

    import adaptivenet as an
    import optax

    tx = optax.chain(
        optax.adam(1e-3),
        an.pruning.prune(an.pruning.cubic(final=0.95, start=500, end=3_000), every=100),
    )

================= ==============================================================================
``trees``         paths, selection of leaves by path, masks beside parameters
``counts``        exact counts and fractions of any size, without 64-bit integers
``selection``     the exact k-th largest score of a whole pytree, without sorting or gathering
``posterior``     what is believed of each parameter: estimators, Laplace, samplers, metrics
``pruning``       scores, schedules, allocations, structures, and the transformation ``prune``
``consolidation`` learning without forgetting: EWC, SI, cascades, sleep, lifelong pruning
``compression``   the file: what a sparse network weighs when written and read back
``data``          data sets with checksums; digits and MNIST-1D need no download
``models``        the subjects to compress
``training``      epochs as one scan, populations, checkpoints, tracking, typed configs
``emergence``     trajectories of synapses, null models, statistics over seeds, verdicts
``testing``       the contract suite that every transformation passes, for your own as well
================= ==============================================================================

>>> import adaptivenet as an
>>> "pruning" in dir(an)
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptivenet import (
        compression,
        consolidation,
        counts,
        data,
        emergence,
        models,
        posterior,
        pruning,
        selection,
        testing,
        training,
        trees,
    )
    from adaptivenet.posterior import with_posterior

__version__ = "0.1.0.dev0"

__all__ = [
    "__version__",
    "compression",
    "consolidation",
    "counts",
    "data",
    "emergence",
    "models",
    "posterior",
    "pruning",
    "selection",
    "testing",
    "training",
    "trees",
    "with_posterior",
]


def __getattr__(name: str) -> Any:
    """Import the public submodule ``name`` on first use (PEP 562)."""
    if name == "with_posterior":
        return importlib.import_module(f"{__name__}.posterior").with_posterior
    if name in __all__ and not name.startswith("_"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; its public names are " + ", ".join(__all__)
    )


def __dir__() -> list[str]:
    """List the public names together with what is already loaded."""
    return sorted({*globals(), *__all__})
