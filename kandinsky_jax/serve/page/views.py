"""The page's HTML that changes: progress and results, the gallery, and the selected picture."""

from __future__ import annotations

import html
from collections.abc import Sequence

from PIL import Image

from kandinsky_jax.serve.page.encoding import data_url, duration
from kandinsky_jax.serve.page.sessions import KeptPicture, Session
from kandinsky_jax.serve.tickets import Progress

NO_PICTURES = '<p class="kj-empty">Pictures that you generate are kept here until you close the tab.</p>'
SPOKEN = 0.25  # share of the work after which a screen reader hears of it again


def empty() -> str:
    """Return the result's place before there is one."""
    hint = 'Describe a picture and press Generate<span class="kj-keys">, or Ctrl + Enter</span>.'
    return _result("", f'<p class="kj-empty">{hint}</p>', running=False)


def working(status: str, note: str = "") -> str:
    """Return the view of a request that has not begun."""
    return _result(
        status, f'<div class="kj-bar"><progress aria-label="Progress"></progress></div>{_note(note)}', running=True
    )


def progress(event: Progress, alt: str, note: str = "", of: str = "") -> str:
    """Return the view of pictures that form.

    Args:
        event: what is known of them.
        alt: what they show.
        note: about the request.
        of: which of several requests it is.
    """
    parts = [of] if of else []
    parts += (
        [f"step {event.step} of {event.steps}"] if event.step else ["reading the prompt"] * (not any(event.previews))
    )
    parts += [f"{duration(event.seconds_left)} left"] if event.seconds_left is not None else []
    percent = round(100 * event.done)
    bar = (
        f'<div class="kj-bar"><progress max="100" value="{percent}" aria-label="Progress">{percent} %</progress>'
        f'<span class="kj-left">{html.escape(" · ".join(parts))}</span></div>'
    )
    label = html.escape(f"Preview: {alt}", quote=True)
    frames = [
        _frame(f'<img src="{_small(one)}" alt="{label}">', "kj-forming") if one else _blank() for one in event.previews
    ]
    spoken = int(event.done / SPOKEN) * round(100 * SPOKEN)
    return _result(
        "Generating",
        bar + _frames(frames) + _note(note),
        running=True,
        spoken=f", {spoken} % done" if spoken else "",
    )


def finished(kept: Sequence[KeptPicture], key: str, note: str, seconds: float, made: str = "") -> str:
    """Return the view of finished pictures; `made` says what they are, where that is not their number."""
    frames = []
    for one in kept:
        address = _address(key, one)
        image = f'<img src="{address}" alt="{_quoted(one.alt)}">'
        frames.append(_frame(f'<a href="{address}" target="_blank">{image}</a>'))
    what = made or ("1 picture" if len(kept) == 1 else f"{len(kept)} pictures")
    return _result(f"{what} in {duration(seconds)}", _frames(frames) + _note(note), running=False)


def stopped(message: str, kept: str = "") -> str:
    """Return the view of a request that was cancelled; `kept` says what there is of it."""
    content = kept or "Nothing was generated."
    return _result(message, f'<p class="kj-empty">{html.escape(content)}</p>', running=False)


def failed(message: str) -> str:
    """Return the view of an error."""
    return _result("", f'<p class="kj-error" role="alert">{html.escape(message)}</p>', running=False)


def notice(message: str, wrong: bool = False) -> str:
    """Return a message about what a button did."""
    kind, role = ("kj-error", "alert") if wrong else ("kj-notice", "status")
    return f'<p class="{kind}" role="{role}">{html.escape(message)}</p>'


def gallery(session: Session) -> str:
    """Return the session's pictures as buttons, the newest first."""
    pictures = session.listed()
    if not pictures:
        return NO_PICTURES
    chosen = session.selection
    thumbs = [
        f'<button type="button" class="kj-thumb" data-number="{one.number}" '
        f'aria-pressed="{str(one is chosen).lower()}" aria-label="Picture {one.number}: {_quoted(one.alt)}">'
        f'<img src="session/{session.key}/{one.number}.webp" alt="" loading="lazy"></button>'
        for one in reversed(pictures)
    ]
    every = f'<a class="kj-link" href="session/{session.key}/all.zip" download="kandinsky.zip">Download all</a>'
    group = f'<div class="kj-thumbs" data-key="{session.key}" role="group" aria-label="Gallery">'
    return f"{group}{''.join(thumbs)}</div><p>{every}</p>"


def selected(session: Session) -> str:
    """Return the selected picture, its settings and its download."""
    one = session.selection
    if one is None:
        return ""
    return (
        f'<figure class="kj-selected"><img src="{_address(session.key, one)}" alt="{_quoted(one.alt)}" '
        f'width="{one.size[0]}" height="{one.size[1]}">'
        f'<figcaption><p><a class="kj-link" href="{_address(session.key, one)}" download="{one.name}">Download</a> '
        f"Picture {one.number}, {one.size[0]} x {one.size[1]}</p>"
        f'<pre class="kj-about" tabindex="0" aria-label="Settings of the picture">{html.escape(one.about)}</pre>'
        "</figcaption></figure>"
    )


def _result(status: str, content: str, running: bool, spoken: str = "") -> str:
    """Return the result's place; `spoken` is a part of the status for screen readers only."""
    unseen = f'<span class="kj-unseen">{html.escape(spoken)}</span>' if spoken else ""
    return (
        f'<div data-running="{str(running).lower()}"><p class="kj-status" role="status" aria-live="polite">'
        f"{html.escape(status)}{unseen}</p><div>{content}</div></div>"
    )


def _frames(frames: Sequence[str]) -> str:
    return f'<div class="kj-frames" data-count="{len(frames)}">{"".join(frames)}</div>'


def _frame(content: str, kind: str = "") -> str:
    return f'<div class="kj-frame {kind}">{content}</div>'


def _blank() -> str:
    return _frame('<span class="kj-blank"></span>', "kj-forming")


def _note(note: str) -> str:
    return f'<p class="kj-small">{html.escape(note)}</p>' if note else ""


def _small(preview: Image.Image) -> str:
    return data_url(preview, lossless=max(preview.size) <= 32)


def _address(key: str, one: KeptPicture) -> str:
    return f"session/{key}/{one.number}.png"


def _quoted(text: str) -> str:
    return html.escape(text, quote=True)
