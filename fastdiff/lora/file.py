"""Read LoRA files of any layout into one canonical form, and write them in the layouts that other programs read.

W' = W + sum_i s_i Delta_i(W)         every update acts on the base's own weight, so that the order does not matter
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastdiff.checkpoints import configs, single_file, tensors
from fastdiff.checkpoints.family import PLAIN, Family
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.checkpoints.tensors import TensorFile
from fastdiff.lora import foreign, identify
from fastdiff.lora.kinds import Factors, Update, build, describe
from fastdiff.lora.layouts import READERS, Part, canonical, kernel_of, other_kind, read_peft
from fastdiff.lora.places import files_of, located
from fastdiff.runtime.console import warn
from fastdiff.runtime.errors import InputRefused, UsageError, as_field, quoted

if TYPE_CHECKING:
    from fastdiff.diffusion.schedule import PredictionType

Format = Literal["kohya", "diffusers", "peft"]
MAX_LAYERS = 16  # in a block of a UNet; a header that says more is damaged


@dataclass(eq=False)
class Lora:
    """A LoRA: its updates by canonical module name, and the header of its file. It is hashable and equals only itself."""

    modules: dict[str, Update]
    metadata: dict[str, str] = field(default_factory=dict)
    source: str = "the LoRA"  # its file, or what messages call it
    skipped: list[str] = field(default_factory=list)  # keys that were left out: bundled embeddings, unknown ones where allowed
    total: int = 0  # number of modules in the file, when `modules` holds only those that fit a base
    dtype: torch.dtype | None = None  # the widest of its file's weights; None where it comes from no file

    @property
    def recipe(self) -> Recipe:
        """The sampling settings in the header; ValueError where a number there is malformed."""
        return Recipe.from_metadata(self.metadata)

    @property
    def family(self) -> Family | None:
        """The base's family, by the layers, then by what the header says of them; None if unknown."""
        return identify.family_of(self.shapes, self.metadata)

    @property
    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """The shape of the parameter that each module changes; None where an update does not determine it."""
        return {key: update.shape for key, update in self.modules.items()}

    @property
    def trained_for(self) -> "PredictionType | None":
        """What the base predicts that it was trained on, as its header states it; None where the header does not say."""
        return identify.stated_prediction(self.metadata)

    @property
    def layers(self) -> int:
        """Layers in a block of the base UNet, needed to read LDM names; 2 unless the base was pruned."""
        return int(self.metadata.get("fastdiff.layers_per_block", 2))

    def of_unet(self) -> "Lora":
        """This LoRA without the modules of text encoders."""
        return replace(self, modules={k: v for k, v in self.modules.items() if k.startswith("lora_unet_")})

    def for_unet(self, option: str) -> "Lora":
        """`of_unet`, with a warning that modules of text encoders are left out; InputRefused where nothing else is there.

        `option` is the one that named the file.
        """
        unet = self.of_unet()
        if texts := len(self.modules) - len(unet.modules):
            where = as_field(option, self.source)
            if not unet.modules:
                raise InputRefused(f"{where}: changes text encoders alone, which are not trained here")
            warn(f"{where}: its {texts} modules for text encoders are not used; the student has those of the base")
        return unet

    def save(self, path: str | Path, *, dtype: torch.dtype | None = None, format: Format = "kohya") -> Path:
        """Write this LoRA and return the path. kohya's layout is what every program loads; `save` describes the others.

        Without `dtype` the weights keep that of their file; those of no file become fp16.
        """
        from fastdiff.lora.writing import save  # it imports this module

        save(self, Path(path).expanduser(), dtype=dtype, format=format)
        return Path(path).expanduser()

    def factors(self, doing: str) -> dict[str, Factors]:
        """The modules, all of which must be low-rank factors; InputRefused names one that is not.

        `doing` completes the message "... cannot be", as "merged into a LoRA".
        """
        result: dict[str, Factors] = {}
        for key, update in self.modules.items():
            if not isinstance(update, Factors):
                kind = {"dora": "a DoRA", "loha": "a LoHa", "lokr": "a LoKr", "full": "a full difference"}.get(
                    update.kind, update.kind
                )
                hint = "bake it into a checkpoint with `base`" + (
                    "" if update.needs_weight else ", or give `rank=R` to approximate it"
                )
                raise InputRefused(f"{self.source}: {kind} ({key}) cannot be {doing} exactly", hint)
            result[key] = update
        return result


