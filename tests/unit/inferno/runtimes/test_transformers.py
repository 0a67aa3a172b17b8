"""Hugging Face folders, made here with random weights, compared with transformers itself."""

from __future__ import annotations

import io
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from inferno.engine.engine import Engine
from inferno.errors import InvalidInput, PackageError
from inferno.protocol.tensors import Array, Tensors
from inferno.repository.package import Package
from inferno.settings import BatchingSettings, InferenceSettings
from tests.unit.inferno.artifacts import TINY, TINY_BERT, WORDS, tiny_tokenizer

ReadPackage = Callable[..., Package]

TEXTS = ["a b c", "d", "e f g h i j k l m m l k"]
#: Torch uses different kernels for a batch and for one row.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each architecture, of two tiny layers."""
    root = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    tokenizer, vocabulary = tiny_tokenizer(), dict(TINY_BERT)
    names = {0: "bad", 1: "good", 2: "odd"}
    models = {
        "text-classification": BertForSequenceClassification(
            BertConfig(id2label=names, **vocabulary)
        ),
        "text-ranking": BertForSequenceClassification(
            BertConfig(id2label={0: "fit"}, **vocabulary)
        ),
        "feature-extraction": BertModel(BertConfig(**vocabulary)),
        "image-classification": ViTForImageClassification(
            ViTConfig(image_size=16, patch_size=8, id2label=names, **TINY)
        ),
        "automatic-speech-recognition": WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=vocabulary["vocab_size"], num_mel_bins=8, d_model=32, encoder_layers=2,
                decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
                encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=50,
                max_target_positions=24, pad_token_id=0, bos_token_id=2, eos_token_id=3,
                decoder_start_token_id=2, begin_suppress_tokens=None, suppress_tokens=None,
            )
        ),
    }  # fmt: skip
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    pictures = ViTImageProcessorPil(size={"height": 16, "width": 16})
    pictures.save_pretrained(root / "image-classification")
    hearing = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    hearing.save_pretrained(root / "automatic-speech-recognition")
    return root


SIGNATURES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "text-classification": ({"text": "string"}, {"label": "string", "scores": [3]}),
    "text-ranking": ({"query": "string", "document": "string"}, {"score": []}),
    "feature-extraction": ({"text": "string"}, {"embedding": [32]}),
    "image-classification": ({"image": "bytes"}, {"label": "string", "scores": [3]}),
    "automatic-speech-recognition": ({"audio": "bytes"}, {"text": "string"}),
}


def saved_files(folders: Path, pipeline: str) -> dict[str, bytes]:
    """Return the files of a saved model, for a package whose artifact is the folder `saved`."""
    saved = folders / pipeline
    return {
        f"saved/{path.relative_to(saved)}": path.read_bytes()
        for path in saved.rglob("*")
        if path.is_file()
    }


def load(package: ReadPackage, folders: Path, pipeline: str, **fields: Any) -> Engine:
    inputs, outputs = SIGNATURES[pipeline]
    signature = {
        "inputs": [{"name": n, "dtype": d, "shape": ["batch"]} for n, d in inputs.items()],
        "outputs": [
            {"name": n, "dtype": "string", "shape": ["batch"]}
            if d == "string"
            else {"name": n, "dtype": "float32", "shape": ["batch", *d]}
            for n, d in outputs.items()
        ],
    }
    parameters = {"pipeline": pipeline} | fields.pop("parameters", {})
    found = package(
        pipeline, format="transformers", entrypoint=None, artifact="saved", signature=signature,
        parameters=parameters, files=saved_files(folders, pipeline), **fields,
    )  # fmt: skip
    return Engine(
        found, BatchingSettings(max_batch_size=8), InferenceSettings(device="cpu", threads=1)
    )


def ask(engine: Engine, *members: dict[str, list[Any]]) -> list[Tensors]:
    """Answer members together, and check that each has the same answer alone."""

    def arrays(member: dict[str, list[Any]]) -> Tensors:
        return {name: np.array(values, object) for name, values in member.items()}

    prepared = [engine.prepare(arrays(member)) for member in members]
    answers = engine.forward(prepared)
    for one, answer in zip(prepared, answers, strict=True):
        [alone] = engine.forward([one])
        for name, got in answer.items():
            if got.dtype.kind == "f":
                np.testing.assert_allclose(got, alone[name], atol=TOLERANCE)
            else:
                assert got.tolist() == alone[name].tolist()
    return answers


