"""Data sets that are read from front to back: WebDataset shards (`wds:`) and Hugging Face data sets (`hf:`)."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdiff.data.folder import MISSING
from fastdiff.data.images import CAPTIONS, SUFFIXES, Sample, caption_in, caption_of_json, hash_of
from fastdiff.runtime.errors import UsageError, as_field, quoted

EXTRA = 'pip install "fastdiff[data]"'
# A server that does not answer, or stops sending, is given up within 30 s; webdataset's own command would take 15 minutes.
# No retry once bytes may have come: they cannot be taken back out of a pipe.
CURL = ["curl", "-sfL", "--connect-timeout", "10", "--speed-limit", "1", "--speed-time", "20"]
CURL += ["--retry", "2", "--retry-delay", "1", "--retry-max-time", "5"]
PIPED_ENDS = [141, 23]  # how curl ends when nobody reads on
IMAGES = ("image", "img", "picture", "jpg", "png", "webp")  # names of an image column
BUILDERS = {"imagefolder", "parquet", "arrow", "webdataset", "json"}


class WebDataset:
    """Tar shards: local ones, `http(s)://` and `pipe:COMMAND`, with braces for many: `wds:shards/{0000..0099}.tar`."""

    count = None

    def __init__(self, urls: str) -> None:
        try:
            from webdataset.shardlists import expand_urls
        except ImportError as error:
            raise UsageError("`data=wds`: webdataset is not installed", EXTRA) from error
        self.spec, self.urls = f"wds:{urls}", expand_urls(urls)
        missing = [url for url in self.urls if self.local(url) and not Path(url).is_file()]
        if missing:
            more = f" ({len(missing)} of {len(self.urls)} are missing)" if len(self.urls) > 1 else ""
            raise UsageError(f"{as_field('data', self.spec)}: no such shard: {missing[0]}{more}")

    @staticmethod
    def local(url: str) -> bool:
        return not url.startswith(("pipe:", "http:", "https:", "hf:", "gs:", "ais:", "sftp:", "ftps:", "scp:", "htgs:"))

    def identity(self) -> str:
        """Of local shards by size and time; what stands behind an address is taken to stay."""
        stats = [os.stat(url) for url in self.urls if self.local(url)]
        return hash_of(self.urls, [(stat.st_size, stat.st_mtime_ns) for stat in stats])

    def samples(self) -> Iterator[Sample]:
        for url in self.urls:
            yield from self.shard(url)

    def shard(self, url: str) -> Iterator[Sample]:
        """One tar file's samples; one that ends early, or cannot be opened, gives what was read and a problem by name."""
        from webdataset.tariterators import group_by_keys

        problems: list[str] = []
        try:
            with self.open(url) as stream:
                duplicate = lambda error: problems.append(str(error.args[0])) or True
                for row in group_by_keys(members(stream, url, problems), handler=duplicate):
                    yield from broken(url, problems)
                    yield sample_of(row, Path(url).name)
        except OSError as error:
            problems.append(str(error))
        yield from broken(url, problems)

    def open(self, url: str) -> Any:
        from webdataset.gopen import Pipe, gopen

        if url.startswith(("http:", "https:")):
            return Pipe([*CURL, url], mode="rb", bufsize=8192, ignore_status=PIPED_ENDS)
        return gopen(url)


def broken(url: str, problems: list[str]) -> Iterator[Sample]:
    while problems:
        yield Sample(url, problem=f"broken tar ({problems.pop(0)})")


