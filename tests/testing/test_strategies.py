"""The strategies draw what they say, and reach their edges."""

import math

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.merge import soup
from shiftkern.ot import sinkhorn
from shiftkern.rotation import to_matrix
from shiftkern.testing import (
    DTYPES,
    LAYOUTS,
    assert_orthogonal,
    cost_matrices,
    lay_out,
    probability_vectors,
    rotation_parameters,
    state_dicts,
    tensors,
)

from helpers.process import output, run


@given(tensors())
def test_tensors_have_channels(x):
    assert 2 <= x.dim() <= 5
    assert x.dtype in DTYPES
    assert x.numel() < 10**6


@given(tensors((3, 0, 2), edges="all"))
def test_tensors_of_a_shape(x):
    assert x.shape == (3, 0, 2)


@given(tensors((4, 3, 5), edges="finite", dtypes=[torch.float16]))
def test_finite_edges_are_finite(x):
    assert x.dtype == torch.float16
    assert x.isfinite().all()


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [
        (tensors(min_dim=1, max_dim=1), lambda x: x.numel() == 0),
        (tensors(edges="all"), lambda x: bool(x.isnan().any())),
        (tensors(edges="all"), lambda x: bool(x.isinf().any())),
        (tensors((6,), edges="finite"), lambda x: float(x.abs().max()) == torch.finfo(x.dtype).max),
        (tensors((6, 5)), lambda x: not x.is_contiguous()),
        (tensors((6, 5)), lambda x: x.stride(0) == 0),
        (tensors((6, 5)), lambda x: x.storage_offset() == 1 and x.is_contiguous()),
        (probability_vectors(5), lambda p: float(p.max()) == 1.0),
        (probability_vectors(5), lambda p: bool((p == 0.2).all())),
        (probability_vectors(), lambda p: len(p) == 1),
        (cost_matrices(forbidden=True), lambda c: bool(c.isinf().any())),
        (cost_matrices(4, 4), lambda c: float(c.min()) == float(c.max())),
        (state_dicts(2), lambda s: "norm.num_batches_tracked" in s[0]),
        (state_dicts(2), lambda s: all(torch.equal(s[0][n], s[1][n]) for n in s[0])),
        (rotation_parameters(["butterfly_rotate"]), lambda r: r[1]["factors"] == 3),
    ],
)
def test_edges_are_reached(strategy, wanted):
    find(strategy, wanted, settings=settings(max_examples=500))


def test_no_edges_where_none_are_asked_for():
    with pytest.raises(NoSuchExample):
        find(
            tensors((2, 2)),
            lambda x: not bool(x.isfinite().all()) or bool((x == 0).any()),
            settings=settings(max_examples=50),
        )


@given(probability_vectors(dtypes=[torch.float32, torch.float64]))
def test_probabilities_sum_to_one(p):
    assert p.dim() == 1
    assert (p >= 0).all()
    assert abs(float(p.double().sum()) - 1) <= len(p) * torch.finfo(p.dtype).eps


@given(probability_vectors(9, zeros=False))
def test_probabilities_without_zeros(p):
    assert len(p) == 9
    assert (p > 0).all()


@pytest.mark.filterwarnings("ignore::shiftkern.ConvergenceWarning")
@given(cost_matrices(forbidden=True, max_size=12), st.data())
def test_costs_and_probabilities_make_problems(costs, data):
    a, b = (data.draw(probability_vectors(n, zeros=False)) for n in costs.shape)
    finite = costs[costs.isfinite()]
    assert (finite >= 0).all()
    assert (finite <= 1000).all()
    result = sinkhorn(a, b, costs, 1.0, max_iter=3)
    assert (result.plan()[costs.isinf()] == 0).all()


@given(state_dicts(3))
def test_states_can_be_merged(models):
    assert len({tuple(model) for model in models}) == 1
    merged = soup(models)
    for name, tensor in merged.items():
        assert tensor.dtype == models[0][name].dtype
        assert tensor.shape == models[0][name].shape


