"""The contract suite: what every transformation that acts during training must pass.

Use it on your own::

    import adaptivenet as an, optax, pytest

    def make(strength):
        return optax.chain(optax.adam(1e-2), my_transformation(strength))

    @pytest.mark.parametrize("mode", an.testing.MODES)
    @pytest.mark.parametrize("subject", an.testing.SUBJECTS)
    def test_contract(subject, mode):
        an.testing.check(make, subject=subject, mode=mode)

A factory ``make(strength)`` builds the transformation for one number in (0, 1), possibly traced: a
sparsity, a decay, whatever a population may sweep. It may ignore it.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.pruning import transformation

# optax itself needs the standard promotion of dtypes, whatever the caller's setting is: hence the
# decorators below.
PyTree = Any
Make = Callable[[Any], optax.GradientTransformation]

__all__ = [
    "MODES",
    "SUBJECTS",
    "ContractError",
    "check",
    "check_checkpoint",
    "check_landing",
    "check_resume",
    "check_sharded",
]

SUBJECTS = ("dict", "list", "linen", "nnx_state", "nnx_optimizer")
MODES = ("eager", "jit", "scan", "vmap_seeds", "vmap_strengths")

_STRENGTHS = (0.3, 0.6, 0.9)
_STEPS = 6
_SIZES = (8, 16, 4)


class ContractError(AssertionError):
    """A transformation broke the contract; the message says where and how.

    >>> issubclass(ContractError, AssertionError)
    True
    """


class _Subject(NamedTuple):
    """A thing to train: ``step(tx, carry, batch)`` with carry = (params, opt_state)."""

    start: Callable[[Any, jax.Array], tuple[PyTree, PyTree]]
    step: Callable[[Any, tuple[PyTree, PyTree], Any], tuple[PyTree, PyTree]]


def _batches(key: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    inputs = jax.random.normal(key, (steps, 5, _SIZES[0]))
    return inputs, jnp.tanh(inputs[..., : _SIZES[-1]] * 2.0)


def _init_dict(key: jax.Array) -> PyTree:
    params = {}
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(_SIZES)):
        key, now = jax.random.split(key)
        kernel = jax.random.normal(now, (fan_in, fan_out)) * fan_in**-0.5
        params[f"dense{layer + 1}"] = {"kernel": kernel, "bias": jnp.zeros(fan_out)}
    return params


def _init_list(key: jax.Array) -> PyTree:
    layers = _init_dict(key)
    return [[layer["kernel"], layer["bias"]] for layer in layers.values()]


def _forward(pairs: Sequence[tuple[jax.Array, jax.Array]], inputs: jax.Array) -> jax.Array:
    hidden = inputs
    for place, (kernel, bias) in enumerate(pairs):
        hidden = hidden @ kernel.astype(jnp.float32) + bias.astype(jnp.float32)
        hidden = jax.nn.relu(hidden) if place + 1 < len(pairs) else hidden
    return hidden


def _apply_dict(params: PyTree, inputs: jax.Array) -> jax.Array:
    return _forward([(layer["kernel"], layer["bias"]) for layer in params.values()], inputs)


def _apply_list(params: PyTree, inputs: jax.Array) -> jax.Array:
    return _forward([(kernel, bias) for kernel, bias in params], inputs)


def _functional(init: Callable[..., PyTree], apply: Callable[..., Any]) -> _Subject:
    def start(tx: Any, key: jax.Array) -> tuple[PyTree, PyTree]:
        params = init(key)
        return params, tx.init(params)

    def step(tx: Any, carry: tuple[PyTree, PyTree], batch: Any) -> tuple[PyTree, PyTree]:
        params, opt_state = carry
        inputs, targets = batch
        grads = jax.grad(lambda p: jnp.mean((apply(p, inputs) - targets) ** 2))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return _Subject(start, step)


def _linen() -> _Subject:
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, inputs: jax.Array) -> jax.Array:
            hidden = nn.relu(nn.Dense(_SIZES[1], name="dense1")(inputs))
            return nn.Dense(_SIZES[2], name="dense2")(hidden)

    net = Net()
    return _functional(
        lambda key: net.init(key, jnp.zeros((1, _SIZES[0])))["params"],
        lambda params, inputs: net.apply({"params": params}, inputs),
    )


def _nnx_net(key: jax.Array) -> Any:
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.dense1 = nnx.Linear(_SIZES[0], _SIZES[1], rngs=rngs)
            self.dense2 = nnx.Linear(_SIZES[1], _SIZES[2], rngs=rngs)

        def __call__(self, inputs: jax.Array) -> jax.Array:
            return self.dense2(jax.nn.relu(self.dense1(inputs)))

    return Net(nnx.Rngs(key))


def _nnx_state() -> _Subject:
    from flax import nnx

    graph = nnx.graphdef(_nnx_net(jax.random.key(0)))
    return _functional(
        lambda key: nnx.state(_nnx_net(key), nnx.Param),
        lambda params, inputs: nnx.merge(graph, params)(inputs),
    )


def _nnx_optimizer() -> _Subject:
    from flax import nnx

    def start(tx: Any, key: jax.Array) -> tuple[PyTree, PyTree]:
        model = _nnx_net(key)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        return nnx.as_pure(nnx.state(model, nnx.Param)), nnx.as_pure(optimizer.opt_state)

    def step(tx: Any, carry: tuple[PyTree, PyTree], batch: Any) -> tuple[PyTree, PyTree]:
        params, opt_state = carry
        inputs, targets = batch
        model = _nnx_net(jax.random.key(0))
        nnx.update(model, params)
        # Built anew because tx may close over traced numbers, which a graph definition cannot.
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        nnx.update(optimizer.opt_state, nnx.state(opt_state))
        grads = nnx.grad(lambda m: jnp.mean((m(inputs) - targets) ** 2))(model)
        optimizer.update(model, grads)
        return nnx.as_pure(nnx.state(model, nnx.Param)), nnx.as_pure(optimizer.opt_state)

    return _Subject(start, step)


def _subject(name: str) -> _Subject:
    makers: dict[str, Callable[[], _Subject]] = {
        "dict": lambda: _functional(_init_dict, _apply_dict),
        "list": lambda: _functional(_init_list, _apply_list),
        "linen": _linen,
        "nnx_state": _nnx_state,
        "nnx_optimizer": _nnx_optimizer,
    }
    if name not in makers:
        raise ValueError(f"subject={name!r}; choose one of {', '.join(SUBJECTS)}.")
    return makers[name]()


def _run(
    subject: _Subject, make: Make, strength: Any, key: jax.Array, batches: Any, mode: str
) -> tuple[PyTree, PyTree]:
    tx = optax.with_extra_args_support(make(strength))
    carry = subject.start(tx, key)
    if mode == "scan":
        return jax.lax.scan(lambda c, b: (subject.step(tx, c, b), None), carry, batches)[0]
    step = jax.jit(lambda c, b: subject.step(tx, c, b)) if mode == "jit" else None
    for place in range(len(batches[0])):
        batch = jax.tree.map(lambda leaf: leaf[place], batches)  # noqa: B023 (used at once)
        carry = step(carry, batch) if step else subject.step(tx, carry, batch)
    return carry


@jax.numpy_dtype_promotion("standard")
def check(make: Make, *, subject: str = "dict", mode: str = "jit", steps: int = _STEPS) -> None:
    """Trains a small network with a transformation and checks the contract.

    Args:
      make: factory of the transformation; see the module.
      subject: kind of tree, one of :data:`SUBJECTS`.
      mode: way of running, one of :data:`MODES`. The result is compared with another way of
        running, populations member by member with single runs.
      steps: number of updates.

    Raises:
      ContractError: parameters do not land on the mask, become non-finite, change their structure
        or dtype, or depend on the way of running.
      ValueError: an unknown subject or mode.

    >>> from adaptivenet import pruning
    >>> check(lambda s: optax.chain(optax.sgd(0.1), pruning.prune(s)), subject="list", mode="scan")
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}; choose one of {', '.join(MODES)}.")
    kind = _subject(subject)
    batches = _batches(jax.random.key(1), steps)
    keys = jax.random.split(jax.random.key(0), len(_STRENGTHS))
    where = f"subject {subject!r}, mode {mode!r}"
    if mode in ("vmap_seeds", "vmap_strengths"):
        strengths = [0.5] * len(keys) if mode == "vmap_seeds" else list(_STRENGTHS)
        if mode == "vmap_strengths":
            keys = jnp.stack([keys[0]] * len(keys))

        def member(key: jax.Array, strength: jax.Array) -> Any:
            return _run(kind, make, strength, key, batches, "scan")

        together = jax.jit(jax.vmap(member))(keys, jnp.asarray(strengths, jnp.float32))
        single = jax.jit(member)
        for place, strength in enumerate(strengths):
            one = jax.tree.map(lambda leaf: leaf[place], together)  # noqa: B023 (used at once)
            alone = single(keys[place], jnp.float32(strength))
            _compare(one, alone, f"{where}, member {place}")
            check_landing(*one, where=f"{where}, member {place}")
        return
    tx = make(0.5)
    initial = kind.start(optax.with_extra_args_support(tx), keys[0])
    final = _run(kind, make, 0.5, keys[0], batches, mode)
    _same_shape(initial, final, where)
    check_landing(*final, where=where)
    reference = "scan" if mode == "jit" else "jit"
    _compare(final, _run(kind, make, 0.5, keys[0], batches, reference), where)


