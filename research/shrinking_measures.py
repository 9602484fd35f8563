"""What is measured of networks that shrink, the claims' numbers, and the tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from research import shrinking_blocks as condensed
from research.results import mean_interval
from research.rounds import Task
from research.shrinking_arms import Course, Net, cross_entropy
from research.shrinking_latency import measure
from research.shrinking_subjects import SUBJECTS
from research.study import Table

if TYPE_CHECKING:
    from research.shrinking import Blocks, Config

PyTree = Any
Metrics = dict[str, np.ndarray]
EACH = 500


class Networks:
    """The networks of one subject on one seed, and their numbers.

    Args:
      name: of the subject.
      course: of its training.
    """

    def __init__(self, name: str, course: Course) -> None:
        self.name, self.course, self.nets = name, course, {}
        self._evaluate: dict[Any, Any] = {}
        self.found: dict[str, float] = {}
        self.timed: dict[str, PyTree] = {}

    def add(self, arm: str, net: Net, beside: Net | None = None) -> None:
        """Measures a network.

        Args:
          arm: its name, such as "shrunk/0.5".
          net: the network.
          beside: the dense network, if the units that are gone are to be put back as zeros, and
            both networks timed.
        """
        apply, task = self.course.subject.apply, self.course.task
        self.nets[arm] = net
        if arm == "dense" or beside is not None:
            self.timed[arm] = net.variables
        self._score(arm, apply, net.variables)
        sizes = [int(leaf.size) for leaf in jax.tree.leaves(net.variables)]
        self._note(arm, parameters=sum(sizes), bytes=condensed.stored(net.variables))
        # Traced on two examples, so that the batch can be told from an axis of one unit.
        self._note(arm, macs=net.costs.macs / 2, activations=net.costs.activations / 2)
        if beside is None:
            return
        masked, share = self.course.masked(net, beside), arm.split("/")[1]
        self.timed[f"masked/{share}"] = masked
        shown = task.check_inputs[:EACH]
        outputs = [np.asarray(apply(v, shown)) for v in (masked, net.variables)]
        apart = float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[0]).max())
        self._note(arm, difference=apart)

    def add_condensed(self, blocks: Blocks, seed: int, done: Callable[[], None]) -> None:
        """Trains, condenses and measures the founding MLP, shrunk, in blocks."""
        shrunk = self.nets[f"shrunk/{blocks.share:g}"].variables
        params = condensed.train(blocks, shrunk, self.course.task, seed, done)
        small = condensed.condense(blocks, params)
        self._score("condensed", condensed.mlp, small)
        kept = sum(int(jnp.count_nonzero(leaf)) for leaf in jax.tree.leaves(params))
        self._note("condensed", parameters=kept, bytes=condensed.stored(small))
        self._note("condensed", macs=condensed.products(small))
        self.timed["condensed"] = small

    def measured(self, batches: tuple[int, ...], rounds: int) -> dict[str, float]:
        """All numbers, those of the clock among them."""
        seconds = measure(self.name, self.timed, self.course.task.check_inputs, batches, rounds)
        for kind, times in seconds.items():
            for arm, value in times.items():
                self._note(arm, **{kind.replace("/", "_"): value})
        return self.found

    def _note(self, arm: str, **numbers: float) -> None:
        self.found |= {f"{what}/{self.name}/{arm}": float(v) for what, v in numbers.items()}

    def _score(self, arm: str, apply: Any, variables: PyTree) -> None:
        if apply not in self._evaluate:

            def numbers(variables: PyTree, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
                logits = apply(variables, x)
                right = jnp.mean((jnp.argmax(logits, -1) == y).astype(jnp.float32))
                return right, cross_entropy(logits, y)

            self._evaluate[apply] = jax.jit(numbers)
        accuracy, loss = _averaged(self._evaluate[apply], variables, self.course.task)
        self._note(arm, accuracy=accuracy, loss=loss)


def _averaged(numbers: Any, variables: PyTree, task: Task) -> tuple[float, float]:
    sums, examples = np.zeros(2), len(task.check_inputs)
    for start in range(0, examples, EACH):
        part = slice(start, start + EACH)
        x, y = task.check_inputs[part], task.check_targets[part]
        sums += len(x) * np.array(numbers(variables, x, y))
    accuracy, loss = sums / examples
    return float(accuracy), float(loss)


def claimed(config: Config, m: Metrics) -> Metrics:
    """The paired differences that the claims are about, each the mean over subjects."""
    names = [name for name in SUBJECTS if getattr(config, name).shares]
    units, scratch = [], []
    for name in names:
        shares = getattr(config, name).shares
        gains = [
            m[f"accuracy/{name}/shrunk/{s:g}"] - m[f"accuracy/{name}/random/{s:g}"] for s in shares
        ]
        units.append(np.mean(gains, axis=0))
        least = f"{shares[-1]:g}"
        gain = m[f"accuracy/{name}/shrunk/{least}"] - m[f"accuracy/{name}/scratch/{least}"]
        scratch.append(gain)
    found = {"gain_units": np.mean(units, axis=0), "gain_scratch": np.mean(scratch, axis=0)}
    if config.resnet.shares:
        first = f"{config.resnet.shares[0]:g}"
        found["gain_resnet"] = m[f"accuracy/resnet/shrunk/{first}"] - m["accuracy/resnet/longer"]
    return found


def arms(config: Config, name: str) -> list[str]:
    """Names of a subject's networks, in the order of its table."""
    shares = [f"{share:g}" for share in getattr(config, name).shares]
    found = ["dense", "longer"]
    for share in shares:
        found += [f"masked/{share}", f"shrunk/{share}", f"random/{share}"]
    found.append(f"scratch/{shares[-1]}")
    if name == "mlp" and config.blocks.sparsity:
        found.append("condensed")
    return found


