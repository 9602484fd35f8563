"""A population spread over devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_AXIS = "population"


def data_mesh(devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Makes a one-dimensional mesh over devices, for data-parallel work.

    Args:
        devices: The devices; by default all.

    Returns:
        A mesh whose only axis is "population", of type Auto (the compiler places what is between).

    Raises:
        ValueError: If there are no devices.

    >>> dict(data_mesh(jax.devices()[:1]).shape)
    {'population': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    if not devices:
        raise ValueError("a mesh needs at least one device")
    return jax.make_mesh((len(devices),), (_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def shard_population(state: Any, mesh: jax.sharding.Mesh) -> Any:
    """Puts each leaf's leading population axis over the devices of a mesh.

    A function from `over_population(..., method="vmap")` then runs every member on its own device.

    Args:
        state: Pytree of arrays that all lead with the population axis.
        mesh: From `data_mesh`.

    Returns:
        The same values, sharded.

    Raises:
        ValueError: If a leaf has no population axis, or its members cannot be shared out evenly;
            names the leaf.

    >>> import jax.numpy as jnp
    >>> shard_population({"w": jnp.arange(4.0)}, data_mesh(jax.devices()[:1]))
    {'w': Array([0., 1., 2., 3.], dtype=float32)}
    """
    devices = int(np.prod(list(mesh.shape.values())))
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))

    def place(path: Any, leaf: Any) -> Any:
        shape = jax.numpy.shape(leaf)
        if not shape or shape[0] % devices:
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "the state"
            raise ValueError(
                f"{name} has shape {shape}; its first axis must be a population of a multiple of "
                f"{devices}, the number of devices"
            )
        return jax.device_put(leaf, sharding)

    return jax.tree_util.tree_map_with_path(place, state)
