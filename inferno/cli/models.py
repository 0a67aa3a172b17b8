"""The commands that create, check, list and share model packages."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich import box
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from inferno.cli.options import InOrder, json_option
from inferno.cli.printing import out
from inferno.errors import ModelNotFound, PackageError
from inferno.operate.addresses import local_url
from inferno.operate.examples import example_call
from inferno.operate.procfile import enter_project
from inferno.packaging.creation import Identity, create
from inferno.packaging.draft import Tensor, parse_tensor
from inferno.packaging.exchange import Transfer, pull_version, push_version
from inferno.packaging.reading import read
from inferno.packaging.stores import shown
from inferno.packaging.validation import Report
from inferno.packaging.validation import validate as run_validation
from inferno.protocol.signature import TensorSpec
from inferno.repository.manifest import MANIFEST, TaskType
from inferno.repository.package import Package
from inferno.repository.repository import Repository
from inferno.settings import load


class _TensorType(click.ParamType[Tensor]):
    """An input or output, as ``name:dtype:shape``."""

    name = "tensor"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> Tensor:
        try:
            return parse_tensor(value)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


_root_option = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="Model repository (default: from the settings).",
)


@click.group(cls=InOrder, invoke_without_command=True)
@click.pass_context
def models(ctx: click.Context) -> None:
    """List the models of the repository, or run one of the commands below."""
    if ctx.invoked_subcommand is not None:
        return
    enter_project()
    settings = load()
    repository = Repository.read(settings.repository)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("Model", "Versions", "Task", "Format", "Description"):
        table.add_column(title, overflow="fold" if title == "Description" else "ignore")
    for model in repository.models.values():
        manifest = model.package().manifest
        versions = [
            f"[bold]{v}[/]" if v == model.active else str(v) for v in sorted(model.versions)
        ]
        description = escape(manifest.description)
        if model.package().missing_artifact:
            description = "[yellow]not prepared;[/] " + description
        table.add_row(
            f"[bold]{model.name}[/]",
            ", ".join(versions),
            manifest.task,
            manifest.format,
            description,
        )
    out.print(table)
    problems = dict(repository.errors)
    for model in repository.models.values():
        problems |= {f"{model.name} version {v}": reason for v, reason in model.errors.items()}
    for name, reason in problems.items():
        out.print(f"[red]{escape(name)} cannot be served:[/] {escape(reason)}", soft_wrap=True)


@models.command()
@click.argument("names", nargs=-1)
def prepare(names: tuple[str, ...]) -> None:
    """Make the models' artifacts that are missing or out of date.

    Runs `prepare.py` of the models NAMES, by default of every model that has one.
    """
    enter_project()
    root = load().repository.root
    if not root.is_dir():
        raise PackageError(f"no model repository at {root}")
    scripts = {path.parent.name: path for path in sorted(root.glob("*/prepare.py"))}
    for name in names:
        if not (root / name).is_dir():
            raise ModelNotFound(f"model {name!r} does not exist in {root}")
        if name not in scripts:
            out.print(f"{escape(name)}: nothing to prepare", soft_wrap=True)
    failed = [
        name
        for name, script in scripts.items()
        if (not names or name in names)
        and subprocess.run([sys.executable, str(script)], check=False).returncode != 0
    ]
    if failed:
        raise PackageError(f"could not prepare {', '.join(failed)}; see the output above")


@models.command()
@click.argument("name")
def show(name: str) -> None:
    """Show the inputs, outputs and batching of a model."""
    enter_project()
    settings = load()
    repository = Repository.read(settings.repository)
    if name in repository.errors:
        raise PackageError(repository.errors[name])
    model = repository.model(name)
    package = model.package()
    manifest = package.manifest
    size = package.max_batch_size(settings.batching.max_batch_size)
    delay_ms = package.max_batch_delay_ms(settings.batching.max_batch_delay_ms)
    out.print(f"[bold]{name}[/] version {package.version}: {escape(manifest.description)}")
    facts = {
        "versions": ", ".join(map(str, sorted(model.versions))),
        "task": manifest.task,
        "format": manifest.format,
        "package": str(package.path),
        "artifact": "missing" if package.missing_artifact else manifest.artifact or "not needed",
        "batches": f"up to {size} rows; the first waits at most {delay_ms:g} ms",
        "labels": ", ".join(manifest.labels),
    }
    for title, value in facts.items():
        if value:
            out.print(f"  {title:<9} {escape(value)}", soft_wrap=True)
    _print_signature(package)
    out.print(f"\nExample\n  {escape(example_call(local_url(settings), package))}", soft_wrap=True)


def _describe_spec(spec: TensorSpec) -> str:
    shape = ", ".join(map(str, spec.shape))
    optional = ", optional" if spec.optional else ""
    description = f"  {spec.description}" if spec.description else ""
    return f"{spec.name:<12} {spec.dtype} [{shape}]{optional}{description}"


@models.command(
    epilog="""\b
