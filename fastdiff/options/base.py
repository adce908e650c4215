"""The options of every command with a base model."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastdiff.checkpoints.family import DEFAULT_BASE, base_names

if TYPE_CHECKING:
    import torch

    from fastdiff.checkpoints.checkpoint import Checkpoint


@dataclass
class BaseConfig:
    """Where the base model comes from: the options that every command with a base has."""

    PANEL: ClassVar[str] = "Base model"

    base: Annotated[str, f"{base_names()}, a hub id, a diffusers folder or a single file"] = field(
        default=DEFAULT_BASE, metadata={"flags": ["-b"]}
    )
    base_config: Annotated[str | None, "folder or hub id with the configs for an unusual single file"] = None
    prediction_type: Annotated[
        Literal["epsilon", "v_prediction"] | None, "what the network of --base predicts; default: read from its files"
    ] = None
    zero_snr: Annotated[
        bool, "the noise schedule of --base ends in pure noise (zero terminal SNR), though its files do not say so"
    ] = False
    allow_pickle: Annotated[bool, "also read the tensors of .ckpt, .pt and .bin files; code in them is never run"] = False

    def open_base(self, dtype: "torch.dtype | None" = None, **how: Any) -> "Checkpoint":
        """The base model; its networks load on first use, in `dtype` (default: float32). `how` is for `checkpoint.load`."""
        import torch

        from fastdiff.checkpoints import checkpoint

        assert self.base is not None
        dtype = dtype or torch.float32
        return checkpoint.load(
            self.base,
            dtype=dtype,
            config=self.base_config,
            prediction=self.prediction_type,
            allow_pickle=self.allow_pickle,
            zero_snr=self.zero_snr,
            **how,
        )