def load(
    path: str | Path, *, layers: int = 2, allow_partial: bool = False, allow_pickle: bool = False, recognise: bool = True
) -> Lora:
    """Read a LoRA of any supported layout; the scale alpha / r is multiplied in.

    `path` is a file, a folder that peft or diffusers wrote, or what `located` finds on the hub. `layers` is the number
    of layers in a block of the base, for files with LDM names whose header lacks it. InputRefused where any key is unknown,
    unless `allow_partial`, which leaves such keys out with a warning. Bundled embeddings are always left out with a warning.

    A published few-step LoRA without a header of ours gets the recipe that its authors document (checkpoints/published.py),
    unless `recognise` is off, and a line says so.
    """
    path = located(path, allow_pickle=allow_pickle)
    files = [tensors.open_file(file, allow_pickle=allow_pickle) for file in files_of(path)]
    how: dict[str, Any] = dict(allow_partial=allow_partial, recognise=recognise)
    return of_components(path, [assembled(file, file.__getitem__, layers, **how) for file in files])


def of_components(path: Path, parts: Sequence[Lora]) -> Lora:
    """One LoRA of those that peft's folder `path` holds for its components; InputRefused where two have the same module."""
    if len(parts) == 1:
        return replace(parts[0], source=str(path))
    modules: dict[str, Update] = {}
    for part in parts:
        if both := modules.keys() & part.modules.keys():
            raise InputRefused(f"{path}: two of its components have {min(both)}")
        modules |= part.modules
    metadata = {key: value for part in reversed(parts) for key, value in part.metadata.items()}
    skipped = [key for part in parts for key in part.skipped]
    whole = Lora(modules, metadata, str(path), skipped, dtype=tensors.widest(part.dtype for part in parts if part.dtype))
    return with_first_encoder(whole, (whole.family or PLAIN).lora_text_prefix)


def outline(file: TensorFile | Path, *, layers: int = 2) -> Lora:
    """The LoRA in a file with its weights on the meta device, which have shapes and no values; InputRefused as in `load`.

    A path may be a folder, as for `load`. Of the tensors only those of one number are read. What `load` refuses for values that
    are not finite passes here.
    """
    if isinstance(file, Path):
        return of_components(file, [outline(tensors.open_file(path), layers=layers) for path in files_of(file)])

    def read(key: str) -> Tensor:
        dtype, shape, *_ = file.layouts[key]
        return file[key] if torch.Size(shape).numel() == 1 else torch.empty(shape, dtype=dtype, device="meta")

    return assembled(file, read, layers)