inferno models new iris --from iris.onnx --task classification
inferno models new iris --from iris.pt --input x:float32:batch,4
inferno models new greet --from greet.py:build --input who:string:batch
inferno models new iris --from mlruns/1/models/m-1/artifacts"""
)
@click.argument("name")
@click.option(
    "--from",
    "source",
    required=True,
    metavar="FILE|FOLDER|MODULE:FUNCTION",
    help="An .onnx file, a TorchScript file (.pt, .ts), a function that builds a Python model, or "
    "the folder of an MLflow model.",
)
@click.option(
    "--version", type=click.IntRange(1), help="Version number (default: the next free one)."
)
@click.option(
    "--task",
    type=click.Choice(list(map(str, TaskType))),
    default=str(TaskType.OTHER),
    show_default=True,
    help="What the model is for.",
)
@click.option("--description", help="One line about the model (default: from the artifact).")
@click.option(
    "--input",
    "inputs",
    type=_TensorType(),
    multiple=True,
    metavar="NAME:DTYPE:SHAPE",
    help="An input that the artifact does not describe, or describes wrongly: x:float32:batch,3. "
    "May be repeated.",
)
@click.option(
    "--output",
    "outputs",
    type=_TensorType(),
    multiple=True,
    metavar="NAME:DTYPE:SHAPE",
    help="The same for an output (default: from a trial run).",
)
@_root_option
def new(
    name: str,
    source: str,
    version: int | None,
    task: str,
    description: str | None,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    root: Path | None,
) -> None:
    """Create the package NAME from an artifact.

    Reads the signature from the artifact. What is missing is found in a trial run, or reported as
    missing. A running platform finds the new version by itself.
    """
    draft = read(source, inputs, outputs)
    # Paths in arguments start from the user's directory, paths in settings from the project's.
    draft.files = {place: file.resolve() for place, file in draft.files.items()}
    enter_project()
    settings = load()
    package = create(
        root or settings.repository.root,
        Identity(name, version, TaskType(task), description),
        draft,
        settings.inference,
    )
    out.print(
        f"[bold]{name}[/] version {package.version} is in {escape(str(package.path))}",
        soft_wrap=True,
    )
    _print_signature(package)
    for note in draft.notes:
        out.print(f"\n[yellow]![/] {escape(note)}", soft_wrap=True)
    target = f"{name}/{package.version}" if root is None else shlex.quote(str(package.path))
    where = "" if root is None else f"INFERNO_REPOSITORY__ROOT={shlex.quote(str(root))} "
    out.print(
        f"\nNext\n  inferno models validate {escape(target)}\n"
        f"  {escape(where)}inferno up      [dim]# a running platform finds it by itself[/]\n"
        f"  {escape(example_call(local_url(settings), package))}",
        soft_wrap=True,
    )


def _print_signature(package: Package) -> None:
    signature = package.signature
    for title, specs in (("Inputs", signature.inputs), ("Outputs", signature.outputs)):
        out.print(f"\n{title}")
        for spec in specs:
            out.print(f"  {escape(_describe_spec(spec))}", soft_wrap=True)


@models.command(
    epilog="""\b
