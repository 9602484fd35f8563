"""The controls: what they simulate, how they count, resume, judge and keep."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from adaptivenet.emergence import statistics
from research import controls

CONFIGS = Path(__file__).parents[2] / "configs" / "controls"
# Cheap enough for sixty sets of each kind here; the whole is a command of its own.
QUICK = ["paired, t", "paired, wilcoxon", "equivalence", "page_trend", "student", "dip", "log_rank"]


def config(tmp_path, **options):
    return controls.Config(**{"output": str(tmp_path), "sets": 60, "null_sets": 60, **options})


@pytest.mark.parametrize("name", QUICK)
def test_power_and_size_are_near_their_targets(name, tmp_path):
    result = controls.simulate(config(tmp_path), name, lambda: None)
    # Sixty sets: a power of 0.8 shows as 39 or more, a size of 0.06 as 10 or fewer, in all but a
    # thousandth of all runs.
    assert result.power["mean"] * 60 >= stats.binom.ppf(0.001, 60, 0.8)
    assert result.size["mean"] * 60 <= stats.binom.ppf(0.999, 60, 0.06)


def test_the_hazard_is_fooled_by_frailty_only_without_its_term(tmp_path):
    few = config(tmp_path, sets=8, null_sets=8)
    fooled = controls.simulate(few, "hazard, frailty ignored", lambda: None)
    honest = controls.simulate(few, "hazard, frailty", lambda: None)
    assert fooled.size["mean"] == 1.0
    assert honest.size["mean"] <= 0.5  # 5 of 8 at a true 5 % is one in 60,000
    assert honest.power["mean"] >= 0.5


def test_every_public_statistic_has_a_control():
    source = Path(controls.__file__).read_text(encoding="utf-8")
    functions = [name for name in statistics.__all__ if name[0].islower()]
    assert functions
    missing = [name for name in functions if f"statistics.{name}(" not in source]
    assert not missing


def test_a_set_has_its_own_stream_whatever_else_is_run():
    draws = [
        controls.stream(seed, name, effect, place).random()
        for seed in (0, 1)
        for name in ("dip", "holm")
        for effect in (False, True)
        for place in (0, 1)
    ]
    assert len(set(draws)) == 16
    assert controls.stream(0, "dip", False, 0).random() == draws[0]


def test_shares_have_the_exact_interval():
    got = controls.share(3, 60)
    assert got["mean"] == 0.05
    assert got["ci_low"] == pytest.approx(stats.beta.ppf(0.025, 3, 58))
    assert got["ci_high"] == pytest.approx(stats.beta.ppf(0.975, 4, 57))
    assert controls.share(0, 60)["ci_low"] == 0.0


def test_synapses_start_at_age_zero_and_grow_again_after_death():
    data = controls.spells(np.random.default_rng(0), 3, 6, age=-0.4)
    for synapse in range(3 * controls.SEEDS):
        rows = data.synapse == synapse
        age = 0
        for died, seen in zip(data.died[rows], data.age[rows], strict=True):
            assert seen == age
            age = 0 if died else age + 1


@pytest.mark.parametrize(
    ("power", "size", "verdict"),
    [(0.9, 0.05, "met"), (0.7, 0.05, "power"), (0.9, 0.07, "size"), (0.7, 0.07, "power and size")],
)
def test_what_misses_its_target_is_called_so(power, size, verdict):
    result = controls.Result("dip", {"mean": power}, {"mean": size}, 0.0)
    assert controls.judged(result).endswith(verdict)
    assert result.passed == (verdict == "met")


def run(tmp_path, *options):
    arguments = ["--config", str(CONFIGS / "smoke.yaml"), "--output", str(tmp_path)]
    controls.main([*arguments, "--sets", "3", "--null-sets", "3", *options])
    (folder,) = (tmp_path / "controls").iterdir()
    return folder


def test_the_command_prints_writes_draws_and_goes_on_where_it_stopped(
    tmp_path, capsys, monkeypatch
):
    chosen = ["--statistics", "dip", "student", "paired, t"]
    real, done = controls.simulate, []

    def stops(config, name, advance):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(name)
        return real(config, name, advance)

    monkeypatch.setattr(controls, "simulate", stops)
    with pytest.raises(SystemExit, match="same command"):
        run(tmp_path, *chosen)
    rest = []
    monkeypatch.setattr(
        controls, "simulate", lambda c, name, a: (rest.append(name), real(c, name, a))[1]
    )
    folder = run(tmp_path, *chosen)
    assert sorted([*done, *rest]) == ["dip", "paired, t", "student"]
    document = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    metrics = document["metrics"]
    assert set(metrics) == {"dip", "paired, t", "student"}
    fresh = real(controls.Config(sets=3, null_sets=3), "student", lambda: None)
    assert metrics["student"]["power"]["mean"] == fresh.power["mean"]
    assert metrics["student"]["coverage"]["mean"] == pytest.approx(1 - fresh.size["mean"])
    assert "coverage" not in metrics["dip"]
    assert (folder / "figure.png").stat().st_size > 5_000
    assert (folder / "figure.pdf").read_bytes().startswith(b"%PDF")
    assert "paired, t" in capsys.readouterr().out


def test_results_of_other_code_are_not_used(tmp_path):
    result = controls.simulate(config(tmp_path, sets=2, null_sets=2), "student", lambda: None)
    file = tmp_path / "statistics" / "student.json"
    controls.write_finished(file, "this code", result)
    assert controls.read_finished(file, "this code") == result
    assert controls.read_finished(file, "other code") is None
    file.write_text("{")
    assert controls.read_finished(file, "this code") is None


def test_an_unknown_statistic_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"\['dipp'\] are unknown; there are .*'dip'"):
        controls.Config(statistics=("dipp",))


def test_a_part_is_not_kept_as_the_whole(tmp_path):
    with pytest.raises(ValueError, match="keep"):
        dataclasses.replace(controls.Config(keep="x.json"), statistics=("dip",))
