"""Finding models: embedded in this package, in a folder, or in a Hub repository."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from kandinsky_jax.checkpoint import orbax, recommended_settings
from kandinsky_jax.checkpoint.tensor_files import PREFERRED, STEMS, ZERO_EMBED, WeightSelection, find, variant_of
from kandinsky_jax.common.errors import MAX_MESSAGE, CheckpointError, shorten
from kandinsky_jax.common.storage import read_json
from kandinsky_jax.models.config import ConfigError
from kandinsky_jax.schedulers.noise_schedule import SchedulerError

PRIOR, DECODER = "kandinsky-2-2-prior", "kandinsky-2-2-decoder"
INPAINT, CONTROLNET = "kandinsky-2-2-decoder-inpaint", "kandinsky-2-2-controlnet-depth"
OFFICIAL = "kandinsky-community"

# The trained small model that is shipped with the package.
EMBEDDED = {"tiny": Path(__file__).parents[1] / "tiny"}

# The safetensors of this repository are in a pull request that was never merged; its main branch has pickles only.
_REVISIONS = {f"{OFFICIAL}/{CONTROLNET}": "refs/pr/5"}

_COMPONENT = re.compile(r"[a-z][a-z0-9_]*")
_REPOSITORY = re.compile(r"(?![.-])[\w.-]{1,96}/(?![.-])[\w.-]{1,96}")  # "./here" and "../there" are paths
_SMALL_FILES = ("*.json", "*.txt", "params/**", ZERO_EMBED)
_INDEX = ("model_index.json", "README.md", "kandinsky_jax_manifest.json", "recommended_settings.json")

MOST_WAITS = 6  # for a Hub that answers 429 or 5xx
LONGEST_WAIT = 60.0  # seconds, of one of them

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class HubOptions:
    """Options for downloads from the Hub, as in diffusers.

    Attributes:
        revision: a branch, tag, commit or `refs/pr/N`.
        cache_dir: folder of Hub files; None is that of huggingface_hub.
        token: for private and gated repositories; None is that of `hf auth login`.
        local_files_only: use the cache only, without requests.
        force_download: download files again that are in the cache.
        subfolder: of the repository or folder that holds the model.
        selection: which tensor files, if there are several.
    """

    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str | None = None
    selection: WeightSelection = PREFERRED

    def __post_init__(self) -> None:
        if self.subfolder is not None and not isinstance(self.subfolder, str):
            raise TypeError(f"subfolder must be a string, got {shorten(self.subfolder)}")
        parts = Path(self.subfolder).parts if self.subfolder else ()
        if ".." in parts or (self.subfolder and Path(self.subfolder).is_absolute()):
            raise ValueError(f"subfolder must lie within the model, got {shorten(self.subfolder)}")


def resolve(name: str | os.PathLike[str], repository: str, **options: Any) -> Path:
    """Return the local folder of a model, with `model_index.json` in it.

    Args:
        name: an embedded model ("tiny", or one of its family, "tiny/kandinsky-2-2-prior"), a folder, or a Hub
            repository ("owner/name"). A folder may also hold a whole family, subfolders named as the official
            repositories; then `repository` picks one.
        repository: member of a model family, such as "kandinsky-2-2-decoder".
        options: see `HubOptions`.
    Raises:
        CheckpointError: saying what was looked for.
    """
    where = HubOptions(**options)
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"a model is named by a string or a path, got {shorten(name)}")
    embedded, _, member = str(name).partition("/")
    if embedded in EMBEDDED and not os.path.exists(name):
        member = member or where.subfolder or ""
        if member not in ("", PRIOR, DECODER, INPAINT, CONTROLNET):
            raise _no_member(name, embedded)
        return EMBEDDED[embedded] / (member or repository)
    folder = Path(name)
    if os.path.isdir(folder):  # false for a name that is too long
        folder = folder / (where.subfolder or "")
        for candidate in (folder, folder / repository):
            if os.path.isfile(candidate / "model_index.json"):
                return candidate
        raise CheckpointError(
            f"{shorten(str(folder), 240)} has no model_index.json, and no subfolder {repository} with one: it is no "
            "model in diffusers' layout or ours"
        )
    if _REPOSITORY.fullmatch(str(name)):
        return _download_model(str(name), where)
    raise CheckpointError(
        f"{shorten(str(name))} is not a folder here, no embedded model ({', '.join(EMBEDDED)}) and no Hub repository "
        "(owner/name)"
    )


def _no_member(name: str | os.PathLike[str], embedded: str) -> CheckpointError:
    return CheckpointError(f"{shorten(str(name))}: {embedded} has {PRIOR}, {DECODER}, {INPAINT} and {CONTROLNET}")


def resolve_component(name: str | os.PathLike[str], weights: bool = True, **options: Any) -> Path:
    """Return the local folder of one component, such as a network or a scheduler.

    Args:
        name: a folder, a Hub repository, or one of an embedded model ("tiny/kandinsky-2-2-decoder").
        weights: whether to download a network's tensors too, or only its small files.
        options: see `HubOptions`; `subfolder` is the component's within a model.
    Raises:
        CheckpointError: saying what was looked for.
    """
    where = HubOptions(**options)
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"a component is named by a string or a path, got {shorten(name)}")
    subfolder = where.subfolder or ""
    embedded, _, member = str(name).partition("/")
    folder = Path(name)
    if embedded in EMBEDDED and not os.path.exists(name):
        if member.partition("/")[0] not in ("", PRIOR, DECODER, INPAINT, CONTROLNET):
            raise _no_member(name, embedded)
        folder = EMBEDDED[embedded] / member
    if os.path.isdir(folder):
        if os.path.isdir(folder / subfolder):
            return folder / subfolder
        raise CheckpointError(_no_subfolder(name, folder, subfolder))
    if _REPOSITORY.fullmatch(str(name)):
        fetch = _fetch_component_files if weights else _fetch_small_files
        return fetch(str(name), where, [subfolder] if subfolder else [""]) / subfolder
    raise CheckpointError(f"{shorten(str(name))} is not a folder here and no Hub repository (owner/name)")


def _no_subfolder(name: str | os.PathLike[str], folder: Path, subfolder: str) -> str:
    """Return the message for a missing subfolder, which names members of a family that have it."""
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if members := [f"{name}/{member}" for member in there if (folder / member / subfolder).is_dir()]:
        return f"{shorten(str(name), 200)} is a family of models: give {' or '.join(members)} for {shorten(subfolder)}"
    has = shorten(", ".join(there)) if there else "none"
    return f"{shorten(str(folder), 240)} has no folder {shorten(subfolder)}; it has {has}"


def resolve_lora(name: str | os.PathLike[str], weight_name: str | None = None, **options: Any) -> Path:
    """Return the local LoRA file, or the folder that holds it.

    Args:
        name: a file, a folder, or a Hub repository.
        weight_name: the file's name in the folder or repository.
        options: see `HubOptions`.
    Raises:
        CheckpointError: where there is none of these, or the Hub cannot be reached.
    """
    where = HubOptions(**options)
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"LoRA is named by a string or a path, or given as a dictionary; got {shorten(name)}")
    subfolder = where.subfolder or ""
    if os.path.exists(name):
        return Path(name) / subfolder if os.path.isdir(name) else Path(name)
    if not _REPOSITORY.fullmatch(str(name)):
        raise CheckpointError(
            f"{shorten(str(name), 240)} is not a file or folder here and no Hub repository (owner/name)"
        )
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    usual = [weight_name] if weight_name else ["pytorch_lora_weights.*", "adapter_model.*"]
    for patterns in (usual, ["*.safetensors"]):
        folder = _fetch(str(name), where, [prefix + pattern for pattern in (*patterns, "adapter_config.json")])
        if any(path.suffix in (".safetensors", ".bin") for path in (folder / prefix).glob("*")):
            break
    return folder / prefix


def stored_folders(name: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Return the local folders of a model, one per downloaded revision; downloads nothing.

    Raises:
        CheckpointError: where there is nothing of it.
    """
    embedded, _, member = str(name).partition("/")
    if embedded in EMBEDDED and not os.path.exists(name):
        if not os.path.isdir(folder := EMBEDDED[embedded] / member):
            raise _no_member(name, embedded)
        return [folder]
    if os.path.isdir(name):
        return [Path(name)]
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = Path(cache_dir or HF_HUB_CACHE) / f"models--{str(name).replace('/', '--')}" / "snapshots"
    found = sorted(snapshots.iterdir()) if _REPOSITORY.fullmatch(str(name)) and snapshots.is_dir() else []
    if not found:
        is_name = _REPOSITORY.fullmatch(str(name))
        end = f" of which {shorten(str(snapshots.parent), 200)} has files" if is_name else " (owner/name)"
        models = ", ".join(EMBEDDED)
        raise CheckpointError(
            f"{shorten(str(name))} is not a folder here, no embedded model ({models}) and no Hub repository{end}"
        )
    return found