def check_landing(params: PyTree, opt_state: PyTree, *, where: str = "") -> None:
    """Checks that parameters are finite, and exactly zero where a mask in the state is False.

    Args:
      params: parameters after a step.
      opt_state: the optimizer state of that step; states without a mask check finiteness only.
      where: prefix of the message.

    Raises:
      ContractError: a parameter is not zero although the mask is False, or is not finite.

    >>> from adaptivenet import pruning
    >>> state = pruning.prune(0.5).init({"w": jnp.ones((2, 2))})
    >>> check_landing({"w": jnp.ones((2, 2))}, state)
    """
    for name, leaf in zip(trees.paths(params), jax.tree.leaves(params), strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.all(jnp.isfinite(leaf))):
            raise ContractError(f"{where}: leaf {name!r} is not finite.")
    for state in transformation._states(opt_state):

        def land(keep: jax.Array, param: jax.Array) -> int:
            return int(jnp.sum(~keep & (param != 0)))

        astray = trees.map_synapses(land, state.mask, params)
        for name, number in zip(trees.paths(astray), jax.tree.leaves(astray), strict=True):
            if number:
                raise ContractError(
                    f"{where}: {number} synapses of leaf {name!r} are not zero although the mask "
                    "is False. Is prune() the last transformation of the chain, and is every "
                    "change of the parameters made by optax.apply_updates?"
                )