def members(stream: Any, url: str, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Files of a tar stream as webdataset's grouping takes them; a damaged header is a problem, and the next good one is found.

    Why not webdataset's own loop: to tarfile a damaged header in the middle is the end of the file, and all the shard behind
    it would be missing without a word.
    """
    last = "the start"

    class Header(tarfile.TarInfo):
        lost = False  # a damaged member is many blocks that are no header

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
                tar.members = []  # it would remember all of them
    except (OSError, tarfile.TarError, EOFError) as error:  # what came before it is still grouped
        problems.append(str(error) if last == "the start" else f"{last}: {error}")
    if last == "the start" and not problems:
        problems.append("no files in it")


def sample_of(row: dict[str, Any], shard: str) -> Sample:
    """A group of files of one name; of several suffixes in one ('a.seg.png'), the last tells what it is."""
    name, parts = f"{shard}/{row['__key__']}", {k: v for k, v in row.items() if not k.startswith("__")}
    image = next((k for k in parts if f".{k}" in SUFFIXES), None) or next((k for k in parts if k.endswith(SUFFIXES)), None)
    if image is None:
        return Sample(name, problem="without an image")
    words = next((parts[k] for k in ("txt", *CAPTIONS) if k in parts), b"").decode("utf-8", "replace").strip()
    caption = words or caption_of_json(parts.get("json", b""))
    return Sample(f"{name}.{image}", caption, lambda: parts[image], "" if caption else MISSING)


class HuggingFace:
    """A data set of the hub or of files at hand: `hf:ID[:SPLIT]`, `hf:imagefolder:FOLDER[:SPLIT]`, `hf:FILE.parquet`."""

    count = None

    def __init__(self, location: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise UsageError("`data=hf`: datasets is not installed", EXTRA) from error
        self.spec, self.library = f"hf:{location}", datasets
        name, *rest = location.split(":")
        files: dict[str, Any] = {}
        if name in BUILDERS:
            if not rest:
                raise UsageError(f"{as_field('data', f'hf:{name}')}: of which files?", f"hf:{name}:PATH")
            place, *rest = rest
            files = {"data_dir": place} if Path(place).is_dir() else {"data_files": place}
        elif Path(name).is_file():
            files, name = {"data_files": name}, Path(name).suffix.removeprefix(".")
        split = rest[0] if rest else "train"
        try:
            self.builder = datasets.load_dataset_builder(name, **files)
            self.rows = self.builder.as_streaming_dataset(split=split)
        except Exception as error:  # the library raises a dozen kinds; each means that there is no such data
            hint = "hf:OWNER/NAME[:SPLIT], hf:imagefolder:FOLDER or hf:FILE.parquet; without a network only files at hand"
            raise UsageError(f"{as_field('data', self.spec)}: {quoted(error).splitlines()[0]}", hint) from error
        self.image = self.columns()

    def columns(self) -> str:
        """The image's column; its bytes are left as they are, so that a damaged one can be hint by name."""
        features = self.rows.features or {}
        images = [k for k, v in features.items() if isinstance(v, self.library.Image)]
        images += [k for k in features if k.lower() in IMAGES and k not in images]
        if features and not images:
            raise UsageError(f"{as_field('data', self.spec)}: no image among its columns: {', '.join(features)}")
        if features and not set(CAPTIONS) & set(features):
            hint = f"captions are looked for as {', '.join(CAPTIONS)}; rename_column of the datasets library gives such a name"
            raise UsageError(f"{as_field('data', self.spec)}: no captions among its columns: {', '.join(features)}", hint)
        image = images[0] if images else "image"
        if isinstance(features.get(image), self.library.Image):
            self.rows = self.rows.cast_column(image, self.library.Image(decode=False))
        return image

    def identity(self) -> str | None:
        """Of the files behind it: their times, or on the hub the commit; None where the library does not tell."""
        files = self.builder.config.data_files
        if not files:
            return None
        return hash_of(self.builder.hash, self.builder.config_id, [tuple(entry.origin_metadata) for entry in files.values()])

    def samples(self) -> Iterator[Sample]:
        number, rows = 0, iter(self.rows)
        while True:
            name = f"{self.spec} row {number}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # a damaged file behind the stream: what follows it cannot be reached
                yield Sample(name, problem=f"broken data file ({str(error).splitlines()[0]})")
                return
            number += 1
            caption = caption_in(row)
            cell = row.get(self.image)
            if isinstance(cell, dict) and cell.get("path"):
                name = f"{self.spec} {cell['path']}"
            yield Sample(name, caption, lambda cell=cell: bytes_of(cell), "" if caption else MISSING)


def bytes_of(cell: Any) -> bytes:
    """An undecoded image of a row: {"bytes", "path"}, one of them None, or the bytes themselves."""
    if not isinstance(cell, dict):
        return cell if isinstance(cell, bytes) else b""
    if cell.get("bytes") is not None:
        return cell["bytes"]
    import fsspec

    with fsspec.open(cell["path"], "rb") as file:
        return file.read()