def is_in_cache(folder: Path) -> bool:
    """Return whether a folder is a revision in the Hub's cache."""
    return _CACHED.search(str(folder)) is not None


# Downloads from the Hub -------------------------------------------------------------------------------------------


def _download_model(repository: str, where: HubOptions) -> Path:
    prefix = f"{where.subfolder.strip('/')}/" if where.subfolder else ""
    root = _fetch(repository, where, [prefix + name for name in _INDEX] + ["README.md"])
    if adapters := recommended_settings.lora_files(root / prefix):
        _fetch(repository, where, [prefix + name for name in adapters])
    parts = [prefix + part for part in components(root / prefix)]
    return _fetch_component_files(repository, where, parts) / prefix


def _fetch_component_files(repository: str, where: HubOptions, parts: Iterable[str]) -> Path:
    """Download components' small files and the tensor files that are read; return the model's folder."""
    prefixes = _prefixes(parts := list(parts))
    folder = _fetch_small_files(repository, where, parts)
    lacking = [prefix for prefix in prefixes if (folder / prefix / "config.json").is_file()]
    for variant, form in _weight_kinds(where.selection):
        if not lacking:
            break
        folder = _fetch(repository, where, [p + name for p in lacking for name in _weight_patterns(variant, form)])
        lacking = [p for p in lacking if not _has_arrived(folder / p, where.selection, variant, form)]
    return folder


