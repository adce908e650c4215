"""Move LoRAs of a full network to a pruned one: find the kept layer that each LoRA module belongs to."""

from dataclasses import replace

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import Family
from fastdiff.checkpoints.locate import stock_config
from fastdiff.lora.file import Lora, layers_told
from fastdiff.lora.kinds import Update
from fastdiff.lora.layouts import canonical
from fastdiff.models import unet
from fastdiff.runtime import console
from fastdiff.runtime.errors import InputRefused


def remapped(base: Checkpoint, item: Lora, *, wanted: bool) -> Lora:
    """Return a LoRA that fits a pruned base. With `wanted`, a LoRA of the full network moves to the layers that were kept.

    Names alone do not tell which network a LoRA is for: up_blocks.1.attentions.1 exists in both, but in the pruned network it
    was attentions.2 before. Raises InputRefused if the LoRA has layers that only the full network has and `wanted` is False.
    """
    whole, config = stock_config(base.family), base.unet_config
    if item.layers != 2 and item.layers == config.get("layers_per_block"):
        return item  # its metadata says that it was trained on a network with these layers
    layers = unet.inherited_layers(whole, config)
    key_of = lambda path: canonical("lora_unet_", path)
    paths = [name.removesuffix(".weight") for name in unet.shapes_of(unet.unet_of(config)) if name.endswith(".weight")]
    mine = {key_of(path): key_of(unet.renamed(path, layers)) for path in paths}
    if not wanted:
        gone = [key for key in item.modules if key.startswith("lora_unet_") and key not in mine]
        if gone and set(gone) <= {key_of(name.removesuffix(".weight")) for name in stock_shapes(base.family)}:
            raise InputRefused(
                f"{item.source}: this LoRA is for the full network that {base.ref} was pruned from (it has {gone[0]})",
                "`remap=True` moves it to the layers that were kept",
            )
        return item
    kept: dict[str, Update] = {key: item.modules[whole_key] for key, whole_key in mine.items() if whole_key in item.modules}
    texts = {key: update for key, update in item.modules.items() if not key.startswith("lora_unet_")}
    used = {whole_key for whole_key in mine.values() if whole_key in item.modules}
    console.info(f"{item.source}: {len(used)} of {len(item.modules) - len(texts)} UNet modules belong to layers that were kept")
    metadata = {k: v for k, v in item.metadata.items() if k != "fastdiff.layers_per_block"} | layers_told(config)
    return replace(item, modules=kept | texts, metadata=metadata)


def stock_shapes(family: Family) -> dict[str, tuple[int, ...]]:
    """Return the shape of every UNet parameter of the family, unpruned."""
    return unet.shapes_of(unet.unet_of(stock_config(family)))


def is_pruned(base: Checkpoint) -> bool:
    """Return whether the base's UNet has other layers than the UNet of its family."""
    whole, mine = stock_config(base.family), base.unet_config
    count = lambda config: (
        unet.stages(config),
        unet.each(config, "layers_per_block"),
        unet.depths(config),
        unet.attended(config),
    )
    return count(whole) != count(mine) or whole.get("mid_block_type") != mine.get("mid_block_type")
