"""What a file's header says to people: trigger words, tags, author, licence, usage. A merged file keeps its parents'."""

import json
from collections.abc import Mapping, Sequence

from fastdiff.checkpoints import configs
from fastdiff.runtime import console
from fastdiff.runtime.errors import quoted

TRIGGERS, TAGS, HINT = "modelspec.trigger_phrase", "modelspec.tags", "modelspec.usage_hint"
AUTHOR, LICENCE, MERGED_FROM = "modelspec.author", "modelspec.license", "modelspec.merged_from"
TAG_COUNTS = "ss_tag_frequency"  # sd-scripts: {folder of pictures: {tag: pictures that have it}}
KEPT = (TRIGGERS, TAGS, HINT, AUTHOR, LICENCE, MERGED_FROM, TAG_COUNTS)
JOINTS = {TRIGGERS: ", ", TAGS: ", ", HINT: "; ", LICENCE: " AND "}  # in lists; SPDX writes AND where several licences apply


def of(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries of a header that its descendants keep."""
    return {key: metadata[key] for key in KEPT if metadata.get(key, "").strip()}


def joined(parents: Sequence[tuple[str, Mapping[str, str]]]) -> dict[str, str]:
    """The entries for a file made of `parents`, each a name and its header. Every text appears once, in the order of parents.

    Differing licences are told in a warning, for all of them apply.
    """
    headers = [of(header) for _, header in parents]
    words: dict[str, str] = {}
    for key in (TRIGGERS, TAGS, HINT, AUTHOR, LICENCE):
        texts = [header[key] for header in headers if key in header]
        if key in JOINTS:
            texts = [part for text in texts for part in text.split(JOINTS[key].rstrip() if key != LICENCE else JOINTS[key])]
        if texts := [text.strip() for text in texts if text.strip()]:
            words[key] = JOINTS.get(key, ", ").join(dict.fromkeys(texts))
    if counts := tag_counts([(name, header.get(TAG_COUNTS)) for name, header in parents]):
        words[TAG_COUNTS] = json.dumps(counts)
    words[MERGED_FROM] = ", ".join(dict.fromkeys(name for name, _ in parents))
    licences = [(name, header[LICENCE].strip()) for (name, _), header in zip(parents, headers, strict=True) if LICENCE in header]
    if len({licence for _, licence in licences}) > 1:
        each = "; ".join(f"{name}: {licence}" for name, licence in licences)
        console.warn(f"the merged files have different licences, and all of them apply to the result: {each}")
    return words


def tag_counts(parents: Sequence[tuple[str, str | None]]) -> dict[str, dict[str, int]]:
    """The numbers of tags of all parents, each a name and its entry. Folders of one name whose tags differ are added up."""
    counts: dict[str, dict[str, int]] = {}
    for name, text in parents:
        if text is None:
            continue
        try:
            table = {str(folder): {str(tag): int(n) for tag, n in tags.items()} for folder, tags in configs.parsed(text).items()}
        except (ValueError, TypeError, AttributeError) as error:
            console.warn(f"{name}: its {TAG_COUNTS} is malformed and left out ({quoted(error)})")
            continue
        for folder, tags in table.items():
            if (there := counts.get(folder)) is None or there == tags:
                counts[folder] = tags
            else:
                counts[folder] = {tag: there.get(tag, 0) + tags.get(tag, 0) for tag in {**there, **tags}}
    return counts