@jax.numpy_dtype_promotion("standard")
def check_checkpoint(make: Make, *, subject: str = "dict", folder: str | None = None) -> None:
    """Checks that parameters and optimizer state survive orbax bit for bit.

    Args:
      make: factory of the transformation.
      subject: kind of tree.
      folder: where to write; a temporary one by default.

    Raises:
      ContractError: a leaf comes back changed.

    >>> check_checkpoint(lambda s: optax.adam(1e-3), subject="list")  # doctest: +SKIP
    """
    kind = _subject(subject)
    carry = _run(kind, make, 0.5, jax.random.key(0), _batches(jax.random.key(1), 2), "jit")
    _identical(carry, _through_orbax(carry, folder), f"subject {subject!r}, checkpoint")


@jax.numpy_dtype_promotion("standard")
def check_resume(make: Make, *, subject: str = "dict", steps: int = _STEPS) -> None:
    """Checks that a run resumed from a checkpoint is the run uninterrupted, bit for bit.

    Args:
      make: factory of the transformation.
      subject: kind of tree.
      steps: updates in all; the run is cut in the middle.

    Raises:
      ContractError: a leaf differs.

    >>> check_resume(lambda s: optax.adam(1e-3), subject="list")  # doctest: +SKIP
    """
    kind = _subject(subject)
    tx = optax.with_extra_args_support(make(0.5))
    batches = _batches(jax.random.key(1), steps)
    step = jax.jit(lambda c, b: kind.step(tx, c, b))
    whole = resumed = kind.start(tx, jax.random.key(0))
    for place in range(steps):
        batch = jax.tree.map(lambda leaf: leaf[place], batches)  # noqa: B023 (used at once)
        whole = step(whole, batch)
        if place == steps // 2:
            resumed = _through_orbax(resumed, None)
        resumed = step(resumed, batch)
    _identical(whole, resumed, f"subject {subject!r}, resumed")


