"""Detectors: tiny models made here, whose boxes are known."""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from inferno.engine.engine import Engine
from inferno.errors import InvalidInput, PackageError
from inferno.processors.yolo import suppress
from inferno.protocol.tensors import Array, Tensors
from inferno.repository.package import Package
from inferno.runtimes import images
from inferno.settings import BatchingSettings, InferenceSettings
from tests.unit.inferno.artifacts import png, yolo_bytes

ReadPackage = Callable[..., Package]

SIZE = 64
SIGNATURE = {
    "inputs": [{"name": "image", "dtype": "bytes", "shape": ["batch"], "content": "image"}],
    "outputs": [
        {"name": "boxes", "dtype": "float32", "shape": ["batch", "detections", 4]},
        {"name": "scores", "dtype": "float32", "shape": ["batch", "detections"]},
        {"name": "labels", "dtype": "string", "shape": ["batch", "detections"]},
        {"name": "classes", "dtype": "int64", "shape": ["batch", "detections"]},
        {"name": "count", "dtype": "int64", "shape": ["batch"]},
    ],
}
#: Candidates in pixels of the square: centre, width, height, and the scores of two classes.
CANDIDATES = np.array(
    [
        [32, 32, 32, 16, 0.9, 0.1],  # the best
        [33, 32, 32, 16, 0.8, 0.1],  # nearly the same box
        [33, 32, 32, 16, 0.1, 0.7],  # of the other class
        [8, 32, 8, 8, 0.5, 0.2],  # elsewhere
        [50, 32, 8, 8, 0.3, 0.2],  # unlikely
        [2, 32, 16, 8, 0.1, 0.4],  # half outside
    ],
    np.float32,
)


def load(package: ReadPackage, **fields: Any) -> Engine:
    return Engine(
        package(**{"signature": SIGNATURE, "labels": ["cat", "dog"]} | fields),
        BatchingSettings(max_batch_size=8),
        InferenceSettings(device="cpu", threads=1),
    )


def yolo(package: ReadPackage, *, labels: list[str] | None = None, **parameters: Any) -> Engine:
    return load(
        package, format="onnx", entrypoint=None, files={"model.onnx": yolo_bytes(CANDIDATES, SIZE)},
        processor="inferno.processors.yolo:build", parameters={"size": SIZE} | parameters,
        labels=labels or ["cat", "dog"],
    )  # fmt: skip


def pictures(*raw: bytes) -> Tensors:
    array = np.empty(len(raw), object)
    array[:] = raw
    return {"image": array}


def found(answer: Tensors, row: int = 0) -> list[tuple[str, float, list[float]]]:
    """Return label, score and box of each detection of a row."""
    n = int(answer["count"][row])
    assert not answer["scores"][row, n:].any()
    assert set(answer["labels"][row, n:]) <= {""}
    assert (answer["classes"][row, n:] == -1).all()
    names = [("cat", "dog")[number] for number in answer["classes"][row, :n]]
    assert names == answer["labels"][row, :n].tolist()
    return [
        (label, round(float(score), 3), [round(float(side), 4) for side in box])
        for label, score, box in zip(
            answer["labels"][row, :n], answer["scores"][row, :n], answer["boxes"][row, :n],
            strict=True,
        )
    ]  # fmt: skip


def test_the_boxes_of_a_square_picture_are_parts_of_it(package: ReadPackage) -> None:
    engine = yolo(package)
    engine.warm_up()
    [answer] = engine.forward([engine.prepare(pictures(png(SIZE, SIZE, red=255)))])
    assert found(answer) == [
        ("cat", 0.9, [0.25, 0.375, 0.75, 0.625]),
        ("dog", 0.7, [0.2656, 0.375, 0.7656, 0.625]),
        ("cat", 0.5, [0.0625, 0.4375, 0.1875, 0.5625]),
        ("dog", 0.4, [0.0, 0.4375, 0.1562, 0.5625]),
    ]


def test_the_grey_beside_a_picture_is_no_part_of_it(package: ReadPackage) -> None:
    # Given a picture that is twice as wide as high, and fills the square's middle half
    engine = yolo(package, conf=0.85)
    [answer] = engine.forward([engine.prepare(pictures(png(200, 100, red=255)))])
    assert found(answer) == [("cat", 0.9, [0.25, 0.25, 0.75, 0.75])]


def test_parameters_say_which_boxes_count(package: ReadPackage) -> None:
    engine = yolo(package, conf=0.05, iou=0.99, max_det=3)
    [answer] = engine.forward([engine.prepare(pictures(png(SIZE, SIZE, red=255)))])
    assert answer["boxes"].shape == (1, 3, 4)
    assert [score for _, score, _ in found(answer)] == [0.9, 0.8, 0.7]


