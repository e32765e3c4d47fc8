"""What clients may send as events of the page, what they are told, and what the server keeps of them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from kandinsky_jax.serve.page.visitors import MAX_NAMES, MAX_UNDELIVERED
from tests.serve.browsers import Site, site, wait_until

pytestmark = [
    # Gradio's queue uses what pandas has deprecated.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]
JSON = {"content-type": "application/json"}
FILE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def server():
    with site(generates=False) as running:
        yield running


@pytest.fixture
def quiet(capfd, caplog):
    """Nothing is logged as an error; Gradio writes its own to stderr."""
    yield
    assert "Traceback" not in capfd.readouterr().err
    assert [one for one in caplog.records if one.levelname == "ERROR"] == []


def function(server: Site, name: str) -> int:
    """The number of the first function with this name in the page's code."""
    return next(number for number, one in server.blocks.fns.items() if one.name == name)


def event(server: Site, name: str = "on_generate", session: str = "tab", **values: object) -> dict[str, Any]:
    """An event in order, except for the values of the components with these labels."""
    labels = {label.replace("_", " "): value for label, value in values.items()}
    number = function(server, name)
    inputs = server.blocks.fns[number].inputs
    assert set(labels) <= {one.label for one in inputs}
    data = [labels.get(one.label, None if one.stateful else one.value) for one in inputs]
    return {"data": data, "fn_index": number, "session_hash": session, "trigger_id": None, "event_data": None}


def join(server: Site, given: object) -> httpx.Response:
    content = given if isinstance(given, bytes) else json.dumps(given).encode()
    return httpx.post(f"{server.url}/ui/gradio_api/queue/join", content=content, headers=JSON)


def outcome(server: Site, given: dict[str, Any]) -> dict[str, Any]:
    """The last message about an event."""
    assert join(server, given).status_code == 200
    address = f"{server.url}/ui/gradio_api/queue/data"
    with httpx.stream("GET", address, params={"session_hash": given["session_hash"]}) as answer:
        messages = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line]
    assert messages[-1]["msg"] == "close_stream"
    return messages[-2]


def said(server: Site, given: dict[str, Any]) -> str:
    """What an event that starts a run shows at once, before there are pictures."""
    address = f"{server.url}/ui/gradio_api/queue/data"
    assert join(server, given).status_code == 200
    with httpx.stream("GET", address, params={"session_hash": given["session_hash"]}) as answer:
        for line in answer.iter_lines():
            if "kj-error" in line:
                return line
    pytest.fail("there was no message")


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"[]",
            b"{",
            b'{"data": 1}',
            b"[" * 100_000,
            b"9" * 10_000,
            b'{"data": [NaN]}',
            b'{"data": [-Infinity]}',
        ),
        b'{"data": [' + b"1," * 2000 + b"1]}",
        json.dumps({"data": []}).encode("utf-16"),
    ],
    ids=range(10),
)
def test_bytes_that_are_no_event_are_refused(server, body):
    assert join(server, body).status_code == 400


@pytest.mark.parametrize(
    "wrong",
    [
        *({"fn_index": number} for number in (10**9, -1, True, "0", 0.0, None, [0], {}, 2**63)),
        *({"session_hash": name} for name in (None, "", 7, "../x", "a b", "x" * 65, "tab\n", [], {"a": 1}, "é")),
        *({"trigger_id": number} for number in (10**9, -1, "0", True, [], 1.0)),
        *({"event_data": data} for data in ("x", [], {"a": FILE}, {"a": [1]}, {"a": 1e999}, 5)),
        *({"data": data} for data in ([], [FILE], [None] * 100, None, {}, "x")),
        *({"api_name": "x"}, {"batched": True}, {"simple_format": True}, {"event_id": "x"}, {"oauth_token": "x"}),
    ],
    ids=str,
)
def test_events_that_the_page_does_not_have_are_refused(server, wrong):
    answer = join(server, event(server) | wrong)
    assert answer.status_code == 400
    assert answer.json()["error"]


@pytest.mark.parametrize("missing", ["fn_index", "session_hash", "data"])
def test_events_without_what_they_need_are_refused(server, missing):
    given = event(server)
    del given[missing]
    assert join(server, given).status_code == 400


@pytest.mark.parametrize(
    ("label", "value"),
    [
        *(("Prompt", value) for value in (7, True, ["x"], FILE, "\ud800")),
        *(("Pictures", value) for value in ("1", True, [1], {}, "x" * 10**6)),
        *(("Scheduler", value) for value in (1, ["euler"], FILE)),
        *(("Fast mode", value) for value in ("true", 1, [], "x")),
        *(("Seed after generating", value) for value in (1, [])),
    ],
    ids=lambda value: str(value)[:20],
)
def test_values_that_no_component_has_are_refused(server, label, value):
    answer = join(server, event(server, **{label.replace(" ", "_"): value}))
    assert answer.status_code == 400
    assert "data[" in answer.json()["error"]


