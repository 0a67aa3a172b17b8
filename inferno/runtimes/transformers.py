"""Runtime of Hugging Face models: a folder that `save_pretrained` has written.

`parameters.pipeline` is the model's task, by its name on the Hub. Nothing is downloaded, and no
code from the folder runs.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy.signal import resample_poly
from torch import Tensor, nn
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
)

from inferno.errors import PackageError
from inferno.protocol.tensors import Array, Tensors
from inferno.repository.package import Package
from inferno.runtimes import images
from inferno.runtimes.base import ModelContext
from inferno.runtimes.modules import ModuleRunner
from inferno.runtimes.texts import head

#: Nothing is downloaded, and no code of the folder runs: pickles are read as weights only.
_SAFELY = {"local_files_only": True, "trust_remote_code": False}
#: transformers uses larger limits for tokenizers without a limit.
_NO_LIMIT = 10**20


class Pipeline(nn.Module):
    """A model with its pre- and postprocessing."""

    #: Inputs that a package must declare.
    inputs: ClassVar[tuple[str, ...]]
    #: Class of transformers that loads the model from a folder.
    loader: ClassVar[Any]

    def __init__(self, folder: Path, context: ModelContext) -> None:
        """Load the model; its weights keep their stored precision."""
        super().__init__()
        self.model: Any = self.loader.from_pretrained(folder, weights_only=True, **_SAFELY)
        self.parameters_ = context.parameters
        self.labels = context.labels

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the model with the arrays of `preprocess` as tensors."""
        dtype = self.model.dtype
        return self.answer(
            {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
        )

    def answer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the model, and return what `postprocess` needs; by default the logits."""
        return {"logits": self.model(**inputs).logits}

    def classes(self, logits: Array) -> Tensors:
        """Return `scores` [rows, classes], and `label` [rows], the most likely class."""
        config = self.model.config
        # The same rule as in the pipelines of transformers.
        if config.num_labels == 1 or config.problem_type == "multi_label_classification":
            scores = 1 / (1 + np.exp(-logits))
        else:
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            scores = powers / powers.sum(axis=1, keepdims=True)
        names = self.labels or [config.id2label[n] for n in range(config.num_labels)]
        return {"label": np.array(names, object)[scores.argmax(axis=1)], "scores": scores}


class TextPipeline(Pipeline):
    """A model that takes a text, or a pair of texts."""

    inputs: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(self, folder: Path, context: ModelContext) -> None:
        """Load model and tokenizer; texts are cut off after `parameters.max_tokens`.

        The default is the smaller limit of model and tokenizer; some have no limit.
        """
        super().__init__(folder, context)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **_SAFELY)
        self.tokenizer.padding_side = "right"
        longest = getattr(self.model.config, "max_position_embeddings", None) or _NO_LIMIT
        end = min(self.tokenizer.model_max_length, longest)
        self.max_tokens: int | None = context.parameters.get(
            "max_tokens", None if end >= _NO_LIMIT else end
        )
        #: Fill values for the engine, which groups tasks by length and pads them.
        self.padding = dict.fromkeys(self.tokenizer.model_input_names, 0) | {
            "input_ids": self.tokenizer.pad_token_id or 0
        }

    def preprocess(self, inputs: Tensors) -> Tensors:
        """Tokenise the rows of one task; int64 [rows, tokens of the longest row] each."""
        encoded = self.tokenizer(
            *(self._heads(inputs[name].tolist()) for name in self.inputs),
            truncation=self.max_tokens is not None,
            max_length=self.max_tokens,
            padding=True,
            return_tensors="np",
        )
        return {name: np.asarray(encoded[name], np.int64) for name in self.padding}

    def _heads(self, texts: list[str]) -> list[str]:
        """Return as much of each text as the model can read."""
        words = getattr(self.tokenizer, "backend_tokenizer", None)
        # How a pair is cut off depends on which text is the longer one.
        if words is None or self.max_tokens is None or len(self.inputs) > 1:
            return texts
        if self.tokenizer.truncation_side == "left":
            return texts
        return [head(text, words, self.max_tokens) for text in texts]


class TextClassification(TextPipeline):
    """`text` to `label` and `scores`."""

    loader = AutoModelForSequenceClassification

    def postprocess(self, outputs: Tensors) -> Tensors:
        """Return the classes."""
        return self.classes(outputs["logits"])


class TextRanking(TextPipeline):
    """`query` and `document` to `score`: their relevance by a cross-encoder."""

    inputs = ("query", "document")
    loader = AutoModelForSequenceClassification

    def postprocess(self, outputs: Tensors) -> Tensors:
        """Return the scores, from 0 to 1 unless `parameters.activation` is `none`."""
        logits = outputs["logits"][:, 0]
        is_raw = self.parameters_.get("activation") == "none"
        return {"score": logits if is_raw else 1 / (1 + np.exp(-logits))}


class FeatureExtraction(TextPipeline):
    """`text` to `embedding`: the mean over its tokens, or that of the first token."""

    loader = AutoModel

    def __init__(self, folder: Path, context: ModelContext) -> None:
        """Load the model; `parameters.pooling` is `mean` or `cls`.

        The default is the pooling that sentence-transformers has saved in the folder, or `mean`.

        Raises:
          ValueError: the pooling is something else.
        """
        super().__init__(folder, context)
        self.pooling = context.parameters.get("pooling") or _saved_pooling(folder)
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"parameters.pooling: {self.pooling!r}: expected mean or cls")

    def answer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return embeddings of length 1, unless `parameters.normalize` is false."""
        states = self.model(**inputs).last_hidden_state.float()
        if self.pooling == "cls":
            pooled = states[:, 0]
        else:
            seen = inputs["attention_mask"].unsqueeze(2).to(states.dtype)
            pooled = (states * seen).sum(1) / seen.sum(1).clamp(min=1)
        if self.parameters_.get("normalize", True):
            pooled = nn.functional.normalize(pooled, dim=1)
        return {"embedding": pooled}

    def postprocess(self, outputs: Tensors) -> Tensors:
        """Return the embeddings as they are."""
        return outputs


def _saved_pooling(folder: Path) -> str:
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    saved = json.loads(file.read_text())
    # Older releases of sentence-transformers save one switch per pooling.
    names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    switched = [names.get(key, key) for key, on in saved.items() if on is True and "_mode_" in key]
    return str(saved.get("pooling_mode") or " and ".join(switched))


class ImageClassification(Pipeline):
    """`image` to `label` and `scores`."""

    inputs = ("image",)
    loader = AutoModelForImageClassification

    def __init__(self, folder: Path, context: ModelContext) -> None:
        """Load model and image processor."""
        super().__init__(folder, context)
        self.images = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            folder, backend="pil", **_SAFELY
        )

    def sample(self) -> Tensors:
        """Return a picture to warm up with."""
        return images.sample()

    def preprocess(self, inputs: Tensors) -> Tensors:
        """Decode and scale the pictures of one task; float32 [rows, channels, height, width].

        Raises:
          ValueError: an input is not a picture, or is too large.
        """
        scaled = [self._scaled(raw) for raw in inputs["image"]]
        return {"pixel_values": np.concatenate(scaled)}

    def _scaled(self, raw: bytes) -> Array:
        """Decode and scale one picture, whose full size takes memory only meanwhile."""
        found = self.images(images=[images.decode(raw)], return_tensors="np")
        return np.asarray(found["pixel_values"])

    def postprocess(self, outputs: Tensors) -> Tensors:
        """Return the classes."""
        return self.classes(outputs["logits"])