def _fetch_small_files(repository: str, where: HubOptions, parts: Iterable[str]) -> Path:
    return _fetch(repository, where, [prefix + name for prefix in _prefixes(parts) for name in _SMALL_FILES])


def _prefixes(parts: Iterable[str]) -> list[str]:
    return [f"{part}/" if part else "" for part in parts]


def _weight_kinds(selection: WeightSelection) -> list[tuple[str | None, str]]:
    """Return variants ("*" is any) and formats of tensor files, in order of preference."""
    forms = {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}[selection.use_safetensors]
    return [(variant, form) for variant in dict.fromkeys([selection.variant, None, "*"]) for form in forms]


def _weight_patterns(variant: str | None, form: str) -> list[str]:
    suffix, shard = f".{variant}" if variant else "", "-?????-of-?????"
    return [f"{stem}{name}.{form}" for stem in STEMS for name in (suffix, suffix + shard, shard + suffix)]


def _has_arrived(folder: Path, selection: WeightSelection, variant: str | None, form: str) -> bool:
    if (folder / orbax.FOLDER).is_dir():
        return True
    path = find(folder, selection)
    return path is not None and f".{form}" in path.name and variant in ("*", variant_of(path.name))


def _fetch(repository: str, where: HubOptions, patterns: list[str]) -> Path:
    """Download files of a repository into the Hub's cache.

    Raises:
        CheckpointError: for whatever goes wrong.
    """
    from huggingface_hub import snapshot_download

    revision = where.revision or _REVISIONS.get(repository)
    try:
        return _patiently(
            lambda: Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    cache_dir=None if where.cache_dir is None else Path(where.cache_dir),
                    token=where.token,
                    local_files_only=where.local_files_only,
                    force_download=where.force_download,
                    allow_patterns=patterns,
                )
            )
        )
    except Exception as error:  # of huggingface_hub, httpx and the disk: they share no base
        raise CheckpointError(_explain(repository, revision, where.local_files_only, error)) from None


def _patiently(action: Callable[[], T]) -> T:
    """Return the result of `action`, repeating it while the server is busy (429, 5xx)."""
    for attempt in range(MOST_WAITS + 1):
        try:
            return action()
        except Exception as error:
            response = _response_of(error)
            status = getattr(response, "status_code", None)
            if attempt == MOST_WAITS or not (status == 429 or (isinstance(status, int) and 500 <= status < 600)):
                raise
            wait = _wait(response, attempt)
            logging.getLogger(__name__).warning("the Hub answers %s; asking again in %.0f s", status, wait)
        time.sleep(wait)
    raise AssertionError("unreachable")


def _response_of(error: BaseException | None) -> Any:
    """Return the server's response that caused an error, which huggingface_hub may have wrapped."""
    for _ in range(10):
        if error is None or getattr(error, "response", None) is not None:
            break
        error = error.__cause__ or error.__context__
    return getattr(error, "response", None)


def _wait(response: Any, attempt: int) -> float:
    """Return the seconds to wait: as the server asks, or increasing; at most `LONGEST_WAIT`."""
    try:
        asked = float(response.headers.get("Retry-After", ""))
    except ValueError:
        asked = 2.0**attempt
    return min(max(asked, 0.0), LONGEST_WAIT)


