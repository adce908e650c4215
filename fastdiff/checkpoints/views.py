"""A checkpoint file as the rest of fastdiff sees it: every tensor under its one LDM name, weights of 8 bits as numbers again.

    W = W8 * scale        W8: float8_e4m3fn or float8_e5m2;  scale: one number, or one an output channel;  in fp32

Programs write the same network under several names. ComfyUI's scaled fp8 files hold `<layer>.scale_weight` (older) or
`<layer>.weight_scale` (newer) beside a weight, and the scales of activations, which only its own products need. Every other
kind of quantisation is refused by name.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints import configs, tensors
from fastdiff.checkpoints.tensors import CODES, Layout, TensorFile
from fastdiff.runtime.errors import InputRefused

UNET = "model.diffusion_model."
FP8 = {torch.float8_e4m3fn, torch.float8_e5m2}
HALF = torch.float16  # what a weight of fp8 is written as where the stored precision is kept: it holds every number of fp8
RENAMED = (  # what the names of a whole file, or of its UNet, start with -> what they start with in an LDM file
    ("state_dict.", ""),
    ("module.", ""),
    ("model.model.diffusion_model.", UNET),
    ("diffusion_model.", UNET),
    ("model.model.", "model."),
)
BARE = re.compile(r"(input_blocks\.\d+|middle_block\.\d+|output_blocks\.\d+|time_embed|label_emb|out)\.")  # a UNet's own names
COND = ("time_embedding.cond_proj.weight", "time_embed.cond_proj.weight")  # an LCM's guidance input: a second name, and ours
SCALE = re.compile(r"(.+)\.(scale_weight|weight_scale)$")
UNUSED = re.compile(r"(.+\.)?(scale_input|input_scale|scaled_fp8|comfy_quant)$")  # the scales of activations, and markers
UNKNOWN = (  # pattern of a tensor name, and the quantisation that has such names
    (r"\.weight_scale_2$", "nvfp4 or another double scaling"),
    (r"\.(weight_scale_inv|weight_scalar)$", "block scaling"),
    (r"\.pre_quant_scale$", "smoothed activations"),
    (r"\.(quant_state\.|absmax$|quant_map$|nested_absmax$|SCB$|CB$)", "bitsandbytes"),
    (r"\.(qweight|qzeros|zero_point|weight_zero_point|g_idx)$", "integers with zero points"),
    (r"\.(svd_up|svd_down|proj_down|smooth_factor|wscales)$", "SVDQuant"),
)
FORMATS = {"float8_e4m3fn", "float8_e5m2"}


class View(TensorFile):
    """A file whose tensors have other names than stored, or are restored from fp8. Each is read on access, as in the file."""

    def __init__(self, file: TensorFile, places: Mapping[str, str], scales: Mapping[str, str]) -> None:
        """`places`: name -> stored name. `scales`: stored name of a weight -> that of its scale."""
        self.file, self.places, self.scales = file, dict(places), dict(scales)
        dtype = lambda layout: HALF if layout.dtype in FP8 else layout.dtype
        shown = {name: (layout := file.layouts[old])._replace(dtype=dtype(layout)) for name, old in self.places.items()}
        super().__init__(file.path, shown, file.metadata)

    def __getitem__(self, name: str) -> Tensor:
        old = self.places[name]
        tensor, scale = self.file[old], self.scales.get(old)
        if scale is None:
            return tensor.float() if tensor.dtype in FP8 else tensor
        factor = self.file[scale].float()
        if factor.numel() > 1:  # one an output channel
            factor = factor.reshape(-1, *[1] * (tensor.ndim - 1))
        return tensor.float() * factor

    @property
    def stored_dtypes(self) -> list[str]:
        return self.file.stored_dtypes

    @property
    def fp8_count(self) -> int:
        """How many of the tensors are stored in fp8."""
        return sum(self.file.layouts[old].dtype in FP8 for old in self.places.values())


def opened(path: str | Path, *, allow_pickle: bool = False) -> TensorFile:
    """Open a file of a checkpoint, as `tensors.open_file` does, under LDM names and with fp8 weights restored.

    InputRefused, naming it, for a quantisation that is not known.
    """
    return view(tensors.open_file(path, allow_pickle=allow_pickle))


def view(file: TensorFile) -> TensorFile:
    """The file itself where all is as it should be, else a `View` of it."""
    places, scales = renamed(file), scales_of(file)
    hidden = {*scales.values(), *(name for name in file if UNUSED.match(name))} if quantized(file) else set()
    places = {name: old for name, old in places.items() if old not in hidden}
    if len(places) == len(file) and all(name == old for name, old in places.items()) and not has_fp8(file):
        return file
    return View(file, places, scales)


def has_fp8(file: TensorFile) -> bool:
    """Whether any tensor is stored in fp8."""
    return any(layout.dtype in FP8 for layout in file.layouts.values())


def quantized(file: TensorFile) -> bool:
    """Whether a file has scales or markers of quantisation beside its weights."""
    return any(SCALE.match(name) or UNUSED.match(name) for name in file)


def renamed(file: TensorFile) -> dict[str, str]:
    """The LDM name of every tensor -> the name that it has in the file. Names that we do not know stay as they are."""
    names = {name: name for name in file}
    for start, new in RENAMED:
        if not any(name.startswith(start) for name in names) or start == "model.model." and start + "diffusion_model." in names:
            continue
        names = {new + name.removeprefix(start) if name.startswith(start) else name: old for name, old in names.items()}
    if not any(name.startswith(UNET) for name in names) and any(BARE.match(name) for name in names):
        names = {UNET + name if BARE.match(name) else name: old for name, old in names.items()}
    names = {UNET + COND[1] if name == UNET + COND[0] else name: old for name, old in names.items()}
    if len(names) != len(file):
        raise InputRefused(f"{file.path}: has the same tensor under two names", "it is damaged, or two models in one file")
    return names


def is_diffusers_unet(file: TensorFile) -> bool:
    """Whether a file is a UNet under diffusers' names, as some few-step models are published."""
    return f"{UNET}input_blocks.0.0.weight" not in file and any(re.match(r"(unet\.)?down_blocks\.", name) for name in file)


