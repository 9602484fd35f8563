"""What the tests of the null models share."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly(request):
    """Many small programs run once; the shadow's promise of last bits needs the real compiler."""
    if request.path.name == "test_shadow.py":
        yield
        return
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
