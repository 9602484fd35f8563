"""Models that really shrink: accuracy against multiply-accumulates, bytes and measured time.

Five families of networks are trained, lose the units that they need least, are made smaller by
``pruning.shrink`` with the state of their optimizer, and are trained on. Beside them stand the
dense network, the same units kept in place as zeros, units drawn at random, and a network of the
smaller widths that is trained from scratch. Targets are printed as reached or missed.

    python -m research.shrinking --config configs/shrinking/smoke.yaml
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import numpy as np

from adaptivenet.emergence.verdict import Hypothesis, Preregistration
from adaptivenet.training import Range
from research import study
from research.shrinking_arms import Course, stepper
from research.shrinking_measures import Networks, claimed, tables
from research.shrinking_subjects import SUBJECTS, Lessons, load, subject_of

Share = Annotated[float, Range(gt=0, lt=1)]


@dataclasses.dataclass(frozen=True)
class Claims(Preregistration):
    """On scores, on training from scratch, and on what is lost; a config makes some."""

    units: Hypothesis = study.BLANK
    scratch: Hypothesis = study.BLANK
    lossless: Hypothesis = study.BLANK


@dataclasses.dataclass(frozen=True)
class Setting:
    """How one subject is trained and cut."""

    shares: tuple[Share, ...] = ()
    """shares of the dense multiply-accumulates that are left, falling; none: it is not run"""
    data: Literal["digits", "mnist", "fashion_mnist", "cifar10_jpeg", "tinyshakespeare"] = "mnist"
    """data set (never replaced by another one)"""
    length: Annotated[int, Range(ge=1)] = 64
    """tokens of a sequence, where the data are a text"""
    score: Literal["magnitude", "fisher", "taylor"] = "magnitude"
    """of units: sums of squares of weights, of weights times gradients, or squares of their sums"""
    compete: Literal["ranks", "means"] = "ranks"
    """groups lose the same share each, or compete by scores divided by the mean of their group"""
    epochs: Annotated[int, Range(ge=1)] = 8
    """passes over the training data of the dense network"""
    recover: Annotated[int, Range(ge=1)] = 3
    """passes after each share is reached for"""
    cuts: Annotated[int, Range(ge=1)] = 2
    """cuts from a share to the next, in equal ratios"""
    spread: Annotated[float, Range(ge=0, lt=1)] = 0.4
    """part of those passes over which the cuts are spread"""
    batch_size: Annotated[int, Range(ge=1)] = 128
    """examples a step"""
    learning_rate: Annotated[float, Range(gt=0)] = 1e-3
    """peak of Adam's rate; linear warm-up over a tenth, then a cosine to zero"""
    recover_rate: Annotated[float, Range(gt=0)] = 1e-3
    """of later passes, from which a cosine falls to zero"""
    weight_decay: Annotated[float, Range(ge=0)] = 0.0
    """decoupled weight decay"""
    flip: bool = False
    """whether half of the training images are mirrored, anew for every step"""
    calibration: Annotated[int, Range(ge=1)] = 8
    """batches from which scores are taken"""
    floor: Annotated[int, Range(ge=1)] = 2
    """units of a group that stay whatever they score"""
    multiple: Annotated[int, Range(ge=1)] = 1
    """groups keep a multiple of so many units"""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The condensed arm of the founding MLP, whose inputs cannot go."""

    sparsity: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """share of the blocks of the first kernel that are cut; 0: it is not run"""
    share: Share = 0.5
    """the shrunk network that it starts from: one of mlp.shares"""
    block: tuple[int, int] = (1, 64)
    """inputs and outputs of a block, which divide that network's kernel"""
    epochs: Annotated[int, Range(ge=1)] = 20
    """passes over the training data"""
    batch_size: Annotated[int, Range(ge=1)] = 128
    """examples a step"""
    learning_rate: Annotated[float, Range(gt=0)] = 1e-3
    """peak of Adam's rate for a dense network; linear warm-up, then a cosine to zero"""
    rate_power: Annotated[float, Range(ge=0)] = 0.4
    """the rate is multiplied by the final density to minus this power"""
    weight_decay: Annotated[float, Range(ge=0)] = 0.2
    """decoupled weight decay"""