@given(rotation_parameters())
def test_rotations_are_orthogonal(arguments):
    assert_orthogonal(to_matrix(*arguments), tol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0, 3), (2, 3, 4, 5)])
def test_layouts_hold_the_same_numbers(layout, shape):
    x = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    y = lay_out(x, layout)
    assert y.shape == x.shape
    assert torch.equal(y, x) or layout == "expanded"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tensors(dtypes=[torch.int64]), ArgumentError, "tensors: argument 'dtypes'"),
        (lambda: tensors(dtypes=[]), ArgumentError, "tensors: argument 'dtypes'"),
        (lambda: tensors(layouts="sliced"), ArgumentError, "tensors: argument 'layouts'"),
        (lambda: tensors(layouts=["spiral"]), ArgumentError, "tensors: argument 'layouts'"),
        (lambda: tensors(min_dim=3, max_dim=2), ArgumentError, "tensors: argument 'max_dim'"),
        (lambda: tensors(max_dim=6), ArgumentError, "tensors: argument 'max_dim'"),
        (lambda: tensors((2.5, 1)), ArgumentTypeError, "tensors: argument 'shape'"),
        (lambda: tensors(edges="some"), ArgumentError, "tensors: argument 'edges'"),
        (lambda: tensors(empty=1), ArgumentTypeError, "tensors: argument 'empty'"),
        (lambda: probability_vectors(0), ArgumentError, "probability_vectors: argument 'n'"),
        (lambda: probability_vectors(max_size=0), ArgumentError, "probability_vectors: argument 'max_size'"),
        (lambda: probability_vectors(zeros=None), ArgumentTypeError, "probability_vectors: argument 'zeros'"),
        (lambda: cost_matrices(3, 0), ArgumentError, "cost_matrices: argument 'm'"),
        (lambda: cost_matrices(layouts=["spiral"]), ArgumentError, "cost_matrices: argument 'layouts'"),
        (lambda: state_dicts(0), ArgumentError, "state_dicts: argument 'count'"),
        (lambda: state_dicts(max_tensors=0), ArgumentError, "state_dicts: argument 'max_tensors'"),
        (lambda: rotation_parameters("polar"), ArgumentError, "rotation_parameters: argument 'functions'"),
        (lambda: rotation_parameters(["polar"]), ArgumentError, "rotation_parameters: argument 'functions'"),
        (lambda: rotation_parameters(max_width=1), ArgumentError, "rotation_parameters: argument 'max_width'"),
        (lambda: lay_out(torch.zeros(2), "spiral"), ArgumentError, "lay_out: argument 'layout'"),
        (lambda: lay_out([1.0], "sliced"), ArgumentTypeError, "lay_out: argument 'x'"),
    ],
)
def test_wrong_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=f"^{message}: "):
        make()


def test_hypothesis_is_loaded_when_a_strategy_is():
    script = """
        import sys
        import shiftkern
        from shiftkern.testing import assert_orthogonal
        before = "hypothesis" in sys.modules
        from shiftkern.testing import tensors
        print(before, "hypothesis" in sys.modules, "tensors" in dir(shiftkern.testing))
    """
    assert output(script) == "False True True"


def test_a_missing_hypothesis_is_named():
    script = """
        import sys
        sys.modules["hypothesis"] = None
        import shiftkern.testing
        print(shiftkern.testing.assert_orthogonal.__name__)
        shiftkern.testing.tensors
    """
    done = run(script)
    assert done.returncode == 1
    assert done.stdout == "assert_orthogonal\n"
    expected = (
        "ModuleNotFoundError: the strategies of shiftkern.testing need hypothesis: pip install 'shiftkern[testing]'"
    )
    assert done.stderr.splitlines()[-1] == expected


def test_an_unknown_name_is_an_error():
    import shiftkern.testing

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        shiftkern.testing.nothing  # noqa: B018
