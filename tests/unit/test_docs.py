"""The documents agree with the code: tables, settings, examples, links and commands."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import BaseModel
from transformers import BertConfig, BertForSequenceClassification, pipeline

from inferno.engine.engine import Engine
from inferno.operate.settings_document import environment_example, settings_markdown
from inferno.protocol.signature import Signature, TensorSpec
from inferno.protocol.webhooks import sign
from inferno.repository import graph as ensemble
from inferno.repository import manifest
from inferno.repository.manifest import Manifest
from inferno.repository.repository import Repository
from inferno.runtimes import ModelContext
from inferno.settings import Settings
from tests.unit.inferno.artifacts import TINY_BERT, export_bert, png, tiny_tokenizer, yolo_bytes

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Longest line of a document, in characters, and longest paragraph, in lines.
LONGEST_LINE, LONGEST_PARAGRAPH = 120, 5
PACKAGING = ROOT / "docs" / "model-packaging.md"

#: Documented commands that no test runs as they stand, and why; the e2e tier runs the others.
NOT_RUN = {
    "make run": "runs until it is stopped; the e2e tier starts the same platform",
    "make test": "it is what runs this test",
    "make test-long": "takes half an hour",
    "make setup": "changes the environment that the test runs in; make test does most of it",
    "make check": "make test begins with it",
    "make chaos": "takes ten minutes; the chaos tier runs a short one",
    "python -m tests.fuzz --seconds 60 --seed 7": "takes a minute; the fuzz tier runs a short one",
    "python -m tests.chaos --seconds 60 --only sigkill": (
        "takes a minute; the chaos tier runs a short one"
    ),
    "python -m tests.chaos --broker redis:// --only sigkill": (
        "fails by design; the chaos tier runs the default broker"
    ),
    "docker compose up --build": (
        "needs Docker; test_deployment_files.py compares its file with the Procfile"
    ),
    "make bench": "takes minutes; tests/bench runs a small one",
    "make bench-full": "takes hours; tests/bench runs a small one",
    "python -m bench run --targets inferno,flask --workloads echo --connections 64,256 "
    "--seconds 5 --repeats 3": "takes a minute; tests/bench runs a small one",
    "python -m bench compare build/bench-results/before.json build/bench-results/after.json": (
        "needs the files of two runs; tests/bench compares others"
    ),
    "python -m bench run --targets inferno --variant always:INFERNO_REDIS__FSYNC=always": (
        "takes a minute; tests/bench runs a small one without a variant"
    ),
    "python -m bench cache": "takes minutes; tests/bench runs a small one",
    "python -m bench remainder --workload embed-int8 --turns 5": (
        "takes minutes; tests/bench runs a small one"
    ),
    "python -m bench swaps --model digits": "takes a minute; tests/bench runs a small one",
    "python -m bench.precision": "takes a minute; tests/bench runs a small one",
    ".venv/bin/pip install -r bench/requirements.txt": "would change the environment of the test",
    ".venv/bin/python -m bench.gpu": "takes minutes; the e2e tier runs the same in small",
    ".venv/bin/python -m bench.scenarios": "takes minutes; the e2e tier runs the same in small",
    "inferno worker sentiment": "runs until it is stopped; the e2e tier starts the same command",
    "INFERNO_REDIS__LISTEN=10.0.0.5 inferno up": "needs an address of the reader's machine",
    'export INFERNO_REDIS__URL="redis://:$(ssh 10.0.0.5 cat inferno/data/redis/password.txt)'
    '@10.0.0.5:6379/0"': "needs a second machine",
    "redis-cli -s data/redis/redis.sock": "waits for commands; see test_redis_access",
    "REDISCLI_AUTH=$(cat data/redis/password.txt) redis-cli -s data/redis/redis.sock": "as above",
    "celery -A tasks worker -Q sentiment --loglevel INFO": (
        "runs until it is stopped; as every worker in tests"
    ),
    "INFERNO_BROKER__URL=amqp://user:password@rabbit.example.com:5672// inferno up": (
        "runs until it is stopped; the e2e tier starts the same with a RabbitMQ of its own"
    ),
    "inferno models new iris --from iris.onnx --task classification": (
        "writes into the repository; tests/e2e/test_packaging.py runs it with one of its own"
    ),
    "inferno models validate iris": (
        "writes into the repository; tests/e2e/test_packaging.py runs it with one of its own"
    ),
    "curl http://127.0.0.1:8000/v1/models/iris:predict "
    """-d '{"inputs": {"x": [5.1, 3.5, 1.4, 0.2]}}'""": (
        "writes into the repository; tests/e2e/test_packaging.py runs it with one of its own"
    ),
    "inferno models push iris packages": (
        "writes into the repository; tests/e2e/test_packaging.py runs it with one of its own"
    ),
    "inferno models pull packages/iris/1 --name flowers": (
        "writes into the repository; tests/e2e/test_packaging.py runs it with one of its own"
    ),
    "inferno settings --markdown > docs/settings.md": "would write into the checkout",
    "inferno settings --env > .env.example": "would write into the checkout",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: Path
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.name}: {self.text.splitlines()[0][:50]}"

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, without comments, with continuations joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line and not line.startswith("#")]


def blocks(document: Path, language: str | None = None) -> Iterator[Block]:
    """Yield a document's fenced blocks, of one language or of all."""
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", document.read_text(), re.M | re.S):
        if language in (None, found[1]):
            yield Block(document, found[1], found[2])


