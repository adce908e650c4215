"""Captions and prompts in the encodings, files and tables that people have; which source wins, and what is told."""

import io
import json
from types import SimpleNamespace

import pytest
from PIL import Image

from fastdiff.commands import sample
from fastdiff.data import folder, streams
from fastdiff.data.prompts import read_prompts
from fastdiff.models import unet
from fastdiff.options.lcm import Config
from fastdiff.runtime import console, text_file
from fastdiff.runtime.config import read_file
from fastdiff.runtime.errors import InputRefused, UsageError

FRENCH = "une fille à Paris, l’été"


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def opened(tmp_path, capsys):
    """Open tmp_path as a folder of training data: (captions by name, what is told)."""

    def open_folder(column=None):
        console.reset()
        made = folder.Folder(tmp_path, column) if column else folder.Folder(tmp_path)
        if "counts" in vars(made):  # what is told before encoding begins
            made.counts.tell("data")
        captions = {path.relative_to(tmp_path).as_posix(): caption for path, caption in made.captions.items()}
        return captions, capsys.readouterr().err.replace("\n", " ")

    return open_folder


# ---- encodings

UNICODE = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


@pytest.mark.parametrize("encoding", UNICODE)
@pytest.mark.parametrize("text", [FRENCH, "赤いリンゴ", "красное яблоко", "🍎 on blue"])
def test_all_of_unicode_is_read_in_each_of_its_encodings(tmp_path, opened, encoding, text):
    picture(tmp_path / "a.png")
    written(tmp_path / "a.txt", text.encode(encoding))
    assert opened()[0] == {"a.png": text}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_recognised_by_its_zero_bytes(tmp_path, opened, encoding):
    picture(tmp_path / "a.png")
    written(tmp_path / "a.txt", "a red apple\r\n".encode(encoding))
    captions, told = opened()
    assert captions == {"a.png": "a red apple"}
    assert "1 caption: UTF-16 or UTF-32, read so; the first: a.txt" in told


WESTERN = """une fille à Paris, l’été
Füße im Grünen, Öl auf Leinwand
un niño en España – ¿qué?
um cão e uma maçã
en blå bil på gatan, ö
rødgrød med fløde på æble
“quoted” … 20 °C, © 2020
CAFÉ À PARIS
« crème brûlée » à 5 €
Zoë’s façade""".splitlines()


@pytest.mark.parametrize("text", WESTERN)
def test_windows_1252_is_read_where_it_is_plausible_and_told(tmp_path, opened, text):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
        written(tmp_path / f"{name}.txt", text.encode("cp1252"))
    captions, told = opened()
    assert captions == {"a.png": text, "b.png": text}
    assert "2 captions: not UTF-8, read as Windows-1252 (save it as UTF-8 to be sure); the first: a.txt" in told


OTHERS = {
    "shift-jis": ["赤いリンゴ", "猫", "a 猫 cat", "ねこ", "1girl, 青い空", "あ"],
    "euc-jp": ["赤いリンゴ", "女の子", "cat ネコ"],
    "gbk": ["红苹果", "一个女孩", "红色的裙子, 1girl", "天空, sky"],
    "big5": ["蘋果", "女孩", "天空, sky"],
    "cp1250": ["žluťoučký kůň", "červený", "zażółć gęślą jaźń"],
    "cp1251": ["красная шапка", "a кот"],
    "koi8-r": ["красная шапка", "a кот"],
    "cp1253": ["γάτα"],
    "cp1254": ["kırmızı şapka"],
    "cp949": ["고양이"],
}