@dataclasses.dataclass(frozen=True)
class Targets:
    """What was aimed at."""

    accuracy: float = 0.975
    """of the founding MLP"""
    bytes: float = 10.0
    """times fewer bytes there"""
    speed: float = 3.0
    """times as fast as dense there, batch 1"""
    macs: float = 2.1
    """times fewer multiply-accumulates of the residual CNN, at no loss"""
    kept: float = 0.8
    """of that ratio is what the clock shows"""


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """Accuracy against what a network costs, for networks that are made smaller."""

    data: Literal["of each subject"] = "of each subject"
    """every subject has its own"""
    claims: Claims = Claims()
    """what is claimed, over all subjects"""
    mlp: Setting = Setting()
    """the founding MLP: 128 and 64 hidden units"""
    lenet5: Setting = Setting()
    """LeNet-5-Caffe"""
    resnet: Setting = Setting()
    """a residual CNN with batch norm: stages of 16, 32 and 64 channels"""
    depth: Annotated[int, Range(ge=1)] = 1
    """blocks of each of its stages; 9 make ResNet-56"""
    lstm: Setting = Setting()
    """an LSTM of 64 cells, which reads an image row by row"""
    transformer: Setting = Setting()
    """a transformer: two blocks of width 64, with four heads"""
    blocks: Blocks = Blocks()
    """the founding MLP without the zeros of its kernels"""
    targets: Targets = Targets()
    """aims, to be printed as reached or missed"""
    batches: tuple[Annotated[int, Range(ge=1)], ...] = (1, 64)
    """sizes of a batch that are timed; the first one counts for the targets"""
    rounds: Annotated[int, Range(ge=1)] = 100
    """timed rounds, in which all networks of a subject take turns"""

    def __post_init__(self) -> None:
        """Refuses shares that do not fall, before anything runs."""
        for name in SUBJECTS:
            shares = getattr(self, name).shares
            if list(shares) != sorted(set(shares), reverse=True):
                raise ValueError(f"{name}.shares: give them falling, each once, not {shares}.")
        if self.blocks.sparsity and self.blocks.share not in self.mlp.shares:
            raise ValueError(
                f"blocks.share={self.blocks.share:g} is none of mlp.shares: {self.mlp.shares}."
            )


def run(config: Config, data: Lessons, seeds: tuple[int, ...], tick: study.Tick) -> study.Outcome:
    """Trains and shrinks every subject on the seeds, and measures.

    What a subject gave on a seed is kept in the run folder at once: a run that is stopped loses the
    subject that it was at, no more.
    """
    folder, _ = study.open_run("shrinking", config)
    (folder / "parts").mkdir(exist_ok=True)
    names = [name for name in SUBJECTS if getattr(config, name).shares]
    parts = [(seed, name) for seed in seeds for name in names]
    work = {name: _epochs(config, name) for name in names}
    total, finished = len(seeds) * sum(work.values()), 0
    found: dict[int, dict[str, float]] = {seed: {} for seed in seeds}
    for seed, name in parts:
        path = folder / "parts" / f"{seed}-{name}.npz"
        if not path.exists():
            before = finished

            def done(what: str = f"{SUBJECTS[name].title}, seed {seed}") -> None:
                nonlocal finished
                finished += 1
                tick(what, finished / total)

            numbers = _measured(config, data, name, seed, done)
            study.Outcome({key: np.array([v]) for key, v in numbers.items()}, {}).save(path)
            finished = before
        finished += work[name]
        found[seed] |= {key: v[0] for key, v in study.Outcome.load(path).metrics.items()}
    metrics = {key: np.array([found[seed][key] for seed in seeds]) for key in found[seeds[0]]}
    return study.Outcome({**metrics, **claimed(config, metrics)}, {})


def _measured(config: Config, data: Lessons, name: str, seed: int, done: Any) -> dict[str, float]:
    """All numbers of one subject on one seed."""
    setting, subject = getattr(config, name), subject_of(config, name)
    course = Course(subject, setting, data.tasks[name], seed, stepper(subject, setting))
    networks = Networks(name, course)
    dense = course.train(course.begin(), setting.epochs, 0, setting.learning_rate, done)
    networks.add("dense", dense)
    longer = course.train(dense, setting.recover, 1, setting.recover_rate, done)
    networks.add("longer", longer)
    for arm, random in (("shrunk", False), ("random", True)):
        net = dense
        for number, share in enumerate(setting.shares, 1):
            net = course.shrink(net, dense, share, number, done, random=random)
            networks.add(f"{arm}/{share:g}", net, beside=dense if arm == "shrunk" else None)
    least = f"{setting.shares[-1]:g}"
    same = setting.epochs + setting.recover * len(setting.shares)
    scratch = course.scratch(networks.nets[f"shrunk/{least}"], same, done)
    networks.add(f"scratch/{least}", scratch)
    if name == "mlp" and config.blocks.sparsity:
        networks.add_condensed(config.blocks, seed, done)
    return networks.measured(config.batches, config.rounds)


def _epochs(config: Config, name: str) -> int:
    """Passes over the training data of a subject, all arms together."""
    setting = getattr(config, name)
    found = 2 * setting.epochs + setting.recover * (1 + 3 * len(setting.shares))
    return found + (config.blocks.epochs if name == "mlp" and config.blocks.sparsity else 0)


def draw(config: Config, outcome: study.Outcome) -> Any:
    """Accuracy against costs, a panel for each subject, and time against multiply-accumulates."""
    from research import shrinking_figure

    return shrinking_figure.draw(config, outcome)


def judge(config: Config, outcome: study.Outcome) -> study.Judgement:
    """The preregistered tests, with a table a subject, and the targets."""
    return study.judge(config, outcome)._replace(tables=tuple(tables(config, outcome.metrics)))


if __name__ == "__main__":
    study.main(Config, run, judge, draw, load=load)
