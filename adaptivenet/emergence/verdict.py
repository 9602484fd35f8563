"""Claims that can fail: what is claimed is fixed before a run, and judged by rule after it.

A study's config holds a :class:`Preregistration` with one :class:`Hypothesis` a claim. Before
anything runs, :func:`check` refuses a claim without a primary metric, or seeds that a pilot has
seen; after it, :func:`judge` reads one number a seed and says SUPPORTED, REFUTED or INCONCLUSIVE.
The unit of analysis is the seed.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from adaptivenet.emergence.statistics import bca, holm, paired
from adaptivenet.training import Range

__all__ = [
    "ClaimError",
    "Exclusion",
    "Hypothesis",
    "Preregistration",
    "Verdict",
    "check",
    "emergence",
    "exclude",
    "hypotheses",
    "judge",
]

Word = Literal["SUPPORTED", "REFUTED", "INCONCLUSIVE"]
_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_RULE = re.compile(r"(?P<metric>[\w.]+)\s*(?P<sign><=|>=|<|>)\s*(?P<bound>\S+)")


class ClaimError(ValueError):
    """What is claimed cannot be judged: no metric, a pilot's seeds, an unknown number."""


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """One claim about one number a seed."""

    statement: str = ""
    """what is claimed, in one sentence"""
    metric: str = ""
    """the primary metric: a number that the study measures on each seed"""
    direction: Literal["greater", "less", "equal"] = "greater"
    """the mean over seeds lies above, below, or within the margin of `than`"""
    than: float = 0.0
    """what the mean is compared with"""
    margin: Annotated[float, Range(ge=0)] = 0.0
    """smallest effect worth the name; the half width of what counts as equal"""
    test: Literal["t", "wilcoxon", "sign_flip"] = "t"
    """the test over seeds"""


@dataclasses.dataclass(frozen=True)
class Preregistration:
    """What is fixed before the run; a study adds one field of type Hypothesis a claim."""

    alpha: Annotated[float, Range(gt=0, lt=0.5)] = 0.05
    """error rate of the whole family of claims (two-sided, by Holm)"""
    pilot_seeds: tuple[int, ...] = ()
    """seeds that were looked at while the study was made; none may come back here"""
    exclusions: tuple[str, ...] = ()
    """a seed is left out if one of these holds, such as "dense_accuracy < 0.4" """
    not_claimed: tuple[str, ...] = ()
    """claims of the study that this config does not make"""
    stopping: Literal["fixed"] = "fixed"
    """every seed of the config is run, and nobody looks before the last one ends"""
    exploratory: bool = False
    """a run that may not be called a test of the claims (smoke scale, pilots)"""


class Verdict(NamedTuple):
    """What the seeds say of a claim.

    Attributes:
      name: the claim's field, such as ``h1a``.
      statement: the claim.
      metric: its primary metric.
      word: SUPPORTED, REFUTED or INCONCLUSIVE.
      estimate: mean over seeds.
      low: lower end of the interval (BCa bootstrap over seeds), None where there is none.
      high: its upper end.
      effect_size: the mean's distance from ``than`` in standard deviations over seeds.
      p: two-sided p value (of the test whose direction the data favour), None without an estimate.
      p_adjusted: the same after Holm's correction over the claims.
      n: seeds used.
      reason: why, where the word alone would mislead.
    """

    name: str
    statement: str
    metric: str
    word: Word
    estimate: float | None
    low: float | None
    high: float | None
    effect_size: float | None
    p: float | None
    p_adjusted: float | None
    n: int
    reason: str


class Exclusion(NamedTuple):
    """A rule that leaves a seed out: ``metric sign bound`` holds."""

    metric: str
    sign: str
    bound: float

    def holds(self, values: Any) -> np.ndarray:
        """True where the rule leaves out; nan never does."""
        return np.asarray(_COMPARE[self.sign](np.asarray(values, np.float64), self.bound))


def hypotheses(claims: Preregistration) -> dict[str, Hypothesis]:
    """The claims that a preregistration makes, in their order.

    Args:
      claims: a dataclass with fields of type :class:`Hypothesis`.

    Returns:
      Name to hypothesis.

    Raises:
      ClaimError: ``not_claimed`` names no claim.

    >>> import dataclasses
    >>> @dataclasses.dataclass(frozen=True)
    ... class Claims(Preregistration):
    ...     h1: Hypothesis = Hypothesis(metric="gain")
    >>> list(hypotheses(Claims()))
    ['h1']
    """
    found = {f.name: getattr(claims, f.name) for f in dataclasses.fields(claims)}
    known = {name: value for name, value in found.items() if isinstance(value, Hypothesis)}
    strangers = [name for name in claims.not_claimed if name not in known]
    if strangers:
        raise ClaimError(
            f"claims.not_claimed names {', '.join(strangers)}; the claims of this study are "
            f"{', '.join(known)}."
        )
    return {name: value for name, value in known.items() if name not in claims.not_claimed}


