"""Single networks: components of a base model, and a VAE or a ControlNet that is loaded beside it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.checkpoints import configs
from fastdiff.runtime.errors import InputRefused, UsageError, as_field, device_error, quoted

FILES = ["config.json", "diffusion_pytorch_model.safetensors", "fastdiff.json"]


def locate(ref: str, option: str, what: str, *, files: bool = False) -> Path:
    """The folder or file of the network that `ref` names, a path or a hub id; the hub is asked only where no such path exists.

    `option` is the option that `ref` was given with and `what` the kind of network, both for messages. With `files` a single file
    is one too. UsageError where there is no such path or the hub cannot be reached.
    """
    folder = Path(ref).expanduser()
    if folder.exists():
        return folder
    named_file = folder.suffix in {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}
    if named_file or ref.startswith((".", "/", "~")) or ref.count("/") != 1:
        missing = "no such file" if files and named_file else "no such file or folder" if files else "no such folder"
        kinds = f"a file or a diffusers folder of a {what}" if files else f"a diffusers folder of a {what}"
        raise UsageError(f"{as_field(option, ref)}: {missing}", f"give {kinds}, or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(ref, allow_patterns=FILES))
    except Exception as error:  # the hub client raises a dozen kinds
        hint = "give a folder" + (" or a file" if files else "")
        raise UsageError(f"{as_field(option, ref)}: not on this machine, and the hub cannot be reached", hint) from error


def config_of(folder: Path, option: str, ref: str, classes: tuple[str, ...]) -> dict[str, Any]:
    """The config.json of the network in `folder`; InputRefused where there is none, or its class is not one of `classes`."""
    path = folder / "config.json"
    config = configs.read(path)
    if config.get("_class_name") not in classes:
        problem = config.get("_class_name") or "no config.json there"
        raise InputRefused(f"{as_field(option, ref)}: {problem}", f"a diffusers folder of {' or '.join(classes)}")
    return config


def load(folder: Path, option: str, ref: str, config: dict[str, Any], *, allow_pickle: bool = False) -> nn.Module:
    """Load the network in fp32 and freeze it; InputRefused where weights are missing, cannot be read, or are pickled.

    Pickles (.bin) are read with `allow_pickle` alone; diffusers reads nothing but tensors from them.
    """
    import diffusers

    check_values(config, folder / "config.json")
    kind = getattr(diffusers, config["_class_name"])  # one of the classes that `config_of` allows
    if not allow_pickle and not list(folder.glob("*.safetensors")) and list(folder.glob("*.bin")):
        hint = "`allow_pickle=True` reads their tensors" if option == "vae" else "give a folder with .safetensors files"
        raise InputRefused(f"{as_field(option, ref)}: has pickled weights alone (.bin)", hint)
    how: dict[str, Any] = {} if allow_pickle else {"use_safetensors": True}
    try:
        net, report = kind.from_pretrained(
            folder, local_files_only=True, torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True, **how
        )
    except Exception as error:  # diffusers and torch raise a dozen kinds where a config or a file of weights is damaged
        if clear := device_error(error):
            raise clear from error
        reason = (quoted(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputRefused(f"{as_field(option, ref)}: its weights cannot be read ({reason})") from error
    if missing := sorted(report["missing_keys"]):
        raise InputRefused(f"{as_field(option, ref)}: {len(missing)} of its layers have no weights ({missing[0]})")
    return net.eval().requires_grad_(False)


def check_values(config: dict[str, Any], where: Path) -> None:
    """InputRefused where the config of a VAE or a ControlNet has a value that no such network can have."""
    if config["_class_name"] == "ControlNetModel":
        configs.check(config, configs.UNET, where, ("block_out_channels",))
    else:
        configs.check_part("vae", config, where)


def skeleton(part: str, config: dict[str, Any], index: dict[str, Any]) -> nn.Module:
    """The component `part` of a base model as a network without weights: its parameters are on the meta device.

    `index` is the content of model_index.json, which names the classes of text encoders.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        if part.startswith("text_encoder"):
            import transformers

            cls = getattr(transformers, index[part][1])  # the class that the folder names
            return cls(cls.config_class.from_dict(config))
        from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

        vae = AutoencoderTiny if config.get("_class_name") == "AutoencoderTiny" else AutoencoderKL
        return (UNet2DConditionModel if part == "unet" else vae).from_config(config)
