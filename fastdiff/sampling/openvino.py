"""Run pure functions of tensors by OpenVINO, Intel's runtime for CPUs: traced by torch, converted with their weights; fp32."""

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
    """Raise UsageError if OpenVINO is not installed, or cannot run on this device or in this precision."""
    if torch.device(device).type != "cpu":
        raise UsageError(f"`compile=openvino`: it runs on the CPU, not on {torch.device(device).type}", "use `device=cpu`")
    if precision not in {"auto", "fp32"}:
        raise UsageError(f"`compile=openvino`: it computes in fp32, not in {precision}", "use `precision=fp32`, or leave it out")
    if importlib.util.find_spec("openvino") is None:
        raise UsageError("`compile=openvino`: OpenVINO is not installed", 'pip install "fastdiff[openvino]"')


@cache
def core() -> Any:
    """Return this process's only OpenVINO core, kept until the process ends.

    Each core installs its own stack for signal handlers over that of the core before, and unmaps it when it is deleted. A core
    that is deleted later can restore an unmapped stack, and then Ctrl-C is a segmentation fault (version 2026.4).
    """
    import openvino

    return openvino.Core()


def compiled(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Any:
    """Compile a function by OpenVINO, for tensors of these shapes.

    This calls OpenVINO's PyTorch frontend directly: `openvino.convert_model` takes three times as long, to prepare inputs
    that need no preparation, and collects usage statistics. There is no cache on disk: it would be as large as the network,
    and a second start took as long (12 s at SD1.5's widths).
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch warns that a trace is valid for these shapes alone, as intended
        traced = torch.jit.trace(function, tensors, check_trace=False)
    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced, example_input=tensors)  # keep a reference: the model only borrows it
    model = frontend.convert(frontend.load(decoder))
    model.reshape({i: tuple(t.shape) for i, t in enumerate(tensors)})  # a trace does not record sizes
    how = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return core().compile_model(model, "CPU", how)


class Compiled:
    """A function of named tensors, compiled at the first call with new shapes. The forms of the last KEPT shapes are kept.

    If OpenVINO cannot convert the function, it runs in torch after a warning.
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
        """Compile the function for the shapes of `tensors`, or return it unchanged if that fails."""
        names = list(tensors)
        ordered = lambda *values: self.function(**dict(zip(names, values, strict=True)))
        try:
            request = compiled(ordered, tuple(tensors.values())).create_infer_request()
            run = lambda **given: torch.from_numpy(request.infer([given[k].numpy() for k in names], share_inputs=True)[0])
            run(**tensors)
        except Exception as error:  # a layer that OpenVINO lacks, or a version with another interface
            console.warn(f"`compile=openvino`: {self.what} runs without it ({type(error).__name__}: {quoted(error)[:200]})")
            return self.function
        return run
