"""Pure functions of tensors by OpenVINO, Intel's runtime for CPUs: traced, handed over with their weights, compiled, fp32."""

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastdiff.runtime import console
from fastdiff.runtime.errors import UsageError, quoted


def check(device: torch.device | str, precision: str = "auto") -> None:
    """UsageError where it cannot run."""
    if torch.device(device).type != "cpu":
        raise UsageError(f"`compile=openvino`: it runs on the CPU, not on {torch.device(device).type}", "add `device=cpu`")
    if precision not in {"auto", "fp32"}:
        raise UsageError(f"`compile=openvino`: it computes in fp32, not in {precision}", "leave `precision` out")
    if importlib.util.find_spec("openvino") is None:
        raise UsageError("`compile=openvino`: OpenVINO is not installed", 'pip install "fastdiff[openvino]"')


@cache
def core() -> Any:
    """The one of this process, kept to its end.

    Each lays a stack for signal handlers over that of the one before and unmaps its own when it goes, also from under one that
    goes later and puts it back: the next Ctrl-C would be a segmentation fault (2026.4).
    """
    import openvino

    return openvino.Core()


def compiled(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Any:
    """OpenVINO's form of a function of tensors of these shapes.

    Through the frontend itself: `openvino.convert_model` calls it too, then takes three times as long to prepare inputs that
    need nothing, and keeps statistics of its use. No cache on the disk: it would be as large as the network, and a second start
    was no shorter (SD1.5's widths: 12 s with and without).
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that a trace holds for these shapes alone, which is what it is for
        traced = torch.jit.trace(function, tensors, check_trace=False)
    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced, example_input=tensors)  # by name: the model only borrows it
    model = frontend.convert(frontend.load(decoder))
    model.reshape({i: tuple(t.shape) for i, t in enumerate(tensors)})  # a trace says nothing of sizes
    how = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return core().compile_model(model, "CPU", how)


class Compiled:
    """A function of named tensors, compiled at the first call with new shapes; forms of the last few shapes are kept.

    What cannot be converted runs as it is, after one warning.
    """

    KEPT = 4

    def __init__(self, function: Callable[..., Tensor], what: str) -> None:
        self.function, self.what = function, what
        self.forms: dict[Any, Callable[..., Tensor]] = {}

    def __call__(self, **tensors: Tensor) -> Tensor:
        key = tuple((name, tuple(v.shape)) for name, v in tensors.items())
        if key not in self.forms:
            while len(self.forms) >= self.KEPT:
                self.forms.pop(next(iter(self.forms)))
            self.forms[key] = self.form(tensors)
        return self.forms[key](**tensors)

    def form(self, tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
        names = list(tensors)
        ordered = lambda *values: self.function(**dict(zip(names, values, strict=True)))
        try:
            request = compiled(ordered, tuple(tensors.values())).create_infer_request()
            run = lambda **given: torch.from_numpy(request.infer([given[k].numpy() for k in names], share_inputs=True)[0])
            run(**tensors)
        except Exception as error:  # a layer that OpenVINO does not know, or a version of it that has moved its doors
            console.warn(f"`compile=openvino`: {self.what} runs without it ({type(error).__name__}: {quoted(error)[:200]})")
            return self.function
        return run
