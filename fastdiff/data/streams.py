"""Data sets that are streamed from start to end: WebDataset shards (`wds:`) and Hugging Face data sets (`hf:`)."""

import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastdiff.checkpoints import hub, hub_client, hub_errors
from fastdiff.checkpoints.hub_client import asking
from fastdiff.checkpoints.references import Reference
from fastdiff.data.folder import MISSING, chosen
from fastdiff.data.images import CAPTIONS, Caption, Sample, hash_of
from fastdiff.runtime import console
from fastdiff.runtime.counts import Counts, Kind
from fastdiff.runtime.errors import Failed, UsageError, as_field, quoted
from fastdiff.runtime.picture_file import suffixes, unreadable

EXTRA = 'pip install "fastdiff[data]"'
# Give up within 30 s if a server does not answer or stops sending; webdataset's own command takes 15 minutes.
# Do not retry once bytes may have arrived: what is in the pipe cannot be taken back.
CURL = ["curl", "-sfL", "--connect-timeout", "10", "--speed-limit", "1", "--speed-time", "20"]
CURL += ["--retry", "2", "--retry-delay", "1", "--retry-max-time", "5"]
PIPED_ENDS = [141, 23]  # curl's exit codes when the reader closes the pipe
IMAGES = ("image", "img", "picture", "jpg", "png", "webp")  # names of a column of images; the first that is there wins
BUILDERS = {"imagefolder", "parquet", "arrow", "webdataset", "json"}
OF_FILES = {"parquet": "parquet", "arrow": "arrow", "json": "json", "jsonl": "json", "tar": "webdataset"}  # suffix -> builder
GROUPING = 2  # part of the cache key of shards: raise it if the same shard gives other samples than before

FURTHER = Kind("picture", "further pictures of the same name in the tar, left out")


class WebDataset:
    """Tar shards: files, `http(s)://` addresses or `pipe:COMMAND`; braces name many, as in `wds:shards/{0000..0099}.tar`.

    Raises UsageError if webdataset is not installed or a local shard does not exist.
    """

    count = None

    def __init__(self, urls: str, caption_column: str | None = None) -> None:
        try:
            from webdataset.shardlists import expand_urls
        except ImportError as error:
            raise UsageError("`data=wds`: webdataset is not installed", EXTRA) from error
        self.spec, self.urls = f"wds:{urls}", expand_urls(urls)
        self.counts, self.column = Counts(), caption_column
        missing = [url for url in self.urls if self.local(url) and not Path(url).is_file()]
        if missing:
            more = f" ({len(missing)} of {len(self.urls)} are missing)" if len(self.urls) > 1 else ""
            raise UsageError(f"{as_field('data', self.spec)}: no such shard: {missing[0]}{more}")

    @staticmethod
    def local(url: str) -> bool:
        """Return whether a shard is a file on this machine."""
        return not url.startswith(("pipe:", "http:", "https:", "hf:", "gs:", "ais:", "sftp:", "ftps:", "scp:", "htgs:"))

    def identity(self) -> str:
        """Hash the addresses, and the size and time of local shards. Remote shards are assumed not to change."""
        stats = [os.stat(url) for url in self.urls if self.local(url)]
        return hash_of(GROUPING, self.urls, self.column, [(stat.st_size, stat.st_mtime_ns) for stat in stats])

    def samples(self) -> Iterator[Sample]:
        """Yield the samples of all shards."""
        for url in self.urls:
            yield from self.shard(url)

    def shard(self, url: str) -> Iterator[Sample]:
        """Yield the samples of one tar file. A damaged file gives its readable samples, and samples with a problem."""
        problems: list[str] = []
        remote = not self.local(url)
        failed = False
        try:
            with self.open(url) as stream:
                for row in grouped(members(stream, url, problems), self.column, problems):
                    yield from broken(url, problems, remote)
                    yield sample_of(row, Path(url).name, self.column)
        except OSError as error:
            problems.append(str(error))
            failed = True
        yield from broken(url, problems, remote or failed)

    def open(self, url: str) -> Any:
        """Open a shard as a binary stream; `http(s)` by curl with our timeouts."""
        from webdataset.gopen import Pipe, gopen

        if url.startswith(("http:", "https:")):
            return Pipe([*CURL, url], mode="rb", bufsize=8192, ignore_status=PIPED_ENDS)
        return gopen(url)


