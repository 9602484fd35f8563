"""Landing with every optimizer that optax has, inside every wrapper; and what cannot work."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adaptivenet as an
from adaptivenet import pruning

# Shared, so that its event is compiled once for the whole module.
PRUNER = pruning.prune(0.6)

ALIASES = {
    "adabelief": {},
    "adadelta": {},
    "adafactor": {},
    "adagrad": {},
    "adam": {},
    "adamax": {},
    "adamaxw": {},
    "adamw": {},
    "adan": {},
    "amsgrad": {},
    "fromage": {},
    "lamb": {},
    "lars": {},
    "lbfgs": {},
    "lion": {},
    "nadam": {},
    "nadamw": {},
    "noisy_sgd": {"key": 0},
    "novograd": {},
    "optimistic_adam_v2": {},
    "optimistic_gradient_descent": {},
    "polyak_sgd": {"learning_rate": None},
    "radam": {},
    "rmsprop": {},
    "rprop": {},
    "sgd": {"momentum": 0.9, "nesterov": True},
    "sign_sgd": {},
    "signum": {},
    "sm3": {},
    "yogi": {},
}
CONTRIB = {
    "acprop": {},
    "ademamix": {},
    "adopt": {},
    "cocob": {"learning_rate": None},
    "dadapt_adamw": {},
    "dog": {},
    "dowg": {},
    "galore": {},
    "madgrad": {},
    "momo": {},
    "momo_adam": {},
    "muon": {},
    "prodigy": {},
    "schedule_free_adamw": {},
    "schedule_free_sgd": {},
    "simplified_ademamix": {},
    "sophia": {},
}


def build(name, module=optax, options=None):
    options = {"learning_rate": 0.01} | (options or {})
    return getattr(module, name)(**{k: v for k, v in options.items() if v is not None})


def parameters(dtype=jnp.float32):
    kernel = jax.random.normal(jax.random.key(0), (6, 5))
    deep = jax.random.normal(jax.random.key(1), (5, 4))
    return {
        "a": {"kernel": kernel.astype(dtype), "bias": jnp.ones(5, dtype)},
        "b": {"kernel": deep.astype(dtype)},
    }


def loss(params):
    return sum(
        jnp.sum(jnp.square(leaf.astype(jnp.float32) - 1)) for leaf in jax.tree.leaves(params)
    )


# What an optimizer asks for beside the gradient.
SIGNALS = {
    "lbfgs": ("value", "grad", "value_fn"),
    "momo": ("value",),
    "momo_adam": ("value",),
    "polyak_sgd": ("value",),
    "reduce_on_plateau": ("value",),
    "sophia": ("obj_fn",),
}


def train(tx, dtype=jnp.float32, steps=3, params=None, after=None, wanted=()):
    """Eager steps, checked one by one; optax mixes dtypes, hence the standard promotion."""
    tx = optax.with_extra_args_support(tx)
    params = parameters(dtype) if params is None else params
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
        for _ in range(steps):
            value, grads = jax.value_and_grad(loss)(params)
            signals = {"value": value, "grad": grads, "value_fn": loss, "obj_fn": loss}
            signals = {name: signals[name] for name in wanted}
            updates, state = tx.update(grads, state, params, **signals)
            params = optax.apply_updates(params, updates)
            if after is not None:
                after(params, state)
    return params, state


def exact(params, state, kept=20):
    """Exactly `kept` in the mask, and exact zeros elsewhere."""
    astray = an.trees.map_synapses(
        lambda m, p: np.sum(~np.asarray(m) & (np.asarray(p).astype(np.float64) != 0)),
        pruning.mask(state),
        params,
    )
    assert sum(jax.tree.leaves(astray)) == 0
    assert sum(int(m.sum()) for m in jax.tree.leaves(pruning.mask(state))) == kept


def test_no_alias_is_forgotten():
    """A new optimizer of optax must be added here, or be named with the reason why not."""
    deprecated = {"optimistic_adam"}
    found = {
        name
        for name in dir(optax)
        if getattr(getattr(optax, name), "__module__", "") == "optax._src.alias"
        and callable(getattr(optax, name))
        and name[0].islower()
    }
    assert {"adam", "sgd", "lbfgs"} <= found
    assert found - deprecated <= set(ALIASES)


@pytest.mark.parametrize("name", ALIASES)
def test_every_alias_lands(name):
    tx = optax.chain(build(name, optax, ALIASES[name]), PRUNER)
    start = parameters()
    params, state = train(tx, after=exact, wanted=SIGNALS.get(name, ()))
    assert np.any(params["a"]["kernel"] != start["a"]["kernel"])
    an.testing.check_landing(params, state)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["adagrad", "adam", "lamb", "lion", "sgd"])
def test_aliases_land_in_half_precision(name, dtype):
    # An eps of 1e-8 is zero in float16, whose parameters would become nan.
    eps = {"eps": 1e-3} if name == "adam" else {}
    tx = optax.chain(build(name, optax, ALIASES[name] | eps), PRUNER)
    params, state = train(tx, dtype, after=exact)
    assert params["a"]["kernel"].dtype == dtype
    an.testing.check_landing(params, state)


@pytest.mark.parametrize("name", CONTRIB)
def test_contributed_optimizers_land(name):
    tx = optax.chain(build(name, optax.contrib, CONTRIB[name]), PRUNER)
    an.testing.check_landing(*train(tx, after=exact, wanted=SIGNALS.get(name, ())))


SGD = optax.sgd(0.05)
CHAIN = optax.chain(SGD, PRUNER)
WRAPPERS = {
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.chain(optax.adam(0.1), PRUNER)),
    "named_chain": optax.named_chain(("sgd", SGD), ("prune", PRUNER)),
    "weight decay": optax.chain(SGD, optax.add_decayed_weights(-0.01), PRUNER),
    "MultiSteps around": optax.MultiSteps(CHAIN, every_k_schedule=2),
    "MultiSteps within": optax.chain(
        optax.MultiSteps(SGD, every_k_schedule=2).gradient_transformation(), PRUNER
    ),
    "inject_hyperparams within": optax.chain(
        optax.inject_hyperparams(optax.adam)(learning_rate=0.1), PRUNER
    ),
    "inject_hyperparams around": optax.inject_hyperparams(
        lambda learning_rate: optax.chain(optax.sgd(learning_rate), PRUNER)
    )(learning_rate=optax.linear_schedule(0.1, 0.01, 3)),
    "masked": optax.masked(CHAIN, {"a": {"kernel": True, "bias": False}, "b": True}),
    "masked optimizer": optax.chain(
        optax.masked(SGD, {"a": {"kernel": True, "bias": True}, "b": {"kernel": False}}), PRUNER
    ),
    "apply_if_finite": optax.apply_if_finite(CHAIN, max_consecutive_errors=3),
    "flatten within": optax.chain(optax.flatten(optax.adam(0.1)), PRUNER),
    "reduce_on_plateau": optax.chain(SGD, optax.contrib.reduce_on_plateau(), PRUNER),
    "sam": optax.chain(optax.contrib.sam(SGD, optax.sgd(0.01)), PRUNER),
    "mechanize within": optax.chain(optax.contrib.mechanize(SGD), PRUNER),
    "noise": optax.chain(SGD, optax.add_noise(0.1, 0.5, key=0), PRUNER),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_land(name):
    wrapper = WRAPPERS[name]
    skips = name == "MultiSteps around"  # its first step accumulates only
    wanted = SIGNALS.get(name, ())
    params, state = train(wrapper, steps=4, after=None if skips else exact, wanted=wanted)
    exact(params, state)
    an.testing.check_landing(params, state)


def test_multi_steps_counts_gradient_steps():
    tx = optax.MultiSteps(optax.chain(SGD, pruning.prune(0.6, every=2)), every_k_schedule=3)
    params = parameters()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), pruning.record(state).kept

    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides by its counter
        kept = jax.lax.scan(step, (params, tx.init(params)), None, length=7)[1]
    assert kept.tolist() == [50] * 5 + [20] * 2


def test_two_pruners_of_a_multi_transform():
    tx = optax.multi_transform(
        {
            "half": optax.chain(SGD, pruning.prune(0.5)),
            "tenth": optax.chain(optax.adam(0.1), pruning.prune(0.9)),
        },
        {"a": "half", "b": "tenth"},
    )
    params, state = train(tx)
    assert int((params["a"]["kernel"] != 0).sum()) == 15
    assert int((params["b"]["kernel"] != 0).sum()) == 2
    an.testing.check_landing(params, state)
    with pytest.raises(ValueError, match="holds 2 pruning states"):
        pruning.mask(state)
    assert pruning.record(state.inner_states["tenth"]).alive == 2


def test_partition_prunes_one_part():
    tx = optax.partition({"prune": CHAIN, "plain": SGD}, {"a": "plain", "b": "prune"})
    params, state = train(tx)
    assert int((params["b"]["kernel"] != 0).sum()) == 8
    assert np.all(params["a"]["kernel"] != 0)
    assert an.trees.paths(pruning.mask(state)) == ("b/kernel",)


def test_prune_itself_with_injected_hyperparameters():
    options = ("score", "structure", "allocation", "regrow", "select", "every", "seed", "ages")
    tx = optax.chain(
        SGD, optax.inject_hyperparams(pruning.prune, static_args=options)(schedule=0.5)
    )
    params, state = train(tx, steps=1)
    exact(params, state, kept=25)
    state[1].hyperparams["schedule"] = jnp.float32(0.9)
    updates, state = tx.update(params, state, params)
    exact(optax.apply_updates(params, updates), state, kept=5)


def test_apply_if_finite_keeps_the_zeros_when_it_rejects():
    tx = optax.apply_if_finite(CHAIN, max_consecutive_errors=3)
    params, state = train(tx, steps=1)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    updates, state = tx.update(bad, state, params)
    assert not bool(state.last_finite)
    exact(optax.apply_updates(params, updates), state)


def test_within_nnx_optimizer_under_jit():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.dense1 = nnx.Linear(6, 8, rngs=rngs)
            self.dense2 = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, inputs):
            return self.dense2(jax.nn.relu(self.dense1(inputs)))

    model = Net()
    optimizer = nnx.Optimizer(model, optax.chain(optax.adam(0.01), PRUNER), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, inputs):
        grads = nnx.grad(lambda m: jnp.mean((m(inputs) - 1.0) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer, jnp.ones((4, 6)))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    state = nnx.as_pure(optimizer.opt_state)
    exact(params, state, kept=64 - 38)
    an.testing.check_landing(params, state)


class TestWhatCannotWork:
    """A transformation cannot see the chain that it is in; `check_landing` finds what breaks it."""

    @pytest.mark.parametrize(
        "chain",
        {
            "before the optimizer": optax.chain(PRUNER, SGD),
            "before momentum": optax.chain(SGD, PRUNER, optax.trace(0.9)),
            "before clipping": optax.chain(SGD, PRUNER, optax.clip(0.1)),
            "before noise": optax.chain(SGD, PRUNER, optax.add_noise(0.01, 0.5, key=0)),
            "before averaging": optax.chain(SGD, PRUNER, optax.ema(0.9)),
            "inside mechanize": optax.contrib.mechanize(CHAIN),
        }.items(),
        ids=lambda item: item[0],
    )
    def test_what_comes_after_it_is_found(self, chain):
        params, state = train(chain[1])
        message = r"synapses of leaf '[ab]/kernel' are not zero.*Is prune\(\) the last"
        with pytest.raises(an.testing.ContractError, match=message):
            an.testing.check_landing(params, state)

    def test_changes_without_apply_updates_are_found(self):
        params, state = train(CHAIN)
        params = jax.tree.map(lambda p: p + 0.01, params)
        with pytest.raises(an.testing.ContractError, match=r"made by optax\.apply_updates\?"):
            an.testing.check_landing(params, state)

    def test_the_average_of_schedule_free_is_not_pruned_and_found(self):
        tx = optax.chain(optax.contrib.schedule_free_sgd(0.05), PRUNER)
        params, state = train(tx)
        an.testing.check_landing(params, state)
        averaged = optax.contrib.schedule_free_eval_params(state[0], params)
        with pytest.raises(an.testing.ContractError, match="are not zero although the mask"):
            an.testing.check_landing(averaged, state)
        # The remedy: the mask is a plain pytree, and apply_mask a plain function.
        exact(pruning.apply_mask(averaged, pruning.mask(state)), state)

    def test_lookahead_around_it_is_refused_with_the_reason(self):
        tx = optax.chain(optax.lookahead(SGD, 2, 0.5), PRUNER)
        with pytest.raises(TypeError, match=r"slow weights would be copied.*Put it inside"):
            tx.init(optax.LookaheadParams.init_synced(parameters()))

    def test_lookahead_outside_it_prunes_the_fast_weights(self):
        tx = optax.lookahead(CHAIN, sync_period=3, slow_step_size=0.5)
        params, state = train_lookahead(tx, 2)
        exact(params.fast, state)
        with pytest.raises(an.testing.ContractError, match="are not zero"):
            an.testing.check_landing(params.slow, state)


def train_lookahead(tx, steps):
    params = optax.LookaheadParams.init_synced(parameters())
    state = tx.init(params)
    for _ in range(steps):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(jax.grad(loss)(params.fast), state, params)
        params = optax.apply_updates(params, updates)
    return params, state