DISGUISED = (  # text, encoding, how it is named
    ("猫の絵", "iso-2022-jp", "ISO-2022"),
    ("1girl, 赤い花", "iso-2022-jp", "ISO-2022"),
    ("고양이", "iso-2022-kr", "ISO-2022"),
    ("红苹果", "hz", "HZ"),
    ("一只猫, cat", "hz", "HZ"),
    ("日本語", "utf-7", "UTF-7"),
    ("1girl, 赤い花の絵, best", "utf-7", "UTF-7"),
    ("猫の絵", "utf-16-le", "UTF-16 without a mark"),
    ("猫の絵", "utf-16-be", "UTF-16 without a mark"),
    ("赤い花 1girl\r\n", "utf-16-le", "UTF-16 without a mark"),
    ("日本", "shift-jis", "does not read as Windows-1252"),
    ("1girl, 日本", "shift-jis", "does not read as Windows-1252"),
    ("本", "shift-jis", "does not read as Windows-1252"),
    ("風景", "shift-jis", "does not read as Windows-1252"),
    ("空", "shift-jis", "does not read as Windows-1252"),
    ("風景", "big5", "does not read as Windows-1252"),
    ("桜", "gbk", "does not read as Windows-1252"),
)


@pytest.mark.parametrize(("text", "encoding", "name"), DISGUISED)
def test_encodings_whose_bytes_pass_for_others_are_named(text, encoding, name):
    with pytest.raises(text_file.NotText, match=name):
        text_file.decode(text.encode(encoding))


SIGNS = """a cat +dog, c++ and C+Java
+McDonald +iPhone4 +BlueBird+RedBird, score+2, +red
{red|blue} ~{soft}~ (café:1.2), [été:0.5], {été|hiver}, <lora:x0>, <lora:abc0:1>
<x0y0z0>
~{a}
email+tag@example.com, 2+2=4
“à la carte”, l’été – «été»""".splitlines()


@pytest.mark.parametrize("text", SIGNS)
def test_signs_within_captions_are_no_other_encoding(text):
    assert text_file.decode(text.encode())[0] == text
    assert text_file.decode(text.encode("cp1252"))[0] == text


@pytest.mark.parametrize("encoding", OTHERS)
def test_other_encodings_are_refused_rather_than_guessed(tmp_path, opened, encoding):
    for i, text in enumerate(OTHERS[encoding]):
        picture(tmp_path / f"{i}.png")
        written(tmp_path / f"{i}.txt", text.encode(encoding))
    picture(tmp_path / "good.png")
    written(tmp_path / "good.txt", "good")
    assert {caption for caption in opened()[0].values() if caption} == {"good"}
    problems = [sample.problem for sample in folder.Folder(tmp_path).samples() if sample.problem]
    assert len(problems) == len(OTHERS[encoding])
    assert all("a caption that is no text (" in problem and "save it as UTF-8" in problem for problem in problems)


@pytest.mark.parametrize(
    "data", [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "naïve".encode()[:3], "café é".encode() + b"\xe9", b"\x01\x02"]
)
def test_what_is_no_text_is_no_caption(tmp_path, data):
    picture(tmp_path / "a.png")
    written(tmp_path / "a.txt", data)
    (row,) = folder.Folder(tmp_path).samples()
    assert "a caption that is no text" in row.problem


def test_characters_that_are_none_are_left_out_and_told(tmp_path, opened):
    texts = {
        "bom": "\ufeffa \ufeffcat",
        "zero": "a\u200b c\u200bat",
        "space": "a\xa0\u202fcat",
        "nul": "a cat\0\0",
        "sub": "a cat\x1a",
        "bell": "a c\x07at and a long caption",
        "lost": "caf\ufffd au lait",
        "mac": "a\rcat",
        "joined": "👨\u200d👩 family",
    }
    for name, text in texts.items():
        picture(tmp_path / f"{name}.png")
        written(tmp_path / f"{name}.txt", text)
    captions, told = opened()
    wanted = dict.fromkeys(("bom", "zero", "space", "nul", "sub", "mac"), "a cat")
    wanted |= {"bell": "a cat and a long caption", "lost": "caf au lait", "joined": texts["joined"]}
    assert captions == {f"{name}.png": text for name, text in sorted(wanted.items())}
    assert "1 caption: holds U+FFFD" in told
    assert "the first: lost.txt" in told
    assert "1 caption: control characters were left out; the first: bell.txt" in told
    assert "2 captions: invisible characters" in told


def test_half_a_character_in_json_is_left_out(tmp_path, opened):
    picture(tmp_path / "a.png")
    written(tmp_path / "a.json", r'{"text": "a \ud83d cat"}')
    captions, told = opened()
    assert captions == {"a.png": "a cat"}
    assert "control characters" in told


