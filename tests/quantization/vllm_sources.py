"""vLLM's sources, read without importing them: of any version, on any machine."""

import ast
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path


class VllmSources:
    """A vLLM wheel, or a directory that holds the package `vllm`."""

    def __init__(self, path: Path) -> None:
        self._root = zipfile.Path(path) if path.suffix == ".whl" else path
        self._tree = cache(self._parse)

    def defines(self, module: str, name: str) -> bool:
        """Whether `from module import name` would find something, followed through re-exports."""
        if self._tree(f"{module}.{name}") is not None:
            return True
        tree = self._tree(module)
        return tree is not None and any(
            self._binds(node, module, name) for node in _statements(tree)
        )

    def functions(self, module: str, class_name: str) -> dict[str, list[str]]:
        """The functions in a class body and the names of their parameters; empty without it."""
        tree = self._tree(module)
        classes = [] if tree is None else [n for n in tree.body if isinstance(n, ast.ClassDef)]
        return {
            function.name: [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]
            for found in classes
            if found.name == class_name
            for function in found.body
            if isinstance(function, ast.FunctionDef)
        }

    def _binds(self, node: ast.stmt, module: str, name: str) -> bool:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            return node.name == name
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            return any(isinstance(t, ast.Name) and t.id == name for t in targets)
        if isinstance(node, ast.ImportFrom):
            source = self._absolute(node, module)
            return any(
                (alias.asname or alias.name) == name
                and (not source.startswith("vllm") or self.defines(source, alias.name))
                for alias in node.names
            )
        return False

    def _absolute(self, node: ast.ImportFrom, module: str) -> str:
        """The module that `from ... import` in `module` means."""
        if not node.level:
            return node.module or ""
        is_package = self._file(module).name == "__init__.py"
        parents = module.split(".")
        parents = parents[: len(parents) - node.level + is_package]
        return ".".join([*parents, *([node.module] if node.module else [])])

    def _file(self, module: str) -> Path | zipfile.Path:
        path = self._root.joinpath(*module.split("."))
        package = path / "__init__.py"
        return package if package.is_file() else path.parent / f"{path.name}.py"

    def _parse(self, module: str) -> ast.Module | None:
        file = self._file(module)
        return ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else None


def _statements(node: ast.Module | ast.If | ast.Try) -> Iterator[ast.stmt]:
    """What runs when a module is imported, that in `if` and `try` too."""
    bodies = [node.body]
    if not isinstance(node, ast.Module):
        bodies.append(node.orelse)
    if isinstance(node, ast.Try):
        bodies += [node.finalbody, *(handler.body for handler in node.handlers)]
    for statement in (statement for body in bodies for statement in body):
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements(statement)
        else:
            yield statement
