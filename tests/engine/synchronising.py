"""Counts what makes the host wait for the device, in steps that run on the CPU.

On an accelerator each of these stops the host until the device has caught up: reading a value, a result whose size
depends on values, and a copy from memory that is not pinned. On the CPU they are seen as torch's own operations.
"""

from __future__ import annotations

import ast
import functools
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OPERATIONS = {
    "_local_scalar_dense",  # item(), bool(), int(), float(), if, while
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",
    "argwhere",
    "masked_select",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
    "bincount",
    "repeat_interleave",  # of a tensor of repeats, without output_size
}
READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
"""Reads that torch does past its dispatcher where the tensor lies on the CPU already."""
COPIES = {torch.tensor, torch.as_tensor, torch.asarray}
"""Made on the host and copied, where a device is named."""


class Synchronisations:
    """``found``: operation and the line of ours or of a library that asked for it → how often.

    Args:
        host: tensors that lie on the host on an accelerator too.
    """

    def __init__(self, host: tuple[Tensor, ...] = ()) -> None:
        self.found: Counter[tuple[str, str]] = Counter()
        self.counting = False
        self.host = {tensor.data_ptr() for tensor in host}

    def note(self, name: str, tensor: Any) -> None:
        if self.counting and not (isinstance(tensor, Tensor) and tensor.data_ptr() in self.host):
            asked = _asked_by()
            if not _on_the_cpu_alone(asked.filename, asked.lineno or 0):
                self.found[name, f"{Path(asked.filename).name}:{asked.lineno}"] += 1

    def on_host(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, not counted: its tensors lie on the host by design."""

        def call(*args: Any, **options: Any) -> Any:
            before, self.counting = self.counting, False
            try:
                return function(*args, **options)
            finally:
                self.counting = before

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_Functions(self))
            stack.enter_context(_Dispatches(self))
            yield


class _Functions(TorchFunctionMode):
    def __init__(self, seen: Synchronisations) -> None:
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        # Every device is the CPU here: only the one that is named in the code is meant.
        to_host = func is Tensor.to and "cpu" in [
            v for v in (*args[1:], *options.values()) if isinstance(v, str)
        ]
        made = func in COPIES and options.get("device") is not None and not isinstance(args[0], Tensor)
        if func in READS or to_host or made:
            self.seen.note(func.__name__, args[0])
        return func(*args, **options)


class _Dispatches(TorchDispatchMode):
    def __init__(self, seen: Synchronisations) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name in OPERATIONS:
            self.seen.note(name, args[0] if args else None)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self.seen.note(f"{name} by a mask", args[0])
        return func(*args, **(kwargs or {}))


def _asked_by() -> traceback.FrameSummary:
    """The innermost line that is not torch's."""
    return next(
        frame
        for frame in reversed(traceback.extract_stack())
        if "site-packages" not in frame.filename and frame.filename != __file__
    )


@functools.cache
def _on_the_cpu_alone(file: str, line: int) -> bool:
    """Whether a line stands in an ``if device.type == "cpu"``: in a check that accelerators are spared."""
    tree = ast.parse(Path(file).read_text())
    return any(
        isinstance(node, ast.If)
        and node.lineno <= line <= (node.body[-1].end_lineno or 0)
        and "device.type == 'cpu'" in ast.unparse(node.test)
        for node in ast.walk(tree)
    )
