"""What an installed wheel holds."""

import doctest
import importlib
import importlib.resources
import inspect
import pkgutil
import re

import pytest
import torch

import shiftkern

from helpers.process import output

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(shiftkern.__path__, "shiftkern.")
    if not info.name.endswith("__main__") and "._native" not in info.name
)
#: The packages whose ``__all__`` is the public API.
PUBLIC = ["shiftkern", "shiftkern.errors", "shiftkern.methods"]
PUBLIC += [f"shiftkern.{name}" for name in ("attention", "merge", "norm", "ot", "peft", "rotation", "testing", "tta")]


def public_objects():
    """Every public function and class once."""
    seen = {}
    for module in PUBLIC:
        for name in getattr(importlib.import_module(module), "__all__", ()):
            value = getattr(importlib.import_module(module), name)
            if callable(value) and getattr(value, "__module__", "").startswith("shiftkern"):
                seen.setdefault(id(value), (f"{module}.{name}", value))
    return list(seen.values())


OBJECTS = public_objects()
objects = pytest.mark.parametrize(("name", "value"), OBJECTS, ids=[name for name, _ in OBJECTS])


@pytest.mark.parametrize("file", ["py.typed", "_native.pyi", "__init__.py"])
def test_files(file):
    assert importlib.resources.files("shiftkern").joinpath(file).is_file()


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", shiftkern.__version__)


@pytest.mark.parametrize("module", ["shiftkern", *MODULES])
def test_modules_import_have_a_docstring_and_true_names(module):
    loaded = importlib.import_module(module)
    assert loaded.__doc__
    names = getattr(loaded, "__all__", [])
    assert len(names) == len(set(names))
    assert all(hasattr(loaded, name) for name in names)


@pytest.mark.parametrize("module", ["shiftkern.norm", "shiftkern.tta", "shiftkern.errors"])
def test_public_packages_list_their_names(module):
    assert importlib.import_module(module).__all__


@pytest.mark.parametrize("module", ["shiftkern", *MODULES])
def test_doctests(module):
    threads = torch.get_num_threads()
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(verbose=False)
    for test in finder.find(importlib.import_module(module), module):
        torch.manual_seed(0)
        assert runner.run(test).failed == 0, test.name
    assert torch.get_num_threads() == threads


@objects
def test_docstrings_name_parameters_and_errors(name, value):
    text = inspect.getdoc(value)
    assert text, name
    if inspect.isclass(value) and issubclass(value, (Exception, Warning)):
        return
    parameters = [p for p in inspect.signature(value).parameters.values() if p.name not in ("self", "args", "kwargs")]
    documented = any(word in text for word in ("Parameters\n", "Attributes\n", "see :func:"))
    assert documented or not parameters, name
    if inspect.isfunction(value) and parameters and "see :func:" not in text:
        section = text.partition("Parameters\n")[2]
        missing = [p.name for p in parameters if not re.search(rf"\b{re.escape(p.name)}\b", section)]
        assert not missing, (name, missing)


@objects
def test_functions_have_examples_and_name_their_errors(name, value):
    if not inspect.isfunction(value):
        return
    text = inspect.getdoc(value)
    assert ">>> " in text, name
    parameters = inspect.signature(value).parameters
    if parameters and name.startswith(("shiftkern.norm", "shiftkern.tta", "shiftkern.set")):
        assert "Raises\n" in text, name


@objects
def test_classes_of_the_domains_have_examples(name, value):
    is_base = any(inspect.isclass(other) and value in other.__mro__[1:] for _, other in OBJECTS)
    if inspect.isclass(value) and name.startswith(("shiftkern.norm", "shiftkern.tta")) and not is_base:
        assert ">>> " in inspect.getdoc(value), name


def test_import_adds_little_to_that_of_torch():
    script = """
        import time
        import torch
        start = time.process_time()
        import shiftkern
        print(time.process_time() - start)
    """
    # Processor time, and the least of five: another process on the machine must not decide.
    assert min(float(output(script)) for _ in range(5)) < 0.15


def test_import_starts_no_thread_and_needs_no_extra():
    script = """
        import sys, threading
        import torch
        before = threading.active_count()
        import shiftkern
        assert threading.active_count() == before
        heavy = {"sklearn", "matplotlib", "rich", "scipy", "hypothesis"} & set(sys.modules)
        print(heavy or "none")
    """
    assert output(script) == "none"


def test_import_is_light_and_registers_every_operator():
    script = """
    import sys, torch, shiftkern
    loaded = [name for name in ("attention", "merge", "norm", "ot", "peft", "rotation", "testing", "tta")
              if f"shiftkern.{name}" in sys.modules]
    print(loaded, len(shiftkern._library.OPERATORS))
    print(shiftkern.rotation.givens_rotate.__name__, "rotation" in dir(shiftkern))
    """
    first, second = output(script).splitlines()
    assert first == f"[] {len(shiftkern._library.OPERATORS)}"
    assert second == "givens_rotate True"


def test_an_unknown_attribute_is_an_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        shiftkern.nothing  # noqa: B018