#: The models whose fields docs/model-packaging.md lists in a table of this name.
TABLES: dict[str, type[BaseModel]] = {
    "Manifest": Manifest,
    "Signature": Signature,
    "TensorSpec": TensorSpec,
    "Batching": manifest.Batching,
    "Concurrency": manifest.Concurrency,
    "Inference": manifest.Inference,
    "Codecs": manifest.Codecs,
    "WarmUp": manifest.WarmUp,
    "Retries": manifest.Retries,
    "Cache": manifest.Cache,
    "Stage": ensemble.Stage,
}


def field_table(kind: type[BaseModel]) -> str:
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for name, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        if field.is_required():
            shown = "required"
        elif isinstance(default, BaseModel):
            shown = "see below"
        elif default in (None, "", (), {}):
            shown = ""
        else:
            text = str(default)
            shown = f"`{text.lower() if isinstance(default, bool) else text}`"
        rows.append(f"| `{name}` | {shown} | {field.description} |")
    return "\n".join(rows)


def context_table() -> str:
    """Return the table of ModelContext; the source has the meanings as comments."""
    source = Path(sys.modules[ModelContext.__module__].__file__ or "").read_text()
    rows = ["| attribute | meaning |", "|---|---|"]
    for field in fields(ModelContext):
        found = re.search(rf"#: (.*)\n    {field.name}:", source)
        assert found, f"{field.name} has no comment"
        rows.append(f"| `{field.name}` | {found[1]} |")
    return "\n".join(rows)


@pytest.mark.parametrize("name", ["context", *TABLES])
def test_field_tables_are_those_of_the_code(name: str) -> None:
    expected = context_table() if name == "context" else field_table(TABLES[name])
    pattern = rf"<!-- table: {name} -->\n\n(.*?)\n\n<!-- end -->"
    found = re.search(pattern, PACKAGING.read_text(), re.S)

    assert found is not None
    assert found[1] == expected, f"put this into {PACKAGING.name}:\n{expected}"


def test_every_section_of_a_manifest_has_a_table() -> None:
    sections = {field.annotation for field in Manifest.model_fields.values()}
    documented = set(TABLES.values())

    assert {kind for kind in sections if hasattr(kind, "model_fields")} <= documented


def test_settings_document_is_up_to_date() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()

    assert text == settings_markdown(), "run: inferno settings --markdown > docs/settings.md"


def test_env_example_is_up_to_date() -> None:
    text = (ROOT / ".env.example").read_text()

    assert text == environment_example(), "run: inferno settings --env > .env.example"