def tokens(folder: Path, *texts: Any) -> Any:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer(*texts, return_tensors="pt", padding=True)


def test_texts_are_classified_as_transformers_does(package: ReadPackage, folders: Path) -> None:
    engine = load(package, folders, "text-classification")
    engine_answers = ask(engine, {"text": TEXTS[:2]}, {"text": TEXTS[2:]})
    folder = folders / "text-classification"
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    for n, text in enumerate(TEXTS):
        with torch.inference_mode():
            expected = model(**tokens(folder, [text])).logits.softmax(1)[0].numpy()
        answer = engine_answers[n // 2]
        np.testing.assert_allclose(answer["scores"][n % 2], expected, atol=TOLERANCE)
        assert answer["label"][n % 2] == ["bad", "good", "odd"][expected.argmax()]


def test_the_labels_of_the_package_go_before_those_of_the_folder(
    package: ReadPackage, folders: Path
) -> None:
    engine = load(package, folders, "text-classification", labels=["x", "y", "z"])
    [answer] = ask(engine, {"text": TEXTS})
    assert set(answer["label"]) <= {"x", "y", "z"}


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_pairs_are_scored_as_transformers_does(
    package: ReadPackage, folders: Path, activation: str
) -> None:
    engine = load(package, folders, "text-ranking", parameters={"activation": activation})
    [first, second] = ask(
        engine,
        {"query": TEXTS[:1] * 2, "document": TEXTS[1:]},
        {"query": ["e"], "document": ["f"]},
    )
    folder = folders / "text-ranking"
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = model(**tokens(folder, [*TEXTS[:1] * 2, "e"], [*TEXTS[1:], "f"])).logits
    expected = (logits if activation == "none" else logits.sigmoid())[:, 0].numpy()
    got = np.concatenate([first["score"], second["score"]])
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)


def test_embeddings_are_the_mean_over_the_tokens(package: ReadPackage, folders: Path) -> None:
    engine = load(package, folders, "feature-extraction", parameters={"max_tokens": 6})
    answers = ask(engine, *({"text": [text]} for text in TEXTS))
    folder = folders / "feature-extraction"
    model = BertModel.from_pretrained(folder).eval()
    for text, answer in zip(TEXTS, answers, strict=True):
        cut = " ".join(text.split()[:4])
        with torch.inference_mode():
            mean = model(**tokens(folder, [cut])).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(
            answer["embedding"][0], mean / np.linalg.norm(mean), atol=TOLERANCE
        )


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_folders_of_sentence_transformers_are_pooled_as_they_say(
    package: ReadPackage, folders: Path, tmp_path: Path, pooling: str
) -> None:
    folder = tmp_path / "feature-extraction"
    modules = [Transformer(str(folders / "feature-extraction")), Pooling(32, pooling_mode=pooling)]
    reference = SentenceTransformer(modules=modules, device="cpu")
    reference.save_pretrained(str(folder), create_model_card=False)
    answers = ask(
        load(package, tmp_path, "feature-extraction", parameters={"normalize": False}),
        *({"text": [text]} for text in TEXTS),
    )
    got = np.concatenate([answer["embedding"] for answer in answers])
    np.testing.assert_allclose(got, reference.encode(TEXTS), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("saved", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "lasttoken"}, None),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, None),
    ],
)
def test_a_pooling_that_was_saved_is_used_or_refused(
    package: ReadPackage, folders: Path, tmp_path: Path, saved: dict[str, Any], pooling: str | None
) -> None:
    shutil.copytree(folders / "feature-extraction", tmp_path / "feature-extraction")
    (tmp_path / "feature-extraction/1_Pooling").mkdir()
    (tmp_path / "feature-extraction/1_Pooling/config.json").write_text(json.dumps(saved))
    if pooling is None:
        with pytest.raises(PackageError, match=r"parameters.pooling: .*: expected mean or cls"):
            load(package, tmp_path, "feature-extraction")
        return
    expected = load(
        package, folders, "feature-extraction", version=2, parameters={"pooling": pooling}
    )
    [answer] = ask(load(package, tmp_path, "feature-extraction"), {"text": TEXTS})
    [other] = ask(expected, {"text": TEXTS})
    np.testing.assert_array_equal(answer["embedding"], other["embedding"])


