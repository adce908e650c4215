"""The Python code on a model card that opens the base of the weights in stock diffusers."""

import os
import shlex
from pathlib import Path

from fastdiff.checkpoints import locate, pickles, references, views
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import aliases, named
from fastdiff.runtime.command import option_words

# Without it, text encoders that are stored in half precision stay in it beside a UNet in fp32, and the pipeline fails.
FP32 = ", torch_dtype=torch.float32"
EXPORTED = "base"  # the folder that `note` has the reader make
PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}  # the classes that open one component of a single file


def load_expression(base: Checkpoint, folder: Path, pipeline: str | None = None, arguments: str = "") -> str:
    """Return the Python expression that opens the base with diffusers, for code that runs in `folder`.

    A relative path to the base is told from there. `pipeline` is the class that opens it, by default that of `opener`, and
    `arguments` goes before the closing bracket. A single file that was opened with a folder of configs takes those configs, and
    the components that it lacks, from that folder.
    """
    pipeline = pipeline or opener(base)
    if embedded(base):
        return f'{pipeline}.from_pretrained(fastdiff.load("{base.ref}").path{arguments}{FP32})'
    if base.path.is_file() and why_not(base):
        return f'{pipeline}.from_pretrained("{EXPORTED}"{arguments}{FP32})'
    ref = seen_from(folder, base.ref, base.path)
    if not base.path.is_file():
        where = None if references.local(base.ref) else references.parse(base.ref, "base")
        if where and where.path:  # diffusers opens no pipeline in a folder of a repository
            return f'{pipeline}.from_pretrained(fastdiff.load("{where}").path{arguments}{FP32})'
        revision = f', revision="{where.revision}"' if where and where.revision else ""
        return f'{pipeline}.from_pretrained("{ref}"{revision}{arguments}{FP32})'
    if not has_config(base):
        return f'{pipeline}.from_single_file("{ref}"{arguments})'
    assert base.config is not None, "`has_config` says so"
    config, held = seen_from(folder, str(base.config), base.config), held_by(base)
    if any(part not in held for part in base.text_parts):
        one = "".join(
            f', {part}={PARTS[part]}.from_single_file("{ref}", config="{config}", subfolder="{part}"{FP32})'
            for part in PARTS
            if part in held
        )
        return f'{pipeline}.from_pretrained("{config}"{one}{arguments}{FP32})'
    others = "".join(
        f', {part}={kind}.from_pretrained("{config}", subfolder="{part}"{FP32})'
        for part, kind in PARTS.items()
        if part not in held
    )
    return f'{pipeline}.from_single_file("{ref}", config="{config}"{others}{arguments}{FP32})'


def opener(base: Checkpoint) -> str:
    """Return the name of the diffusers class that opens the base; for a whole single file, only the family's own class can."""
    whole = base.path.is_file() and not why_not(base) and not (has_config(base) and set(base.text_parts) - held_by(base))
    return base.family.pipeline if whole else "DiffusionPipeline"


def openers(base: Checkpoint, pipeline: str | None = None) -> list[str]:
    """Return the names from diffusers in `load_expression`."""
    expression = load_expression(base, Path(), pipeline)
    return [pipeline or opener(base), *(kind for kind in PARTS.values() if f"{kind}." in expression)]


def note(base: Checkpoint, folder: Path) -> list[str]:
    """Return comments for the code: what to do first where diffusers cannot open the base; else nothing."""
    if not base.path.is_file() or embedded(base) or not (reason := why_not(base)):
        return []
    command = shlex.join(["fastdiff", "export", *words_for(base, folder), "-o", EXPORTED])
    return [f"# diffusers cannot open {base.path.name}: {reason}. First make a folder of it:", f"#   {command}"]


def words_for(base: Checkpoint, folder: Path) -> list[str]:
    """Return the options that open the base, as words of a command line that runs in `folder`."""
    how: dict[str, str | bool] = {"base": base.ref, **base.opening}
    paths = {name: Path(value) for name in ("base", "base_config") if isinstance(value := how.get(name), str)}
    how |= {name: seen_from(folder, str(path), path) for name, path in paths.items() if path.expanduser().exists()}
    return option_words(how)


def why_not(base: Checkpoint) -> str | None:
    """Say why stock diffusers cannot open a single file; None where it can."""
    if isinstance(base.file, views.View):
        return "its tensors have other names, or a precision that diffusers does not read"
    if base.path.suffix != ".safetensors" and base.allow_pickle and pickles.leftovers(base.path):
        return "it holds leftovers of training beside tensors"
    texts = set(base.text_parts)
    if has_config(base) and 0 < len(texts - held_by(base)) < len(texts):
        return "it has one of two text encoders"
    return None


def has_config(base: Checkpoint) -> bool:
    """Whether the base is a single file that was opened with a folder of configs."""
    return "base_config" in base.opening


def held_by(base: Checkpoint) -> set[str]:
    """Return the names of the components that a single file holds."""
    if views.is_diffusers_unet(base.file):
        return {"unet"}
    return {part for part in base.parts if any(name.startswith(base.family.prefixes[part]) for name in base.file)}


def seen_from(folder: Path, ref: str, path: Path) -> str:
    """Return a reference to `path` for code that runs in `folder`: a path, told from there if it is relative, or a hub id.

    Of a file on the hub it is the address, which diffusers opens.
    """
    if not (given := Path(ref).expanduser()).exists():
        if (where := references.parse(ref, "base")) and path.is_file():
            inside = where.path or path.name
            return f"https://huggingface.co/{where.hub_id}/blob/{where.revision or 'main'}/{inside}"
        return locate.hub_id_of(path) or aliases().get(ref, (ref,))[0]
    if hub_id := locate.hub_id_of(given):
        return hub_id
    return ref if given.is_absolute() and given == Path(ref) else Path(os.path.relpath(given, folder)).as_posix()


def embedded(base: Checkpoint) -> bool:
    """Whether the base is one that ships with fastdiff and is opened by its fastdiff name."""
    family = named(base.ref)
    return family is not None and family.ships_weights