def assembled(
    file: TensorFile, read: Callable[[str], Tensor], layers: int, *, allow_partial: bool = False, recognise: bool = True
) -> Lora:
    """The LoRA in a file, whose tensors `read` returns; InputRefused as in `load`."""
    path, metadata = file.path, file.metadata
    if other := other_kind(file):
        raise InputRefused(f"{path}: {other.kind} ({other.key})", other.hint)
    embeddings = [key for key in file if key.startswith("bundle_emb.")]
    if embeddings:
        names = sorted({key.split(".")[1] for key in embeddings})
        warn(f"{path}: its bundled embeddings are left out ({', '.join(names[:5])})")
    try:
        Recipe.from_metadata(metadata)
        layers = int(metadata.get("fastdiff.layers_per_block", layers))
        if not 1 <= layers <= MAX_LAYERS:
            raise ValueError(f"fastdiff.layers_per_block {layers}")
    except ValueError as error:
        raise InputRefused(f"{path}: the header is malformed ({quoted(error)})") from error
    table = single_file.flat_table(layers)
    parts = {key: parse(key, table) for key in file if key not in embeddings}
    unknown = [key for key, part in parts.items() if part is None]
    if unknown:
        message = f"{path}: {len(unknown)} of {len(file)} keys are unknown: {', '.join(unknown[:3])}"
        if not allow_partial or len(unknown) == len(parts):
            raise InputRefused(message, "" if len(unknown) == len(parts) else "`allow_partial=True` leaves them out")
        warn(message)
    known = {key: part for key, part in parts.items() if part}
    if not known:
        raise InputRefused(f"{path}: no LoRA modules in it")
    configs = configured(path, metadata, known.values())
    if in_second_encoder(path, configs.get("", {})):
        unnamed = {key: part for key, part in known.items() if part.name and not part.component}
        known |= {key: part._replace(key=part.key.replace("lora_te_", "lora_te2_", 1)) for key, part in unnamed.items()}
    modules: dict[str, dict[str, Tensor]] = {}
    for key, part in known.items():
        sides = modules.setdefault(part.key, {})
        if part.side in sides:
            raise InputRefused(f"{path}: {part.key} has two sets of weights ({key})")
        sides[part.side] = read(key)
    for part in known.values():
        if part.name and configs.get(part.component):
            peft_scale(modules[part.key], part, configs[part.component], path)
    if rank_stabilised(metadata):
        for sides in modules.values():
            stabilise(sides)
    updates = {key: build(plain_magnitude(sides), f"{path}: {key}", kernel_of(key)) for key, sides in modules.items()}
    weights = [file.layouts[key].dtype for key, part in known.items() if part.side not in {"alpha", "on_input"}]
    lora = with_right_header(Lora(updates, metadata, str(path), [*embeddings, *unknown], dtype=tensors.widest(weights)))
    lora = with_first_encoder(lora, (lora.family or PLAIN).lora_text_prefix)
    if recognise:
        unscaled = all(m["alpha"].item() == len(m["down"]) for m in modules.values() if m.keys() >= {"alpha", "down"})
        family = lora.family.name if lora.family else None
        lora.metadata = foreign.header(path, lora.metadata, lora.modules, family, unscaled=unscaled)
    return lora


def rank_stabilised(metadata: Mapping[str, str]) -> bool:
    """Whether the header says that LyCORIS trained the LoRA with rs_lora, at the scale alpha / sqrt(r)."""
    try:
        arguments = configs.parsed(metadata.get("ss_network_args") or "{}")
    except ValueError:
        return False
    return isinstance(arguments, dict) and str(arguments.get("rs_lora")).lower() in {"true", "1"}


def stabilise(sides: dict[str, Tensor]) -> None:
    """Give a GLoRA that was trained with rs_lora the alpha at which alpha / r is its scale.

    LyCORIS stores such an alpha for all other kinds. Of GLoRA it stores the alpha that was asked for.
    """
    if "a2" in sides and "alpha" in sides and sides["alpha"].numel() == 1:
        rank = sides["a2"].shape[:1].numel()
        sides["alpha"] = torch.tensor((sides["alpha"].item() or rank) * math.sqrt(rank))


def with_right_header(lora: Lora) -> Lora:
    """The LoRA without header entries that name a family whose networks have other layers, which a warning tells."""
    wrong = identify.wrong_claims(lora.shapes, lora.metadata)
    if not wrong:
        return lora
    fitting = [row.name for row in identify.possible(lora.shapes)]
    said = ", ".join(f"{entry} says {row}" for entry, row in wrong.items())
    warn(f"{lora.source}: {said}, but its layers are those of {' or '.join(fitting)}; the header is ignored there")
    metadata = {key: value for key, value in lora.metadata.items() if key not in wrong}
    if identify.FAMILY in wrong and (family := identify.family_of(lora.shapes, metadata)):
        metadata[identify.FAMILY] = family.name
    return replace(lora, metadata=metadata)


