"""What a token costs on a machine that is rented by the hour."""

from __future__ import annotations

import math

DEFAULT_USD_PER_HOUR = 0.10264
DEFAULT_PRICE_SOURCE = (
    "Amazon EC2 c7a.large (2 vCPU = 2 cores of a 4th generation AMD EPYC, 4 GiB), Linux, on demand, us-east-1, "
    "list price as of 2026"
)


def usd_per_million_tokens(tokens_per_s: float, usd_per_hour: float = DEFAULT_USD_PER_HOUR) -> float:
    """Dollars for a million tokens on a machine that makes ``tokens_per_s`` and costs ``usd_per_hour``, always busy.

    Raises ``ValueError`` where the speed is not above zero or the price is below it.
    """
    if not (tokens_per_s > 0 and math.isfinite(tokens_per_s)):
        raise ValueError(f"tokens_per_s is {tokens_per_s}: it must be a number above 0.")
    if not (usd_per_hour >= 0 and math.isfinite(usd_per_hour)):
        raise ValueError(f"usd_per_hour is {usd_per_hour}: it must be a number of at least 0.")
    return usd_per_hour / 3600 / tokens_per_s * 1e6
