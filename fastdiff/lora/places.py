"""Where LoRAs are: files, folders that peft or diffusers wrote, and repositories of the hub."""

from pathlib import Path

from fastdiff.checkpoints import hub, references
from fastdiff.checkpoints.published import hub_of
from fastdiff.runtime import console
from fastdiff.runtime.errors import UsageError, as_field

PEFT, DIFFUSERS = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"  # the names that libraries write
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")  # the folders of one that peft wrote for each component


def files_of(path: Path) -> list[Path]:
    """The files of the LoRA at a path: the file itself, or of a folder that peft or diffusers wrote those of all components."""
    folders = [path, *(path / part for part in COMPONENTS)]
    if files := [file for folder in folders if (file := folder / PEFT).is_file()]:
        return files
    return [path / DIFFUSERS] if (path / DIFFUSERS).is_file() else [path]


def located(ref: str | Path, option: str = "lora", *, allow_pickle: bool = False) -> Path:
    """The file or folder of the LoRA that `ref` names: a path, or a repository of the hub, a folder or a file in it.

    Of a repository the file under the name that diffusers writes is taken, else peft's folder, else its only file. What is on
    this machine wins; of peft's folder the hub is asked what belongs to it. UsageError where there is nothing of that name, or
    there are several files, which it lists.
    """
    path = Path(ref).expanduser()
    if isinstance(ref, Path) or references.local(ref) or (where := references.parse(ref, option)) is None:
        return path
    given = as_field(option, ref)
    if where.names_file:
        return hub.file(where, given)
    here = hub.cached(where)
    if here and files_of(here / where.path) == [here / where.path / DIFFUSERS]:
        return hub.told(here, where) / where.path / DIFFUSERS
    return of_repository(hub.ask(where, given), allow_pickle=allow_pickle)  # peft's files may be here in part


def of_repository(repository: hub.Repository, *, allow_pickle: bool = False) -> Path:
    """The LoRA of a repository, downloaded; errors as of `located`."""
    names = repository.inside()
    if "model_index.json" in names and not names.keys() & {DIFFUSERS, PEFT}:
        raise UsageError(f"{repository.given}: {repository.where} is a whole checkpoint, not a LoRA", "give it as `base`")
    adapters = [name for name in names if name in {PEFT, *(f"{part}/{PEFT}" for part in COMPONENTS)}]
    configs = [name for name in (adapter.replace(PEFT, "adapter_config.json") for adapter in adapters) if name in names]
    if DIFFUSERS in names:
        wanted = [DIFFUSERS]
    elif adapters:
        wanted = [*adapters, *configs]
    else:
        wanted = [repository.only_file(allow_pickle=allow_pickle)]
    if adapters and repository.unasked:
        parts = ", ".join(name.removesuffix(PEFT) or name for name in adapters)
        console.warn(f"{repository.where}: all that this machine has of the LoRA is used ({parts}); it may have more parts")
    here = hub.cached(repository.where) if adapters and DIFFUSERS not in names else None
    if here and all((here / names[name]).is_file() for name in wanted):
        folder = hub.told(here, repository.where) / repository.where.path
    else:
        folder = hub.fetch(repository, [names[name] for name in wanted]) / repository.where.path
    return whole(folder) if adapters or DIFFUSERS in names else folder / wanted[0]


def whole(folder: Path) -> Path:
    """The path of the LoRA in a folder: its file, which has a name that says more, or the folder that peft wrote."""
    files = files_of(folder)
    return files[0] if files[0].name == DIFFUSERS else folder


def called(path: Path) -> str:
    """A short name for a LoRA: its file or folder, or its repository where a library has named the file."""
    standard = path.name == DIFFUSERS or hub.COMMIT.fullmatch(path.name)
    return hub_of(path).partition("/")[2] or path.stem if standard else path.stem
