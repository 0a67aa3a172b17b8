"""Python code as an artifact: the module of an entry point, and the local files that it imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

from inferno.errors import PackageError
from inferno.packaging.draft import Draft, Tensor


def draft(source: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Draft:
    """Read `module:function`; see `reading.read`.

    Args:
      source: the module is a path, or a name in the current folder.
      inputs: inputs of the model; code does not declare them.
      outputs: outputs of the model; found in a trial run if empty.
    Raises:
      PackageError: the file does not exist, or `inputs` is empty.
    """
    module, _, function = source.rpartition(":")
    file = Path(module if module.endswith(".py") else f"{module.replace('.', '/')}.py")
    if not file.is_file():
        raise PackageError(f"{source}: {file} does not exist")
    if not inputs:
        raise PackageError(
            f"{source}: code does not declare its inputs; name them, such as "
            "--input text:string:batch or --input x:float32:batch,3"
        )
    return Draft(
        source=source,
        format="python",
        files={str(path.relative_to(file.parent)): path for path in (file, *neighbours(file))},
        entrypoint=f"{file.stem}:{function}",
        inputs=list(inputs),
        outputs=list(outputs),
    )


def neighbours(file: Path) -> list[Path]:
    """Return the local files that a module imports by relative imports, directly or indirectly.

    Raises:
      PackageError: a file is not valid Python.
    """
    found: dict[Path, None] = {}
    waiting = [file]
    while waiting:
        for path in _imported(waiting.pop()):
            if path not in found and path != file:
                found[path] = None
                waiting.append(path)
    return list(found)


def _imported(file: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as exc:
        raise PackageError(f"{file}: not valid Python: {exc}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                place = file.parent.joinpath(*name.split("."))
                for path in (place.with_suffix(".py"), place / "__init__.py"):
                    if path.is_file():
                        yield path
