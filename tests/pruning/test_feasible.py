"""What cannot work is refused by `init`, by path, with the way out."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivenet import pruning
from adaptivenet.counts import as_share
from adaptivenet.pruning.allocations import Field, Leaf
from adaptivenet.pruning.demands import Sparsity

PARAMS = {
    "wide": {"kernel": np.ones((50, 50), np.float32), "bias": np.ones(50, np.float32)},
    "thin": {"kernel": np.ones((1, 4), np.float32)},
}


@dataclass(frozen=True)
class FirstAlone:
    """An allocation of one's own that sets the counts itself."""

    def groups(self, sizes):
        return ((0,), (1,))

    def share_out(self, demand, field):
        singles = [field.of([place]) for place in range(len(field.leaves))]
        found = [
            pruning.allocations.share_out(pruning.Uniform(), demand, one)[0] for one in singles
        ]
        return [one._replace(members=(place,)) for place, one in enumerate(found)]


NOTHING_OF_THIN = r"a target of {:g} leaves none of the 4 units of leaf 'thin/kernel'; lower it"
REFUSED = {
    "uniform": (
        {"schedule": 0.9, "allocation": pruning.Uniform()},
        NOTHING_OF_THIN.format(0.9) + ".*or give the allocation a floor",
    ),
    "a floor that rounds to nothing": (
        {"schedule": 0.9, "allocation": pruning.Uniform(floor_share=0.1)},
        NOTHING_OF_THIN.format(0.9),
    ),
    "global": (
        {"schedule": 0.9999},
        "a target of 0.9999 leaves none of the 2504 units of leaf 'thin/kernel', 'wide/kernel'",
    ),
    "units": (
        {"schedule": 0.995, "structure": pruning.Unit()},
        "a target of 0.995 leaves none of the 54 units of leaf 'thin/kernel', 'wide/kernel'",
    ),
    "fixed": (
        {"schedule": 0.5, "allocation": pruning.PerPath({"thin": pruning.Fixed(0.9)})},
        r"PerPath: Fixed\(0.9\) of 'thin' leaves none of the 4 units of leaf 'thin/kernel'; lower",
    ),
    "fixed, whatever the schedule": (
        {"schedule": pruning.threshold(0.1), "allocation": pruning.PerPath(
            {"thin": pruning.Fixed(0.9)})},
        r"Fixed\(0.9\) of 'thin' leaves none",
    ),
    "a factor": (
        {"schedule": 0.95, "allocation": pruning.PerPath({"thin": 0.95})},
        r"leaves none of the 4 units of leaf 'thin/kernel'; .* lower its factor of 'thin'",
    ),
    "the default of rules": (
        {"schedule": 0.9, "allocation": pruning.PerPath({"wide": 0.5}, pruning.Uniform())},
        NOTHING_OF_THIN.format(0.9),
    ),
    "Erdos-Renyi": (
        {"schedule": 0.9996, "allocation": pruning.ErdosRenyiKernel()},
        r"leaves none of the 4 units of leaf 'thin/kernel'.* rule of its own by PerPath",
    ),
    "a budget": (
        {"schedule": 0.9, "allocation": pruning.Budget({"thin": 5000, "wide": 9000}),
         "select": "thin", },
        "Budget: 'wide' matches no prunable leaf",
    ),
    "a budget that buys nothing": (
        {"schedule": 0.9, "allocation": pruning.Budget({"thin": 5000}), "select": "thin"},
        "a target of 0.9 leaves 2000 of a cost of 20000, for which not even a unit of leaf "
        "'thin/kernel' can be kept, which costs 5000",
    ),
    "one's own": ({"schedule": 0.9, "allocation": FirstAlone()}, NOTHING_OF_THIN.format(0.9)),
    # The largest that a schedule asks for, wherever that is.
    "cubic": (
        {"schedule": pruning.cubic(0.9, 0, 9), "allocation": pruning.Uniform()}, "of 0.9 leaves"),
    "downwards": (
        {"schedule": pruning.linear(0.1, 0, 9, initial=0.9), "allocation": pruning.Uniform()},
        "of 0.9 leaves",
    ),
    "cyclic": (
        {"schedule": pruning.cyclic(0.1, 0.9, 4), "allocation": pruning.Uniform()}, "of 0.9 leaves"
    ),
    "AC/DC": (
        {"schedule": pruning.ac_dc(0.9, 2, 0, 9), "allocation": pruning.Uniform()}, "of 0.9 leaves"
    ),
    "rates": (
        {"schedule": pruning.rates(0.9, 0, 9), "allocation": pruning.Uniform()}, "of 0.9 leaves"
    ),
    "sawtooth": (  # 0.8 in the end, of which one unit is left; 0.88 in the last tooth
        {"schedule": pruning.sawtooth(0.8, 0, 9, period=1, overshoot=0.4),
         "allocation": pruning.Uniform()},
        "of 0.8799[0-9]* leaves|of 0.88 leaves|of 0.879.* leaves",
    ),
    # Other things that no event can do.
    "an N:M that does not divide": (
        {"schedule": 0.5, "structure": pruning.NofM(2, 4)},
        r"leaf 'thin/kernel' of shape \(1, 4\): the 1 entries of axis -2 are not divisible by m=4",
    ),
    "an N:M that is never asked for": (
        {"schedule": 0.0, "structure": pruning.NofM(1, 1)},
        r"leaf 'thin/kernel': NofM.* fixes the density; the target .* must be above 0",
    ),
    "blocks that do not divide": (
        {"schedule": 0.5, "structure": pruning.Block(2, 2)},
        r"leaf 'thin/kernel' of shape \(1, 4\): its last two axes cannot be cut by Block",
    ),
    "a selection of nothing": (
        {"schedule": 0.5, "select": "conv"}, "select='conv' matches no leaf"),
    "a rule for nothing": (
        {"schedule": 0.5, "allocation": pruning.PerPath({"conv": 0.5})},
        "PerPath: 'conv' matches no prunable leaf",
    ),
    "a structure for nothing": (
        {"schedule": 0.5, "structure": pruning.ByPath({"conv": pruning.Unit()})},
        "ByPath: 'conv' matches no prunable leaf",
    ),
    "costs that are not known": (
        {"schedule": lambda step: 0.5, "allocation": pruning.Budget(kind="macs"), "select": "."},
        r"Budget: the MACs of a synapse of leaf 'wide/bias' of shape \(50,\) are not known",
    ),
    "a budget of rows": (
        {"schedule": 0.5, "allocation": pruning.Budget(), "structure": pruning.FanIn()},
        "Budget chooses unit by unit, which leaf 'thin/kernel' cannot follow",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_init_refuses(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        pruning.prune(**options).init(PARAMS)


ACCEPTED = {
    "a floor": {"schedule": 0.9, "allocation": pruning.Uniform(floor=1)},
    "a share as a floor": {"schedule": 0.9, "allocation": pruning.Uniform(floor_share=0.25)},
    "what only the event can know": {"schedule": 0.99},
    "rows keep one": {"schedule": 0.99, "structure": pruning.FanIn()},
    "a rule that spares it": {
        "schedule": 0.9, "allocation": pruning.PerPath({"thin": 0.5}, pruning.Uniform())},
    "Erdos-Renyi spares thin leaves": {"schedule": 0.9, "allocation": pruning.ErdosRenyiKernel()},
    "a budget": {"schedule": 0.99, "allocation": pruning.Budget({"thin": 7})},
    "a closed loop may never go there": {
        "schedule": pruning.auto(0.1), "allocation": pruning.Uniform()},
    "a function": {"schedule": lambda step: 0.9, "allocation": pruning.Uniform()},
    "one's own": {"schedule": 0.5, "allocation": FirstAlone()},
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_init_accepts(name):
    assert pruning.prune(**ACCEPTED[name]).init(PARAMS).mask["thin"]["kernel"].all()


def test_what_is_traced_cannot_be_judged():
    def member(sparsity, factor):
        rules = pruning.PerPath({"thin": factor, "wide": pruning.Fixed(sparsity)})
        for allocation in (pruning.Uniform(), pruning.Global(floor_share=sparsity), rules):
            pruning.prune(sparsity, allocation=allocation).init(PARAMS)
        return pruning.prune(0.9, allocation=pruning.Uniform(floor_share=factor)).init(PARAMS).step

    jax.eval_shape(member, jnp.float32(0.99), jnp.float32(1.0))
    # A known target of traced parameters can.
    with pytest.raises(ValueError, match="leaves none of the 4 units"):
        jax.eval_shape(pruning.prune(0.9, allocation=pruning.Uniform()).init, PARAMS)


@pytest.mark.parametrize(
    ("score", "remedy"),
    [
        (
            pruning.fisher_tempered(),
            r"with_signals\(chain, fisher=an\.pruning\.signals\.fisher\(\)\)",
        ),
        (pruning.movement, r"with_signals\(chain, movement=an\.pruning\.signals\.movement\(\)\)"),
        (pruning.saliency, r"wrap the chain in an\.pruning\.with_signals"),
        (pruning.snr, r"wrap the chain in an\.with_posterior"),
    ],
)
def test_a_missing_signal_is_named_with_the_way_out(score, remedy):
    pruner = pruning.prune(0.5, score=score)
    message = rf"{score.__name__}\(\) asks for the signal '\w+', which nobody supplies: .*{remedy}"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(pruner.update, PARAMS, pruner.init(PARAMS), PARAMS)


def test_the_numbers_of_erdos_renyi_are_those_of_the_event():
    """The check counts with fractions what the event counts in limbs."""
    rng, allocation = np.random.default_rng(0), pruning.ErdosRenyiKernel()
    shapes = [tuple(int(n) for n in rng.integers(1, 40, rng.integers(2, 4))) for _ in range(5)]
    leaves = tuple(
        Leaf(str(k), s, jnp.float32, int(np.prod(s))) for k, s in enumerate([*shapes, (1, 2)])
    )
    living = jnp.asarray([leaf.units for leaf in leaves], jnp.uint32)
    size = int(living.sum())
    out = jax.jit(jax.vmap(lambda share: [
        contest.keep.astype(jnp.int32)
        for contest in allocation.share_out(Sparsity(as_share(share)), Field(leaves, living))
    ]))  # fmt: skip
    shares = np.float32([0.0, 0.3, 0.5, 0.9, 0.99, 0.999])
    found = np.stack(out(shares), axis=1)
    for share, row in zip(shares, found, strict=True):
        wanted = size - int(float(share) * size + 0.5)
        assert allocation.of_leaves(leaves, wanted) == row.tolist()
        assert sum(row) == wanted
