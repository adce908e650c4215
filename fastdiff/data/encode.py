"""Encode pictures and captions once, in a cache that all data sets, methods and runs share.

Latents are cached by the hash of the picture's bytes, the crop and the VAE; text states by the caption and the text encoders.
Whatever is in the cache is not encoded again.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint, fingerprint
from fastdiff.data import held_out
from fastdiff.data.batch import Buckets, Data, Encoded
from fastdiff.data.images import Framing, Sample, hash_of, reasons
from fastdiff.data.listing import NAMED, Listing
from fastdiff.data.store import Share, Store, Stored
from fastdiff.models import autoencoder, prompt, text
from fastdiff.models.denoiser import Cond
from fastdiff.runtime import console, disk, picture_file, stop
from fastdiff.runtime.counts import Counts, Kind
from fastdiff.runtime.disk import cache_folder
from fastdiff.runtime.errors import InputRefused, Stopped, as_field
from fastdiff.runtime.picture_file import Refused, decode
from fastdiff.sampling.sampler import at_once

SIZE = 64  # pictures or captions per cache file
HOPELESS, HOPELESS_S = 256, 20.0  # give up after this many refused samples, or seconds, without a usable one

ENLARGED = Kind("picture", "smaller than it is trained at, enlarged (`min_size` leaves small ones out)")
COPY = Kind("picture", "the same bytes as another one; each is used", warns=False)


class Source(Protocol):
    """A source of samples, in an order that never changes."""

    spec: str
    counts: Counts  # what was left out, guessed or changed when the source was opened

    @property
    def count(self) -> int | None: ...  # None: unknown until all have been read
    def identity(self) -> str | None: ...  # changes if any sample does; None: unknown without reading
    def samples(self) -> Iterator[Sample]: ...


def encode(
    base: Checkpoint,
    source: Source,
    framing: Framing,
    *,
    most: int | None = None,
    by_default: bool = False,
    device: torch.device | str = "cpu",
) -> Data:
    """Encode the first `most` samples of a source (default: all). Unusable samples are skipped, with warnings.

    Samples beyond `most` are left out; with a warning if nobody chose the number (`by_default`).

    Raises InputRefused if no sample is usable, and DoesNotFit if the disk is too small. Afterwards the text encoders are
    released and the VAE is on the CPU.
    """
    source.counts.tell(as_field("data", source.spec))
    share = Share(cache_folder())
    captions = Captions(base, share, device)
    pictures = Pictures(base, framing, captions, share, device)
    listing = pictures.listed(source, most)
    if listing.cut:
        taken = f"{as_field('data', source.spec)}: only the first {most} images are used"
        if by_default:
            console.warn(f"{taken}, which is the default of data that is streamed; take more with `max_images`")
        else:
            console.info(f"{taken} (`max_images`)")
    held_out.warn_of(base.family, (caption for _, _, caption in listing.rows), as_field("data", source.spec))
    text.tell(base, [caption for _, _, caption in listing.rows], as_field("data", source.spec), "captions")
    not_finite = captions.encode(dict.fromkeys(caption for _, _, caption in listing.rows))
    base.release("text_encoders", "tokenizers")
    base.vae.to("cpu")
    for name, _, caption in listing.rows:
        if caption in not_finite:
            listing.refuse(name, "text embedding not finite")
    listing.rows = [row for row in listing.rows if row[2] not in not_finite]
    if not listing.rows:
        raise hopeless(source, listing)
    if listing.refused:
        name, why = listing.refused[0]
        total = len(listing.rows) + len(listing.refused)
        console.warn(
            f"{as_field('data', source.spec)}: {len(listing.refused)} of {total} images skipped: {reasons(listing.refused)}; "
            f"the first: {name}: {why}" + (f"; all of them: {pictures.index}" if len(listing.refused) > NAMED else "")
        )
    listing.counts.tell(as_field("data", source.spec))
    return pictures.encoded(listing.rows)


def hopeless(source: Source, listing: Listing) -> InputRefused:
    """Make the error for a source without a usable sample."""
    name, why = listing.refused[0] if listing.refused else ("it", "gives no samples")
    return InputRefused(
        f"{as_field('data', source.spec)}: none of {len(listing.refused)} images can be used: {reasons(listing.refused)}; "
        f"the first: {name}: {why}"
    )


class Captions:
    """The cache of text states by caption. Raises InputRefused if the text encoder gives NaN or infinity for an empty prompt."""

    def __init__(self, base: Checkpoint, share: Share, device: torch.device | str) -> None:
        self.base, self.share, self.device = base, share, device
        nets = [fingerprint(net) for net in base.text_encoders]
        lengths = [tokenizer.model_max_length for tokenizer in base.tokenizers]
        rule = (nets, base.family.name, lengths, prompt.RULES, base.max_tokens, base.text_layer)
        self.store = Store(cache_folder() / f"texts-{hash_of(*rule)[:16]}")
        if self.encode([""]):
            raise InputRefused(f"{as_field('base', base.ref)}: the text encoder returns NaN or infinity for an empty prompt")

    @staticmethod
    def key(caption: str) -> str:
        return hash_of(caption)

    def encode(self, captions: Iterable[str]) -> set[str]:
        """Encode the captions that are not in the cache. Returns those whose states are not finite."""
        wanted = [caption for caption in captions if self.key(caption) not in self.store]
        mine = [caption for caption in wanted if self.share.mine(int(self.key(caption), 16))]
        with suppress(Stopped), console.progress(len(mine), "encoding captions") as bar:
            for i in range(0, len(mine), SIZE):
                stop.check()
                part = mine[i : i + SIZE]
                states = text.rows(self.base, part, device=self.device)
                rows = {self.key(caption): row_of(cond) for caption, cond in zip(part, states, strict=True)}
                self.store.put({key: parts for key, parts in rows.items() if finite(parts)})
                bar.update(len(part))
        stop.meet()  # if one process was stopped, all stop here
        self.store.scan()
        return {caption for caption in wanted if self.key(caption) not in self.store}

    def size(self, captions: Iterable[str]) -> int:
        """Return about how many bytes the states of captions take that are not in the cache: a long one has several windows."""
        new = [caption for caption in dict.fromkeys(captions) if self.key(caption) not in self.store]
        return self.bytes_of_window * sum(text.window_counts(self.base, new))

    @property
    def bytes_of_window(self) -> int:
        """The bytes of a short caption's states."""
        return sum(self.store.get(self.key(""), part).nbytes for part in self.parts)

    @property
    def parts(self) -> tuple[str, ...]:
        """The fields of Cond that are stored for a caption."""
        return ("tokens", "pooled") if self.base.family.size_conditioned else ("tokens",)

    def stored(self, captions: list[str]) -> Cond:
        """Return the states of captions as a Cond of `Stored` rows, read from disk when indexed."""
        return Cond(**{part: Stored(self.store, part, [self.key(c) for c in captions]) for part in self.parts})

    def unconditional(self) -> Cond:
        """Return the unconditional Cond of one row: of the empty prompt, or zeros where SDXL's pipeline uses zeros."""
        cond = self.stored([""])[:]
        return cond.map(torch.zeros_like) if self.base.zeros_for_empty_prompt else cond


