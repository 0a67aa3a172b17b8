"""Names that processes agree on."""

import pytest

from inferno import names


def test_the_lane_of_a_task_is_the_model_of_its_name() -> None:
    assert names.task_name("embed") == "infer.embed"
    assert names.lane(names.task_name("embed")) == "embed"
    assert names.lane("celery.backend_cleanup") is None


@pytest.mark.parametrize("name", ["a", "0", "resnet-18", "yolo.v8_n", "a" * 64])
def test_good_model_names(name: str) -> None:
    assert names.MODEL_NAME.fullmatch(name)


@pytest.mark.parametrize(
    "name", ["", "A", "-a", ".a", "..", "_a", "a/b", "a b", "a\n", "ä", "a" * 65, "../a", "a\\b"]
)
def test_bad_model_names(name: str) -> None:
    assert not names.MODEL_NAME.fullmatch(name)


def test_keys_are_where_others_look_for_them() -> None:
    assert names.result_key("1-2") == "celery-task-meta-1-2"
    assert names.record_key("inferno:", "1-2") == "inferno:task:1-2"
    assert names.workers_key("inferno:") == "inferno:workers"
