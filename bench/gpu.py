"""How much of a device's speed is left behind the whole platform: `python -m bench.gpu`.

Two TorchScript models, in half precision on a GPU: `embed`, the encoder of the default model, and
`resnet50`, a network of ResNet-50's shape with random weights, which takes pictures of 224x224
pixels as base64. Each runs twice on the same device: its engine alone, in a loop of full batches,
and behind the whole platform, with enough clients to keep the batches full.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from inferno.engine.device import choose_device
from inferno.engine.engine import Engine
from inferno.protocol import tensors
from inferno.protocol.tensors import Tensors
from inferno.repository.repository import Repository
from inferno.settings import Settings
from inferno.testing.platform import running_platform
from inferno.testing.processes import ROOT

#: Number of different inputs that clients send in turn.
INPUTS = 16
PIXELS = 224
#: Limit of one call, in seconds.
PATIENCE_S = 120.0
#: Smallest accepted cosine of `embed` to the embeddings of the original model.
MIN_COSINE = 0.99


# -- Models ----------------------------------------------------------------------------------------


class EncoderLayer(nn.Module):
    """One layer of a BERT encoder, made from published weights."""

    def __init__(self, weights: dict[str, Tensor], prefix: str, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = linear(weights, f"{prefix}.attention.self.query")
        self.key = linear(weights, f"{prefix}.attention.self.key")
        self.value = linear(weights, f"{prefix}.attention.self.value")
        self.attended = linear(weights, f"{prefix}.attention.output.dense")
        self.attended_norm = norm(weights, f"{prefix}.attention.output.LayerNorm")
        self.inner = linear(weights, f"{prefix}.intermediate.dense")
        self.outer = linear(weights, f"{prefix}.output.dense")
        self.outer_norm = norm(weights, f"{prefix}.output.LayerNorm")

    def split(self, x: Tensor) -> Tensor:
        """Split into heads: [batch, tokens, hidden] to [batch, heads, tokens, part]."""
        return x.view(x.size(0), x.size(1), self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the new token states, [batch, tokens, hidden]."""
        query, key, value = (self.split(part(x)) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed = mixed.transpose(1, 2).flatten(2)
        x = self.attended_norm(x + self.attended(mixed))
        states: Tensor = self.outer_norm(x + self.outer(F.gelu(self.inner(x))))
        return states


class Encoder(nn.Module):
    """all-MiniLM-L6-v2: token ids and mask to embeddings of length 1."""

    def __init__(self, weights: dict[str, Tensor], layers: int = 6, heads: int = 12) -> None:
        super().__init__()
        self.words = embedding(weights["embeddings.word_embeddings.weight"])
        # All tokens have type 0, so its embedding is added to each position.
        places = weights["embeddings.position_embeddings.weight"]
        places = places + weights["embeddings.token_type_embeddings.weight"][0]
        self.places = embedding(places)
        self.norm = norm(weights, "embeddings.LayerNorm")
        self.layers = nn.ModuleList(
            EncoderLayer(weights, f"encoder.layer.{n}", heads) for n in range(layers)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return float32 [batch, hidden]."""
        places = torch.arange(input_ids.size(1), device=input_ids.device)
        x = self.norm(self.words(input_ids) + self.places(places))
        mask = attention_mask.bool()[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        seen = attention_mask[:, :, None].float()
        return F.normalize((x.float() * seen).sum(1) / seen.sum(1), dim=1)


def embedding(weight: Tensor) -> nn.Embedding:
    """Make an embedding table from published weights."""
    return nn.Embedding(weight.size(0), weight.size(1), _weight=weight)


def linear(weights: dict[str, Tensor], prefix: str) -> nn.Linear:
    """Make a linear layer from published weights."""
    weight = weights[f"{prefix}.weight"]
    layer = nn.Linear(weight.size(1), weight.size(0))
    layer.load_state_dict({"weight": weight, "bias": weights[f"{prefix}.bias"]})
    return layer


def norm(weights: dict[str, Tensor], prefix: str) -> nn.LayerNorm:
    """Make a layer norm from published weights."""
    layer = nn.LayerNorm(weights[f"{prefix}.weight"].numel(), eps=1e-12)
    layer.load_state_dict({kind: weights[f"{prefix}.{kind}"] for kind in ("weight", "bias")})
    return layer


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.path = nn.Sequential(
            *convolution(channels, width, 1),
            nn.ReLU(),
            *convolution(width, width, 3, stride),
            nn.ReLU(),
            *convolution(width, out, 1),
        )
        is_same = stride == 1 and channels == out
        self.shortcut = (
            nn.Identity() if is_same else nn.Sequential(*convolution(channels, out, 1, stride))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the input of the next block."""
        return F.relu(self.path(x) + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 with random weights: 25.6 million, and 4.1 billion multiplications a picture."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = 64
        for width, count, first in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for n in range(count):
                blocks.append(Bottleneck(channels, width, first if n == 0 else 1))
                channels = 4 * width
        stem = (*convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.features = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, 1000)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Take uint8 [batch, 3, 224, 224]; return the likeliest class and its score."""
        scores = self.head(self.features(image.to(self.head.weight.dtype) / 255)).float()
        best = scores.softmax(1).max(1)
        return best.indices, best.values


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    """Make a convolution and its normalisation."""
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return [layer, nn.BatchNorm2d(outputs)]


# -- Packages --------------------------------------------------------------------------------------


def write_package(
    root: Path, name: str, module: nn.Module, example: tuple[Tensor, ...], **manifest: Any
) -> None:
    """Write a module to a model repository, as TorchScript in its current precision.

    Args:
      root: folder of the repository.
      name: name of the model.
      module: module to trace, on its device.
      example: inputs of the module, on the same device.
      manifest: further members of model.yaml.
    """
    folder = root / name / "1"
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), torch.inference_mode():
        # torch has deprecated TorchScript.
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(module.eval(), example)  # type: ignore[no-untyped-call]
        traced.save(str(folder / "model.ts"))
    document = {"name": name, "version": 1, "format": "torchscript", **manifest}
    (folder / "model.yaml").write_text(yaml.safe_dump(document))


def write_embed(root: Path, device: str, dtype: torch.dtype, batch_size: int) -> None:
    """Write the package of `embed`."""
    sys.path.insert(0, str(ROOT / "models"))
    import minilm  # type: ignore[import-not-found]

    weights = {name: torch.from_numpy(array) for name, array in minilm.read_weights().items()}
    module = Encoder(weights).to(device, dtype)
    ids = torch.ones(2, 8, dtype=torch.int64, device=device)
    source = yaml.safe_load((ROOT / "models" / "embed" / "2" / "model.yaml").read_text())
    folder = root / "embed" / "1"
    folder.mkdir(parents=True)
    minilm.copy_tokenizer(folder)
    write_package(
        root,
        "embed",
        module,
        (ids, torch.ones_like(ids)),
        processor="inferno.processors.text:build",
        batching={"max_batch_size": batch_size, "pad": source["batching"]["pad"]},
        codecs={"default": "base64"},
        **{name: source[name] for name in ("signature", "warm_up", "parameters")},
    )


def write_resnet(root: Path, device: str, dtype: torch.dtype, batch_size: int) -> None:
    """Write the package of `resnet50`."""
    torch.manual_seed(0)
    image = torch.zeros(2, 3, PIXELS, PIXELS, dtype=torch.uint8, device=device)
    shape: list[str | int] = ["batch", 3, PIXELS, PIXELS]
    write_package(
        root,
        "resnet50",
        ResNet50().to(device, dtype),
        (image,),
        batching={"max_batch_size": batch_size},
        signature={
            "inputs": [{"name": "image", "dtype": "uint8", "shape": shape}],
            "outputs": [
                {"name": "class", "dtype": "int64", "shape": ["batch"]},
                {"name": "score", "dtype": "float32", "shape": ["batch"]},
            ],
        },
    )


def sentences() -> list[Tensors]:
    """Return texts of about 20 words."""
    words = "a model answers what it is asked while others wait for their turn in the same lane"
    return [{"text": np.array([f"{words} {n} times over"], object)} for n in range(INPUTS)]


def pictures() -> list[Tensors]:
    """Return pictures of noise."""
    noise = np.random.default_rng(0)
    shape = (1, 3, PIXELS, PIXELS)
    return [{"image": noise.integers(0, 256, shape, np.uint8)} for _ in range(INPUTS)]


@dataclass(frozen=True)
class Model:
    """A model to measure."""

    name: str
    write: Callable[[Path, str, torch.dtype, int], None]
    inputs: Callable[[], list[Tensors]]
    #: Largest number of rows in one forward pass, by device.
    batch_size: dict[str, int]


MODELS = (
    Model("embed", write_embed, sentences, {"cuda": 64, "cpu": 32}),
    Model("resnet50", write_resnet, pictures, {"cuda": 32, "cpu": 4}),
)


# -- Measurement -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """The results of one model."""

    model: str
    dtype: str
    max_batch_size: int
    clients: int
    #: One-row tasks a second, in the engine alone and through the platform.
    engine_per_s: float
    platform_per_s: float
    #: `platform_per_s` over `engine_per_s`.
    ratio: float
    mean_batch: float
    p50_ms: float
    p99_ms: float


def measure(model: Model, options: argparse.Namespace, device: str, folder: Path) -> Figures:
    """Measure a model alone and behind the platform, with its files in an empty folder."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    batch_size = options.batch_size or model.batch_size[device]
    clients = options.clients or 3 * batch_size
    inputs = model.inputs()
    root = folder / "models"
    model.write(root, device, dtype, batch_size)
    engine_per_s = run_engine(root, model.name, inputs, device, options.seconds)
    bodies = [_body(each) for each in inputs]
    env = {
        "INFERNO_REPOSITORY__ROOT": str(root),
        "INFERNO_INFERENCE__DEVICE": device,
        "INFERNO_SERVER__PROCESSES": str(options.web_processes),
        "INFERNO_SERVER__SYNC_WAIT_MS": str(int(PATIENCE_S * 1e3)),
    }
    with running_platform(folder, env, "--no-flower") as served:
        url = f"{served.url}/v1/models/{model.name}:predict"
        call = partial(_ask, url, bodies, options.seconds)
        share = [clients // options.processes] * options.processes
        share[0] += clients % options.processes
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.processes, spawn) as pool:
            answers = [answer for found in pool.map(call, share) for answer in found]
    latencies_ms = [took_s * 1e3 for _, took_s, _ in answers]
    per_s = len(answers) / (max(e for e, _, _ in answers) - min(e - t for e, t, _ in answers))
    p50_ms, p99_ms = np.percentile(latencies_ms, (50, 99))
    return Figures(
        model=model.name,
        dtype=str(dtype).removeprefix("torch."),
        max_batch_size=batch_size,
        clients=clients,
        engine_per_s=round(engine_per_s, 1),
        platform_per_s=round(per_s, 1),
        ratio=round(per_s / engine_per_s, 3),
        # Every member of a batch reports its size.
        mean_batch=round(len(answers) / sum(1 / size for _, _, size in answers), 1),
        p50_ms=round(float(p50_ms), 1),
        p99_ms=round(float(p99_ms), 1),
    )


def run_engine(
    root: Path, name: str, inputs: Sequence[Tensors], device: str, seconds: float
) -> float:
    """Run full batches in a loop, as the worker would; return rows a second.

    Raises:
      RuntimeError: the embeddings of `embed` differ from the original.
    """
    settings = Settings(repository={"root": root}, inference={"device": device})
    package = Repository.read(settings.repository).model(name).package()
    engine = Engine(package, settings.batching, settings.inference)
    engine.warm_up()
    if name == "embed":
        _check_embeddings(engine)
    batches = 0
    began = time.perf_counter()
    while (took_s := time.perf_counter() - began) < seconds or not batches:
        members = (inputs[n % INPUTS] for n in range(engine.max_batch_size))
        engine.forward([engine.prepare(member) for member in members])
        batches += 1
    return batches * engine.max_batch_size / took_s


def _check_embeddings(engine: Engine) -> None:
    reference = np.load(ROOT / "models" / "embed" / "reference.npz")
    texts = [{"text": np.array([text], object)} for text in reference["texts"].tolist()]
    got = [engine.forward([engine.prepare(text)])[0]["embedding"][0] for text in texts]
    cosine = float((np.array(got) * reference["embeddings"]).sum(axis=1).min())
    if cosine < MIN_COSINE:
        raise RuntimeError(f"embed: cosine {cosine:.4f} to the original, expected {MIN_COSINE}")


def _body(inputs: Tensors) -> bytes:
    """Return the body of a request, with texts as JSON and numbers as base64."""
    wire = {
        name: array.tolist()
        if array.dtype == object
        else tensors.encode(array, array.dtype.name, "base64")
        for name, array in inputs.items()
    }
    return json.dumps({"inputs": wire}).encode()


def _ask(
    url: str, bodies: Sequence[bytes], seconds: float, clients: int
) -> list[tuple[float, float, int]]:
    """Call with concurrent clients; return end, duration and batch size of each call.

    Raises:
      httpx.HTTPStatusError: a call was refused.
    """
    # The wall clock is the same in all processes.
    end = time.time() + seconds

    def client(n: int) -> list[tuple[float, float, int]]:
        answers = []
        with httpx.Client(timeout=PATIENCE_S) as http:
            while (began := time.time()) < end:
                answer = http.post(url, content=bodies[n % len(bodies)]).raise_for_status().json()
                now = time.time()
                answers.append((now, now - began, answer["batch"]["size"]))
                n += 1
        return answers

    with ThreadPoolExecutor(clients) as pool:
        return [answer for found in pool.map(client, range(clients)) for answer in found]


def table(figures: Sequence[Figures]) -> str:
    """Return the figures as a table of text."""
    rows = [
        "model      dtype    batch  clients  engine/s  platform/s  ratio  mean batch"
        "  p50 ms  p99 ms"
    ]
    rows += [
        f"{f.model:<10} {f.dtype:<8} {f.max_batch_size:>5} {f.clients:>8} {f.engine_per_s:>9.1f} "
        f"{f.platform_per_s:>11.1f} {f.ratio:>6.2f} {f.mean_batch:>11.1f} {f.p50_ms:>7.1f} "
        f"{f.p99_ms:>7.1f}"
        for f in figures
    ]
    return "\n".join(rows)


def main() -> None:
    """Measure, print a table and write JSON."""
    names = [model.name for model in MODELS]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"any of {', '.join(names)}")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--seconds", type=float, help="length of each measurement (default: 8, on CUDA 15)"
    )
    parser.add_argument("--batch-size", type=int, help="rows of a pass (default: by model)")
    parser.add_argument("--clients", type=int, help="concurrent clients (default: three batches)")
    parser.add_argument(
        "--processes", type=int, help="processes of the clients (default: 1, on CUDA 4)"
    )
    parser.add_argument(
        "--web-processes", type=int, help="processes of the front end (default: 2, on CUDA 6)"
    )
    parser.add_argument("--json", type=Path, default=Path("build/gpu.json"))
    options = parser.parse_args()
    if unknown := set(options.models) - set(names):
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(names)}")
    device = choose_device(options.device)
    is_cuda = device == "cuda"
    options.seconds = options.seconds or (15.0 if is_cuda else 8.0)
    options.processes = options.processes or (4 if is_cuda else 1)
    options.web_processes = options.web_processes or (6 if is_cuda else 2)
    hardware = torch.cuda.get_device_name() if is_cuda else platform.processor() or "CPU"
    print(f"{device}: {hardware}, torch {torch.__version__}", flush=True)
    figures = []
    for model in MODELS:
        if options.models and model.name not in options.models:
            continue
        with tempfile.TemporaryDirectory(prefix="inferno-gpu-") as folder:
            figures.append(measure(model, options, device, Path(folder)))
    print(table(figures))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "device": device,
        "hardware": hardware,
        "torch": torch.__version__,
        "figures": [asdict(each) for each in figures],
    }
    options.json.write_text(json.dumps(document, indent=2) + "\n")
    print(f"-> {options.json}")


if __name__ == "__main__":
    main()
