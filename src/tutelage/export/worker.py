"""One model in a process of its own: so its memory is its own, and no other model's libraries are beside it.

`tutelage.export.bench` starts it as a program. It reads one JSON object a line and answers each with one.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[[Any], Any]


class Worker:
    """The model of one target.

    Args:
        target: what `Target.spec` gives, with ``device``, ``threads`` and ``compile``.
    """

    def __init__(self, target: dict[str, Any]) -> None:
        import torch

        self.target, self.torch = target, torch
        if target["threads"]:
            torch.set_num_threads(target["threads"])
        self.device = torch.device(target["device"] if target["kind"] != "onnx" else "cpu")
        # Imported before memory is counted.
        libraries = {"onnx": "onnxruntime", "pt2": "torch.export"}
        importlib.import_module(libraries.get(target["kind"], "tutelage.export.deployed"))
        self.rows: dict[int, Any] = {}
        self.before = _resident()
        _forget_peak()
        self.tokens: int | None = None
        self.run, self.parameters = self._load()

    def about(self) -> dict[str, Any]:
        """Parameters and FLOPs of a row, where they can be told, and the device."""
        flops = self.target["flops"]
        if flops is None and self.target["kind"] != "onnx":
            from torch.utils.flop_counter import FlopCounterMode

            with FlopCounterMode(display=False) as counter:
                self._call(1)
            flops = counter.get_total_flops()
        if self.target["compile"] and self.target["kind"] != "onnx":
            self.run = self.torch.compile(self.run, options={"freezing": True})
        for size in (1, self.target["batch_size"]):
            self._call(size)
        return {"parameters": self.parameters, "flops": flops, "device": str(self.device)}

    def time(self, size: int, seconds: float) -> dict[str, Any]:
        """Seconds of each call with ``size`` rows, for about ``seconds``, three calls at least."""
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - started < seconds:
            self._wait()
            begun = time.perf_counter()
            self._call(size)
            self._wait()
            times.append(time.perf_counter() - begun)
        return {"times": times}

    def memory(self) -> dict[str, Any]:
        """Bytes at the peak beyond what the process had before the model was loaded; on a GPU those of the GPU."""
        if self.device.type == "cuda":
            return {"memory": self.torch.cuda.max_memory_allocated(self.device)}
        return {"memory": max(0, _peak() - self.before)}

    def _load(self) -> tuple[Run, int | None]:
        target, place = self.target, Path(self.target["place"])
        if target["kind"] == "onnx":
            from tutelage.export.reading import load_onnx

            return load_onnx(place), target["parameters"]
        if target["kind"] == "pt2":
            return self._program(place), target["parameters"]
        from tutelage.export.deployed import deployed
        from tutelage.models import Vocabulary, build_model, load_model
        from tutelage.recipe.schema import ModelConfig

        if target["kind"] == "folder":
            built = load_model(place)
        else:
            config = ModelConfig(model=target["place"], options=target["options"])
            shape = tuple(target["input_shape"])
            size = target["vocabulary"]
            built = build_model(
                config,
                outputs=target["outputs"],
                input_shape=shape,
                task=target["task"],
                vocabulary=None if size is None else Vocabulary(size),
            )
        if getattr(built.module, "main_input_name", None) == "input_ids":
            found: Any = built.module
            self.tokens = found.get_input_embeddings().num_embeddings
        model = deployed(built).to(self.device).requires_grad_(False)
        return model, sum(parameter.numel() for parameter in model.parameters())

    def _program(self, place: Path) -> Run:
        from torch.export.passes import move_to_device_pass

        from tutelage.export.reading import load_operations, read_metadata, read_program

        if "int8" in str(read_metadata(place).get("quantised")):
            load_operations()
        found = read_program(place)
        run: Run = (found if self.device.type == "cpu" else move_to_device_pass(found, self.device)).module()
        return run

    def _call(self, size: int) -> None:
        if size not in self.rows:
            shape = (size, *self.target["input_shape"])
            drawn = self.torch.rand(shape) if self.tokens is None else self.torch.randint(self.tokens, shape)
            self.rows[size] = drawn.to(self.device)
        with self.torch.no_grad():
            self.run(self.rows[size])

    def _wait(self) -> None:
        if self.device.type != "cpu":
            self.torch.accelerator.synchronize(self.device)


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between
    worker: Worker | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = None
            if worker is None:
                worker = Worker(asked)
                answer = worker.about()
            else:
                answer = getattr(worker, asked.pop("do"))(**asked)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _resident() -> int:
    return _status("VmRSS") or _most_resident()


def _peak() -> int:
    return _status("VmHWM") or _most_resident()


def _status(field: str) -> int | None:
    """A figure that Linux keeps of this process, in bytes; none elsewhere."""
    file = Path("/proc/self/status")
    if not file.exists():
        return None
    lines = (line.split() for line in file.read_text().splitlines() if line.startswith(field))
    return next((1024 * int(words[1]) for words in lines), None)


def _most_resident() -> int:
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _forget_peak() -> None:
    """Let the peak begin anew: imports had one of their own."""
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")


if __name__ == "__main__":
    main()
