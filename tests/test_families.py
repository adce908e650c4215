"""A family of checkpoints is one row of data: no other file names one or branches on one."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastdiff.checkpoints import family, published
from fastdiff.checkpoints.family import DEFAULT_BASE, FAMILIES, SHIPPED, Presets
from fastdiff.models.unet import LAYOUTS
from fastdiff.options.base import BaseConfig
from fastdiff.runtime.config import options, preset
from fastdiff.runtime.errors import UsageError
from fastdiff.sampling.settings import Settings

PACKAGE = Path(__file__).parent.parent / "fastdiff"
TABLE = PACKAGE / "checkpoints" / "family.py"
NAMES = {*FAMILIES, *family.aliases()}
# What still has dictionaries by name.
# The word of another vocabulary: a layout of UNet blocks is called after the model that has it.
ALLOWED = {(place, name) for place in ("models/unet.py", "options/prune.py") for name in LAYOUTS if name in NAMES}
# The rows of published few-step weights say which families their authors made them for.
ALLOWED |= {("checkpoints/published.py", name) for row in published.ROWS for name in row.made_for}


def names_a_family(node):
    """Whether an expression is a family, or its name: `base.family`, `family`, `recipe.family`, `family.name`."""
    if isinstance(node, ast.Attribute):
        return node.attr in {"family", "families"} or (node.attr == "name" and names_a_family(node.value))
    return isinstance(node, ast.Name) and node.id == "family"


def broken(text, place):
    """What breaks the rule in a file's text, as `line: what`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES:
            if (place, node.value) not in ALLOWED:
                yield f"{place}:{node.lineno}: names {node.value!r}"
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            # Two families may be compared, or a family with None; anything else is a branch on which one it is.
            fine = lambda side: names_a_family(side) or (isinstance(side, ast.Constant) and side.value is None)
            if any(map(names_a_family, sides)) and not all(map(fine, sides)):
                yield f"{place}:{node.lineno}: branches on {ast.unparse(node)}"
        elif isinstance(node, ast.Match) and names_a_family(node.subject):
            yield f"{place}:{node.lineno}: branches on {ast.unparse(node.subject)}"


def test_no_other_file_names_a_family():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        if path != TABLE:
            found += broken(path.read_text(), place)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        'x = {"sd15": 1}',
        'def f(base="emoji"): ...',
        'if base.family.name == "sd" + "xl": ...',
        "if base.family is SHIPPED: ...",
        "if base.family in (A, B): ...",
        "if family.name in NAMES: ...",
        'if ref == "ssd-1b": ...',
        "match base.family.name:\n    case _: ...",
    ],
)
def test_a_planted_name_or_branch_is_found(line):
    assert list(broken(line, "data/bad.py"))


@pytest.mark.parametrize(
    "line",
    [
        "if one.family != other.family: ...",
        "if recipe.family != family.name: ...",
        "if lora.family is None: ...",
        "if base.family.size_conditioned: ...",
        '"""Of sdxl and others."""',
    ],
)
def test_what_is_no_branch_passes(line):
    assert not list(broken(line, "data/good.py"))


# ---- the table


def test_a_row_agrees_with_what_ships():
    for name, row in FAMILIES.items():
        assert (row.name, str(row)) == (name, name)
        assert (row.home / "unet" / "config.json").is_file()
        assert (row.home / "unet" / "diffusion_pytorch_model.safetensors").exists() == row.ships_weights
        assert family.of_width(row.cross_attention_width) is row
        assert set(row.open_clip) < set(row.prefixes)
        assert Settings.usual(row).scheduler == row.sampling.scheduler
        assert row.published or row.ships_weights  # else nobody could have a checkpoint of it


def test_classes_are_those_of_diffusers():
    import diffusers

    for row in FAMILIES.values():
        assert hasattr(diffusers, row.pipeline)
        assert hasattr(diffusers, row.controlnet_pipeline)


def test_a_new_row_is_enough():
    """Help, errors and look-ups are made from the table."""
    hub_ids = {"sd30": ("o/three",), "three-tiny": ("o/tiny", "p/tiny")}
    new = replace(FAMILIES["sd21"], name="sd30", title="SD3.0", hub_ids=hub_ids, cross_attention_width=999)
    table = {**FAMILIES, "sd30": new}
    assert family.base_names(table) == "emoji, sd15, sd21, sd21-base, sdxl, ssd-1b, sd30, three-tiny"
    assert family.titles(table) == "SD1.5, SD2.1, SDXL and SD3.0"
    assert family.aliases(table)["three-tiny"] == ("o/tiny", "p/tiny")
    assert family.named("three-tiny", table) is family.named("sd30", table) is new
    assert family.of_unet_config({"cross_attention_dim": 999}, table) is new
    assert new.home == FAMILIES["sd21"].home


def test_help_and_errors_are_made_from_the_table():
    from fastdiff.checkpoints.locate import locate

    option = next(o for o in options(BaseConfig) if o.name == "base")
    assert option.help.startswith(f"{family.base_names()}, ")
    assert option.default == DEFAULT_BASE == SHIPPED.name
    with pytest.raises(UsageError, match=rf"not an alias \({family.base_names()}\)"):
        locate("nowhere")


# ---- presets


def test_presets_are_a_table_by_family_and_variant():
    table = Presets(sdxl={"lr": 1}, sd15={"lr": 2}, variants={"fast": Presets(sd15={"lr": 3}, sd21={"lr": 4})})
    assert table == {"sd15": {"lr": 2}, "sd15:fast": {"lr": 3}, "sd21:fast": {"lr": 4}, "sdxl": {"lr": 1}}
    assert list(table) == ["sd15", "sd15:fast", "sd21:fast", "sdxl"]  # as the help tells them
    assert table.get("emoji", {}) == {}
    assert preset([], Presets(sd15={}), "sd15") == {}


@pytest.mark.parametrize("wrong", [{"sd16": {}}, {"sd15": 3}, {"variants": {"fast": Presets(), "slow": {"sd99": {}}}}])
def test_presets_refuse_what_is_no_family(wrong):
    with pytest.raises(TypeError, match="Presets: sd"):
        Presets(**wrong)


@pytest.mark.parametrize("name", [name for name, row in FAMILIES.items() if row.published])
def test_diffusers_ddim_of_a_shipped_scheduler_config_does_not_clip_latents(name):
    """DDIMScheduler clips x0 to [-1, 1] unless the config says otherwise, as the published configs of all families do.

    Single files use the shipped configs, so `Sampler.pipeline()` and the folders that `export` writes would clip.
    """
    diffusers = pytest.importorskip("diffusers")
    config = json.loads((FAMILIES[name].home / "scheduler" / "scheduler_config.json").read_text())
    assert diffusers.DDIMScheduler.from_config(config).config.clip_sample is False
