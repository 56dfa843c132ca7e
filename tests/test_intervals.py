"""The bootstrap of many values: the same numbers as all at once, in little memory. Others are in test_compare.py."""

import numpy as np
import pytest

from analysis import intervals


@pytest.mark.parametrize(("n", "most_kept"), [(2, 9000), (300, 9000), (4001, 9000), (4001, 4000)])
def test_resamples_drawn_in_parts_are_those_drawn_at_once(n, most_kept, monkeypatch):
    monkeypatch.setattr(intervals, "MAX_KEPT", most_kept)
    values = np.random.default_rng(1).random(n)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=2000).astype(np.float64)
    expected = np.quantile(counts @ values / n, (0.025, 0.975))
    assert intervals.bootstrap_interval(values) == pytest.approx((values.mean(), *expected), rel=1e-12)


def test_resamples_stay_small():
    assert next(intervals._resamples(200_000)).nbytes < 10_000_000
    assert 4 * intervals.MAX_KEPT * intervals.NUM_RESAMPLES <= 100_000_000
    assert intervals._kept_resamples(300)[0].itemsize == 1
