import json
import math

import pytest
from comparison.aggregation import (
    Horizon,
    area_under,
    by_arm,
    interpolate,
    mean_height,
    measures,
    over_seeds,
    paired,
    spread,
    success_at_seconds,
    t_quantile,
)
from comparison.figure import mean_curve
from comparison.plan import differences
from comparison.record import CurvePoint, RunRecord, TestResult, compact_json


def run(arm="a", seed=1, wins=(50, 100), seconds_per_iteration=2.0, test=100) -> RunRecord:
    curve = [CurvePoint(10 * i, 10 * i * seconds_per_iteration, won, 200) for i, won in enumerate(wins)]
    return RunRecord(
        arm=arm,
        seed=seed,
        digest="d",
        iterations=curve[-1].iteration,
        curve=curve,
        training={"entropy": [0.5, None], "replayed": [0.0, 8.0], "fresh_tokens": [30, 30], "replayed_tokens": [0, 20]},
        tests={"1": TestResult(test, 200, 1, 0.05)},
        seconds={"training": curve[-1].seconds},
        provenance={"commit": "c"},
    )


@pytest.mark.parametrize(
    ("df", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (1000, 1.962)]
)
def test_t_quantiles_are_those_of_the_tables(df, expected):
    assert t_quantile(0.975, df) == pytest.approx(expected, abs=5e-4)


def test_t_quantile_at_other_levels():
    assert t_quantile(0.5, 3) == pytest.approx(0.0, abs=1e-12)
    assert t_quantile(0.995, 5) == pytest.approx(4.0321, abs=5e-5)
    with pytest.raises(ValueError, match="df"):
        t_quantile(0.9, 0)


def test_spread():
    result = spread([0.4, 0.5, 0.6, 0.7])
    sd = math.sqrt((0.15**2 + 0.05**2) * 2 / 3)
    assert result.mean == pytest.approx(0.55)
    assert result.sd == pytest.approx(sd)
    assert result.high - result.mean == pytest.approx(3.1824 * sd / 2, rel=1e-4)
    assert result.mean - result.low == pytest.approx(result.high - result.mean)
    assert (spread([0.4]).sd, spread([0.4]).low) == (None, None)


def test_interpolation_is_linear_between_points_and_constant_beyond():
    x, y = [10.0, 20.0, 40.0], [1.0, 2.0, 0.0]
    assert [interpolate(x, y, at) for at in (0, 10, 15, 20, 35, 40, 99)] == [1.0, 1.0, 1.5, 2.0, 0.5, 0.0, 0.0]


def test_mean_height_is_the_normalised_trapezoid_area():
    x, y = [0.0, 10.0, 20.0], [0.0, 1.0, 1.0]
    assert mean_height(x, y, 20) == pytest.approx(0.75)
    assert mean_height(x, y, 10) == pytest.approx(0.5)
    assert mean_height(x, y, 5) == pytest.approx(0.25)
    assert mean_height(x, y, 15) == pytest.approx((5 + 5) / 15)
    assert mean_height([0.0], [0.3], 0) == 0.3


def test_curves_are_compared_over_what_all_runs_have_reached():
    short, long = run(wins=(40, 80), seconds_per_iteration=3), run(seed=2, wins=(40, 80, 200), seconds_per_iteration=1)
    horizon = Horizon.of([short, long])
    assert (horizon.iterations, horizon.seconds) == (10, 20.0)
    assert area_under(long.curve, horizon.iterations) == pytest.approx(0.3)
    assert success_at_seconds(short.curve, horizon.seconds) == pytest.approx(0.2 + 0.2 * 20 / 30)
    assert success_at_seconds(long.curve, horizon.seconds) == pytest.approx(1.0)


def test_differences_are_paired_by_seed():
    ours = [run("ours", seed, test=test) for seed, test in ((1, 110), (2, 130), (3, 150), (7, 10))]
    theirs = [run("theirs", seed, test=test) for seed, test in ((3, 130), (2, 120), (1, 100), (9, 190))]
    measure, horizon = measures(["1"])["test, T = 1"], Horizon.of(ours + theirs)
    by_seed, over = paired(ours, theirs, measure, horizon)
    assert by_seed == pytest.approx({1: 0.05, 2: 0.05, 3: 0.1})
    assert over.mean == pytest.approx(0.2 / 3)
    assert paired(ours[3:], theirs, measure, horizon) == ({}, None)


def test_a_measure_that_a_run_lacks_is_left_out():
    started = run()
    late = RunRecord(
        **{
            **{name: getattr(started, name) for name in started.__dataclass_fields__},
            "curve": started.curve[1:],
            "seed": 2,
        }
    )
    horizon = Horizon.of([started, late])
    before = over_seeds([started, late], measures(["1"])["validation before"], horizon)
    assert (before.n, before.mean) == (1, 0.25)
    assert over_seeds([started], measures(["0.4"])["test, T = 0.4"], horizon) is None


def test_arms_keep_the_order_asked_for():
    records = [run("b", 2), run("c"), run("a"), run("b", 1)]
    assert [(name, [r.seed for r in runs]) for name, runs in by_arm(records, ["c", "missing", "b"]).items()] == [
        ("c", [1]),
        ("b", [1, 2]),
        ("a", [1]),
    ]


def test_mean_curve_covers_what_all_seeds_cover():
    x, mean, sd = mean_curve([([0.0, 10.0, 20.0], [0.0, 1.0, 1.0]), ([5.0, 8.0, 15.0], [1.0, 1.0, 1.0]), ([], [])])
    assert x == [5.0, 8.0, 10.0, 15.0]
    assert mean == pytest.approx([0.75, 0.9, 1.0, 1.0])
    assert sd == pytest.approx([0.5 * math.sqrt(0.5), 0.2 * math.sqrt(0.5), 0.0, 0.0])


def test_records_survive_their_file():
    record = run()
    values = json.loads(record.to_json())
    assert RunRecord.from_json(values) == record
    assert values["replay"] == {"episodes": 8.0, "iterations": 1, "token_share": 0.25}
    assert values["test"]["1"]["success"] == 0.5


def test_compact_json_is_the_same_json():
    values = {"a": [1, 2.5, None, 'x ]\n[ "{'], "b": {"c": [{"x": 1}, {"y": []}]}, "d": {}, "e": [[1], [2]]}
    assert json.loads(compact_json(values)) == values
    assert '{"x": 1}' in compact_json(values)
    with pytest.raises(ValueError, match="JSON"):
        compact_json([math.nan])


def test_settings_that_differ():
    def config(loss, clip, callbacks, same=1):
        entries = [{"class_path": f"some.where.{name}", "init_args": {"horizon": 20}} for name in callbacks]
        return {
            "model": {"loss": {"class_path": f"losses.{loss}", "init_args": {"clip": clip}}, "same": same},
            "trainer": {"callbacks": entries},
        }

    found = differences({"a": config("PPO", 0.2, ["X"]), "b": config("Cov", 0.2, ["X", "Curriculum"])})
    assert found == {
        "model.loss": {"a": "PPO", "b": "Cov"},
        "trainer.callbacks.Curriculum": {"a": None, "b": True},
        "trainer.callbacks.Curriculum.horizon": {"a": None, "b": 20},
    }
