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
        _, found = self._class(module, class_name)
        return {
            function.name: [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]
            for function in (found.body if found else [])
            if isinstance(function, ast.FunctionDef)
        }

    def attributes(self, module: str, class_name: str) -> set[str]:
        """What instances of a class have: by its body, by `self.NAME = `, and by its bases."""
        home, found = self._class(module, class_name)
        if found is None:
            return set()
        names = {name for statement in found.body for name in _bound(statement)}
        names |= {
            node.attr
            for node in ast.walk(found)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        }
        bases = [base.id for base in found.bases if isinstance(base, ast.Name)]
        return names.union(*(self.attributes(home, base) for base in bases))

    def constants(self, module: str, class_name: str) -> set[object]:
        """The strings, numbers and such that are written in a class."""
        _, found = self._class(module, class_name)
        nodes = ast.walk(found) if found else ()
        return {node.value for node in nodes if isinstance(node, ast.Constant)}

    def _class(self, module: str, name: str) -> tuple[str, ast.ClassDef | None]:
        """A class and the module that defines it, followed through re-exports."""
        tree = self._tree(module)
        for node in [] if tree is None else _statements(tree):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._class(self._absolute(node, module), alias.name)
        return module, None

    def _binds(self, node: ast.stmt, module: str, name: str) -> bool:
        if isinstance(node, ast.ImportFrom):
            source = self._absolute(node, module)
            return any(
                (alias.asname or alias.name) == name
                and (not source.startswith("vllm") or self.defines(source, alias.name))
                for alias in node.names
            )
        return name in _bound(node)

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


def _bound(node: ast.stmt) -> list[str]:
    """The names that a definition or an assignment binds."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    return [target.id for target in targets if isinstance(target, ast.Name)]


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