class SpeechRecognition(Pipeline):
    """`audio` to `text`, for models like Whisper that take a window of fixed length."""

    inputs = ("audio",)
    loader = AutoModelForSpeechSeq2Seq

    def __init__(self, folder: Path, context: ModelContext) -> None:
        """Load model, feature extractor and tokenizer.

        `parameters.generate` holds arguments of transformers' `generate`, such as `language`,
        `task` and `max_new_tokens`.
        """
        super().__init__(folder, context)
        # Only this pipeline needs it; inferno[transformers] installs it.
        import soundfile

        self._soundfile = soundfile
        self.features = AutoFeatureExtractor.from_pretrained(  # type: ignore[no-untyped-call]
            folder, **_SAFELY
        )
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **_SAFELY)
        self.options: dict[str, Any] = dict(context.parameters.get("generate", {}))

    def sample(self) -> Tensors:
        """Return half a second of silence to warm up with."""
        buffer = io.BytesIO()
        rate = self.features.sampling_rate
        self._soundfile.write(buffer, np.zeros(rate // 2, np.float32), rate, format="WAV")
        return {"audio": np.array([buffer.getvalue()], object)}

    def preprocess(self, inputs: Tensors) -> Tensors:
        """Decode the recordings of one task; float32 [rows, mel bands, steps].

        Raises:
          ValueError: an input is not a recording, or is longer than the model's window.
        """
        rate = self.features.sampling_rate
        heard = [self._read(raw) for raw in inputs["audio"]]
        found = self.features(heard, sampling_rate=rate, return_tensors="np")
        return {"input_features": found["input_features"]}

    def _read(self, raw: bytes) -> Array:
        """Decode a file; return the mean of its channels at the model's rate, float32 [samples]."""
        rate, longest_s = self.features.sampling_rate, self.features.chunk_length
        try:
            with self._soundfile.SoundFile(io.BytesIO(raw)) as file:
                given = file.samplerate
                # Checked before decoding: few compressed bytes can be hours of silence.
                if file.frames > longest_s * given:
                    raise ValueError(
                        f"audio: {file.frames / given:.1f} s; expected at most {longest_s:g} s"
                    )
                samples = file.read(dtype="float32", always_2d=True)
        except self._soundfile.SoundFileError as exc:
            raise ValueError("audio: expected a WAV, FLAC, OGG or MP3 file") from exc
        mono: Array = samples.mean(axis=1)
        return mono if given == rate else resample_poly(mono, rate, given).astype(np.float32)

    def answer(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the token ids of the text."""
        return {"tokens": self.model.generate(**inputs, **self.options)}

    def postprocess(self, outputs: Tensors) -> Tensors:
        """Return the texts."""
        texts = self.tokenizer.batch_decode(outputs["tokens"], skip_special_tokens=True)
        return {"text": np.array(texts, object)}


PIPELINES: dict[str, type[Pipeline]] = {
    "text-classification": TextClassification,
    "text-ranking": TextRanking,
    "feature-extraction": FeatureExtraction,
    "image-classification": ImageClassification,
    "automatic-speech-recognition": SpeechRecognition,
}


class TransformersRuntime:
    """The model of one folder, as a pipeline."""

    def __init__(self, package: Package, context: ModelContext) -> None:
        """Load the folder that `artifact` names; by default, the version's folder.

        Raises:
          PackageError: the folder holds no such model, or the package does not fit the pipeline.
        """
        wanted = context.parameters.get("pipeline")
        kind = PIPELINES.get(str(wanted))
        if kind is None:
            raise PackageError(
                f"{package.path}: parameters.pipeline: {wanted!r}: "
                f"expected one of {', '.join(PIPELINES)}"
            )
        declared = [spec.name for spec in package.signature.inputs]
        if sorted(declared) != sorted(kind.inputs):
            raise PackageError(
                f"{package.path}: signature.inputs: {', '.join(declared)}: "
                f"{wanted} takes {' and '.join(kind.inputs)}"
            )
        folder = (package.path / (package.manifest.artifact or ".")).resolve()
        if not (folder / "config.json").is_file():
            raise PackageError(f"{folder / 'config.json'} is missing; save_pretrained writes it")
        try:
            pipeline = kind(folder, context)
        except (OSError, ValueError, ImportError, RuntimeError, pickle.UnpicklingError) as exc:
            raise PackageError(f"{folder}: cannot be loaded: {exc}") from exc
        self.processor = pipeline
        self._runner = ModuleRunner(pipeline, context)

    @property
    def memory_bytes(self) -> int:
        """Size of the weights in bytes."""
        return self._runner.memory_bytes

    def run(self, inputs: Tensors) -> Tensors:
        """Run the model."""
        return self._runner.run((), **inputs)
