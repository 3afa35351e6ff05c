"""Money per token."""

from __future__ import annotations

import math

import pytest

from fallow.meter.cost import DEFAULT_USD_PER_HOUR, usd_per_million_tokens


def test_a_million_tokens_in_an_hour_cost_the_hour() -> None:
    assert usd_per_million_tokens(1e6 / 3600, 0.5) == pytest.approx(0.5)
    assert usd_per_million_tokens(1000.0) == pytest.approx(DEFAULT_USD_PER_HOUR / 3.6)
    assert usd_per_million_tokens(200.0, 1.0) == pytest.approx(2 * usd_per_million_tokens(400.0, 1.0))
    assert usd_per_million_tokens(1.0, 0.0) == 0


@pytest.mark.parametrize(("speed", "price"), [(0, 1), (-1, 1), (math.nan, 1), (math.inf, 1), (1, -1), (1, math.nan)])
def test_numbers_without_meaning_are_refused(speed: float, price: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        usd_per_million_tokens(speed, price)
