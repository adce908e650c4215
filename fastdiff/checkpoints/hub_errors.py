"""What went wrong with the hub, in one line: the true cause, and what to do about it."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from fastdiff.checkpoints.family import aliases
from fastdiff.checkpoints.hub_client import Busy, Silence
from fastdiff.checkpoints.published import ROWS
from fastdiff.checkpoints.references import Reference, endpoint
from fastdiff.runtime import network
from fastdiff.runtime.errors import Failed, InputRefused, UsageError, device_error
from fastdiff.runtime.network import host_of, one_line, status_of

AGAIN = "run the command again; files that are whole are kept"
OTHER_DISK = "set HF_HOME to a folder on another disk"


class NotThere(UsageError):
    """A repository that the hub does not have, or does not show."""


class Unreachable(UsageError):
    """No repository of the hub can be had now: there is no network, or the hub does not serve us."""


class Offline(Unreachable):
    """Something is not on this machine, and downloads are forbidden."""


def token_place() -> str:
    """Where the access token in use comes from, for messages; "" where there is none."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return f"the token in {name}"
    from huggingface_hub import constants, get_token

    return f"the token of your login ({constants.HF_TOKEN_PATH})" if get_token() else ""


def cache_folder() -> Path:
    """The folder of the hub's downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def near(name: str, names: Iterable[str]) -> str:
    """A question after the name that was meant, to end a sentence with; "" where none is alike."""
    known = {other.lower(): other for other in names}
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.75)
    return f"; did you mean {known[found[0]]}?" if found and known[found[0]] != name else ""


def known_ids() -> list[str]:
    """The repositories that aliases stand for, and those of published few-step models."""
    published = [hub_id for row in ROWS for hub_id in (*row.lora_hubs, *row.whole_hubs)]
    return [*published, *(hub_id for ids in aliases().values() for hub_id in ids)]


def explain(error: BaseException, given: str, where: Reference) -> UsageError:
    """The clear error for one that the hub's client raised; `given` is the option with its value, as messages write it."""
    if isinstance(error, UsageError):
        return error
    page, host, token = where.page, host_of(endpoint()), token_place()
    kinds = {cls.__name__ for each in network.chain(error) for cls in type(each).__mro__}
    status = status_of(error)
    if full := network.full_disk(error, cache_folder(), OTHER_DISK):
        return full
    if isinstance(error, Busy) or status == 429:
        return busy(error, given, host, token)
    if isinstance(error, Silence):
        return silence(error, given, where, host)
    if "GatedRepoError" in kinds:
        who = f"{token} has no access yet" if token else "no access token is set"
        hint = f"accept the licence on {page} and set HF_TOKEN to a token of that account ({endpoint()}/settings/tokens)"
        return UsageError(f"{given}: {where.hub_id} is gated: its owner lets in only those who asked, and {who}", hint)
    if "DisabledRepoError" in kinds or status == 451:
        return InputRefused(f"{given}: the hub has closed {where.hub_id} ({status})", "give another repository")
    if "RevisionNotFoundError" in kinds:
        hint = f"give a branch, tag or commit of {page}/commits"
        return UsageError(f"{given}: {where.hub_id} has no revision {where.revision or 'main'}", hint)
    if "RemoteEntryNotFoundError" in kinds:
        return UsageError(f"{given}: {where.hub_id} has no file {where.path}", f"{page}/tree/main lists them")
    if status == 401 and token:  # a valid token of somebody who may not read a repository gets 404
        hint = "make a new one and set HF_TOKEN, or remove it: public repositories load without"
        return UsageError(f"{given}: the hub does not accept {token}: it is wrong or has expired (401)", hint)
    if "RepositoryNotFoundError" in kinds or status in {401, 404}:
        return not_there(given, where, token)
    if status == 403:
        what = f"{token} may not read it" if token else "it is not open to everybody"
        return UsageError(f"{given}: the hub refuses {where.hub_id}: {what} (403)", f"see {page}, and the rights of the token")
    if status is not None and status >= 500:
        return Unreachable(f"{given}: {host} has a fault of its own ({status})", "try again in some minutes")
    if "OfflineModeIsEnabled" in kinds:
        return offline(given, str(where))
    if found := network.cause(error, host):
        return Unreachable(f"{given}: {found[0]}", found[1])
    if status is not None:
        return Failed(f"{given}: {host} answers {status} for {where}", f"see {page}")
    if kinds & {"JSONDecodeError", "FileMetadataError"}:
        hint = "a login page of the network, a firewall or a wrong HF_ENDPOINT may stand between"
        return Unreachable(f"{given}: what {host} answers is not from a hub", hint)
    if clear := device_error(error):
        return clear
    return Failed(f"{given}: {where} cannot be downloaded ({type(error).__name__}: {one_line(error)})", f"see {page}")


