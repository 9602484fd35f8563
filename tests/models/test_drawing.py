"""The drawing of a coupling holds every group, member and shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import adaptivenet as an


def test_every_member_has_a_mark():
    params = an.models.lenet5_init(jax.random.key(0))
    coupling = an.pruning.couple(an.models.lenet5, params, jnp.ones((1, 784)))
    (axes,) = an.models.draw_coupling(coupling).axes
    members = sum(len(group.members) for group in coupling.groups)
    assert len(axes.texts) == len(axes.collections) == members
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert "conv2/kernel  5 x 5 x 20 x 50" in labels
    counts = [tick.get_text() for tick in axes.get_xticklabels()]
    assert sorted(counts[:3]) == ["20", "50", "500"]