# ---- prompts, pipes and configs


def test_prompt_files_are_read_by_the_same_rules(tmp_path, capsys):
    for encoding in (*UNICODE, "cp1252", "utf-16-le"):
        text = "# a comment\r\na cat\r\n\r\nplain\r\n" if encoding == "utf-16-le" else f"# a comment\r\n{FRENCH}\r\n\r\nplain\r\n"
        console.reset()
        lines = read_prompts(written(tmp_path / "p.txt", text.encode(encoding)))
        assert lines == [text.splitlines()[1], "plain"], encoding
        told = capsys.readouterr().err
        assert ("read as Windows-1252" in told) == (encoding == "cp1252")
    with pytest.raises(UsageError, match="not UTF-8") as refused:
        read_prompts(written(tmp_path / "p.txt", "赤いリンゴ\n".encode("shift-jis")))
    assert refused.value.hint == "save the file as UTF-8"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_prompts_of_a_pipe_are_read_by_the_same_rules(monkeypatch, encoding):
    data = f"# a comment\r\n{FRENCH}\r\n\r\nplain\r\n".encode(encoding)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    assert sample.wanted(SimpleNamespace(prompt=["first"], prompts="-")) == ["first", FRENCH, "plain"]


def test_a_pipe_that_is_no_text_is_refused(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("赤い".encode("shift-jis")), encoding="utf-8"))
    with pytest.raises(UsageError, match="`prompts=-`: byte 0 is not UTF-8"):
        sample.wanted(SimpleNamespace(prompt=[], prompts="-"))


def test_a_prompt_of_a_terminal_in_windows_1252(monkeypatch, capsys):
    text = "un café".encode("cp1252").decode("utf-8", "surrogateescape")  # as Python gives such an argument
    assert sample.wanted(SimpleNamespace(prompt=[text], prompts=None)) == ["un café"]
    assert "--prompt: not UTF-8, read as Windows-1252" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_config_files_of_windows_editors(tmp_path, encoding):
    path = written(tmp_path / "config.toml", "output = 'été'\r\nsteps = 3\r\n".encode(encoding))
    assert read_file(Config, path) == {"output": "été", "steps": 3}
    with pytest.raises(UsageError, match="not UTF-8"):
        read_file(Config, written(path, "output = '赤い'".encode("shift-jis")))


def test_a_layout_with_a_mark(tmp_path):
    from fastdiff.checkpoints.family import FAMILIES

    path = written(tmp_path / "layout.json", '{"layers_per_block": 1}'.encode("utf-8-sig"))
    assert unet.student_config({"layers_per_block": 2}, str(path), FAMILIES["sd15"])["layers_per_block"] == 1


# ---- caption files


def test_names_of_caption_files(tmp_path, opened):
    for name, words in {
        "a.png": "a.txt",
        "b.JPG": "b.TXT",
        "c.png": "c.png.txt",
        "d.png": "d.caption",
        "e.png": "e.Caption",
        "f.png": "f.png.caption",
        "dir/g.v2.png": "dir/g.v2.txt",
        "h.webp": "h.png.txt",
    }.items():
        picture(tmp_path / name)
        written(tmp_path / words, f"caption of {name}")
    written(tmp_path / "i.JSON", '{"prompt": "of json"}')
    picture(tmp_path / "i.png")
    captions, told = opened()
    assert captions.pop("i.png") == "of json"
    assert captions.pop("h.webp") is None
    assert captions == {name: f"caption of {name}" for name in captions}
    assert len(captions) == 7
    assert "1 caption: without a picture that is read; the first: h.png.txt" in told


def test_names_in_composed_and_decomposed_letters_are_the_same(tmp_path, opened):
    """macOS writes é as two characters."""
    picture(tmp_path / "cafe\u0301.png")
    written(tmp_path / "caf\xe9.txt", "by file")
    picture(tmp_path / "the\u0301.png")
    written(tmp_path / "metadata.jsonl", json.dumps({"file_name": "th\xe9.png", "text": "by table"}))
    assert sorted(opened()[0].values()) == ["by file", "by table"]