def _explain(repository: str, revision: str | None, offline: bool, error: Exception) -> str:
    """Explain an error with a repository in one sentence, with what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return (
            f"{repository} is gated: accept its conditions on its page at the Hub, then `hf auth login` or give "
            "token=..."
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"{repository} is not on the Hub, or not open to you: `hf auth login`, or give token=..."
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no revision {shorten(repr(revision))} (a branch, tag, commit or refs/pr/N) on the Hub"
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    if (offline or constants.HF_HUB_OFFLINE) and isinstance(error, LocalEntryNotFoundError):
        which = f" with the revision {shorten(repr(revision))}" if revision else ""
        return (
            f"{repository}{which} is not in the Hub's cache, and only the cache was used, because of "
            "local_files_only or HF_HUB_OFFLINE; leave that out to fetch it, or give cache_dir="
        )
    reason = shorten(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__), 200)
    message = f"{repository} could not be fetched from the Hub: {reason.rstrip('. ')}"
    if isinstance(error, ValueError):
        return message
    if offline or constants.HF_HUB_OFFLINE:
        return message + ". Only the cache was used, because of local_files_only or HF_HUB_OFFLINE"
    return message + ". What has arrived is kept; call it again"


_CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+?)[/\\]snapshots")


@contextlib.contextmanager
def hint_for_cached_files() -> Iterator[None]:
    """Add to errors about files in the Hub's cache how to check them and download them again."""
    try:
        yield
    except (CheckpointError, ConfigError, SchedulerError) as error:
        if (cached := _CACHED.search(str(error))) is None:
            raise
        repository = f"{cached['owner']}/{cached['name']}"
        hint = f" (`kandinsky-jax verify {repository}` finds damaged files, force_download=True fetches them again)"
        raise type(error)(shorten(str(error), MAX_MESSAGE - len(hint)) + hint) from None


# Content of a model -----------------------------------------------------------------------------------------------


def components(folder: Path) -> dict[str, str]:
    """Return a model's components and their classes, from its `model_index.json`.

    Raises:
        CheckpointError: where the file is missing or damaged, or names a component that is not a plain folder name.
    """
    index = read_json(folder / "model_index.json")
    parts = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if value is None or isinstance(value, bool | int | float):
            continue  # an option of the pipeline, such as "requires_safety_checker", or a component that is not there
        if not (isinstance(value, list) and len(value) == 2 and all(isinstance(v, str | None) for v in value)):
            raise CheckpointError(
                f"{folder / 'model_index.json'}: {shorten(name)} should be [library, class], is {shorten(value)}"
            )
        if not _COMPONENT.fullmatch(name):
            raise CheckpointError(f"{folder / 'model_index.json'}: {shorten(repr(name))} is not a name of a component")
        if value[1] is not None:
            parts[name] = value[1]
    return parts


def pipeline_class(folder: Path) -> str:
    """Return the class that a `model_index.json` names."""
    return str(read_json(folder / "model_index.json").get("_class_name"))


def component_folder(folder: Path, name: str) -> Path:
    """Return the folder of a model's component.

    The decoders of a family may share one MoVQ, for it is the same in all of them: a decoder without one of its own has
    that of the folder `kandinsky-2-2-decoder` next to it.

    Raises:
        CheckpointError: if it is not found.
    """
    own = folder / name
    if own.is_dir():
        return own
    shared = folder.parent / DECODER / name
    if name != "movq" or not shared.is_dir():
        raise CheckpointError(f"{folder} has no folder {name}, which its model_index.json names")
    return shared


def find_prior(
    decoder: Path,
    prior: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Path:
    """Find the prior that belongs to a decoder.

    In this order: `prior`, where given; a folder `kandinsky-2-2-prior` next to the decoder's; the repository that the
    front matter of the decoder's README names under `prior:`. `options`: see `HubOptions`.
    """
    if prior is not None:
        return resolve(prior, PRIOR, **options)
    sibling = decoder.parent / PRIOR
    if (sibling / "model_index.json").is_file():
        return sibling
    readme = decoder / "README.md"
    if readme.is_file():
        named = _front_matter(readme).get("prior")
        named = named[0] if isinstance(named, list) and named else named
        if isinstance(named, str):
            return resolve(named, PRIOR, **options)
    raise CheckpointError(
        f"{decoder} does not say which prior belongs to it: there is no folder {sibling} and no `prior:` in the front "
        "matter of its README.md. Name one: from_pretrained(..., prior=FOLDER_OR_REPOSITORY), or --prior"
    )


def with_prior(
    decoder: Path,
    prior: str | os.PathLike[str] | None = None,
    **options: Any,
) -> list[Path]:
    """Return the folder of a decoder and that of its prior, see `find_prior`, or one folder that has both."""
    if any(name.startswith("prior_") for name in components(decoder)):
        return [decoder]
    return [decoder, find_prior(decoder, prior, **options)]


def _front_matter(readme: Path) -> dict[str, object]:
    """Return the YAML metadata of a model card; empty if there is none that can be read."""
    from huggingface_hub import ModelCard

    try:
        return ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # of PyYAML, of the model card's own checks, of the decoder: a README is no part of a model
        return {}