@pytest.fixture(scope="module")
def example_repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """The packages in docs/model-packaging.md, with artifacts."""
    folder = tmp_path_factory.mktemp("documented")
    for block in blocks(PACKAGING):
        head, _, body = block.text.partition("\n")
        if not head.startswith("# models/"):
            continue
        file = folder / head.removeprefix("# ")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(body)
    # Small stand-ins for the artifacts that users bring.
    torch.manual_seed(0)
    reviews = BertForSequenceClassification(BertConfig(id2label={0: "bad", 1: "good"}, **TINY_BERT))
    reviews.save_pretrained(folder / "models/reviews/1/saved")
    tiny_tokenizer().save_pretrained(folder / "models/reviews/1/saved")
    topics = BertForSequenceClassification(BertConfig(**TINY_BERT)).eval()
    topics.set_attn_implementation("eager")
    export_bert(topics, folder / "models/topics/1/model.onnx")
    tiny_tokenizer().save_pretrained(folder / "models/topics/1")
    topics.save_pretrained(folder / "topics")
    car = np.array([[320, 320, 160, 320, 0.2, 0.1, 1]], np.float32)
    (folder / "models/traffic/1/model.onnx").write_bytes(yolo_bytes(car, 640))
    for script in folder.glob("models/*/prepare.py"):
        subprocess.run([sys.executable, str(script)], check=True, timeout=60)
    settings = Settings().repository.model_copy(update={"root": folder / "models", "active": {}})
    return Repository.read(settings)


@pytest.mark.parametrize(
    ("model", "version", "inputs", "outputs"),
    [
        ("greet", 1, {"who": ["Ada", "Bo"]}, {"greeting": ["Hello, Ada!", "Hello, Bo!"]}),
        ("double", 1, {"x": np.array([[1, 2]], np.float32)}, {"y": [[2.0, 4.0]]}),
        ("double", 2, {"number": ["21", "0.5"]}, {"y": [42.0, 1.0]}),
        (
            "traffic",
            1,
            {"image": [png(64, 64, red=255)]},
            {
                "boxes": [[[0.375, 0.25, 0.625, 0.75], *[[0.0] * 4] * 19]],
                "scores": [[1.0, *[0.0] * 19]],
                "labels": [["car", *[""] * 19]],
                "count": [1],
            },
        ),
    ],
)
def test_documented_packages_serve(example_repository, model, version, inputs, outputs) -> None:
    assert example_repository.errors == {}
    package = example_repository.model(model).package(version)
    engine = Engine(package, Settings().batching, Settings().inference)
    arrays = {
        name: np.array(value, object) if isinstance(value, list) else value
        for name, value in inputs.items()
    }

    engine.warm_up()
    [answer] = engine.forward([engine.prepare(arrays)])

    assert {name: answer[name].tolist() for name in outputs} == outputs


def test_the_documented_folder_of_hugging_face_answers_as_transformers_does(
    example_repository: Repository,
) -> None:
    package = example_repository.model("reviews").package(1)
    engine = Engine(package, Settings().batching, Settings().inference)
    engine.warm_up()
    texts = ["what a lovely day", "how it is"]

    [answer] = engine.forward([engine.prepare({"text": np.array(texts, object)})])

    pipe = pipeline("text-classification", str(package.path / "saved"), device="cpu")
    expected = pipe(texts)
    assert answer["label"].tolist() == [found["label"] for found in expected]
    scores = [found["score"] for found in expected]
    np.testing.assert_allclose(answer["scores"].max(axis=1), scores, atol=2e-5)


def test_the_documented_language_model_in_onnx_answers_as_transformers_does(
    example_repository: Repository,
) -> None:
    package = example_repository.model("topics").package(1)
    engine = Engine(package, Settings().batching, Settings().inference)
    engine.warm_up()
    texts = ["what a lovely day", "how it is"]

    answers = engine.forward([engine.prepare({"text": np.array([t], object)}) for t in texts])

    saved = package.path.parents[2] / "topics"
    tokens = tiny_tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = BertForSequenceClassification.from_pretrained(saved)(**tokens).logits.numpy()
    given = np.concatenate([answer["logits"] for answer in answers])
    np.testing.assert_allclose(given, expected, atol=1e-5)


def test_every_documented_package_is_tried(example_repository: Repository) -> None:
    assert set(example_repository.models) == {
        "greet",
        "double",
        "quadruple",
        "reviews",
        "topics",
        "traffic",
    }


def test_readme_lists_the_default_models() -> None:
    readme = (ROOT / "README.md").read_text()
    listed = dict(re.findall(r"^\| `([a-z]+)` \| ([a-z]+) \|", readme, re.M))
    found = {
        path.parts[-3]: yaml.safe_load(path.read_text())["task"]
        for path in (ROOT / "models").glob("*/*/model.yaml")
    }

    assert listed == found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", document.read_text()):
        link = target[0] or target[1]
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        file = (document.parent / path) if path else document
        assert file.exists(), f"{document.name}: {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in anchors, f"{document.name}: {link}"