def test_which_of_several_captions_wins_is_fixed_and_told(tmp_path, opened):
    sources = ("metadata.jsonl", "metadata.csv", "a.png.txt", "a.txt", "a.caption", "a.json")
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    contents = {
        "metadata.jsonl": '{"file_name": "a.png", "text": "metadata.jsonl"}\n',
        "metadata.csv": "file_name,text\na.png,metadata.csv\n",
        "a.json": '{"text": "a.json"}',
    }
    for source in sources:
        written(tmp_path / source, contents.get(source, source))
    written(tmp_path / "b.txt", "same")
    written(tmp_path / "b.caption", " same\n")
    for source in sources:
        captions, told = opened()
        assert captions == {"a.png": source, "b.png": "same"}
        assert ("1 picture: captions that disagree" in told) == (source != sources[-1])
        (tmp_path / source).unlink()


def test_several_lines_empty_captions_and_shared_ones_are_counted(tmp_path, opened):
    for name in ("lines.png", "empty.png", "empty.json.png", "shared.png", "shared.jpg"):
        picture(tmp_path / name)
    written(tmp_path / "lines.txt", "first line\r\nsecond line\r\n\r\n")
    written(tmp_path / "empty.txt", b"\xef\xbb\xbf \r\n")
    written(tmp_path / "empty.json.json", "{broken")
    written(tmp_path / "shared.txt", "of both\n")
    captions, told = opened()
    assert captions["lines.png"] == "first line second line"
    assert captions["shared.png"] == captions["shared.jpg"] == "of both"
    for line in (
        "1 caption: of several lines, used whole (sd-scripts takes the first line alone); the first: lines.txt",
        "1 caption: empty; the first: empty.txt",
        "1 caption: a .json file that is no valid JSON or has no caption in it; the first: empty.json.json",
        "1 caption: shared by pictures of the same name; the first: shared.txt",
    ):
        assert line in told


# ---- tables


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
def test_csv_tables(tmp_path, opened, delimiter, encoding):
    rows = [("file_name", "id", "text"), ("a.png", "1", '"une fille, à Paris; ""l’été"""'), ("sub\\b.png", "2", "plain")]
    text = "\r\n".join(delimiter.join(row) for row in rows) + "\r\n"
    written(tmp_path / "metadata.csv", text.encode(encoding))
    picture(tmp_path / "a.png")
    picture(tmp_path / "sub" / "b.png")
    captions, told = opened()
    assert captions == {"a.png": 'une fille, à Paris; "l’été"', "sub/b.png": "plain"}
    assert "1 table row: backslashes in its file name, taken for folders; the first: metadata.csv line 3" in told


def test_csv_mistakes(tmp_path, opened):
    picture(tmp_path / "a.png")
    table = tmp_path / "metadata.csv"
    written(table, "sep=;\nfile_name;text\na.png;x; y\n")
    captions, told = opened()
    assert captions == {"a.png": "x; y"}
    assert "more fields than the header; the rest was taken for the end of the caption" in told
    for text, problem in (
        ("a.png,a cat\n", "the first line names no column file_name; it has a.png, a cat"),
        ("file_name,text,id\na.png,a cat, sitting,3\n", "line 2 has 4 fields, and the header 3"),
        ("file_name,text\n,x\n", "line 2 has no file_name"),
        ("", "the first line names no column file_name; it has nothing"),
    ):
        written(table, text)
        with pytest.raises(InputRefused, match=problem):
            opened()
    written(table, "file_name,label\na.png,cat\n")
    with pytest.raises(UsageError, match="has no column text, caption, prompt; it has file_name, label"):
        opened()
    assert opened("label")[0] == {"a.png": "cat"}
    with pytest.raises(UsageError, match="`caption_column=tags`; it has file_name, label"):
        opened("tags")