def busy(error: BaseException, given: str, host: str, token: str) -> UsageError:
    """The error for a hub that refuses more requests for now."""
    wait = error.wait_s if isinstance(error, Busy) else None
    hint = f"run the command again in {wait} s" if wait else "run the command again in some minutes"
    hint += "" if token else "; with an access token (HF_TOKEN) the hub allows more"
    return Unreachable(f"{given}: {host} takes no more requests from here for now (429)", hint)


def silence(error: Silence, given: str, where: Reference, host: str) -> UsageError:
    """The error for a hub that was given up."""
    seconds = f"{network.patience_s():.0f} s"
    if error.status:
        return Unreachable(
            f"{given}: {host} has had a fault of its own for {seconds} ({error.status})", "try again in some minutes"
        )
    hint = "try again later; HF_HUB_DOWNLOAD_TIMEOUT=SECONDS waits longer"
    if error.broken == "stopped":
        return Unreachable(f"{given}: {host} stopped sending {where.hub_id} in the middle of a file, for {seconds}", hint)
    if error.broken:
        return Unreachable(f"{given}: {host} ends the connection in the middle of a file of {where.hub_id}", AGAIN)
    return Unreachable(f"{given}: {host} has not answered for {seconds}", f"{hint}; behind a proxy, name it in HTTPS_PROXY")


def not_there(given: str, where: Reference, token: str) -> UsageError:
    """The error for a repository that is not there or private, for which the hub gives one answer."""
    if token:
        message, hint = f"or a private one that {token} may not read", "check the name"
    else:
        message = "or a private one: without an access token the hub says the same of both"
        hint = "check the name; for a private one set HF_TOKEN"
    what, meant = ("repository", near(where.hub_id, known_ids())) if where.kind == "model" else ("data set", "")
    return NotThere(f"{given}: no such {what} on the hub ({where.hub_id}), {message}", hint + meant)


def offline(given: str, what: str) -> UsageError:
    """The error for something that is not on this machine where downloads are forbidden."""
    hint = "drop `offline` (or HF_HUB_OFFLINE) to download it, or give a folder or file of this machine"
    return Offline(f"{given}: {what} is not on this machine, and nothing is downloaded offline", hint)


def reason(error: Unreachable, given: str) -> str:
    """Why the hub cannot be asked, without the option's name."""
    return "nothing is asked of the hub offline" if isinstance(error, Offline) else str(error).removeprefix(f"{given}: ")


def partial(error: Unreachable, given: str, where: Reference, what: str) -> Unreachable:
    """The error for something that the part of a repository on this machine lacks, while the hub cannot be asked for the rest.

    `what` says what is missing, as "no weights".
    """
    return type(error)(f"{given}: what this machine has of {where} has {what}, and {reason(error, given)}", error.hint)


def in_words(error: Exception) -> str:
    """Why another library could not take something from the hub, in words; else the first line of what it says."""
    clear = explain(error, "", Reference("the hub"))
    if isinstance(clear, Offline):  # whose message names what is wanted, which the library does not tell
        return "they are not on this machine, and nothing is downloaded offline"
    return one_line(error) if isinstance(clear, Failed) else str(clear).removeprefix(": ")