class Pictures:
    """The cache of latents by picture and crop."""

    def __init__(self, base: Checkpoint, framing: Framing, captions: Captions, share: Share, device: torch.device | str) -> None:
        self.base, self.framing, self.captions, self.share, self.device = base, framing, captions, share, device
        self.store = Store(cache_folder() / f"latents-{hash_of(fingerprint(base.vae), base.vae.config.scaling_factor)[:16]}")

    def there(self, digest: str) -> bool:
        """Return whether all items of the picture with this hash are in the cache."""
        return all(key in self.store for key in self.framing.keys(digest))

    def listed(self, source: Source, most: int | None) -> Listing:
        """Encode the first `most` samples of a source and list them. If all are in the cache, only the old listing is read."""
        identity = source.identity()
        self.index = self.store.folder / "sets" / f"{hash_of(identity, source.spec, most, self.framing)}.json"
        known = Listing.read(self.index) if identity else None
        if self.share.all(known is not None and all(self.there(digest) for _, digest, _ in known.rows)):
            console.info(f"{len(known.rows)} images of {source.spec} are in the cache; delete {self.index} to read them again")
            return known
        listing = Reading(self, source, most).read()
        if self.share.rank == 0:
            listing.write(self.index)
        return listing

    def bytes_each(self) -> int:
        """Return the bytes of one item's latent moments, stored as fp16."""
        side = self.framing.resolution_px // autoencoder.factor(self.base.vae)
        return 2 * 2 * self.base.vae.config.latent_channels * side**2

    def announce(self, source: Source, samples: int, captions: list[str] | None) -> None:
        """Print how much will be written to disk; `captions` are None where they are not known yet, and taken for short.

        Raises DoesNotFit if there is not enough space.
        """
        texts = samples * self.captions.bytes_of_window if captions is None else self.captions.size(captions)
        size = samples * self.bytes_each() * len(self.framing.cuts) + texts
        amount, needed = f"{samples} images of {source.spec} to encode", size
        if captions is None:
            amount = f"up to {amount} (as many as it has, without those in the cache)"
            # what is in the cache may belong to other data; if the disk fills up later, the run can be resumed
            needed = size * max(0, samples - len(self.store) // len(self.framing.cuts)) // samples
        room = f"{disk.format_size(disk.free_bytes(self.store.folder))} are free"
        console.info(f"{amount}: about {disk.format_size(size)} in {self.store.folder.parent}; {room}")
        hint = "set FASTDIFF_CACHE to another folder, or take fewer images with `max_images`"
        disk.require(self.store.folder, needed, f"{samples} encoded images", hint)

    def encode(self, samples: list[tuple[Sample, str]]) -> list[tuple[str, str]]:
        """Encode (sample, hash) pairs into one cache file. Returns (name, reason) of each unusable sample."""
        refused, items = [], []  # an item is (index in `samples`, key, pixels, note)
        with ThreadPoolExecutor() as pool:
            for i, cuts in enumerate(pool.map(lambda pair: self.cut(*pair), samples)):
                sample, digest = samples[i]
                if isinstance(cuts, Refused):
                    refused.append((sample.name, str(cuts)))
                    continue
                keys = zip(self.framing.keys(digest), cuts, strict=True)
                items += [(i, key, *item) for key, item in keys if key not in self.store]
        moments = self.moments({key: pixels for _, key, pixels, _ in items})
        bad = {i for i, key, _, _ in items if not moments[key].isfinite().all()}
        notes = {key: note for i, key, _, note in items if i not in bad}
        self.store.put({key: {"moments": moments[key]} for key in notes}, notes)
        return refused + [(samples[i][0].name, "latents not finite") for i in sorted(bad)]

    def moments(self, pictures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Encode pixels (3, H, W) uint8 by key to moments (2 C, h, w) fp16, pictures of one size in common batches."""
        vae, moments = self.base.vae.to(self.device), {}
        for shape in {pixels.shape for pixels in pictures.values()}:
            keys = [key for key, pixels in pictures.items() if pixels.shape == shape]
            n = at_once(max(shape[1:]) // autoencoder.factor(vae))
            for i in range(0, len(keys), n):
                part = keys[i : i + n]
                pixels = torch.stack([pictures[key] for key in part]) / 127.5 - 1
                rows = autoencoder.encode_moments(vae, pixels, most=n).half().cpu()
                moments |= {key: row.clone() for key, row in zip(part, rows, strict=True)}
        return moments

    def cut(self, sample: Sample, digest: str) -> list[tuple[Tensor, dict[str, list]]] | Refused:
        """Decode and crop a sample: pixels and note of each item. A note has SDXL's six sizes, and the kinds of what was changed.

        Refused is returned, not raised, so that the thread pool goes on.
        """
        try:
            image, kinds = decode(sample.data, self.framing.background)
            if why := self.too_small(image.height, image.width):
                return Refused(why)
        except Refused as error:
            return error
        return [(pixels, {"size": size, "kinds": kinds}) for pixels, size in self.framing.cut(image, digest)]

    def too_small(self, height: int, width: int) -> str:
        """Return why a picture of this size in px is left out, or ""."""
        least = self.framing.min_size_px
        return f"smaller than {as_field('min_size', least)} ({width} x {height})" if min(height, width) < least else ""

    def size(self, digest: str) -> list[int]:
        """Return SDXL's six sizes of a picture's first item in the cache."""
        return self.store.notes[self.framing.keys(digest)[0]]["size"]

    def changes(self, digest: str) -> list[Kind]:
        """Return the kinds of what was changed in a picture of the cache to encode it."""
        note = self.store.notes[self.framing.keys(digest)[0]]
        kinds = [Kind(*kind) for kind in note["kinds"]]
        transparent = picture_file.transparent(self.framing.background)
        kinds = [kind._replace(what=f"{kind.what} (`background`)") if kind == transparent else kind for kind in kinds]
        height, width, _, _, h, w = note["size"]
        return [*kinds, ENLARGED] if h > height or w > width else kinds

    def encoded(self, rows: list[tuple[str, str, str]]) -> Data:
        """Make the data set of listed rows: an Encoded if all items have one size, else Buckets, the most frequent size first."""
        texts = list(dict.fromkeys(caption for _, _, caption in rows))
        place, cond, uncond = {c: i for i, c in enumerate(texts)}, self.captions.stored(texts), self.captions.unconditional()
        groups: dict[tuple[int, int], list[tuple[str, str, int]]] = {}
        for name, digest, caption in rows:
            for key in self.framing.keys(digest):
                groups.setdefault(tuple(self.store.notes[key]["size"][4:]), []).append((key, name, place[caption]))
        sizes = sorted(groups, key=lambda size: (-len(groups[size]), size))
        identity = hash_of(sorted((digest, caption) for _, digest, caption in rows))
        made = []
        for keys, names, captions in (zip(*groups[size], strict=True) for size in sizes):
            ids = torch.tensor([self.store.notes[key]["size"] for key in keys], dtype=torch.float32)
            made.append(
                Encoded(
                    moments=Stored(self.store, "moments", list(keys)),
                    texts=cond,
                    captions=torch.tensor(captions)[:, None],
                    weights=torch.ones(1),
                    uncond=uncond,
                    time_ids=ids if self.base.family.size_conditioned else None,
                    names=list(names),
                    views=len(self.framing.cuts),
                    identity=identity,
                )
            )
        return made[0] if len(made) == 1 else Buckets(made)


class Reading:
    """One pass over a source: every process lists all samples and encodes its own share."""

    def __init__(self, pictures: Pictures, source: Source, most: int | None) -> None:
        self.pictures, self.source, self.most, self.share = pictures, source, most, pictures.share
        self.listing, self.usable = Listing(), 0
        self.kinds: list[tuple[Kind, ...]] = []  # of the captions of the listing's rows
        self.waiting: list[tuple[Sample, str]] = []
        self.started = time.monotonic()
        self.patient = source.count is not None  # a source with a known count is local and quickly hashed: do not give up early

    def read(self) -> Listing:
        """Read and encode the source. Raises Stopped after a stop signal, InputRefused if no sample is usable."""
        with suppress(Stopped):
            self.look()
        stop.meet()
        return self.settled()

    def look(self) -> None:
        """List all samples and encode this process's share of those that are not in the cache."""
        count, samples, total, captions = self.source.count, self.hashed(), None, None
        if count is not None:  # readable twice: hash all first, to know how many are missing
            with console.progress(min(count, self.most or count), "reading images") as bar:
                pairs = [(bar.update(1), (sample.forget(), digest))[1] for sample, digest in samples]
            samples = iter(pairs)
            captions = [sample.caption or "" for sample, _ in pairs]
            missing = total = len({digest for _, digest in pairs if not self.pictures.there(digest)})
        else:  # an upper limit: nobody knows how many there are, or are in the cache
            missing = self.most or 0
        if missing:
            self.pictures.announce(self.source, missing, captions)
        self.patient = False
        with console.progress(total, "encoding images") as bar:
            for part in self.missing(samples):
                self.waiting.append(part)
                if len(self.waiting) >= SIZE or self.late():
                    bar.update(self.flush())
            bar.update(self.flush())

    def missing(self, samples: Iterable[tuple[Sample, str]]) -> Iterator[tuple[Sample, str]]:
        """List all samples, and yield those that this process has to encode."""
        seen: set[str] = set()
        for sample, digest in samples:
            there = self.pictures.there(digest)
            if there and (why := self.pictures.too_small(*self.pictures.size(digest)[:2])):
                self.refuse(sample.name, why)
                continue
            self.listing.rows.append((sample.name, digest, sample.caption or ""))
            self.kinds.append(sample.kinds)
            if there:
                self.usable += 1
            elif digest not in seen and self.share.mine(int(digest, 16)):
                seen.add(digest)
                yield sample, digest

    def hashed(self) -> Iterator[tuple[Sample, str]]:
        """Yield the first `most` samples that have a picture and a caption, each with the hash of the picture's bytes."""
        taken = 0
        for sample in self.source.samples():
            stop.check()
            if taken == self.most:
                self.listing.cut = True
                return
            why, data = sample.problem, b""
            self.listing.passing |= sample.passing
            if not why:
                try:
                    data = sample.data
                except OSError as error:
                    why = f"not readable ({error.strerror or error})"
                    self.listing.passing = True
            if not why and not data:
                why = "0 bytes"
            if why:
                self.refuse(sample.name, why)
                continue
            taken += 1
            yield sample, hashlib.sha256(data).hexdigest()

    def late(self) -> bool:
        """Return whether it is time to encode the waiting samples early: none was usable for half of HOPELESS_S seconds."""
        return not self.usable and time.monotonic() - self.started > HOPELESS_S / 2

    def refuse(self, name: str, why: str) -> None:
        """Add a refused sample. Raises InputRefused if no sample was usable for too long, instead of reading on for hours."""
        self.listing.refuse(name, why)
        waited = time.monotonic() - self.started > HOPELESS_S
        if self.usable or self.patient or not (waited or len(self.listing.refused) >= HOPELESS):
            return
        if self.waiting:
            self.flush()
        else:
            raise hopeless(self.source, self.listing)

    def flush(self) -> int:
        """Encode the waiting samples and return how many they are."""
        samples, self.waiting = self.waiting, []
        if samples:
            refused = self.pictures.encode(samples)
            self.usable += len(samples) - len(refused)
            for row in refused:
                self.refuse(*row)
        return len(samples)

    def settled(self) -> Listing:
        """Combine the results of all processes into one listing that is the same on each."""
        refused = list(dict.fromkeys(self.share.gather(self.listing.refused)))
        self.share.wait()
        self.pictures.store.scan()
        named = {name for name, _ in refused}
        rows = [row for row in self.listing.rows if self.pictures.there(row[1])]
        gone = [row[0] for row in self.listing.rows if not self.pictures.there(row[1])]
        refused += [(name, "a copy of an image that was skipped") for name in gone if name not in named]
        if not rows:
            raise hopeless(self.source, Listing(rows, refused))
        cut, passing = (any(self.share.gather([mine])) for mine in (self.listing.cut, self.listing.passing))
        return Listing(rows, refused, self.counted(), cut, passing)

    def counted(self) -> Counts:
        """Count what was guessed or changed in the usable samples."""
        counts, seen = Counts(), set[str]()
        for (name, digest, _), kinds in zip(self.listing.rows, self.kinds, strict=True):
            if self.pictures.there(digest):
                counts.add([*self.pictures.changes(digest), *kinds, *([COPY] if digest in seen else [])], name)
                seen.add(digest)
        return counts


def row_of(cond: Cond) -> dict[str, Tensor]:
    """The tensors of a Cond of one row, by name, as they are stored: fp16."""
    row = {"tokens": cond.tokens[0].half().clone()}
    return row if cond.pooled is None else row | {"pooled": cond.pooled[0].half().clone()}


def finite(parts: dict[str, Tensor]) -> bool:
    """Return whether all tensors are free of NaN and infinity."""
    return all(bool(tensor.isfinite().all()) for tensor in parts.values())