def layers_told(unet_config: Mapping[str, Any]) -> dict[str, str]:
    """The header entry with the number of layers in a block of the base; empty for the usual two. LDM names depend on it."""
    layers = unet_config.get("layers_per_block", 2)
    return {} if layers == 2 else {"fastdiff.layers_per_block": str(layers)}


def parse(key: str, table: Mapping[str, str]) -> Part | None:
    """What the tensor `key` of a LoRA file is; None where no layout has such a name. `table` is `single_file.flat_table`'s."""
    return next(filter(None, (reader(key, table) for reader in READERS)), None)


def plain_magnitude(sides: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a module with peft's DoRA magnitude in kohya's form.

    peft has one value per output, in any shape, which becomes flat here. kohya's shape also says which axis is meant.
    """
    result = dict(sides)
    if "magnitude_out" in result:
        result["magnitude"] = result.pop("magnitude_out").reshape(-1)
    return result


def configured(path: Path, metadata: Mapping[str, str], parts: Iterable[Part]) -> dict[str, dict[str, Any]]:
    """`peft_configs`; InputRefused where they are malformed, or for a kind of adapter that is not supported."""
    try:
        configs = peft_configs(path, metadata, parts)
        kinds = {str(config.get("peft_type") or "LORA") for config in configs.values()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputRefused(f"{path}: the header or adapter_config.json is malformed ({quoted(error)})") from error
    if others := kinds - {"LORA", "LOHA", "LOKR"}:
        raise InputRefused(f"{path}: a peft adapter of type {others.pop()}", "merge it in peft: PeftModel.merge_and_unload()")
    return configs


def peft_configs(path: Path, metadata: Mapping[str, str], parts: Iterable[Part]) -> dict[str, dict[str, Any]]:
    """The peft config of each component, from the header. For a raw peft file, adapter_config.json beside it is under ""."""
    header = configs.parsed(metadata.get("lora_adapter_metadata") or "{}")
    own: dict[str, dict[str, Any]] = {}
    for key, value in header.items():
        own.setdefault(key.split(".")[0], {})[key.partition(".")[2]] = value
    if any(part.name and not part.component for part in parts):
        config_path = path.parent / "adapter_config.json"
        if config_path.exists():
            own[""] = dict(configs.parsed(config_path.read_text()))
        else:
            warn(f"{path}: no adapter_config.json beside it, so its scale is unknown; alpha = rank is assumed")
    return own


def in_second_encoder(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether a raw peft file, which names no component, is for SDXL's second text encoder: by its folder, or its class."""
    base = config.get("auto_mapping") or {}
    return path.parent.name == "text_encoder_2" or base.get("base_model_class") == "CLIPTextModelWithProjection"


def peft_scale(sides: dict[str, Tensor], part: Part, config: Mapping[str, Any], path: Path) -> None:
    """Put the scale of a module by its peft config among its tensors: alpha for LoRA, alpha / r for LoHa and LoKr.

    `part` is one of the module's tensors. LoKr's two full matrices do not tell r, and peft scales these too. InputRefused where
    the config is malformed.
    """
    try:
        if part.side == "down":
            alpha = peft_alpha(config, part.name, sides["down"].shape[:1].numel())
            sides.setdefault("alpha", torch.tensor(float(alpha)))
        elif part.side in {"w1_a", "kron1", "kron1_a"} and config.get("peft_type") in {"LOHA", "LOKR"}:
            rank = pattern_value(config.get("rank_pattern"), part.name) or config["r"]
            alpha = pattern_value(config.get("alpha_pattern"), part.name) or config["alpha"]
            sides["scale"] = torch.tensor(alpha / rank, dtype=torch.float64)
    except (ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError, re.error) as error:
        raise InputRefused(f"{path}: the header or adapter_config.json is malformed ({quoted(error)})") from error


def peft_alpha(config: Mapping[str, Any], name: str, rank: int) -> float:
    """The alpha of the module `name` by a peft config. `rank` is that of the tensor."""
    alpha = pattern_value(config.get("alpha_pattern"), name) or config.get("lora_alpha") or rank
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def pattern_value(patterns: Mapping[str, float] | None, name: str) -> float | None:
    """The value of the first pattern of a peft config that matches the end of a module's name; None without one."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), None)


def with_first_encoder(lora: Lora, prefix: str) -> Lora:
    """The LoRA with the prefix of its first text encoder changed to `prefix`: SD1 files have either lora_te_ or lora_te1_.

    InputRefused where one has both.
    """
    renamed = {re.sub(r"^lora_te1?_", prefix, key): update for key, update in lora.modules.items()}
    if len(renamed) < len(lora.modules):
        raise InputRefused(f"{lora.source}: the first text encoder has modules under both lora_te_ and lora_te1_")
    return replace(lora, modules=renamed)


def from_peft(state: dict[str, Tensor], alpha: float | dict, prefix: str = "lora_unet_") -> dict[str, Factors]:
    """The LoRA modules by canonical name of the state dict that `peft.get_peft_model_state_dict(net)` returns.

    `alpha` is one number, or one for each dotted module name. ValueError where the adapter is no plain LoRA.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        part = read_peft(f"unet.{key}", {})
        if not part or part.side == "magnitude_out":
            raise ValueError(f"{key}: not a factor of a plain LoRA")
        own = float(alpha[part.name] if isinstance(alpha, dict) else alpha)
        modules.setdefault(canonical(prefix, part.name), {"alpha": torch.tensor(own)})[part.side] = tensor
    factors: dict[str, Factors] = {}
    for key, sides in modules.items():
        update = build(sides, key)
        assert isinstance(update, Factors), f"{key}: down and up make factors"
        factors[key] = update
    return factors


def summary(lora: Lora) -> dict[str, Any]:
    """The facts about a LoRA that `inspect` and results report: modules, family, kinds, ranks, keys left out."""
    family = lora.family and lora.family.name
    return {"modules": len(lora.modules), "family": family, **describe(lora.modules), "skipped": len(lora.skipped)}


def parse_spec(spec: str, default: float, option: str = "lora") -> tuple[Path, float]:
    """Split `FILE[=WEIGHT]` into path and weight; `default` is the weight of a FILE alone.

    FILE may also be what `located` finds on the hub. Where the text after the last = is no number, it belongs to the path.
    UsageError for an infinite or NaN weight.
    """
    head, _, tail = spec.rpartition("=")
    try:
        strength = float(tail) if head else default
    except ValueError:
        head, strength = "", default
    if not math.isfinite(strength):
        raise UsageError(f"{spec}: the weight must be a finite number")
    return located(head or spec, option), strength


Weighted = Mapping[Any, float] | Sequence[Any] | str | Path | Lora | None


def with_weights(loras: Weighted, default: float = 1.0) -> list[tuple[Path | Lora, float]]:
    """Turn any way of naming LoRAs into a list of (path or Lora, weight).

    Accepts {FILE: WEIGHT}, a list of FILE, FILE=WEIGHT or (FILE, WEIGHT), or one FILE. A `Lora` may replace any FILE. UsageError
    for a weight that is not finite.
    """
    if isinstance(loras, Mapping):
        pairs: list[Any] = list(loras.items())
    else:
        pairs = [loras] if isinstance(loras, str | Path | Lora) else list(loras or ())
    result: list[tuple[Path | Lora, float]] = []
    for pair in pairs:
        if isinstance(pair, str):
            result.append(parse_spec(pair, default))
            continue
        item, weight = (pair, default) if isinstance(pair, Path | Lora) else pair
        item = item if isinstance(item, Lora) else located(item)
        if not math.isfinite(weight):
            raise UsageError(
                f"{as_field('lora', item.source if isinstance(item, Lora) else item)}: the weight must be a finite number"
            )
        result.append((item, float(weight)))
    return result


def opened(item: Path | Lora, **options: Any) -> Lora:
    """The LoRA itself, or the one that is read from a path; `options` go to `load`."""
    return item if isinstance(item, Lora) else load(item, **options)