@jax.numpy_dtype_promotion("standard")
def check_sharded(make: Make, *, steps: int = _STEPS, devices: Any = None) -> None:
    """Checks that a run over a mesh of devices is the run on one device, bit for bit.

    The gradients are elementwise, so that no sum is reordered: what differs is the transformation.

    Args:
      make: factory of the transformation.
      steps: number of updates.
      devices: those of the mesh, all by default; their number must divide 16.

    Raises:
      ContractError: a leaf differs, or a sharded leaf was gathered.

    >>> from adaptivenet import pruning
    >>> check_sharded(lambda s: optax.chain(optax.sgd(0.1), pruning.prune(s)))
    """
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    devices = jax.devices() if devices is None else list(devices)
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    tx = optax.with_extra_args_support(make(0.5))
    key = jax.random.key(0)
    params = {
        "kernel": jax.random.normal(key, (16, 6)),
        "bias": jnp.ones(16),
        "deep": [jax.random.normal(jax.random.fold_in(key, 1), (16, 2, 3))],
    }
    rows = NamedSharding(mesh, PartitionSpec("data"))
    spread = jax.device_put(params, rows)

    def step(carry: Any, target: jax.Array) -> Any:
        params, opt_state = carry
        grads = jax.tree.map(lambda p: jnp.sin(p * 3.0 + target), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    # The compiler of the CPU fuses multiplications into additions as the shapes of the shards
    # allow, which changes last bits; unoptimized code does not.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    init, advance = (jax.jit(f, compiler_options=options) for f in (tx.init, step))
    results = []
    for start in (params, spread):
        carry = (start, init(start))
        for target in np.linspace(0, 1, steps, dtype=np.float32):
            carry = advance(carry, target)
        results.append(carry)
    if len(devices) > 1:
        for name, leaf in zip(
            trees.paths(results[1][0]), jax.tree.leaves(results[1][0]), strict=True
        ):
            if leaf.sharding.is_fully_replicated:
                raise ContractError(f"sharded: leaf {name!r} was gathered.")
    _identical(results[0], jax.device_get(results[1]), f"{len(devices)} devices")


def _through_orbax(carry: PyTree, folder: str | None) -> PyTree:
    import orbax.checkpoint as ocp

    leaves, treedef = jax.tree.flatten(carry)
    with (
        tempfile.TemporaryDirectory() as temporary,
        ocp.CheckpointManager(folder or temporary) as manager,
    ):
        manager.save(0, args=ocp.args.StandardSave(carry))
        manager.wait_until_finished()
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves]
        abstract = jax.tree.unflatten(treedef, shapes)
        return manager.restore(0, args=ocp.args.StandardRestore(abstract))


def _same_shape(before: PyTree, after: PyTree, where: str) -> None:
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise ContractError(
            f"{where}: the structure changed from {jax.tree.structure(before)} to "
            f"{jax.tree.structure(after)}."
        )
    leaves = zip(trees.paths(before), jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    for name, old, new in leaves:
        if (jnp.shape(old), jnp.asarray(old).dtype) != (jnp.shape(new), jnp.asarray(new).dtype):
            raise ContractError(
                f"{where}: leaf {name!r} changed from {jnp.asarray(old).dtype}{jnp.shape(old)} to "
                f"{jnp.asarray(new).dtype}{jnp.shape(new)}."
            )


def _compare(got: PyTree, expected: PyTree, where: str) -> None:
    """Equal but for the rounding that another order of summation brings."""
    _same_shape(expected, got, where)
    pairs = zip(trees.paths(got), jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    for name, a, b in pairs:
        a, b = _numbers(a), _numbers(b)
        if jnp.issubdtype(a.dtype, jnp.floating):
            a, b = a.astype(np.float64), b.astype(np.float64)
            if not np.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True):
                worst = np.nanmax(np.abs(a - b))
                raise ContractError(f"{where}: {name!r} differs by up to {worst:g}.")
        elif not np.array_equal(a, b):
            raise ContractError(f"{where}: {name!r} differs in {np.sum(a != b)} places.")


def _numbers(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _identical(a: PyTree, b: PyTree, where: str) -> None:
    _same_shape(a, b, where)
    for name, x, y in zip(trees.paths(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if _numbers(x).tobytes() != _numbers(y).tobytes():
            raise ContractError(f"{where}: leaf {name!r} is not identical.")
