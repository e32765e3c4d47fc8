"""Where a model lies: embedded in this package, in a folder, or in a Hub repository."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from kandinsky_jax import orbax
from kandinsky_jax.storage import read_json
from kandinsky_jax.tensors.files import STEMS, ZERO_EMBED, CheckpointError, find

PRIOR, DECODER = "kandinsky-2-2-prior", "kandinsky-2-2-decoder"
INPAINT, CONTROLNET = "kandinsky-2-2-decoder-inpaint", "kandinsky-2-2-controlnet-depth"
OFFICIAL = "kandinsky-community"

# The pipelines that a repository of each kind serves: what its model_index.json may name.
KINDS = {
    PRIOR: ("KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline", "KandinskyPriorPipeline"),
    DECODER: (
        "KandinskyV22Pipeline",
        "KandinskyV22Img2ImgPipeline",
        "KandinskyV22CombinedPipeline",
        "KandinskyV22Img2ImgCombinedPipeline",
    ),
    INPAINT: ("KandinskyV22InpaintPipeline", "KandinskyV22InpaintCombinedPipeline"),
    CONTROLNET: (
        "KandinskyV22ControlnetPipeline",
        "KandinskyV22ControlnetImg2ImgPipeline",
        "KandinskyV22ControlnetCombinedPipeline",
        "KandinskyV22ControlnetImg2ImgCombinedPipeline",
    ),
}

# The trained small model that is shipped with the package.
EMBEDDED = {"tiny": Path(__file__).parent / "tiny"}

# The safetensors of this repository are in a pull request that was never merged; its main branch has pickles only.
_REVISIONS = {f"{OFFICIAL}/{CONTROLNET}": "refs/pr/5"}

_COMPONENT = re.compile(r"[a-z][a-z0-9_]*")
# Without the half-precision twins that some repositories hold beside them ("*.fp16.safetensors").
_FILES = (
    "*.json",
    "*.txt",
    "params/**",
    ZERO_EMBED,
    *(f"{stem}{end}" for stem in STEMS for end in (".safetensors", "-*.safetensors")),
)
_PICKLES = tuple(f"{stem}.bin" for stem in STEMS)


def resolve(
    name: str | os.PathLike[str],
    repository: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The local folder of a model, with `model_index.json` in it.

    Args:
        name: an embedded model ("tiny", or one of its family, "tiny/kandinsky-2-2-prior"), a folder, or a Hub
            repository ("owner/name"). A folder may also hold a whole family, subfolders named as the official
            repositories; then `repository` picks one.
        repository: which member of a family is wanted, such as "kandinsky-2-2-decoder".
        revision: of a Hub repository: a branch, tag, commit or `refs/pr/N`.
        cache_dir: where Hub files are kept; None is huggingface_hub's own.
    Raises:
        CheckpointError: saying what was looked for.
    """
    embedded, _, member = str(name).partition("/")
    if embedded in EMBEDDED and not Path(name).exists():
        if member not in ("", PRIOR, DECODER, INPAINT, CONTROLNET):
            raise CheckpointError(f"{name}: {embedded} has {PRIOR}, {DECODER}, {INPAINT} and {CONTROLNET}")
        return EMBEDDED[embedded] / (member or repository)
    folder = Path(name)
    if folder.is_dir():
        for candidate in (folder, folder / repository):
            if (candidate / "model_index.json").is_file():
                return candidate
        raise CheckpointError(
            f"{folder} has no model_index.json, and no subfolder {repository} with one: it is no model in diffusers' "
            "layout or ours"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return _download(str(name), revision or _REVISIONS.get(str(name)), cache_dir)
    raise CheckpointError(
        f"{name} is no folder here, no embedded model ({', '.join(EMBEDDED)}) and no Hub repository (owner/name)"
    )


def _download(repository: str, revision: str | None, cache_dir: Any) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    def fetch(patterns: list[str]) -> Path:
        try:
            return Path(snapshot_download(repository, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))
        except RepositoryNotFoundError:
            raise CheckpointError(f"{repository} is not on the Hub, or not open to you") from None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise CheckpointError(f"{repository} could not be fetched from the Hub: {reason}") from None

    root = fetch(["model_index.json", "README.md"])
    parts = components(root)
    folder = fetch(["model_index.json", "README.md"] + [f"{part}/{pattern}" for part in parts for pattern in _FILES])
    # Pickles only where there is nothing else.
    networks = [part for part in parts if (folder / part / "config.json").is_file()]
    bare = [p for p in networks if find(folder / p) is None and not (folder / p / orbax.FOLDER).is_dir()]
    return fetch([f"{part}/{pattern}" for part in bare for pattern in _PICKLES]) if bare else folder


def components(folder: Path) -> dict[str, str]:
    """A model's components and their classes, from its `model_index.json`.

    Raises:
        CheckpointError: where the file is missing or damaged, or names a component that is no plain folder name.
    """
    index = read_json(folder / "model_index.json")
    parts = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if not (isinstance(value, list) and len(value) == 2 and all(isinstance(v, str | None) for v in value)):
            raise CheckpointError(f"{folder / 'model_index.json'}: {name} should be [library, class], is {value!r}")
        if not _COMPONENT.fullmatch(name):
            raise CheckpointError(f"{folder / 'model_index.json'}: {name!r} is no name of a component")
        if value[1] is not None:
            parts[name] = value[1]
    return parts


def pipeline_class(folder: Path) -> str:
    """The class that a `model_index.json` names."""
    return str(read_json(folder / "model_index.json").get("_class_name"))


def kind(folder: Path) -> str | None:
    """Which of `KINDS` a model is; None for another one."""
    found = pipeline_class(folder)
    return next((name for name, classes in KINDS.items() if found in classes), None)


def component_folder(folder: Path, name: str) -> Path:
    """Where a model's component lies.

    The decoders of a family may share one MoVQ, for it is the same in all of them: a decoder without one of its own has
    the one of the folder `kandinsky-2-2-decoder` beside it.

    Raises:
        CheckpointError: where it lies nowhere.
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
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The prior that belongs to a decoder.

    In this order: `prior`, where given; a folder `kandinsky-2-2-prior` beside the decoder's; the repository that the
    front matter of the decoder's README names under `prior:`.
    """
    if prior is not None:
        return resolve(prior, PRIOR, revision=revision, cache_dir=cache_dir)
    beside = decoder.parent / PRIOR
    if (beside / "model_index.json").is_file():
        return beside
    readme = decoder / "README.md"
    if readme.is_file():
        from huggingface_hub import ModelCard

        named = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict().get("prior")
        named = named[0] if isinstance(named, list) and named else named
        if isinstance(named, str):
            return resolve(named, PRIOR, revision=revision, cache_dir=cache_dir)
    raise CheckpointError(
        f"{decoder} does not say which prior belongs to it: there is no folder {beside} and no `prior:` in the front "
        "matter of its README.md. Name one: from_pretrained(..., prior=FOLDER_OR_REPOSITORY)"
    )
