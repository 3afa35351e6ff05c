"""Every parameter is checked before anything is computed."""

from __future__ import annotations

import math

import pytest

from fallow.engine.sampling import SamplingParams
from fallow.errors import RequestError

NAN, INF = math.nan, math.inf
WRONG = {
    "n": [0, -1, 129, 1.5, True, "2", 10**1000],
    "max_tokens": [0, -5, 1.0, NAN],
    "temperature": [-0.1, NAN, INF, -INF, "1", None, True, 10**400, 101],
    "top_p": [-0.1, 1.01, NAN, INF],
    "top_k": [-2, 1.5, 2**31, NAN],
    "min_p": [-0.1, 1.1, NAN],
    "repetition_penalty": [0, -1, NAN, INF, 101],
    "presence_penalty": [-2.1, 2.1, NAN, INF],
    "frequency_penalty": [-2.1, 2.1, NAN, -INF],
    "logit_bias": [{1: 101}, {1: -101}, {1: NAN}, {-1: 0}, {"1": 0}, [1], {2**31: 0}],
    "seed": [-1, 2**64, 1.0, NAN],
    "stop": [[""], ["a"] * 17, [1], 5, "x" * 1025],
    "stop_token_ids": [[-1], [1.0], 3, "12", [2**31]],
    "ignore_eos": [1, None],
    "include_stop_str_in_output": ["yes"],
    "logprobs": [-1, 21, 1.0, True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name
    assert str(caught.value).startswith((name, f"Each string of {name}"))
    assert str(caught.value).endswith(".")
    assert len(str(caught.value)) < 200


def test_the_limits_themselves_are_allowed() -> None:
    params = SamplingParams(
        n=128,
        max_tokens=1,
        temperature=0,
        top_p=0,
        top_k=-1,
        min_p=1,
        presence_penalty=-2,
        frequency_penalty=2.0,
        logit_bias={0: -100, 5: 100.0},
        seed=2**64 - 1,
        stop="end",
        stop_token_ids=[3, 4],
        logprobs=20,
    )
    assert params.is_greedy
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4)
    assert SamplingParams(temperature=1e-9).is_greedy
    assert not SamplingParams().has_penalties


def test_ids_outside_the_vocabulary_are_refused() -> None:
    for params in (SamplingParams(logit_bias={50: 1}), SamplingParams(stop_token_ids=[50])):
        params.check_vocabulary(51)
        with pytest.raises(RequestError, match="0 to 49"):
            params.check_vocabulary(50)
