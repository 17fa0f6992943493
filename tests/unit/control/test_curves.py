"""Target curves: values, files, and refused parameters."""

import math

import pytest

from megatron_rlvr.control import EntropyCurve


def test_values_of_every_kind():
    assert EntropyCurve(start=0.8).value(0.3, 2.0) == pytest.approx(1.6)
    assert EntropyCurve(start=0.8, relative=False).value(0.3, 2.0) == 0.8
    linear = EntropyCurve("linear", end=0.4)
    assert [linear.value(x, 1.0) for x in (0, 0.5, 1, 1.5)] == pytest.approx([1.0, 0.7, 0.4, 0.4])
    cosine = EntropyCurve("cosine", start=1.2, end=0.2)
    for x in (0.0, 0.25, 0.5, 1.0):
        assert cosine.value(x, 1.0) == pytest.approx(0.2 + 1.0 * (1 + math.cos(math.pi * x)) / 2)
    points = EntropyCurve("piecewise", points=[[0.1, 1.0], [0.4, 1.3], [0.6, 1.3], [1.0, 0.5]])
    assert [points.value(x, 2.0) for x in (0, 0.1, 0.25, 0.4, 0.5, 0.8, 1)] == pytest.approx(
        [2.0, 2.0, 2.3, 2.6, 2.6, 1.8, 1.0]
    )


def test_a_curve_from_a_file(tmp_path):
    file = tmp_path / "curve.csv"
    file.write_text("progress,entropy\n0,0.9\n0.5,0.6\n\n1,0.3\n")
    curve = EntropyCurve("file", file=str(file), relative=False)
    assert [curve.value(x, 5.0) for x in (0, 0.25, 0.75, 1)] == pytest.approx([0.9, 0.75, 0.45, 0.3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,entropy\n0,1\n", "line 1: expected 'progress,entropy', found 'step,entropy'"),
        ("progress,entropy\n0,1\n0.5,high\n", "line 3"),
        ("progress,entropy\n0,1,2\n", "line 2"),
        ("progress,entropy\n", "no points"),
        ("progress,entropy\n0,1\n2,1\n", "progress in 0 to 1"),
    ],
)
def test_a_bad_file_is_refused_with_the_line_number(tmp_path, text, message):
    file = tmp_path / "curve.csv"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        EntropyCurve("file", file=str(file))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"curve": "parabola"}, "valid: constant, linear, cosine, piecewise, file"),
        ({"curve": "linear"}, "needs end"),
        ({"curve": "constant", "end": 0.5}, "takes no end"),
        ({"curve": "piecewise"}, "needs points"),
        ({"curve": "piecewise", "points": []}, "no points"),
        ({"curve": "piecewise", "points": [[0.5, 1.0], [0.2, 1.0]]}, "must increase"),
        ({"curve": "piecewise", "points": [[0.5, -1.0]]}, "entropy above 0"),
        ({"curve": "file", "file": "/nowhere.csv"}, "no such file: /nowhere.csv"),
        ({"start": 0.0}, "start must be greater than 0"),
        ({"curve": "linear", "end": "low"}, "end must be a number greater than 0"),
    ],
)
def test_bad_curves_are_refused_in_one_line(parameters, message):
    with pytest.raises(ValueError) as error:
        EntropyCurve(**parameters)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
