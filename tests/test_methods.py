import importlib
from pathlib import Path

import pytest

from shiftkern.methods import METHODS, Method

TESTS = Path(__file__).parent


def test_ids_are_unique_and_in_order():
    ids = [method.id for method in METHODS]
    assert ids == sorted(set(ids))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method.id))
def test_public_name_imports(method: Method):
    module, _, name = method.api.rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))
    assert name in importlib.import_module(module).__all__
    assert method.module in {"attention", "merge", "norm", "ot", "peft", "rotation", "tta"}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method.id))
def test_the_named_tests_exist(method: Method):
    assert method.tests
    for test in method.tests:
        path, _, function = test.partition("::")
        assert path.startswith("tests/")
        source = (TESTS.parent / path).read_text()
        assert not function or f"def {function.partition('[')[0]}(" in source


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method.id))
def test_fields_hold_known_words(method: Method):
    assert method.follows in ("paper", "code")
    assert method.status in ("works", "partial")
    assert method.system
    assert method.paper