def check(claims: Preregistration, seeds: Sequence[int]) -> list[Exclusion]:
    """Refuses what could not be judged, before anything runs.

    Args:
      claims: the preregistration.
      seeds: the seeds to be run.

    Returns:
      The rules of exclusion, read.

    Raises:
      ClaimError: a claim has no primary metric or no statement, equality has no margin, seeds are
        repeated, fewer than two, or a pilot's, or a rule of exclusion cannot be read.

    >>> check(Preregistration(pilot_seeds=(0, 1)), (1, 2))
    Traceback (most recent call last):
      ...
    adaptivenet.emergence.verdict.ClaimError: seeds [1] were looked at in the pilot (pilot_seeds); \
a claim is tested on other seeds: choose new ones.
    """
    for name, claim in hypotheses(claims).items():
        if not claim.metric:
            raise ClaimError(
                f"claims.{name} has no primary metric, so nothing could refute it; name the number "
                f"that decides it: claims.{name}.metric (or, if it is not made here, name it in "
                "claims.not_claimed)"
            )
        if not claim.statement:
            raise ClaimError(f"claims.{name} does not say what is claimed: claims.{name}.statement")
        if claim.direction == "equal" and claim.margin == 0:
            raise ClaimError(
                f"claims.{name} claims equality without saying how near is equal; set "
                f"claims.{name}.margin"
            )
    rules = [_read_rule(text) for text in claims.exclusions]
    if len(set(seeds)) != len(seeds):
        raise ClaimError(f"seeds are repeated: {_repeated(seeds)}; each seed is one unit.")
    if len(seeds) < 2:
        raise ClaimError("fewer than two seeds: the seed is the unit of analysis; give more.")
    seen = sorted(set(seeds) & set(claims.pilot_seeds))
    if seen and not claims.exploratory:
        raise ClaimError(
            f"seeds {seen} were looked at in the pilot (pilot_seeds); a claim is tested on other "
            "seeds: choose new ones."
        )
    return rules


def exclude(rules: Sequence[Exclusion], metrics: Mapping[str, Any]) -> np.ndarray:
    """Which seeds the rules leave in.

    Args:
      rules: what :func:`check` read.
      metrics: name to ``[seeds]``.

    Returns:
      Bool ``[seeds]``.

    Raises:
      ClaimError: a rule names a number that was not measured.

    >>> exclude([Exclusion("accuracy", "<", 0.4)], {"accuracy": [0.3, 0.5]}).tolist()
    [False, True]
    """
    sizes = {len(np.atleast_1d(np.asarray(value))) for value in metrics.values()}
    if len(sizes) != 1:
        raise ClaimError(f"metrics are given for different numbers of seeds: {sorted(sizes)}.")
    keep = np.ones(sizes.pop(), bool)
    for rule in rules:
        keep &= ~rule.holds(_measured(metrics, rule.metric, f"the exclusion '{rule.metric} ...'"))
    return keep


def judge(claims: Preregistration, metrics: Mapping[str, Any]) -> list[Verdict]:
    """Judges every claim by the rule that was fixed before.

    A claim of a greater mean is SUPPORTED when the mean is significantly above ``than``, and
    REFUTED when it is significantly below ``than + margin``: the opposite holds, or the effect is
    smaller than the smallest one worth the name. A claim of equality is SUPPORTED when the mean is
    significantly within the margin (two one-sided tests), and REFUTED when it is significantly
    outside. Otherwise it is INCONCLUSIVE. Both directions are tested, each at half of alpha, and
    Holm's correction spans the claims. Intervals are of level 1 - alpha each, not corrected.

    Args:
      claims: the preregistration.
      metrics: name to one number a seed, ``[seeds]``.

    Returns:
      A verdict a claim, in order.

    Raises:
      ClaimError: a claim or an exclusion names a number that was not measured.

    References:
      Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Stat. 1979;
      Schuirmann, "A comparison of the two one-sided tests procedure", J. Pharmacokinet. 1987.

    >>> import dataclasses
    >>> @dataclasses.dataclass(frozen=True)
    ... class Claims(Preregistration):
    ...     h1: Hypothesis = Hypothesis(statement="It grows.", metric="growth")
    >>> judge(Claims(), {"growth": [0.9, 1.1, 1.0, 1.2, 0.8]})[0].word
    'SUPPORTED'
    """
    keep = exclude([_read_rule(text) for text in claims.exclusions], metrics)
    found = []
    for name, claim in hypotheses(claims).items():
        values = np.asarray(_measured(metrics, claim.metric, f"claims.{name}"), np.float64)
        found.append((name, claim, values[keep], _reason_for_none(values[keep])))
    tests = [
        None if reason else _test(claim, values, claims.alpha) for _, claim, values, reason in found
    ]
    ps = [1.0 if test is None else test[0] for test in tests]
    adjusted = holm(ps) if ps else []
    verdicts = []
    for (name, claim, values, reason), test, p in zip(found, tests, adjusted, strict=True):
        common = {"name": name, "statement": claim.statement, "metric": claim.metric}
        if test is None:
            nothing = dict.fromkeys(("estimate", "low", "high", "effect_size", "p", "p_adjusted"))
            verdicts.append(
                Verdict(**common, word="INCONCLUSIVE", **nothing, n=len(values), reason=reason)
            )
            continue
        raw, supports, why = test
        interval = bca(values, confidence=1 - claims.alpha)
        decided = bool(p < claims.alpha)
        verdicts.append(
            Verdict(
                **common,
                word=("SUPPORTED" if supports else "REFUTED") if decided else "INCONCLUSIVE",
                estimate=float(values.mean()),
                low=_finite(interval.low),
                high=_finite(interval.high),
                effect_size=_finite(_distance(values, claim.than)),
                p=float(raw),
                p_adjusted=float(p),
                n=len(values),
                reason=why if decided else "",
            )
        )
    return verdicts