@pytest.mark.parametrize(
    ("parameters", "labels", "reason"),
    [
        ({"confidence": 1}, None, "parameters.confidence: extra inputs are not permitted"),
        ({"conf": 2}, None, "parameters.conf: 2: input should be less than or equal to 1"),
        ({"size": SIZE}, ["cat"], "labels: 1 names; the artifact has 2 classes"),
    ],
)
def test_a_detector_that_does_not_fit_says_why(
    package: ReadPackage, parameters: dict[str, Any], labels: list[str] | None, reason: str
) -> None:
    with pytest.raises(PackageError, match=reason):
        yolo(package, labels=labels, **parameters).warm_up()


def test_a_picture_is_fitted_into_what_the_model_takes(package: ReadPackage) -> None:
    # Given a model that takes 48 x 64 pixels, each channel scaled in its own way
    engine = yolo(package, size=[48, 64], mean=[0.5, 0.5, 0], std=[0.25, 0.5, 1])
    # When a white picture twice as wide as high is fitted into it
    white = io.BytesIO()
    Image.new("RGB", (128, 64), "white").save(white, "GIF")
    prepared = engine.prepare(pictures(white.getvalue()))
    # Then it has 8 grey rows above and below
    assert prepared["letterbox"].tolist() == [[0, 8, 64, 32]]
    assert prepared["images"].shape == (1, 3, 48, 64)
    for channel, mean, std in zip(
        prepared["images"][0], (0.5, 0.5, 0), (0.25, 0.5, 1), strict=True
    ):
        np.testing.assert_allclose(channel[8:40], (1 - mean) / std, rtol=1e-6)
        grey = np.concatenate([channel[:8], channel[40:]])
        np.testing.assert_allclose(grey, (114 / 255 - mean) / std, rtol=1e-5)


def test_pictures_of_any_size_share_a_batch(package: ReadPackage) -> None:
    # Given pictures of various sizes and colours; the model sees the grey border of one, too
    engine = yolo(package)
    members = [
        engine.prepare(pictures(png(200, 100, 255), png(31, 64, 200))),
        engine.prepare(pictures(png(64, 64, 120))),
        engine.prepare(pictures(png(5, 7, 255))),
    ]
    together = engine.forward(members)
    for member, answer in zip(members, together, strict=True):
        [alone] = engine.forward([member])
        for name, array in answer.items():
            np.testing.assert_array_equal(array, alone[name])
    assert [answer["count"].tolist() for answer in together] == [[4, 3], [1], [4]]


def test_what_is_no_picture_fails_alone(package: ReadPackage) -> None:
    engine = yolo(package, max_pixels=100)
    with pytest.raises(InvalidInput, match="expected a PNG, JPEG, GIF or WebP image"):
        engine.prepare(pictures(b"no"))
    with pytest.raises(InvalidInput, match="has 64x64 pixels; expected at most 100"):
        engine.prepare(pictures(png(64, 64)))


@given(
    seed=st.integers(0, 2**32 - 1), n=st.integers(0, 40), classes=st.integers(1, 3),
    iou=st.floats(0.1, 0.9),
)  # fmt: skip
def test_boxes_are_suppressed_as_one_by_one(seed: int, n: int, classes: int, iou: float) -> None:
    source = np.random.default_rng(seed)
    corners = source.uniform(0, 50, (n, 2))
    boxes = np.concatenate([corners, corners + source.uniform(1, 40, (n, 2))], axis=1)
    kinds = source.integers(0, classes, n)

    def overlap(a: Array, b: Array) -> float:
        sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
        shared = float(sides.clip(0).prod())
        areas = [float((box[2:] - box[:2]).prod()) for box in (a, b)]
        return shared / (sum(areas) - shared)

    expected: list[int] = []
    for place in range(n):
        if not any(
            kinds[place] == kinds[k] and overlap(boxes[place], boxes[k]) > iou for k in expected
        ):
            expected.append(place)
    assert suppress(boxes, kinds, iou, n).tolist() == expected


TORCHVISION = """
import torch
from inferno.processors.torchvision import DetectionModule

class Detector(torch.nn.Module):
    # As torchvision's: a list of pictures to a list of dicts, with as many boxes as there are.
    def forward(self, images):
        found = []
        for image in images:
            n = 1 + int(image.max() > 0.9)
            boxes = torch.tensor([[16.0, 24, 48, 40], [0, 24, 8, 32]])[:n]
            found.append({
                "boxes": boxes, "labels": torch.tensor([1, 0])[:n],
                "scores": torch.tensor([0.6, 0.9])[:n],
            })
        return found

def build(context):
    return DetectionModule(Detector())
"""