def clock(config: Config, name: str, batch: int) -> str:
    """The kind of call whose time is the network's own."""
    return f"{'stream' if SUBJECTS[name].calls > 1 else 'call'}_{batch}"


def speed(m: Metrics, config: Config, name: str, arm: str, batch: int) -> Any:
    """Times as fast as the dense network of the same seed, or None if it was not timed."""
    kind = clock(config, name, batch)
    time = m.get(f"{kind}/{name}/{arm}")
    return None if time is None else m[f"{kind}/{name}/dense"] / time


def fewer(m: Metrics, what: str, name: str, arm: str) -> Any:
    """Times fewer than those of the dense network."""
    # What is masked is stored and multiplied as if it were dense.
    arm = "dense" if arm.startswith("masked") else arm
    return m[f"{what}/{name}/dense"] / m[f"{what}/{name}/{arm}"]


def tables(config: Config, m: Metrics) -> list[Table]:
    """A table a subject, and the targets."""
    found = [_subject(config, m, n) for n in SUBJECTS if getattr(config, n).shares]
    return [*found, _targets(config, m)]


def _percent(values: Any) -> str:
    found = mean_interval(100 * np.asarray(values))
    half = "" if found["ci_low"] is None else f" ± {(found['ci_high'] - found['ci_low']) / 2:.2f}"
    return f"{found['mean']:.2f}{half}"


def _subject(config: Config, m: Metrics, name: str) -> Table:
    setting, rows = getattr(config, name), []
    for arm in arms(config, name):
        same = arm.replace("masked", "shrunk")
        ratios = [f"{np.mean(fewer(m, what, name, arm)):.2f}" for what in ("macs", "bytes")]
        times = [speed(m, config, name, arm, batch) for batch in config.batches]
        cells = ["" if t is None else f"{np.mean(t):.2f}" for t in times]
        label = f"dense, {setting.recover} epochs more" if arm == "longer" else arm
        label = label.replace("/", ", ").replace("random", "random units")
        rows.append([label, _percent(m[f"accuracy/{name}/{same}"]), *ratios, *cells])
    what = "tokens rightly foretold" if SUBJECTS[name].inputs is None else "accuracy"
    title = (
        f"{SUBJECTS[name].title} ({setting.data}): {what} in % on {config.measured_on} data, mean "
        f"of {len(config.seeds)} seeds ± 95 % interval, and times better than dense"
    )
    speeds = [f"faster, batch {batch}" for batch in config.batches]
    return Table(title, ["network, MACs left", "%", "MACs", "bytes", *speeds], rows)


def _targets(config: Config, m: Metrics) -> Table:
    rows, aims, batch = [], config.targets, config.batches[0]

    def row(what: str, aim: float, values: Any, form: str = "{:.2f}") -> None:
        mean = float(np.mean(values))
        word = "reached" if mean >= aim else "missed"
        rows.append([what, form.format(aim), form.format(mean), word])

    if config.mlp.shares:
        arm = "condensed" if config.blocks.sparsity else f"shrunk/{config.mlp.shares[-1]:g}"
        title = f"founding MLP, {arm.replace('/', ', ')}"
        row(f"{title}: accuracy %", 100 * aims.accuracy, 100 * m[f"accuracy/mlp/{arm}"])
        row(f"{title}: times fewer bytes", aims.bytes, fewer(m, "bytes", "mlp", arm))
        row(
            f"{title}: times as fast, batch {batch}, in a compiled loop",
            aims.speed,
            speed(m, config, "mlp", arm, batch),
        )
        call = m[f"call_{batch}/mlp/dense"] / m[f"call_{batch}/mlp/{arm}"]
        row(f"{title}: times as fast, batch {batch}, called from Python", aims.speed, call)
    if config.resnet.shares:
        arm = f"shrunk/{config.resnet.shares[0]:g}"
        ratio = fewer(m, "macs", "resnet", arm)
        row("residual CNN: times fewer MACs", aims.macs, ratio)
        row("residual CNN: points over dense, trained as long", 0.0, 100 * m["gain_resnet"])
        gain = m[f"accuracy/resnet/{arm}"] - m["accuracy/resnet/dense"]
        row("residual CNN: points over dense, not trained on", 0.0, 100 * gain)
        for size in config.batches:
            kept = speed(m, config, "resnet", arm, size) / ratio
            row(f"residual CNN: speed over ratio of MACs, batch {size}", aims.kept, kept)
    return Table("targets", ["", "target", "reached", ""], rows)