@pytest.mark.parametrize(
    ("rows", "number", "what"),
    [
        ('a.png,"a cat\nb.png,a dog\nc.png,a cow\n', 2, "a quote is opened and not closed"),
        ('a.png,a cat\nb.png,"a dog\nc.png,"a cow"\n', 3, "there is text behind a closing quote"),
        ('a.png,"a cat\nb.png,a dog\nc.png,an 8"\n', 2, "a quote is opened and not closed"),
    ],
)
def test_a_quote_that_is_not_closed_does_not_swallow_the_table(tmp_path, opened, rows, number, what):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    written(tmp_path / "metadata.csv", f"file_name,text\n{rows}")
    with pytest.raises(InputRefused, match=f"metadata.csv: line {number}: {what}") as error:
        opened()
    assert "doubled" in error.value.hint
    written(tmp_path / "metadata.csv", 'file_name,text\na.png,"a cat,\n\non a ""mat"""\n')  # several lines are no mistake
    assert opened()[0]["a.png"] == 'a cat, on a "mat"'


def test_the_header_of_a_csv_table_in_any_case(tmp_path, opened):
    picture(tmp_path / "a.png")
    written(tmp_path / "metadata.csv", "File_Name,Text,TAGS\na.png,a cat,some tags\n")
    assert opened()[0] == {"a.png": "a cat"}
    assert opened("tags")[0] == {"a.png": "some tags"}


def test_a_caption_column_that_nothing_has_is_refused(tmp_path, opened):
    picture(tmp_path / "a.png")
    written(tmp_path / "a.txt", "a cat")
    with pytest.raises(UsageError, match="`caption_column=label`: there is no table or .json file of captions") as error:
        opened("label")
    assert error.value.hint == "text files have no columns: leave `caption_column` out"
    written(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "a dog"}\n')
    written(tmp_path / "a.json", '{"tags": "some"}')
    with pytest.raises(UsageError, match="`caption_column=label`: no table or .json file of captions has it") as error:
        opened("label")
    assert error.value.hint == "they have file_name, text, tags"
    picture(tmp_path / "b.png")
    written(tmp_path / "b.json", '{"label": "a label"}')
    captions, told = opened("label")
    assert captions == {"a.png": "a cat", "b.png": "a label"}
    assert "1 caption: of a text file, which has no columns (`caption_column`); the first: a.txt" in told


@pytest.mark.parametrize(
    ("value", "kind"), [(3, "a number"), (0, "a number"), ({"en": "x"}, "an object"), ([3], "a list without text")]
)
def test_captions_that_are_no_text_say_what_they_are(tmp_path, value, kind):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    written(tmp_path / "metadata.jsonl", json.dumps({"file_name": "a.png", "label": value}))
    written(tmp_path / "b.json", json.dumps({"label": value}))
    problems = [sample.problem for sample in folder.Folder(tmp_path, "label").samples()]
    assert problems == [f"a caption that is {kind}, not text"] * 2
    written(tmp_path / "metadata.jsonl", json.dumps({"file_name": "a.png", "text": value, "caption": "a cat"}))
    assert folder.Folder(tmp_path).captions[tmp_path / "a.png"] == "a cat"


def test_a_caption_that_is_no_text_beside_another_one_is_told(tmp_path, opened):
    picture(tmp_path / "a.png")
    written(tmp_path / "a.txt", "赤いリンゴ".encode("shift-jis"))
    written(tmp_path / "a.json", '{"text": "of json"}')
    captions, told = opened()
    assert captions == {"a.png": "of json"}
    assert "1 caption: no text, left out; another caption of the picture is used; the first: a.png" in told


def test_json_files_without_a_picture_are_counted(tmp_path, opened):
    picture(tmp_path / "a.png")
    written(tmp_path / "a.txt", "a cat")
    written(tmp_path / "metadata.json", '{"a.png": "another cat"}')
    written(tmp_path / "old.json", "{}")
    line = "2 files: .json without a picture of its name, not used (a table of captions is named metadata.jsonl)"
    assert line in opened()[1]


def test_the_caption_column_of_json_and_tables(tmp_path, opened):
    row = {"file_name": "a.png", "text": "text of table", "tags": "tags of table"}
    written(tmp_path / "metadata.jsonl", json.dumps(row) + "\n")
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    written(tmp_path / "b.json", '{"text": "text of json", "prompt": "another", "tags": ["tags of json", "more"]}')
    captions, told = opened()
    assert captions == {"a.png": "text of table", "b.png": "text of json"}
    assert "1 caption: several columns differ (text, prompt), the first of them is used (`caption_column`)" in told
    captions, told = opened("tags")
    assert captions == {"a.png": "tags of table", "b.png": "tags of json"}
    assert "1 caption: a list, its first entry is used; the first: b.json" in told


