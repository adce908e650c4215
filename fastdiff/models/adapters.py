"""LoRA on a UNet through peft: attach, and read the trained factors back."""

from torch import nn

from fastdiff.io.lora import Factors, from_peft

# The layers of the published LCM-LoRAs: rank 64 on these gives 67,252,224 parameters on SD1.5 and 196,751,360 on SDXL.
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


def attach(unet: nn.Module, rank: int, alpha: float, name: str = "student") -> None:
    """Freeze the UNet and put a fresh adapter on it, its factors in fp32 whatever the base is stored in."""
    import torch
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS)), adapter_name=name)
    cast_training_params(unet, torch.float32)


def factors(unet: nn.Module, alpha: float, name: str = "student") -> dict[str, Factors]:
    """The adapter as canonical LoRA modules, its scale folded in."""
    from peft import get_peft_model_state_dict

    return from_peft(get_peft_model_state_dict(unet, adapter_name=name), alpha)