def test_a_model_without_an_end_reads_whole_texts(
    package: ReadPackage, folders: Path, tmp_path: Path
) -> None:
    # Given a folder whose model has relative positions, and whose tokenizer names no limit
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=17, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=0, relative_attention=True,
        position_biased_input=False,
    )  # fmt: skip
    folder = tmp_path / "feature-extraction"
    model = DebertaV2Model(config).eval()
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders / "feature-extraction")
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(folder)
    # Then texts of any length are read to the end
    long = " ".join(WORDS * 8)
    [answer] = ask(load(package, tmp_path, "feature-extraction"), {"text": [long]})
    with torch.inference_mode():
        mean = model(**tokens(folder, [long])).last_hidden_state[0].mean(0).numpy()
    np.testing.assert_allclose(answer["embedding"][0], mean / np.linalg.norm(mean), atol=TOLERANCE)


def test_a_folder_is_loaded_in_another_precision(package: ReadPackage, folders: Path) -> None:
    exact = load(package, folders, "feature-extraction")
    [expected] = ask(exact, {"text": TEXTS})
    for version, quantize in enumerate(("int8", "bf16"), start=2):
        engine = load(
            package, folders, "feature-extraction", version=version,
            inference={"quantize": quantize},
        )  # fmt: skip
        inputs = {"text": np.array(TEXTS, object)}
        [answer] = engine.forward([engine.prepare(inputs)])
        cosine = (answer["embedding"] * expected["embedding"]).sum(axis=1)
        assert cosine.min() > 0.99
        assert abs(answer["embedding"] - expected["embedding"]).max() > 1e-5


def png(seed: int, size: tuple[int, int]) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_are_classified_as_transformers_does(package: ReadPackage, folders: Path) -> None:
    pictures = [png(0, (20, 30)), png(1, (16, 16)), png(2, (64, 9))]
    engine = load(package, folders, "image-classification")
    answers = ask(engine, *({"image": [picture]} for picture in pictures))
    folder = folders / "image-classification"
    model = ViTForImageClassification.from_pretrained(folder).eval()
    processor = ViTImageProcessorPil.from_pretrained(folder)
    opened: list[Any] = [Image.open(io.BytesIO(picture)) for picture in pictures]
    with torch.inference_mode():
        expected = model(**processor(images=opened, return_tensors="pt")).logits.softmax(1).numpy()
    got = np.concatenate([answer["scores"] for answer in answers])
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    with pytest.raises(InvalidInput, match="expected a PNG, JPEG, GIF or WebP image"):
        engine.prepare({"image": np.array([b"no"], object)})


def tone(hertz: float, rate: int, seconds: float, channels: int = 1) -> Array:
    times = np.arange(int(rate * seconds)) / rate
    wave = np.sin(2 * np.pi * hertz * times, dtype=np.float32) / 2
    return np.stack([wave] * channels, axis=1)


def wav(samples: Array, rate: int, kind: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype="PCM_16")
    return buffer.getvalue()


#: Suppresses special tokens, which random weights might make the most likely.
GENERATE: dict[str, Any] = {"max_new_tokens": 8, "suppress_tokens": [0, 1, 2, 3]}


def test_speech_is_transcribed_as_transformers_does(package: ReadPackage, folders: Path) -> None:
    # Given tones of several lengths, rates and channels
    recordings = [
        wav(tone(440, 16_000, 0.9), 16_000),
        wav(tone(880, 16_000, 0.3, channels=2), 16_000, "FLAC"),
        wav(tone(440, 8_000, 0.5), 8_000),
    ]
    engine = load(
        package, folders, "automatic-speech-recognition",
        parameters={"generate": GENERATE},
    )  # fmt: skip
    answers = ask(engine, *({"audio": [recording]} for recording in recordings))
    # Then recordings that need no resampling give the same words as the model itself
    folder = folders / "automatic-speech-recognition"
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    features = WhisperFeatureExtractor.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for recording, answer in list(zip(recordings, answers, strict=True))[:2]:
        samples = soundfile.read(io.BytesIO(recording), always_2d=True)[0].mean(1)
        heard = features([samples], sampling_rate=16_000, return_tensors="pt").input_features
        with torch.inference_mode():
            ids = model.generate(heard.float(), **GENERATE)
        expected = tokenizer.batch_decode(ids, skip_special_tokens=True)
        assert answer["text"].tolist() == expected
        assert expected[0]
    for raw, reason in (
        (b"no", "expected a WAV, FLAC, OGG or MP3 file"),
        (wav(tone(440, 16_000, 1.5), 16_000), "1.5 s; expected at most 1 s"),
    ):
        with pytest.raises(InvalidInput, match=reason):
            engine.prepare({"audio": np.array([raw], object)})