def broken(url: str, problems: list[str], passing: bool) -> Iterator[Sample]:
    """Yield a sample for each problem with a tar file, and empty the list. `passing` problems may be gone in the next run."""
    while problems:
        yield Sample(url, problem=f"broken tar ({problems.pop(0)})", passing=passing)


NAMED = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)  # WebDataset parts a name at its first dot


def grouped(files: Iterable[dict[str, Any]], column: str | None, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Group the files of a tar into samples: {"__key__": name, suffix in small letters: bytes, ...}.

    Neighbours whose names are the same up to the first dot belong together, which is WebDataset's rule: 'a.jpg', 'a.seg.png'
    and 'a.txt' are one sample. But a picture whose name has dots and that has a caption of its own is a sample of its own:
    '2024.01.png' and '2024.01.txt', '2024.02.png' and '2024.02.txt' are two. Duplicates are added to `problems`.
    """
    key, last, row, pairs = "", "", dict[str, dict[str, Any]](), 0
    for file in files:
        match = NAMED.fullmatch(file["fname"])
        if match is None:
            continue
        if match[1] != key:
            yield from rest_of(key, row, pairs)
            key, last, row, pairs = match[1], "", {}, 0
        name, suffix = parted(match[2])
        if last and name != last and (pair := pair_of(key, last, row, column)):  # at once: a shard may be one long row
            pairs += 1
            yield pair
        last = name
        if suffix in row.setdefault(name, {}):
            problems.append(f"{file['fname']}: duplicate file name")
        else:
            row[name][suffix] = file["data"]
    for name in [name for name in row if name]:
        if pair := pair_of(key, name, row, column):
            pairs += 1
            yield pair
    yield from rest_of(key, row, pairs)


def parted(dotted: str) -> tuple[str, str]:
    """Part what follows the first dot of a name: '01.00.png' into '01.00' and 'png', '01.png.txt' into '01' and 'png.txt'."""
    name, _, suffix = dotted.rpartition(".")
    suffix = suffix.lower()
    before, _, picture = name.rpartition(".")
    return (before, f"{picture.lower()}.{suffix}") if f".{picture.lower()}" in suffixes() else (name, suffix)


def pair_of(key: str, name: str, row: dict[str, dict[str, Any]], column: str | None) -> dict[str, Any] | None:
    """Take the files of a dotted name out of the row if they are a picture and its caption, else return None."""
    files = row[name]
    if not any(f".{suffix}" in suffixes() for suffix in files):
        return None
    own = [suffix for suffix in files if suffix.rpartition(".")[2] in {*sides(column)} - {"json"}]
    if not own and not any(caption.text for _, caption in captions_of(files, "", column)):
        return None
    del row[name]
    return {"__key__": f"{key}.{name}", **files}


def rest_of(key: str, row: dict[str, dict[str, Any]], pairs: int) -> Iterator[dict[str, Any]]:
    """Yield what is left of neighbours: one sample, or one for each dotted name if they are names, not parts of a sample."""
    if "" in row and not pairs:
        files = {f"{name}.{suffix}" if name else suffix: data for name, some in row.items() for suffix, data in some.items()}
        yield {"__key__": key, **files}
        return
    for name, files in row.items():
        yield {"__key__": f"{key}.{name}" if name else key, **files}


def sides(column: str | None) -> list[str]:
    """Return the suffixes of caption files, without a dot, the first one that is used first."""
    return list(dict.fromkeys([column.lower()] if column else ["txt", *CAPTIONS, "caption"])) + ["json"]


def captions_of(parts: dict[str, Any], image: str, column: str | None) -> list[tuple[str, Caption]]:
    """Return the caption files of a sample, those of the picture's whole name ('a.png.txt') before those of the sample's."""
    found = []
    for side in sides(column):
        for suffix in (f"{image}.{side}", side):
            if suffix in parts:
                data = parts[suffix]
                found.append((suffix, Caption.of_json(data, column) if side == "json" else Caption.of_bytes(data)))
    return found


def members(stream: Any, url: str, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the files of a tar stream in webdataset's format. After a damaged header, it continues at the next good one.

    Each damage is added to `problems`. webdataset's own loop is not used: tarfile takes a damaged header for the end of the
    file, so the rest of the shard would be missing without a warning.
    """
    last = "the start"

    class Header(tarfile.TarInfo):
        lost = False  # a damaged member spans many blocks that are not headers: report it once

        @classmethod
        def frombuf(cls, buffer: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
            try:
                header = super().frombuf(buffer, encoding, errors)
            except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError):
                if not cls.lost:
                    problems.append(f"damaged member after {last}")
                cls.lost = True
                raise
            cls.lost = False
            return header

    try:
        with tarfile.open(fileobj=stream, mode="r|*", ignore_zeros=True, tarinfo=Header) as tar:
            for member in tar:
                last = member.name
                if member.isreg():
                    yield {"fname": last, "data": tar.extractfile(member).read(), "__url__": url}
                tar.members = []  # else tarfile keeps all members in memory
    except (OSError, tarfile.TarError, EOFError) as error:  # the files before it are still used
        problems.append(str(error) if last == "the start" else f"{last}: {error}")
    if last == "the start" and not problems:
        problems.append("no files in it")


def sample_of(row: dict[str, Any], shard: str, column: str | None = None) -> Sample:
    """Make a sample of the files with one name. If a file has several suffixes ('a.seg.png'), the last one is its type.

    The caption is in the file of the suffix `column` (default: txt, then CAPTIONS), else under this key in the .json file.
    Further pictures are counted.
    """
    name, parts = f"{shard}/{row['__key__']}", {k: v for k, v in row.items() if not k.startswith("__")}
    pictures = [k for k in parts if k.endswith(suffixes()) or f".{k}" in suffixes()]
    image = next((k for k in pictures if f".{k}" in suffixes()), None) or next(iter(pictures), None)
    if image is None:
        why = next((f" that is read ({what})" for k in parts if (what := unreadable(f".{k.rpartition('.')[2]}"))), "")
        return Sample(name, problem=f"without an image{why}")
    caption = chosen([caption for _, caption in captions_of(parts, image, column)])
    caption.kinds += (FURTHER,) * (len(pictures) - 1)
    return sample(f"{name}.{image}", caption, lambda data=parts[image]: data)


def sample(name: str, caption: Caption, read: Callable[[], bytes]) -> Sample:
    """Make a sample of a picture and its caption. The picture of a caption that cannot be used is not read."""
    return Sample(name, caption.text, read, "" if caption.text else caption.problem or MISSING, caption.kinds)


class HuggingFace:
    """A data set of the hub or of local files: `hf:ID[:SPLIT]`, `hf:imagefolder:FOLDER[:SPLIT]` or `hf:FILE.parquet`.

    Raises UsageError if `datasets` is not installed, the data cannot be opened, or a column of images or captions is missing.
    """

    count = None

    def __init__(self, location: str, caption_column: str | None = None) -> None:
        try:
            import datasets
        except ImportError as error:
            raise UsageError("`data=hf`: datasets is not installed", EXTRA) from error
        self.spec, self.library = f"hf:{location}", datasets
        self.counts, self.column = Counts(), caption_column
        name, *rest = location.split(":")
        files: dict[str, Any] = {}
        if name in BUILDERS:
            if not rest:
                raise UsageError(f"{as_field('data', f'hf:{name}')}: the path of the files is missing", f"use hf:{name}:PATH")
            place, *rest = rest
            files = {"data_dir": place} if Path(place).is_dir() else {"data_files": place}
        elif Path(name).is_file():
            files, name = {"data_files": name}, self.builder_of(Path(name))
        split = rest[0] if rest else "train"
        given = as_field("data", self.spec)
        if not files and not Path(name).exists() and not hub_client.offline():
            hub.ask(Reference(name, kind="dataset"), given)  # its errors say what is wrong; those of the library do not
        try:
            with asking():
                self.builder = datasets.load_dataset_builder(name, **files)
                self.rows = self.builder.as_streaming_dataset(split=split)
        except Exception as error:  # the library raises many kinds of errors; each means that the data cannot be opened
            if not files and not hub_client.offline():
                clear = hub_errors.explain(error, given, Reference(name, kind="dataset"))
                if not isinstance(clear, Failed):
                    raise clear from error
            hint = "use hf:OWNER/NAME[:SPLIT], hf:imagefolder:FOLDER or hf:FILE.parquet; without a network only local files work"
            raise UsageError(f"{given}: {quoted(error).splitlines()[0]}", hint) from error
        self.image = self.columns()

    def builder_of(self, path: Path) -> str:
        """Return the builder of a local file. Raises UsageError if its suffix names none."""
        suffix = path.suffix.lower().removeprefix(".")
        if suffix not in OF_FILES:
            what = (
                f"a {path.suffix} file is not read as a data set"
                if suffix
                else "a file without a suffix is not read as a data set"
            )
            raise UsageError(f"{as_field('data', self.spec)}: {what}", f"files that are read end in .{', .'.join(OF_FILES)}")
        return OF_FILES[suffix]

    def columns(self) -> str:
        """Return the column of images; others are told. Decoding is switched off, so that a damaged image can be named."""
        features = self.rows.features or {}
        typed = lambda k: isinstance(features[k], self.library.Image)
        no_bytes = lambda k: getattr(features[k], "dtype", "") in ("string", "large_string")  # structs have no dtype
        images = [k for k in features if typed(k) or k.lower() in IMAGES]
        place = {name: i for i, name in enumerate(IMAGES)}
        images.sort(key=lambda k: (no_bytes(k), place.get(k.lower(), len(place)), not typed(k)))
        if len(images) > 1:
            others = ", ".join(images[1:])
            console.warn(f"{as_field('data', self.spec)}: the pictures are those of the column {images[0]}; not used: {others}")
        if features and not images:
            raise UsageError(f"{as_field('data', self.spec)}: there is no image column among {', '.join(features)}")
        if features and self.column and self.column not in features:
            missing = f"there is no {as_field('caption_column', self.column)} among {', '.join(features)}"
            raise UsageError(f"{as_field('data', self.spec)}: {missing}")
        if features and not self.column and not set(CAPTIONS) & set(features):
            hint = "name the column of the captions with `caption_column`"
            raise UsageError(f"{as_field('data', self.spec)}: there is no caption column among {', '.join(features)}", hint)
        image = images[0] if images else "image"
        if isinstance(features.get(image), self.library.Image):
            self.rows = self.rows.cast_column(image, self.library.Image(decode=False))
        return image

    def identity(self) -> str | None:
        """Hash the files of the data set: their times, or their commit on the hub. None if the library does not know them."""
        files = self.builder.config.data_files
        if not files:
            return None
        return hash_of(
            self.builder.hash,
            self.builder.config_id,
            self.column,
            self.image,
            [tuple(entry.origin_metadata) for entry in files.values()],
        )

    def samples(self) -> Iterator[Sample]:
        """Yield a sample for every row. It ends with a problem at a damaged data file."""
        number, rows = 0, iter(self.rows)
        while True:
            name = f"{self.spec} row {number}"
            try:
                with asking():
                    row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # a damaged data file: the rows after it cannot be reached
                yield Sample(name, problem=f"broken data file ({hub_errors.in_words(error)})", passing=True)
                return
            number += 1
            caption = Caption.of_row(row, self.column)
            cell = row.get(self.image)
            if isinstance(cell, dict) and cell.get("path"):
                name = f"{self.spec} {cell['path']}"
            if why := no_picture(cell):
                yield Sample(name, problem=f"{why} (column {self.image})")
            else:
                yield sample(name, caption, lambda cell=cell: bytes_of(cell))


def no_picture(cell: Any) -> str:
    """Return what a cell of the column of images is if it cannot hold a picture, or ""."""
    if isinstance(cell, (dict, bytes)):
        return ""
    if cell is None:
        return "an empty cell, no picture"
    return "a path or other text, not a picture" if isinstance(cell, str) else f"a {type(cell).__name__}, not a picture"


def bytes_of(cell: Any) -> bytes:
    """Return the bytes of an undecoded image: a dict of "bytes" and "path", one of them None, or the bytes themselves."""
    if not isinstance(cell, dict):
        return cell if isinstance(cell, bytes) else b""
    if cell.get("bytes") is not None:
        return cell["bytes"]
    import fsspec

    with asking(), fsspec.open(cell["path"], "rb") as file:
        return file.read()