def test_numbers_that_are_not_finite_are_refused(server):
    body = json.dumps(event(server, Pictures=77.5))
    for number in ("1e999", "-1e999", "NaN", "Infinity"):
        assert join(server, body.replace("77.5", number).encode()).status_code == 400


def test_the_functions_of_gradio_and_of_the_browser_alone_are_not_called(server):
    for name in ("on_unload", None):
        given = {"data": [], "fn_index": function(server, name), "session_hash": "tab"}
        assert join(server, given).status_code == 400


@pytest.mark.parametrize("query", ["", "session_hash=", "session_hash=a&session_hash=b", "session_hash=..%2Fx"])
def test_streams_of_tabs_without_a_name_are_refused(server, query):
    assert httpx.get(f"{server.url}/ui/gradio_api/queue/data?{query}").status_code == 400


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"Pictures": 99}, "Pictures is 99; needed is a number from 1 to 10"),
        ({"Pictures": None}, "Pictures is empty"),
        ({"Pictures": -1e300}, "needed is a number from 1 to 10"),
        ({"Pictures": 10**400}, "needed is a number from 1 to 10"),
        ({"Size,_width_x_height": "640x641"}, "640x641"),
        ({"Scheduler": "none"}, "none"),
        ({"Scheduler": "euler", "Its_variant": "none"}, "none"),
        ({"Seed": "x" * 10_000}, "The seed is"),
        ({"Steps": "nan"}, "Steps is"),
        ({"Guidance_scale": "nan"}, "Guidance scale"),
        ({"Guidance_scale": "1e999"}, "Guidance scale"),
        ({"Prompt": None}, "empty"),
        ({"Prompt": "x" * 100_000}, "characters"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_that_cannot_be_used_are_told_on_the_page(server, quiet, values, says):
    assert says in said(server, event(server, **({"Prompt": "a red circle"} | values)))


@pytest.mark.parametrize(
    "values",
    [
        {"X:_setting": "Colour"},
        {"X:_setting": None, "Y:_setting": None},
        {"X:_values": "9" * 10_000},
        {"X:_values": "1e400", "X:_setting": "Guidance scale"},
        {"X:_values": "-5", "X:_setting": "Seed"},
    ],
    ids=lambda values: str(values)[:30],
)
def test_values_of_a_grid_that_cannot_be_used_are_told_on_the_page(server, quiet, values):
    assert "kj-error" in said(server, event(server, "on_grid", Prompt="x", **({"X:_values": "2"} | values)))


def test_buttons_of_an_empty_gallery_say_what_is_missing(server, quiet):
    for name in ("on_use", "on_settings"):
        last = outcome(server, event(server, name))
        assert last["success"]
        assert "hoose a picture of the gallery" in json.dumps(last["output"]["data"])


def test_a_picture_that_is_picked_may_be_gone(server, quiet):
    for data in (None, True, {}, {"number": 10**30}, {"number": "1"}, {"number": 1.5}):
        assert outcome(server, event(server, "on_pick") | {"event_data": data})["success"]


def test_what_is_dropped_and_is_no_picture_is_told(server, quiet):
    for text in (None, "", "x", "data:image/png;base64,AAAA"):
        given = event(server, "on_drop") | {"data": [text]}
        assert "Not restored" in json.dumps(outcome(server, given)["output"]["data"])


# What is kept -----------------------------------------------------------------------------------------------------


def test_names_that_are_made_up_are_forgotten(server):
    queue, holder = server.blocks._queue, server.blocks.state_holder
    body = event(server, "on_cancel")
    address = f"{server.url}/ui/gradio_api/queue/join"
    with httpx.Client() as client, httpx.stream("GET", f"{server.url}/ui/gradio_api/heartbeat/open") as heartbeat:
        beats = heartbeat.iter_text()
        assert next(beats)
        assert client.post(address, json=body | {"session_hash": "open"}).status_code == 200
        for number in range(MAX_NAMES + 20):
            assert client.post(address, json=body | {"session_hash": f"made-up-{number}"}).status_code == 200
        wait_until(lambda: not queue.event_ids_to_events)
        assert len(queue.pending_messages_per_session) <= MAX_NAMES + 1
        assert len(queue.pending_event_ids_session) <= MAX_NAMES + 1
        assert len(holder.session_data) <= MAX_NAMES
        assert len(queue.event_analytics) <= MAX_NAMES
        assert "open" in queue.pending_event_ids_session


def test_a_tab_that_fetches_nothing_sends_few_events(server):
    queue, body = server.blocks._queue, event(server, "on_cancel", session="silent")
    statuses = {join(server, body).status_code for _ in range(2 * MAX_UNDELIVERED)}
    assert statuses == {200}  # those before are forgotten
    assert len(queue.pending_event_ids_session["silent"]) <= MAX_UNDELIVERED
    with httpx.stream("GET", f"{server.url}/ui/gradio_api/heartbeat/silent") as heartbeat:
        beats = heartbeat.iter_text()
        assert next(beats)
        answers = [join(server, body) for _ in range(MAX_UNDELIVERED + 1)]
    assert answers[-1].status_code == 429
