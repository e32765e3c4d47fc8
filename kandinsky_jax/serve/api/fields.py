"""Fields of the API's requests: OpenAI's, and ours that clients send as extra fields."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from kandinsky_jax.common.errors import quote, shorten
from kandinsky_jax.serve.api.errors import ApiError

MAX_TEXT = 32_000  # characters of a prompt, as OpenAI has it
MAX_ITEMS = 16
MAX_VALUES = 200_000  # of a JSON body, commas and brackets in texts included
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_NONE = {"none", "null", ""}


def _json_text(value: Any) -> Any:
    """Read a list or an object that a multipart field holds as JSON."""
    if isinstance(value, str) and value[:1] in "[{":
        try:
            return from_json(value, allow_inf_nan=False)
        except ValueError:
            return value
    return value


def _listed(value: Any) -> Any:
    """Make a list of a field that is there once."""
    value = _json_text(value)
    return value if isinstance(value, list) or value is None else [value]


Text = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(max_length=200)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1, lt=2**63)]
Ignored = "Accepted and without effect."


class PictureItem(BaseModel):
    """A picture of a mix."""

    model_config = ConfigDict(extra="forbid")
    image: str = Field(description="PNG, JPEG or WebP in base64, or a data: URL.")


class TextItem(BaseModel):
    """A prompt of a mix."""

    model_config = ConfigDict(extra="forbid")
    text: Text


class CommonFields(BaseModel):
    """Fields of all three routes, each of which has its `PATH`."""

    model_config = ConfigDict(extra="forbid")
    PATH: ClassVar[str]

    model: Name | None = Field(None, description="The served model's name, see /v1/models; may be left out.")
    n: Count | None = Field(None, description="Pictures; default 1.")
    size: Name | None = Field(
        None, description='"WIDTHxHEIGHT" or "auto": the model\'s own, or the one nearest to a given picture.'
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description='"b64_json" (default), or "url" for data: URLs.'
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description='Default "png".')
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of JPEG and WebP, 0 to 100; default 95."
    )
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        None, description='"transparent" is refused: pictures are opaque.'
    )
    moderation: Literal["low", "auto"] | None = Field(None, description=Ignored)
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = Field(
        None, description=Ignored
    )
    user: Name | None = Field(None, description=Ignored)
    safety_identifier: Name | None = Field(None, description=Ignored)
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = Field(
        None, description="Previews of each picture in a stream, 0 to 3; default 0."
    )
    negative_prompt: Text | None = Field(None, description="What to avoid.")
    seed: Whole | None = Field(None, description="0 to 2**63 - 1; default: a fresh one, which the response has.")
    steps: Count | None = Field(None, description="Denoising steps of the decoder; default: the model's.")
    guidance_scale: Number | None = Field(None, description="Of the decoder; default: the model's.")
    prior_steps: Count | None = Field(None, description="Denoising steps of the prior; default: the model's.")
    prior_guidance_scale: Number | None = Field(None, description="Of the prior; default: the model's.")
    scheduler: Name | None = Field(None, description="Short name of the decoder's solver, such as dpm++2m-karras.")
    loras: Annotated[dict[Name, Number], BeforeValidator(_json_text)] | None = Field(
        None, description="Weights of LoRA files of the server's folder, by name."
    )
    fast: bool | None = Field(None, description="Use the model's fast adapter and its settings.")
    torch_noise: bool | None = Field(
        None, description="Use PyTorch's noise: the picture that diffusers generates with this seed."
    )

    @property
    def has_pictures(self) -> bool:
        """Whether there are pictures to decode."""
        return True


class GenerationFields(CommonFields):
    """Fields of /v1/images/generations."""

    PATH = "/v1/images/generations"
    prompt: Text = Field("", description="What to generate; may be left out where items are given.")
    style: Literal["vivid", "natural"] | None = Field(None, description=Ignored)
    hint: str | None = Field(None, description="Depth map, bright where near: base64 or a data: URL.")
    items: Annotated[list[Text | PictureItem | TextItem], Field(min_length=1, max_length=MAX_ITEMS)] | None = Field(
        None, description='A mix: prompts, and pictures as {"image": base64}.'
    )
    weights: Annotated[list[Number], Field(max_length=MAX_ITEMS)] | None = Field(
        None, description="A number for each item; default: equal ones with the sum 1."
    )

    @property
    def has_pictures(self) -> bool:
        """Whether there are pictures to decode."""
        return self.hint is not None or any(isinstance(item, PictureItem) for item in self.items or ())


Files = Annotated[list[bytes], BeforeValidator(_listed), Field(min_length=1, max_length=MAX_ITEMS)]


class EditFields(CommonFields):
    """Fields of /v1/images/edits."""

    PATH = "/v1/images/edits"
    image: Files = Field(description="A picture to change; several are mixed with the prompt.")
    prompt: Text = Field("", description="What to generate.")
    mask: bytes | None = Field(
        None, description="Transparent where the picture is repainted; without an alpha channel: white."
    )
    hint: bytes | None = Field(None, description="Depth map, bright where near.")
    input_fidelity: Literal["high", "low"] | None = Field(None, description=Ignored)
    strength: Number | None = Field(None, description="How far to depart from the picture, above 0, at most 1.")
    paste_back: bool | None = Field(None, description="Put the picture's own pixels back outside the mask.")
    weights: Annotated[list[Number], BeforeValidator(_listed), Field(max_length=MAX_ITEMS + 1)] | None = Field(
        None, description="Of several pictures: a number for the prompt, unless it is empty, and one for each picture."
    )


class VariationFields(CommonFields):
    """Fields of /v1/images/variations."""

    PATH = "/v1/images/variations"
    image: bytes = Field(description="The picture to vary.")
    prompt: Text = Field("", description="What to move the picture towards.")
    strength: Number | None = Field(None, description="How far to depart from the picture, above 0, at most 1.")


Fields = TypeVar("Fields", bound=CommonFields)


def from_json_body(kind: type[Fields], body: bytes | bytearray) -> Fields:
    """Read the fields of a JSON body; ApiError where they are wrong."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:  # each may take a hundred times its bytes
        raise ApiError(400, f"the body has more than {MAX_VALUES:,} values", code="invalid_body")
    try:
        given = from_json(body, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {shorten(str(error), 150)}", code="invalid_body") from None
    if not isinstance(given, dict):
        raise ApiError(400, f"the body is {quote(given, 60)}; needed is a JSON object", code="invalid_body")
    return _validated(kind, given, strict=True)


def from_form(kind: type[Fields], given: dict[str, Any]) -> Fields:
    """Read the fields of a multipart body, whose values are texts and files."""
    files = {"image", "mask", "hint"}
    for name, value in given.items():
        parts = value if isinstance(value, list) else [value]
        if name in files and name in kind.model_fields and not all(isinstance(part, bytes) for part in parts):
            raise ApiError(400, f"{name} is text; needed is a file part with a picture", name, "invalid_type")
        if name not in files and any(isinstance(part, bytes) for part in parts):
            raise ApiError(400, f"{quote(name, 60)} is a file part; needed is text", name, "invalid_type")
    texts = {name: None if isinstance(v, str) and name != "prompt" and v in _NONE else v for name, v in given.items()}
    return _validated(kind, texts, strict=False)


def _validated(kind: type[Fields], given: dict[str, Any], strict: bool) -> Fields:
    try:
        return kind.model_validate(given, strict=strict)
    except ValidationError as error:
        raise _as_api_error(error, kind) from None


def _as_api_error(error: ValidationError, kind: type[CommonFields]) -> ApiError:
    """Convert the first fault that was found."""
    fault = error.errors(include_url=False, include_context=False)[0]
    place = [str(part) for part in fault["loc"]]
    top = shorten(place[0], 60) if place else None
    if fault["type"] == "extra_forbidden" and len(place) == 1:
        names = ", ".join(kind.model_fields)
        text = f"{quote(place[0], 60)} is no field of {kind.PATH}; its fields are {names}"
        return ApiError(400, text, top, "unknown_parameter")
    if fault["type"] == "missing":
        return ApiError(400, f"{top} is missing", top, "missing_required_parameter")
    value = fault["input"]
    shown = quote(value, 60)
    if isinstance(value, bytes):
        shown = f"{len(value)} bytes"
    elif isinstance(value, list) and any(isinstance(one, bytes) for one in value):
        shown = f"{len(value)} files"
    return ApiError(400, f"{top} is {shown}: {shorten(fault['msg'], 150)}", top, "invalid_value")


def size_of(text: str | None) -> tuple[int | None, int | None]:
    """Return height and width of OpenAI's "WIDTHxHEIGHT"; None for "auto"."""
    if text is None or text == "auto":
        return None, None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ApiError(
            400,
            f'size is {quote(text, 60)}; needed is "auto" or WIDTHxHEIGHT, such as 512x768',
            "size",
            "invalid_value",
        )
    return int(match[2]), int(match[1])