def test_detectors_of_torchvision_are_served(package: ReadPackage) -> None:
    engine = load(
        package, files={"model.py": TORCHVISION}, processor="inferno.processors.boxes:build",
        parameters={"size": SIZE},
    )  # fmt: skip
    members = [engine.prepare(pictures(png(SIZE, SIZE, red))) for red in (255, 100)]
    bright, dark = engine.forward(members)
    assert found(bright) == [
        ("cat", 0.9, [0.0, 0.375, 0.125, 0.5]),
        ("dog", 0.6, [0.25, 0.375, 0.75, 0.625]),
    ]
    assert found(dark) == [("dog", 0.6, [0.25, 0.375, 0.75, 0.625])]


def test_what_torchvision_exports_for_one_picture_is_served(package: ReadPackage) -> None:
    # Given a graph whose outputs have no batch dimension, and numbers as names
    known = {
        "boxes": np.array([[16, 24, 48, 40], [0, 24, 8, 32], [1, 1, 2, 2]], np.float32),
        "labels": np.array([1, 0, 0]),
        "scores": np.array([0.6, 0.9, 0.1], np.float32),
    }
    called = {"boxes": "2911", "labels": "2913", "scores": "2912"}
    types = {"boxes": TensorProto.FLOAT, "labels": TensorProto.INT64, "scores": TensorProto.FLOAT}
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [output]) for name, output in called.items()],
        "torchvision",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [
            helper.make_tensor_value_info(output, types[name], ["n", *known[name].shape[1:]])
            for name, output in called.items()
        ],
        [numpy_helper.from_array(array, name) for name, array in known.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    fields: dict[str, Any] = {
        "format": "onnx", "entrypoint": None, "processor": "inferno.processors.boxes:build",
        "files": {"model.onnx": model.SerializeToString()}, "batching": {"max_batch_size": 1},
    }  # fmt: skip
    parameters = {"size": SIZE, "input": "image", "outputs": called}
    engine = load(package, parameters=parameters, **fields)
    [answer] = engine.forward([engine.prepare(pictures(png(200, 100)))])
    assert found(answer) == [
        ("cat", 0.9, [0.0, 0.25, 0.125, 0.5]),
        ("dog", 0.6, [0.25, 0.25, 0.75, 0.75]),
    ]
    # Then the error says how to name the outputs
    engine = load(package, version=2, parameters={"size": SIZE, "input": "image"}, **fields)
    with pytest.raises(
        PackageError, match=r"no output 'boxes'; it has 2911, .* parameters.outputs"
    ):
        engine.warm_up()


class Exported(torch.nn.Module):
    """Returns tensors without names; the score is the largest value of a picture."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        boxes = torch.tensor([[[16.0, 24.0, 48.0, 40.0]]]).expand(len(images), 1, 4)
        scores = images.amax([1, 2, 3])[:, None]
        return boxes, scores, torch.ones(len(images), 1, dtype=torch.int64)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_detectors_in_torchscript_are_served(package: ReadPackage) -> None:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Exported()), file)
    parameters = {"size": SIZE, "output_names": ["boxes", "scores", "labels"], "conf": 0.5}
    engine = load(
        package, format="torchscript", entrypoint=None, files={"model.ts": file.getvalue()},
        processor="inferno.processors.boxes:build", parameters=parameters,
    )  # fmt: skip
    engine.warm_up()
    members = [engine.prepare(pictures(png(SIZE, SIZE, red))) for red in (255, 153, 50)]
    answers = engine.forward(members)
    assert [answer["count"].tolist() for answer in answers] == [[1], [1], [0]]
    assert found(answers[1]) == [("dog", 0.6, [0.25, 0.375, 0.75, 0.625])]


def test_pictures_of_a_task_are_decoded_one_by_one(
    package: ReadPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = yolo(package)
    decoded: list[weakref.ref[Image.Image]] = []
    decode, alive = images.decode, []

    def watched(raw: bytes, max_pixels: int) -> Image.Image:
        picture = decode(raw, max_pixels)
        decoded.append(weakref.ref(picture))
        alive.append(sum(one() is not None for one in decoded))
        return picture

    monkeypatch.setattr(images, "decode", watched)
    engine.prepare({"image": np.array([png(64, 32)] * 5, object)})
    assert alive == [1] * 5
