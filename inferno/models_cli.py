"""The commands for those who package models: list, show, prepare."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inferno.errors import ModelNotFound, PackageError
from inferno.operations import InOrder
from inferno.project import enter_project, local_url, missing_artifact, sample_inputs
from inferno.protocol.signature import TensorSpec
from inferno.repository import Repository
from inferno.settings import load

out = Console(highlight=False)


@click.group(cls=InOrder, invoke_without_command=True)
@click.pass_context
def models(ctx: click.Context) -> None:
    """List the models of the repository; see also the commands below."""
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
        if missing_artifact(model.package()):
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
    """Make the artifacts of models that are missing or out of date.

    Runs the `prepare.py` of each of NAMES, by default of every model that has one.
    """
    enter_project()
    root = load().repository.root
    if not root.is_dir():
        raise PackageError(f"no model repository at {root}")
    scripts = {path.parent.name: path for path in sorted(root.glob("*/prepare.py"))}
    for name in names:
        if not (root / name).is_dir():
            raise ModelNotFound(f"there is no model {name!r} in {root}")
        if name not in scripts:
            out.print(f"{escape(name)}: nothing to prepare", soft_wrap=True)
    failed = [
        name
        for name, script in scripts.items()
        if (not names or name in names)
        and subprocess.run([sys.executable, str(script)], check=False).returncode != 0
    ]
    if failed:
        raise PackageError(f"could not prepare {', '.join(failed)}; the reason stands above")


@models.command()
@click.argument("name")
def show(name: str) -> None:
    """Show what a model takes and gives, and how it is batched."""
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
        "artifact": "missing" if missing_artifact(package) else manifest.artifact or "none needed",
        "batches": f"up to {size} rows, the first of which waits at most {delay_ms:g} ms",
        "labels": ", ".join(manifest.labels),
    }
    for title, value in facts.items():
        if value:
            out.print(f"  {title:<9} {escape(value)}", soft_wrap=True)
    for title, specs in (
        ("Inputs", package.signature.inputs),
        ("Outputs", package.signature.outputs),
    ):
        out.print(f"\n{title}")
        for spec in specs:
            out.print(f"  {escape(_describe_spec(spec))}", soft_wrap=True)
    body = json.dumps({"model": name, "inputs": sample_inputs(package)})
    url = local_url(settings)
    out.print(f"\nExample\n  curl {url}/infer -d {escape(shlex.quote(body))}", soft_wrap=True)


def _describe_spec(spec: TensorSpec) -> str:
    shape = ", ".join(map(str, spec.shape))
    optional = ", optional" if spec.optional else ""
    description = f"  {spec.description}" if spec.description else ""
    return f"{spec.name:<12} {spec.dtype} [{shape}]{optional}{description}"
