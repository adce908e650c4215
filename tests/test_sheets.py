"""Sheets of pictures: their labels, their size on a screen, and the full-size file beside a reduced one."""

import base64
import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageChops

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data import teacher
from fastdiff.methods.shared.decoded import Decoded
from fastdiff.methods.shared.edges import Edges
from fastdiff.models import autoencoder
from fastdiff.quality import report
from fastdiff.sampling import sheet as sheets
from fastdiff.sampling.pictures import Pictures, portrait, sheet_of
from fastdiff.sampling.settings import Settings
from fastdiff.sampling.sheet import Layout, Sheet, font_of, in_calls, legible, wrapped
from fastdiff.training.previews import Preview

LONG = "a lighthouse on a rugged cliff at golden hour, waves crashing against the rocks, highly detailed, " * 5


def stack(n, px, seed=0):
    return torch.rand(n, 3, px, px, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def sheet_with(columns=("teacher", "student"), rows=("a cat", "a dog"), px=64):
    return Sheet.of_columns([(label, stack(len(rows), px, i)) for i, label in enumerate(columns)], rows)


def same(a, b):
    return ImageChops.difference(a, b).getbbox() is None


def drawn(prompt, seed):
    return portrait(torch.full((64, 64, 3), 9 * seed, dtype=torch.uint8), {"prompt": prompt, "seed": seed})


# ---- labels


def test_columns_and_rows_have_labels_beside_the_pictures():
    sheet = sheet_with(("teacher", "student"), ("a sleeping cat", "a dog"))
    other = sheet_with(("teacher", "pupil"), ("a sleeping cat", "a fox"))
    image, changed = sheet.image(), other.image()
    left, top = Layout(sheet, 1.0).corner
    assert image.size == changed.size
    assert image.size == (left + 2 * 128 + 4 + 8, top + 2 * 128 + 4 + 8)
    for box in ((left + 132, 0, left + 260, top), (0, top + 132, left, top + 260)):  # the labels of the second column and row
        assert len(image.crop(box).getcolors()) > 2
        assert not same(image.crop(box), changed.crop(box))
    for box in ((left, 0, left + 128, top), (0, top, left, top + 128), (left, top, *image.size)):
        assert same(image.crop(box), changed.crop(box))
    first = sheet.pictures[0].resize((128, 128), Image.Resampling.LANCZOS)
    assert same(image.crop((left, top, left + 128, top + 128)), first)


def test_without_labels_no_room_is_left_for_them():
    plain = Sheet(sheet_with().pictures, ["", ""])
    assert plain.image().size == (8 + 2 * 128 + 4 + 8,) * 2


def test_captions_are_below_their_pictures():
    pictures = sheet_with().pictures
    image, other = (Sheet(pictures, ["", ""], captions=["a", "b", "c", last]).image() for last in ("d", "e"))
    box = ImageChops.difference(image, other).getbbox()
    assert box[0] > image.width // 2
    assert box[1] > image.height - 8 - 2 * 17


def test_a_label_of_calls_counts_them():
    assert (in_calls("teacher", 50), in_calls("student", 1)) == ("teacher\n50 network calls", "student\n1 network call")


@pytest.mark.parametrize(
    ("text", "readable"),
    [
        ("a  red\tapple ", "a red apple"),
        ("café Münster — 3 × 4", "cafe Munster - 3 x 4"),
        ("赤いリンゴ on pink 🦊❤️ 中", "… on pink …"),
        ("красное яблоко", ""),
        ("\ud800\x00\u200b", ""),
        ("teacher\n4 calls", "teacher\n4 calls"),
    ],
)
def test_labels_show_what_the_font_can(text, readable):
    assert legible(text) == readable


def test_prompts_of_any_length_and_script_fit_in_their_rows(tmp_path):
    rows = (LONG, "красное яблоко", "x" * 999, "", "👩‍🚀 في الفضاء", "a\nb")
    sheet = sheet_with(rows=rows)
    layout = Layout(sheet, 1.0)
    assert layout.rows[0][-1].endswith("…")
    assert layout.rows[1] == ["#2"]  # nothing of it can be drawn
    assert layout.rows[3] == []
    assert max(len(lines) for lines in layout.rows) * layout.line <= 128
    assert sheet.save(tmp_path / "sheet.png") == [tmp_path / "sheet.png"]


@pytest.mark.parametrize("text", [LONG, "x" * 99, "a", "a b\nc", "in the middle of the word", ""])
@pytest.mark.parametrize("most", [1, 3, 50])
def test_text_is_broken_to_its_width(text, most):
    font = font_of(13)
    lines = wrapped(text, font, 60, most)
    assert len(lines) <= most
    assert all(font.getlength(line) <= 60 for line in lines)
    if most == 50 and len(text) < 100:
        assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")


# ---- sizes


SIZES = [(16, 3, 128), (64, 3, 128), (100, 3, 100), (256, 3, 256), (512, 3, 320), (1024, 3, 320), (1024, 12, 128)]


@pytest.mark.parametrize(("px", "columns", "tile"), SIZES)
def test_pictures_have_a_size_that_a_screen_can_show(px, columns, tile):
    sheet = Sheet([Image.new("RGB", (px, px))] * columns, ["model"] * columns, ["prompt"])
    assert sheet.tile_px == tile
    assert sheet.image().width < 1760
    assert sheet.is_reduced == (px > tile)


def test_beside_a_reduced_sheet_is_the_full_one(tmp_path):
    sheet = sheet_with(rows=("a cat",), px=1024)
    small, full = sheet.save(tmp_path / "final.png")
    assert (small.name, full.name) == ("final.png", "final-full.png")
    assert sheet.paths(small) == [small, full]
    assert Image.open(small).width < 1000
    image, original = Image.open(full), sheet.pictures[1]
    corner = image.width - round(3.2 * 8) - 1024, image.height - round(3.2 * 8) - 1024
    assert same(image.crop((*corner, corner[0] + 1024, corner[1] + 1024)), original)
    layouts = [Layout(sheet, factor) for factor in (1.0, 3.2)]
    assert layouts[0].rows == layouts[1].rows  # the labels grow with the pictures
    assert layouts[1].font.size == round(3.2 * layouts[0].font.size)


def test_small_pictures_are_written_once(tmp_path):
    assert sheet_with(px=64).save(tmp_path / "final.png") == [tmp_path / "final.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["final.png"]


def test_a_full_sheet_that_nothing_opens_is_not_written(tmp_path):
    sheet = Sheet([Image.new("RGB", (1024, 1024))] * 200, ["seed"] * 10)
    assert sheet.paths(tmp_path / "grid.png") == [tmp_path / "grid.png"]


# ---- those who make sheets


def test_a_grid_has_a_row_for_each_prompt_and_a_column_for_each_seed(tmp_path):
    images = [drawn(prompt, seed) for prompt in ("a cat", "a dog") for seed in (5, 6)]
    sheet = sheet_of(images, 2)
    assert (sheet.columns, sheet.rows) == (["seed 5", "seed 6"], ["a cat", "a dog"])
    (written,) = Pictures(images, columns=2).save(tmp_path / "sheet.png")
    left, top = Layout(sheet, 1.0).corner
    image = Image.open(written)
    for y in (top, top + 132):
        assert len(image.crop((0, y, left, y + 128)).getcolors()) > 2


def test_a_grid_of_many_prompts_or_many_seeds_is_almost_square():
    prompts = sheet_of([drawn(f"animal {i}", 0) for i in range(9)], 1)
    assert (len(prompts.columns), list(prompts.rows), prompts.captions[8]) == (3, [], "animal 8")
    seeds = sheet_of([drawn("a cat", i) for i in range(9)], 9)
    assert (len(seeds.columns), seeds.rows, seeds.captions[8]) == (3, ["a cat"], "seed 8")
    few = sheet_of([drawn("a cat", i) for i in range(4)], 4)
    assert (few.columns[3], few.rows, few.captions) == ("seed 3", ["a cat"], ())
    unknown = sheet_of([Image.new("RGB", (64, 64))] * 4, 1)
    assert unknown.image().size == (8 + 2 * 128 + 4 + 8,) * 2


def preview(monkeypatch, prompts):
    made = Preview.__new__(Preview)
    made.base, made.prompts, made.columns = SimpleNamespace(family=FAMILIES["sd15"], recipe=Recipe()), prompts, {}
    monkeypatch.setattr(made, "draw", lambda net, settings: stack(len(prompts), 64))
    return made


def test_a_preview_tells_models_calls_and_prompts(monkeypatch):
    monkeypatch.setattr(Settings, "usual", classmethod(lambda cls, family: Settings()))
    method = SimpleNamespace(teacher=None, student=None, settings=lambda: Settings("lcm", 4, 1.0), baseline="teacher")
    sheet = preview(monkeypatch, ["a cat", "a dog"]).sheet(method)
    assert sheet.columns == [in_calls("teacher", 50), in_calls("undistilled", 4), in_calls("student", 4)]
    assert sheet.rows == ["a cat", "a dog"]
    cut = preview(monkeypatch, ["a cat"])
    method = SimpleNamespace(teacher=None, student=None, settings=Settings, baseline="student")
    cut.begin(method)
    assert cut.sheet(method).columns == [in_calls(name, 50) for name in ("teacher", "before training", "student")]


def test_a_sheet_of_controls_names_its_items(monkeypatch):
    monkeypatch.setattr(Settings, "usual", classmethod(lambda cls, family: Settings()))
    edges = Edges.__new__(Edges)
    edges.base, edges.names = SimpleNamespace(family=FAMILIES["sd15"], recipe=Recipe()), ["a cat", "a dog"]
    edges.controls = torch.zeros(2, 1, 64, 64, dtype=torch.uint8)
    monkeypatch.setattr(edges, "draw", lambda *args: stack(2, 64))
    method = SimpleNamespace(teacher=object(), student=object(), settings=lambda: Settings("lcm", 1, 1.0))
    sheet = edges.sheet(method)
    assert sheet.columns == ["control", in_calls("teacher", 50), in_calls("student", 1)]
    assert sheet.rows == ["a cat", "a dog"]


def test_a_sheet_of_decoders_names_them(monkeypatch):
    monkeypatch.setattr(autoencoder, "decode", lambda vae, latents: stack(len(latents), 64))
    made = Decoded.__new__(Decoded)
    made.latents, made.held_out = torch.zeros(8, 4, 8, 8), SimpleNamespace(names=[f"animal {i}" for i in range(8)])
    sheet = made.sheet(SimpleNamespace(teacher=None, student=None))
    assert sheet.columns == ["the VAE's own", "tiny decoder", "4 x difference"]
    assert sheet.rows == [f"animal {i}" for i in range(6)]


def test_samples_of_the_teacher_are_named_by_their_prompts(tiny_sd):
    settings = replace(Settings.usual(FAMILIES["sd15"]), num_steps=1)
    data = teacher.encode(checkpoint.load(str(tiny_sd)), ["a cat", "a dog", "a cat"], 64, settings, pairs=0, seed=0)
    assert data.names == ["a cat", "a dog", "a cat"]
    assert data.split(1)[1].names == ["a cat"]


def test_the_page_of_an_evaluation_holds_reduced_pictures():
    data = base64.b64decode(report.encoded(torch.zeros(3, 1024, 1024, dtype=torch.uint8)))
    assert Image.open(io.BytesIO(data)).size == (320, 320)


def test_a_run_lists_both_sheets_and_its_card_shows_the_smaller(fastdiff, tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setattr(sheets, "LEAST_PX", 16)
    monkeypatch.setattr(sheets, "MOST_PX", 32)
    quick = "--resolution 64 --pairs 2 --teacher-steps 1 --batch-size 1 --lora-rank 2 --device cpu --prompts prompts.txt"
    code, result = fastdiff(*f"train-lcm-lora --base {tiny_sd} -o run --steps 1 --preview-every 1 {quick}".split())
    assert code == 0, result
    names = [output["path"] for output in result["outputs"]]
    assert names == ["run/lcm.safetensors", "run/previews/final.png", "run/previews/final-full.png"]
    assert {path.name for path in (tmp_path / "run/previews").iterdir()} == {
        "000001.png", "000001-full.png", "final.png", "final-full.png",
    }  # fmt: skip
    card = (tmp_path / "run/README.md").read_text()
    assert "previews/final.png" in card
    assert "final-full" not in card
