"""Fast adapters of models: which LoRA file belongs to which network of a model's folders, and with which settings.

`recommended_settings.json` names them, see `recommended_settings.FastSettings`.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kandinsky_jax.checkpoint import hub, recommended_settings
from kandinsky_jax.checkpoint.recommended_settings import FILE, NO_SETTINGS, FastSettings, RecommendedSettings
from kandinsky_jax.common.errors import CheckpointError, shorten


@dataclass(frozen=True)
class FastAdapter:
    """The fast adapter of one network.

    Attributes:
        path: its LoRA file.
        settings: made for it; those of a prior's adapter are the prior's alone.
    """

    path: Path
    settings: FastSettings

    def check(self) -> None:
        """Raise CheckpointError where the file is missing."""
        if self.path.is_file():
            return
        advice = "put it there, or remove `fast` from that file"
        if hub.is_in_cache(self.path.parent):
            advice = "load the model without local_files_only or HF_HUB_OFFLINE once, which fetches it"
        raise CheckpointError(
            f"{shorten(str(self.path), 240)} is not there, which {FILE} names as a fast adapter: {advice}"
        )


def of_folder(folder: Path, component: str) -> FastAdapter | None:
    """Return the fast adapter of a network in a model's folder, None where the folder names none.

    Args:
        component: the network's name in the folder: "unet", "prior", or "prior_prior" of a combined pipeline.
    Raises:
        CheckpointError: for a folder whose settings are not valid.
    """
    fast = recommended_settings.read(folder).fast
    if fast is None:
        return None
    name = fast.prior_lora if component == "prior_prior" else fast.lora
    if component != "unet":
        fast = FastSettings(**fast.prior_arguments())
    return None if name is None else FastAdapter(folder / name, fast)


def of_model(folders: Sequence[Path]) -> tuple[FastAdapter | None, FastAdapter | None]:
    """Return the fast adapters of a UNet and of its prior, whose files are there.

    Args:
        folders: see `hub.with_prior`.
    Raises:
        CheckpointError: where neither has one, for a file that is missing, or settings that are not valid.
    """
    decoder, *prior = folders
    unet = of_folder(decoder, "unet")
    found = (unet, of_folder(prior[0], "prior") if prior else of_folder(decoder, "prior_prior"))
    if found == (None, None):
        raise no_adapter(folders)
    for adapter in found:
        if adapter is not None:
            adapter.check()
    return found


def settings_of_model(folders: Sequence[Path], fast: bool) -> RecommendedSettings:
    """Return the settings of a combined call that a model recommends.

    Args:
        folders: see `hub.with_prior`.
        fast: with its fast adapters, whose settings come first: the decoder's, but for the prior what its folder says.
    Raises:
        CheckpointError: see `of_model`.
    """
    found = recommended_settings.of_model(folders)
    if not fast:
        return found
    unet, prior = of_model(folders)
    of_prior = recommended_settings.read(folders[1]) if len(folders) > 1 else NO_SETTINGS
    adapters = [None if adapter is None else adapter.settings for adapter in (unet, prior)]
    return with_adapters(found, adapters[0], of_prior, adapters[1])


def with_adapters(
    settings: RecommendedSettings, unet: FastSettings | None, of_prior: RecommendedSettings, prior: FastSettings | None
) -> RecommendedSettings:
    """Return settings where fast adapters are applied.

    Args:
        settings: of the model.
        unet, prior: settings of the adapters, None for one that is not applied.
        of_prior: what the prior's own folder recommends, which counts before the UNet's adapter for the prior.
    """
    found = settings if unet is None else settings.with_fast(unet).with_prior(of_prior)
    return found if prior is None else found.with_fast(prior)


def no_adapter(folders: Sequence[Path]) -> CheckpointError:
    """Return the error for a model without a fast adapter."""
    where = " and ".join(shorten(str(folder), 200) for folder in folders)
    return CheckpointError(
        f"{where} {'has' if len(folders) == 1 else 'have'} no fast adapter: needed is a model whose {FILE} names one "
        "under `fast`; use this one without, or load a LoRA of your own and set the scheduler and the steps of it"
    )


def merged(unet: FastAdapter | None, prior: FastAdapter | None) -> FastSettings:
    """Return the settings of a combined call: where both adapters have one for the prior, that of the prior's."""
    given = {} if unet is None else unet.settings.given()
    given |= {} if prior is None else prior.settings.given()
    return FastSettings(**given)


def copy(adapters: tuple[FastAdapter | None, FastAdapter | None], folder: Path) -> FastSettings | None:
    """Copy the files of a UNet's and a prior's adapter into one folder, and return the settings that name them there.

    A file that is not there any more is left out, with a warning.
    """
    kept = []
    for adapter in adapters:
        try:
            if adapter is not None:
                adapter.check()
            kept.append(adapter)
        except CheckpointError as error:
            warnings.warn(f"saved without a fast adapter: {error}", stacklevel=4)
            kept.append(None)
    unet, prior = kept
    if unet is None and prior is None:
        return None
    names = [None if adapter is None else adapter.path.name for adapter in (unet, prior)]
    if unet is not None and names[0] == names[1]:
        names[1] = f"prior_{names[1]}"
    for adapter, name in zip(kept, names, strict=True):
        if adapter is not None and name is not None:
            shutil.copyfile(adapter.path, folder / name)
    return replace(merged(unet, prior), lora=names[0], prior_lora=names[1])
