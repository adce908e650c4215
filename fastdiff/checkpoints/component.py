"""Single networks: components of a base model, and a VAE or a ControlNet that is loaded beside it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.checkpoints import configs, folders, hub, references
from fastdiff.checkpoints.references import Reference
from fastdiff.runtime.console import info
from fastdiff.runtime.errors import InputRefused, UsageError, as_field, device_error, quoted

BESIDE = ("config.json", "fastdiff.json")  # what a network's folder has besides its weights


def locate(ref: str, option: str, what: str, *, files: bool = False, allow_pickle: bool = False) -> Path:
    """The folder or file of the network that `ref` names, a path or a hub id; the hub is asked only where no such path exists.

    `option` is the option that `ref` was given with and `what` the kind of network, both for messages. With `files` a single file
    is one too. UsageError where there is no such path or repository, or the hub cannot be asked; InputRefused where a repository
    has no such network, or pickled weights that `allow_pickle` does not allow.
    """
    if path := references.local(ref):
        return path
    where = references.parse(ref, option)
    if where is None:
        named_file = Path(ref).suffix in references.FILES
        missing = "no such file" if files and named_file else "no such file or folder" if files else "no such folder"
        kinds = f"a file or a diffusers folder of a {what}" if files else f"a diffusers folder of a {what}"
        raise UsageError(f"{as_field(option, ref)}: {missing}", f"give {kinds}, or a hub id (owner/name)")
    given = as_field(option, ref)
    if where.names_file and files:
        return hub.file(where, given)
    if (here := hub.cached(where)) and (home := network_in(here / where.path, what, allow_pickle)):
        return hub.told(here, where) and home
    return downloaded(where, given, option, what, files=files, allow_pickle=allow_pickle)


def network_in(folder: Path, what: str, allow_pickle: bool) -> Path | None:
    """The folder of the network in one on this machine that holds all of it: itself, or the component of a checkpoint."""
    for home in (folder, folder / what.lower()):
        if (home / "config.json").exists() and (files := folders.stored(home, "", allow_pickle=allow_pickle)):
            return home if all(path.exists() for path in files) else None
    return None


def downloaded(where: Reference, given: str, option: str, what: str, *, files: bool, allow_pickle: bool) -> Path:
    """Download a network from the hub; a whole checkpoint gives its component, which is told."""
    repository = hub.ask(where, given)
    names = repository.inside()
    part = next((part for part in ("", f"{what.lower()}/") if f"{part}config.json" in names), None)
    if part is None:
        if files:
            name = names[repository.only_file(allow_pickle=allow_pickle)]
            return hub.fetch(repository, [name]) / name
        hint = f"a diffusers folder of a {what}; its files: {hub.some(names)}"
        raise repository.lacking("no config.json", InputRefused(f"{given}: {where} has no config.json", hint))
    inside = [name.removeprefix(part) for name in names if name.startswith(part)]
    weights, variant = folders.choose(inside, allow_pickle)
    if not weights:
        if any(name.endswith(".bin") for name in inside):
            raise repository.lacking(f"no safetensors weights of a {what}", pickles_alone(given, option))
        nothing = InputRefused(f"{given}: {where} has no weights of a {what}", f"its files: {hub.some(names)}")
        raise repository.lacking(f"no weights of a {what}", nothing)
    if variant:
        info(f"{where}: {variant} is used; {repository.no_other}")
    if part:
        info(f"{where}: a whole checkpoint; its {part} is used")
    wanted = [names[part + name] for name in [*(name for name in BESIDE if name in inside), *weights]]
    return hub.fetch(repository, wanted) / where.path / part


def pickles_alone(given: str, option: str) -> InputRefused:
    """The error for a network that is stored in pickles alone."""
    hint = "`allow_pickle=True` reads their tensors" if option == "vae" else "give a folder with .safetensors files"
    return InputRefused(f"{given}: has pickled weights alone (.bin)", hint)


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
        raise pickles_alone(as_field(option, ref), option)
    how: dict[str, Any] = {} if allow_pickle else {"use_safetensors": True}
    if (stored := folders.stored(folder, "", allow_pickle=allow_pickle)) and ".fp16." in stored[0].name:
        how["variant"] = "fp16"  # the folder has no other
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