def paragraphs(document: Path) -> Iterator[list[str]]:
    """Yield the paragraphs and list items of a document, without tables, code and headings."""
    text = re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.M | re.S)
    paragraph: list[str] = []
    for line in text.splitlines():
        is_prose = bool(line.strip()) and not re.match(r"\s*[|#]", line)
        if paragraph and (not is_prose or re.match(r"\s*([-*]|\d+\.) ", line)):
            yield paragraph
            paragraph = []
        if is_prose:
            paragraph.append(line)
    if paragraph:
        yield paragraph


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_lines_and_paragraphs_are_short(document: Path) -> None:
    found = list(paragraphs(document))

    assert [line for lines in found for line in lines if len(line) > LONGEST_LINE] == []
    assert [lines[0] for lines in found if len(lines) > LONGEST_PARAGRAPH] == []


def test_lines_of_the_changelog_are_short() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    assert [line for line in lines if len(line) > LONGEST_LINE] == []


def test_commands_that_are_not_run_have_blocks_of_their_own() -> None:
    found = set()
    for document in DOCUMENTS:
        for block in blocks(document, "bash"):
            known = NOT_RUN.keys() & set(block.commands)
            # A block runs as a whole, or not at all.
            assert not known or known == set(block.commands), str(block)
            found |= known

    assert found == set(NOT_RUN)


def documented_verify() -> Callable[[bytes, Mapping[str, str], bytes], None]:
    """Return the function that docs/api.md shows for webhooks."""
    (block,) = [b for b in blocks(ROOT / "docs" / "api.md", "python") if "def verify" in b.text]
    space: dict[str, Any] = {}
    exec(block.text, space)
    verify: Callable[[bytes, Mapping[str, str], bytes], None] = space["verify"]
    return verify


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key": b"another"}, "signature is wrong"),
        ({"body": b"{}"}, "signature is wrong"),
        ({"webhook-id": "2.completed"}, "signature is wrong"),
        ({"webhook-timestamp": "0"}, "signature is wrong"),
        ({"webhook-signature": ""}, "signature is wrong"),
        ({"at": 3600}, "too old"),
    ],
)
def test_documented_verification_of_webhooks(change: dict[str, Any], reason: str) -> None:
    verify = documented_verify()
    at = int(time.time()) - change.pop("at", 0)
    message = {"key": b"secret", "body": b'{"type": "task.completed"}'}
    headers = {
        "webhook-id": "1.completed",
        "webhook-timestamp": str(at),
        "webhook-signature": "v1,other " + sign(b"secret", "1.completed", at, message["body"]),
    }
    if reason != "too old":
        verify(message["key"], headers, message["body"])
    for name, value in change.items():
        (headers if name in headers else message)[name] = value

    with pytest.raises(ValueError, match=reason):
        verify(message["key"], headers, message["body"])


#: Folder that the file names of a page are relative to; others are paths from the root.
ROOMS = {
    "web": "web",
    "core": "inferno",
    "intake-and-control": "tasks",
    "transport": "tasks",
    "state": "tasks/state",
    "batching": "inferno/batching",
    "batches": "workers/batches",
    "engine": "inferno",
    "results": "tasks/results",
    "workers": "workers",
    "operate": "inferno/operate",
}


def named_files(document: Path) -> Iterator[str]:
    """Yield the Python and Lua files that a document names; `{a,b}` stands for several."""
    for name in re.findall(r"`([\w/.{},-]+\.(?:py|lua))`", document.read_text()):
        head, brace, rest = name.partition("{")
        middle, _, tail = rest.partition("}")
        yield from (f"{head}{one}{tail}" for one in middle.split(",")) if brace else [name]


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs" / "architecture").glob("*.md")), ids=lambda path: path.stem
)
def test_pages_of_rooms_name_files_that_exist(page: Path) -> None:
    room = ROOT / ROOMS.get(page.stem, "")
    assert [
        name
        for name in named_files(page)
        if not (room / name).exists() and not (ROOT / name).exists()
    ] == []