def test_a_recording_that_is_too_long_is_not_decoded(package: ReadPackage, folders: Path) -> None:
    engine = load(package, folders, "automatic-speech-recognition")
    hour = wav(np.zeros((3600 * 8_000, 1), np.float32), 8_000, "FLAC")
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match=r"3600.0 s; expected at most 1 s"):
            engine.prepare({"audio": np.array([hour], object)})
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("pipeline", SIGNATURES)
def test_a_folder_is_warmed_up_without_a_sample_of_its_own(
    package: ReadPackage, folders: Path, pipeline: str
) -> None:
    engine = load(package, folders, pipeline)
    engine.warm_up()
    assert engine.memory_bytes > 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parameters": {"pipeline": "magic"}}, "parameters.pipeline: 'magic': expected one of"),
        ({"artifact": "nowhere"}, "nowhere/config.json is missing; save_pretrained writes it"),
        ({"parameters": {"pipeline": "text-ranking"}}, "text-ranking takes query and document"),
    ],
)
def test_a_folder_that_cannot_be_served_says_why(
    package: ReadPackage, folders: Path, change: dict[str, Any], reason: str
) -> None:
    signature = {
        "inputs": [{"name": "text", "dtype": "string", "shape": ["batch"]}],
        "outputs": [{"name": "label", "dtype": "string", "shape": ["batch"]}],
    }
    fields = {
        "format": "transformers", "entrypoint": None, "signature": signature,
        "artifact": "saved", "parameters": {"pipeline": "text-classification"},
        "files": saved_files(folders, "text-classification"),
    }  # fmt: skip
    with pytest.raises(PackageError, match=reason):
        Engine(package(**fields | change), BatchingSettings(), InferenceSettings(device="cpu"))


def test_code_of_a_folder_never_runs(package: ReadPackage, folders: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    files = saved_files(folders, "text-classification")
    config = json.loads(files["saved/config.json"])
    config["auto_map"] = {
        "AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"
    }  # fmt: skip
    config["model_type"] = "own"
    files["saved/config.json"] = json.dumps(config).encode()
    files["saved/own.py"] = f"open({str(marker)!r}, 'w')".encode()
    signature = {
        "inputs": [{"name": "text", "dtype": "string", "shape": ["batch"]}],
        "outputs": [{"name": "label", "dtype": "string", "shape": ["batch"]}],
    }
    found = package(
        format="transformers", entrypoint=None, signature=signature, artifact="saved",
        parameters={"pipeline": "text-classification"}, files=files,
    )  # fmt: skip

    with pytest.raises(PackageError, match="trust_remote_code"):
        Engine(found, BatchingSettings(), InferenceSettings(device="cpu"))
    assert not marker.exists()


def test_pickles_of_a_folder_are_read_as_weights_only(
    package: ReadPackage, folders: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    files = saved_files(folders, "text-classification")
    del files["saved/model.safetensors"]
    buffer = io.BytesIO()
    torch.save({"weight": Creates(marker)}, buffer)
    files["saved/pytorch_model.bin"] = buffer.getvalue()
    signature = {
        "inputs": [{"name": "text", "dtype": "string", "shape": ["batch"]}],
        "outputs": [{"name": "label", "dtype": "string", "shape": ["batch"]}],
    }
    found = package(
        format="transformers", entrypoint=None, signature=signature, artifact="saved",
        parameters={"pipeline": "text-classification"}, files=files,
    )  # fmt: skip

    with pytest.raises(PackageError, match="cannot be loaded"):
        Engine(found, BatchingSettings(), InferenceSettings(device="cpu"))
    assert not marker.exists()


class Creates:
    """An object whose pickle creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")