def scales_of(file: TensorFile) -> dict[str, str]:
    """Weight -> its scale, by their names in the file; InputRefused for a quantisation that we cannot undo."""
    check_known(file)
    scales: dict[str, str] = {}
    for name in file:
        if (match := SCALE.match(name)) and (weight := f"{match[1]}.weight") in file:
            layout, count = file.layouts[weight], torch.Size(file.layouts[name].shape).numel()
            if count not in {1, layout.shape[0] if layout.shape else 1}:
                raise unknown(file, f"scales of shape {file.layouts[name].shape} for weights of {layout.shape}", name)
            scales[weight] = name
    wrong = lambda layout: not layout.dtype.is_floating_point
    if bad := next((weight for weight in scales if wrong(file.layouts[weight])), None):
        raise unknown(file, f"weights in {CODES[file.layouts[bad].dtype]}", bad)
    return scales


def check_known(file: TensorFile) -> None:
    """InputRefused where names, the header or a marker tell of a quantisation other than fp8 with a scale a weight."""
    for name in file:
        for pattern, what in UNKNOWN:
            if re.search(pattern, name):
                raise unknown(file, what, name)
        if name.endswith(".comfy_quant") and not is_marker(file, name):
            raise unknown(file, "a note on it in another form", name)
    layers: dict[str, Any] = {}
    if text := file.metadata.get("_quantization_metadata"):
        layers = formats(file, text).get("layers", {})
    layers |= {name: formats(file, text_of(file[name])) for name in file if name.endswith(".comfy_quant")}
    for name, row in layers.items():
        kind = str(row.get("format")) if isinstance(row, dict) else str(row)
        if kind not in FORMATS:
            raise unknown(file, kind[:40], name)


def is_marker(file: TensorFile, name: str) -> bool:
    """Whether a tensor is ComfyUI's note of how a layer is quantised: a short JSON text as bytes."""
    layout: Layout = file.layouts[name]
    return layout.dtype == torch.uint8 and len(layout.shape) == 1 and layout.shape[0] < 4096


def text_of(note: Tensor) -> str:
    """The text that a tensor of bytes holds."""
    return bytes(note.tolist()).decode(errors="replace")


def formats(file: TensorFile, text: str) -> dict[str, Any]:
    """The content of a note on quantisation; InputRefused where it is no JSON object."""
    try:
        content = configs.parsed(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise unknown(file, "a note on it that is no JSON", "_quantization_metadata")
    return content


def unknown(file: TensorFile, what: str, name: str) -> InputRefused:
    """The error for a quantisation that we cannot undo."""
    return InputRefused(
        f"{file.path}: quantised in a way that is not known here: {what} ({name})",
        "give the file that it was made from, in fp16, bf16, fp32 or fp8",
    )
