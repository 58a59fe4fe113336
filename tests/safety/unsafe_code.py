"""What code must not do, found in its syntax tree: unpickle, evaluate text, open a shell, trust code by itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator

MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "pickletools",
}
"""Not to be imported at all."""
CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "pandas.read_pickle",
    "numpy.lib.format.read_array",
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "torch.export.load",
    "torch.distributed.all_gather_object",
    "torch.distributed.gather_object",
    "torch.distributed.broadcast_object_list",
    "torch.distributed.scatter_object_list",
    "torch.distributed.recv_object_list",
    "torch.distributed.checkpoint.FileSystemReader",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
    "yaml.full_load",
    "yaml.full_load_all",
}
BASES = {"yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader"}
KEYWORDS = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False}


def found_in(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything that is unsafe."""
    tree = ast.parse(source)
    names = _imported(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            yield from ((line, module) for module in modules if module.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            dotted = _dotted(node, names)
            if dotted in CALLS | BASES:
                yield line, dotted
        elif isinstance(node, ast.keyword) and _is(node.value, KEYWORDS.get(node.arg or "")):
            yield node.value.lineno, f"{node.arg}={ast.unparse(node.value)}"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and _is(value, KEYWORDS.get(str(key.value))):
                    yield value.lineno, f"{key.value!s}={ast.unparse(value)}"


def _is(node: ast.expr, wanted: bool | None) -> bool:
    return wanted is not None and isinstance(node, ast.Constant) and node.value is wanted


def _imported(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                names[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    """``np.load`` as ``numpy.load``; empty where it does not start with a name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value, names)
        return f"{inner}.{node.attr}" if inner else ""
    return ""