inferno models validate sentiment
inferno models validate digits/2 --json
inferno models validate path/to/models/iris/1"""
)
@click.argument("target", metavar="NAME[/VERSION]|PATH")
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    help="How much a row's outputs may change with the other rows in its batch, relative to the "
    "largest value (default: batching.tolerance of model.yaml, else 1e-4 for float32, 1e-2 for "
    "float16).",
)
@json_option
@_root_option
def validate(target: str, tolerance: float | None, as_json: bool, root: Path | None) -> None:
    """Load a version in this process, run it, and report what is wrong.

    Runs it with one row and with many, which must not change each other's outputs. Also sends wrong
    inputs and shows what clients will see. The exit code is 1 if something is wrong.
    """
    folder = Path(target).resolve()
    enter_project()
    settings = load()
    if not (folder / MANIFEST).is_file():
        folder = _version_folder(root or settings.repository.root, target)
    if as_json:
        report = run_validation(folder, settings, tolerance)
        click.echo(json.dumps(report.document(), indent=1))
    else:
        with out.status("") as status:
            report = run_validation(
                folder, settings, tolerance, lambda step: status.update(f"{target}: {step}")
            )
        _print_report(report)
    sys.exit(0 if report.ok else 1)


def _version_folder(root: Path, target: str) -> Path:
    """Return the folder of ``name/version``, or of the newest version of ``name``.

    Raises:
      ModelNotFound: the model or version does not exist.
    """
    name, _, version = target.partition("/")
    # Does not read the repository, because the version may be broken.
    found = {path.parent.name: path.parent for path in (root / name).glob(f"*/{MANIFEST}")}
    chosen = version or max(filter(str.isdecimal, found), key=int, default="")
    if chosen not in found:
        raise ModelNotFound(f"model {target!r} does not exist in {root}", "model")
    return found[chosen]


_MARKS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "failure": "[red]✗[/]"}


def _print_report(report: Report) -> None:
    if report.package is not None:
        title = f"[bold]{report.package.name}[/] version {report.package.version}"
        out.print(f"{title}  {escape(str(report.path))}", soft_wrap=True)
    for check in report.checks:
        line = f"{_MARKS[check.state]} {check.name:<10} {escape(check.detail)}"
        out.print(line, soft_wrap=True)
    if report.latency_ms:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("Rows", "ms", "rows/s"):
            table.add_column(title, justify="right")
        for rows, ms in report.latency_ms.items():
            table.add_row(str(rows), f"{ms:.2f}", f"{1000 * rows / ms:.0f}")
        out.print(table)
    if report.bad_inputs:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("What a client sends")
        table.add_column("Status", justify="right")
        table.add_column("What the client sees", overflow="fold")
        for answer in report.bad_inputs:
            status = 200 if answer.problem is None else answer.problem["status"]
            colour = "red" if status >= 500 or (status == 200 and answer.forbidden) else "default"
            detail = "an answer" if answer.problem is None else answer.problem["detail"]
            table.add_row(escape(answer.case), f"[{colour}]{status}[/]", escape(detail))
        out.print(table)
    if report.memory_bytes is not None:
        out.print(f"  memory  {report.memory_bytes / 1e6:.0f} MB, including the runtime's library")
    if report.package is not None:
        out.print(f"  digest  {report.package.digest}")
    good, bad = "[green]The package is sound.[/]", "[red]Do not serve this package.[/]"
    out.print(f"\n{good if report.ok else bad}")


@models.command(
    epilog="""\b
inferno models push sentiment /mnt/packages
inferno models push digits/2 s3://bucket/packages"""
)
@click.argument("target", metavar="NAME[/VERSION]")
@click.argument("url")
@_root_option
def push(target: str, url: str, root: Path | None) -> None:
    """Copy a version to a store, from which others can pull it.

    The store at URL is a folder, a web server that accepts PUT, or anything that fsspec supports,
    such as s3://bucket/folder (pip install 'inferno[s3]').
    """
    url = _absolute(url)
    enter_project()
    package = Package.read(_version_folder(root or load().repository.root, target))
    with _transfer(f"{package.name}/{package.version}") as progress:
        where = push_version(package, url, progress)
    out.print(
        f"[bold]{package.name}[/] version {package.version} is at {escape(shown(where))}\n"
        f"  inferno models pull {escape(shlex.quote(shown(where)))}",
        soft_wrap=True,
    )


@models.command(
    epilog="""\b
inferno models pull /mnt/packages/sentiment/1
inferno models pull https://packages.example.com/digits/2 --name numbers"""
)
@click.argument("url")
@click.option("--name", help="Name of the model in the repository (default: unchanged).")
@_root_option
def pull(url: str, name: str | None, root: Path | None) -> None:
    """Fetch a version from a store into the repository.

    URL is the one that `inferno models push` printed. The digest of each file is checked before the
    version appears. After an interruption, the same command continues.
    """
    url = _absolute(url)
    enter_project()
    with _transfer(shown(url)) as progress:
        package = pull_version(root or load().repository.root, url, name, progress)
    out.print(
        f"[bold]{package.name}[/] version {package.version} is in {escape(str(package.path))}",
        soft_wrap=True,
    )


def _absolute(url: str) -> str:
    """Return a URL unchanged, and a path as absolute."""
    return url if "://" in url else str(Path(url).resolve())


@contextmanager
def _transfer(title: str) -> Iterator[Transfer]:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=out, transient=True) as bars:
        task = bars.add_task(escape(title), total=None)
        yield Transfer(
            begin=lambda total: bars.update(task, total=total),
            advance=lambda count: bars.advance(task, count),
        )