def emergence(
    verdicts: Sequence[Verdict],
    *,
    present: str,
    no_learning: str,
    shuffled: str,
    predictive: str,
) -> str:
    """The one use of the word "emergent": three gates, each a claim that was judged.

    Args:
      verdicts: what :func:`judge` returned.
      present: the claim that the observable is there at all.
      no_learning: the claim that it goes beyond the rule with the gradient off.
      shuffled: the claim that it goes beyond shuffled importance.
      predictive: the claim that it predicts out of sample what parts alone do not.

    Returns:
      "emergent" if all four are SUPPORTED; else a word and the claim that closed the gate:
      "absent", "forced" (the rule alone does it), "inherited" (shuffling keeps it), "epiphenomenal"
      (it predicts nothing), or "not shown" where a gate is undecided.

    Raises:
      ClaimError: a gate names a claim that was not judged.

    >>> blank = dict.fromkeys(Verdict._fields)
    >>> judged = [Verdict(**{**blank, "name": n, "word": w}) for n, w in
    ...           [("a", "SUPPORTED"), ("b", "REFUTED"), ("c", "SUPPORTED"), ("d", "SUPPORTED")]]
    >>> emergence(judged, present="a", no_learning="b", shuffled="c", predictive="d")
    'forced (b REFUTED)'
    """
    words = {verdict.name: verdict.word for verdict in verdicts}
    gates = {
        "absent": present,
        "forced": no_learning,
        "inherited": shuffled,
        "epiphenomenal": predictive,
    }
    missing = [name for name in gates.values() if name not in words]
    if missing:
        raise ClaimError(f"the gates name claims that were not judged: {missing}.")
    for what, name in gates.items():
        if words[name] == "REFUTED":
            return f"{what} ({name} REFUTED)"
    for name in gates.values():
        if words[name] != "SUPPORTED":
            return f"not shown ({name} INCONCLUSIVE)"
    return "emergent"


def _test(claim: Hypothesis, values: np.ndarray, alpha: float) -> tuple[float, bool, str]:
    """Two-sided p, whether the data favour the claim, and the reason where it needs one."""

    def p(side: Literal["greater", "less"], than: float) -> float:
        return paired(values, alternative=side, than=than, test=claim.test).p

    if claim.direction == "equal":
        low, high = claim.than - claim.margin, claim.than + claim.margin
        within = max(p("greater", low), p("less", high))
        outside = min(1.0, 2 * min(p("less", low), p("greater", high)))
        return min(1.0, 2 * min(within, outside)), within <= outside, ""
    up: Literal["greater", "less"] = "greater" if claim.direction == "greater" else "less"
    down: Literal["greater", "less"] = "less" if up == "greater" else "greater"
    bound = claim.than + (claim.margin if up == "greater" else -claim.margin)
    support, refute = p(up, claim.than), p(down, bound)
    # An effect may be there and still be shown to be negligible: the claim is of one worth a name.
    if max(support, refute) < alpha / 2:
        return 2 * refute, False, "there, but smaller than the smallest effect worth the name"
    return min(1.0, 2 * min(support, refute)), support <= refute, ""


def _read_rule(text: str) -> Exclusion:
    match = _RULE.fullmatch(text.strip())
    try:
        bound = float(match["bound"]) if match else float("nan")
    except ValueError:
        bound = float("nan")
    if match is None or not np.isfinite(bound):
        raise ClaimError(
            f"the exclusion {text!r} cannot be read; write a metric, one of < <= > >=, and a "
            "number: 'dense_accuracy < 0.4'."
        )
    return Exclusion(match["metric"], match["sign"], bound)


def _measured(metrics: Mapping[str, Any], name: str, who: str) -> Any:
    if name not in metrics:
        raise ClaimError(
            f"{who} names the metric {name!r}, which the study does not measure "
            f"(it measures: {', '.join(sorted(metrics))})."
        )
    return metrics[name]


def _reason_for_none(values: np.ndarray) -> str:
    lacking = int(np.sum(~np.isfinite(values)))
    if len(values) < 2:
        return f"{len(values)} seeds are left after the exclusions"
    return f"{lacking} of {len(values)} seeds gave no estimate" if lacking else ""


def _distance(values: np.ndarray, than: float) -> float:
    deviation = float(values.std(ddof=1))
    return (float(values.mean()) - than) / deviation if deviation > 0 else float("nan")


def _finite(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _repeated(seeds: Sequence[int]) -> list[int]:
    return sorted({seed for seed in seeds if list(seeds).count(seed) > 1})
