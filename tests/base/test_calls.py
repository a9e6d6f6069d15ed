"""Calls that answer for every keyword."""

from __future__ import annotations

import inspect

import pytest

from bigdl._base.calls import Gone, Renamed, answers
from bigdl._base.errors import ArgumentError


@answers(
    {
        "colour_name": Renamed("colour", values={"rouge": "red"}),
        "varnish": Gone("paint() has one coat: call polish() after it.", harmless=(None, False)),
    }
)
def paint(wall, colour="white", *, coats=1):
    """Paint it."""
    return wall, colour, coats


def test_a_right_call_goes_through():
    assert paint("north", coats=2) == ("north", "white", 2)


def test_the_signature_is_the_functions_own():
    assert list(inspect.signature(paint).parameters) == ["wall", "colour", "coats"]
    assert paint.__doc__ == "Paint it."


def test_an_old_name_works_with_its_old_values():
    assert paint("north", colour_name="blue") == ("north", "blue", 1)
    assert paint("north", colour_name="rouge") == ("north", "red", 1)


def test_what_asked_for_nothing_still_may():
    assert paint("north", varnish=False) == ("north", "white", 1)


def test_what_is_gone_says_what_to_do():
    with pytest.raises(ArgumentError, match=r"paint\(varnish=….*call polish\(\)"):
        paint("north", varnish=True)


def test_an_unknown_keyword_gets_the_nearest():
    with pytest.raises(ArgumentError, match=r"no argument 'coat'. Did you mean 'coats'"):
        paint("north", coat=2)


def test_both_names_at_once():
    with pytest.raises(ArgumentError, match="both 'colour_name' and 'colour'"):
        paint("north", colour="red", colour_name="blue")


@pytest.mark.parametrize("call", [lambda: paint(), lambda: paint(1, 2, 3)])
def test_a_wrong_count_is_ours_too(call):
    with pytest.raises(ArgumentError, match=r"paint\(\) cannot be called so"):
        call()


def test_an_error_inside_is_the_functions_own():
    @answers({})
    def fails(x):
        raise TypeError("inside")

    with pytest.raises(TypeError, match="inside") as caught:
        fails(1)
    assert not isinstance(caught.value, ArgumentError)