def test_paths_of_tables(tmp_path, capsys):
    data = tmp_path / "data"
    for name in ("a.png", "sub/b.png", "sub/c.png", "d.png", "e.png"):
        picture(data / name)
    picture(tmp_path / "outside.png")
    rows = {
        "a.png": "a",
        "sub\\b.png": "b",
        str(data / "sub" / "c.png"): "c",
        "./sub/../d.png": "d",
        "../outside.png": "x",
        str(tmp_path / "outside.png"): "x",
        "C:\\pictures\\a.png": "x",
        "gone.png": "x",
    }
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows.items()]
    lines += ["", '{"file_name": "e.png", "text": "one\u2028two"}', '{"file_name": "a.png", "text": "a again"}']
    written(data / "metadata.jsonl", "\ufeff" + "\r\n".join(lines))
    made = folder.Folder(data)
    made.counts.tell("data")
    assert list(made.captions.values()) == ["a again", "d", "one two", "b", "c"]
    assert [s.name for s in made.samples() if s.problem] == ["gone.png"]
    told = capsys.readouterr().err
    assert "3 table rows: names a file outside of the folder, not used; the first: metadata.jsonl line 5" in told
    assert "1 table row: a second row of the same file; the last one is used" in told
    written(data / "metadata.jsonl", '{"file_name": 3, "text": "x"}\n')
    with pytest.raises(InputRefused, match="line 1 is not a JSON object with a file_name"):
        folder.Folder(data)


def test_a_table_of_a_sub_folder_wins_over_that_of_the_folder(tmp_path, opened):
    picture(tmp_path / "sub" / "a.png")
    written(tmp_path / "sub" / "metadata.jsonl", '{"file_name": "a.png", "text": "near"}')
    assert opened()[0] == {"sub/a.png": "near"}
    written(tmp_path / "metadata.csv", "file_name,text\nsub/a.png,far\n")
    captions, told = opened()
    assert captions == {"sub/a.png": "near"}
    assert "1 picture: captions that disagree" in told


# ---- streams


def test_captions_in_tars_are_decoded_by_the_same_rules():
    row = {"__key__": "a", "png": b"picture"}
    found = streams.sample_of({**row, "txt": FRENCH.encode("cp1252")}, "s.tar")
    assert found.caption == FRENCH
    assert [kind.what[:31] for kind in found.kinds] == ["not UTF-8, read as Windows-1252"]
    assert "no text" in streams.sample_of({**row, "txt": "赤い".encode("shift-jis")}, "s.tar").problem
    assert streams.sample_of({**row, "json": json.dumps({"text": FRENCH}).encode("utf-16")}, "s.tar").caption == FRENCH
    both = {**row, "txt": b"of txt", "tags": b"of tags", "json": b'{"tags": "of json"}'}
    assert streams.sample_of(both, "s.tar").caption == "of txt"
    assert streams.sample_of(both, "s.tar", "tags").caption == "of tags"
    heic = streams.sample_of({"__key__": "a", "heic": b"x", "txt": b"x"}, "s.tar")
    assert heic.problem == "without an image that is read (.heic pictures, which need a plugin: pip install pillow-heif)"


def test_the_caption_column_of_a_parquet_file(tmp_path):
    import datasets

    rows = [{"image": {"bytes": b"x", "path": None}, "tags": f"tags {i}", "text": "text"} for i in range(2)]
    features = datasets.Features(image=datasets.Image(decode=False), tags=datasets.Value("string"), text=datasets.Value("string"))
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    place = f"{tmp_path}/a.parquet"
    assert [s.caption for s in streams.HuggingFace(place, "tags").samples()] == ["tags 0", "tags 1"]
    assert [s.caption for s in streams.HuggingFace(place).samples()] == ["text", "text"]
    assert streams.HuggingFace(place, "tags").identity() != streams.HuggingFace(place).identity()
    with pytest.raises(UsageError, match="there is no `caption_column=label` among image, tags, text"):
        streams.HuggingFace(place, "label")
