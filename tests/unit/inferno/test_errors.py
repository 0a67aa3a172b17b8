"""The tree of errors: statuses, problem objects, and being stored and raised again."""

import inspect
import pickle

import pytest

from inferno import errors
from inferno.errors import InfernoError, InvalidInput, RequestError, for_callers


def tree(base: type[InfernoError]) -> list[type[InfernoError]]:
    return [base, *(error for child in base.__subclasses__() for error in tree(child))]


ALL = tree(InfernoError)

STATUSES = {
    "InvalidRequest": 400,
    "InvalidField": 422,
    "InvalidInput": 422,
    "PayloadTooLarge": 413,
    "ModelNotFound": 404,
    "TaskNotFound": 404,
    "ResultExpired": 410,
    "ForwardFailed": 500,
    "PlatformUnreachable": 503,
    "ModelUnavailable": 503,
    "BrokerUnavailable": 503,
    "DeadlineExceeded": 504,
}


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
@pytest.mark.parametrize("args", [("what happened",), ("what happened", "inputs.text")])
def test_an_error_is_rebuilt_from_its_stored_arguments(
    error: type[InfernoError], args: tuple[str, ...]
) -> None:
    # Given what Celery stores of an error: its class and the list of its arguments
    raised = error(*args)
    stored = list(raised.args)
    # When it is built again
    rebuilt = error(*stored)
    # Then it says the same
    assert stored == list(args)
    assert (rebuilt.detail, rebuilt.field) == (raised.detail, raised.field)
    assert str(rebuilt) == ": ".join(reversed(args))
    assert rebuilt.problem() == raised.problem()


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_an_error_survives_pickling(error: type[InfernoError]) -> None:
    copy = pickle.loads(pickle.dumps(error("detail", "field")))
    assert type(copy) is error
    assert (copy.detail, copy.field) == ("detail", "field")


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = inspect.getdoc(errors) or ""
    for name, status in STATUSES.items():
        line = next(line for line in drawn.splitlines() if f" {name} " in line)
        assert str(status) in line
        assert getattr(errors, name).status == status
    defined = {error.__name__ for error in ALL if error.__module__ == errors.__name__}
    assert all(name in drawn for name in defined)


def test_codes_are_unique_where_a_class_has_one_of_its_own() -> None:
    codes = [e.code for e in ALL if "code" in vars(e)]
    assert len(set(codes)) == len(codes)


def test_a_problem_object_names_the_field_only_where_there_is_one() -> None:
    assert InvalidInput("too long", "inputs.text").problem() == {
        "type": "about:blank",
        "title": "Invalid input",
        "status": 422,
        "detail": "too long",
        "code": "invalid_input",
        "field": "inputs.text",
    }
    assert "field" not in InvalidInput("too long").problem()


def test_what_a_client_sent_is_not_echoed_by_the_megabyte() -> None:
    error = InvalidInput("x" * 1_000_000, "y" * 1_000_000)
    assert len(error.detail) == RequestError.MAX_DETAIL
    assert error.detail.endswith("...")
    assert error.field is not None
    assert len(error.field) <= RequestError.MAX_DETAIL
    assert InvalidInput(*error.args).args == error.args


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("No such file: '/srv/models/x/1/a.bin'", "No such file: 'a.bin'"),
        ("~/models/x.onnx: bad, /usr/lib/lib.so:45", "x.onnx: bad, lib.so:45"),
        (
            "models/x/1/model.yaml: see https://host/a/b",
            "models/x/1/model.yaml: see https://host/a/b",
        ),
        ("3/4 of a/b/c on 2026/11/30", "3/4 of a/b/c on 2026/11/30"),
        ("it broke\nTraceback (most recent call last):\n  File ...", "it broke"),
        ("Traceback (most recent call last):\n  File ...", "an error"),
        ("z" * 5000, "z" * 1997 + "..."),
    ],
)
def test_texts_for_callers_tell_nothing_of_the_machine(text: str, shown: str) -> None:
    assert for_callers(text) == shown
