"""The playground in a real Chromium, against a server that plays the ingress with scripted replies."""

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from tests.support import ROOT
from tests.support.browser import DEADLINE, MISSING, chromium, open_page, send

if not MISSING:
    from playwright.sync_api import Browser, Locator, Page, expect

PAGE = ROOT / "serve" / "playground.html"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TASKS = ["arithmetic", "reverse", "sort", "logic", "facts", "prose"]
EXAMPLES = {"arithmetic": "12 + 7 =", "sort": "sort stone:", "logic": "not (true or false) and true is"}


# --- the browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as browser:
        yield browser


PageAt = Callable[..., "Page"]


@pytest.fixture
def page_at(browser: "Browser") -> Iterator[PageAt]:
    """``page_at(url, **context)``: the page, ready once the server named its models."""
    with ExitStack() as stack:
        yield lambda url, **context: stack.enter_context(open_page(url, browser, **context))


# --- the server ------------------------------------------------------------------------------------------------------


Reply = Callable[[dict[str, Any]], Response]


def card(name: str, kind: str, **metadata: Any) -> dict[str, Any]:
    return {"id": name, "object": "model", "metadata": {"kind": kind, **metadata}}


def default_cards(*, chat: bool = True, examples: dict[str, str] = EXAMPLES) -> list[dict[str, Any]]:
    size = {"ratio": 0.5, "parameters": 1_390_000, "chat": chat}
    experts = [
        card(task, "expert", task=task, **size, **({"example": examples[task]} if task in examples else {}))
        for task in TASKS
    ]
    router, general = card("auto", "router", tasks=TASKS, threshold=0.62), card("general", "general", **size)
    return [router, general, *experts]


def decision(model: str = "arithmetic", reason: str = "routed", confidence: float = 0.981) -> dict[str, Any]:
    best = model if model in TASKS else "logic"
    rest = (1 - confidence) / (len(TASKS) - 1)
    return {
        "model": model,
        "task": model if model in TASKS else None,
        "reason": reason,
        "confidence": confidence,
        "threshold": 0.62,
        "probabilities": {task: confidence if task == best else rest for task in TASKS},
    }


def event(data: Any) -> bytes:
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n".encode()


def delta(model: str, text: str) -> dict[str, Any]:
    """Of a chat and of a plain completion at once: each side reads its own."""
    return {"model": model, "choices": [{"index": 0, "delta": {"content": text}, "text": text, "finish_reason": None}]}


def speaks(
    *pieces: str,
    model: str | None = None,
    hold: threading.Event | None = None,
    pause: float = 0.0,
    tokens: int | None = None,
    finish: str = "stop",
    headers: dict[str, str] | None = None,
    gone: threading.Event | None = None,
) -> Reply:
    """Say the pieces one by one; the last one once ``hold`` is set. ``gone`` is set when the client hangs up."""

    async def stream(name: str) -> AsyncIterator[bytes]:
        try:
            for i, piece in enumerate(pieces):
                if hold and i == len(pieces) - 1:
                    while not hold.is_set():
                        await asyncio.sleep(0.01)
                await asyncio.sleep(pause)
                yield event(delta(name, piece))
            yield event({"model": name, "choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": finish}]})
            if tokens is not None:
                yield event({"model": name, "choices": [], "usage": {"completion_tokens": tokens}})
            yield event("[DONE]")
        except asyncio.CancelledError:
            if gone:
                gone.set()
            raise

    def reply(body: dict[str, Any]) -> Response:
        name = model or ("arithmetic" if body["model"] == "auto" else body["model"])
        reason = "routed" if body["model"] == "auto" else "named"
        seap = {"x-seap-expert": name, "x-seap-reason": reason, "x-request-id": "req-7f3a", **(headers or {})}
        if reason == "routed":
            seap.setdefault("x-seap-confidence", "0.981")
        return StreamingResponse(stream(name), media_type="text/event-stream", headers=seap)

    return reply


def writes(*parts: bytes, breaks: threading.Event | None = None) -> Reply:
    """These bytes, each in a read of its own; the connection breaks once ``breaks`` is set."""

    async def stream() -> AsyncIterator[bytes]:
        for part in parts:
            yield part
            await asyncio.sleep(0.03)
        if breaks:
            while not breaks.is_set():
                await asyncio.sleep(0.01)
            raise ConnectionResetError

    return lambda body: StreamingResponse(stream(), media_type="text/event-stream")


def refuses(status: int, message: str, **headers: str) -> Reply:
    error = {"message": message, "type": "error", "param": None, "code": status}
    return lambda body: JSONResponse({"error": error}, status, {k.replace("_", "-"): v for k, v in headers.items()})


class Ingress:
    """What the page sees of the product; tests set what it says and read what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.cards = default_cards()
        self.models: Reply | None = None
        self.route: Reply = lambda body: JSONResponse(decision())
        self.replies: dict[str, Reply] = {}
        self.authorization: str | None = None
        self.asked: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        paths = [
            Route("/", self.page),
            Route("/v1/models", self.list_models),
            Route("/v1/route", self.answer, methods=["POST"]),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
            Route("/v1/completions", self.answer, methods=["POST"]),
        ]
        bare = [Route("/seap", self.page), Mount("/seap", routes=paths)]
        self.app = Starlette(routes=[*bare, *paths])

    async def page(self, request: Request) -> Response:
        return Response(PAGE.read_bytes(), media_type="text/html", headers={"content-security-policy": POLICY})

    async def list_models(self, request: Request) -> Response:
        if refusal := self.refusal(request):
            return refusal
        return self.models({}) if self.models else JSONResponse({"object": "list", "data": self.cards})

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append((request.url.path, body, dict(request.headers)))
        if refusal := self.refusal(request):
            return refusal
        if request.url.path.endswith("/route"):
            return self.route(body)
        return self.replies.get(body["model"], speaks("19", tokens=1))(body)

    def refusal(self, request: Request) -> Response | None:
        if self.authorization in (None, request.headers.get("authorization")):
            return None
        return refuses(401, "Invalid API key", www_authenticate=self.authorization.split()[0])({})

    def requests(self, ending: str = "completions") -> list[tuple[str, dict[str, Any], dict[str, str]]]:
        return [each for each in self.asked if each[0].endswith(ending)]


class Stage:
    """The one server of the module, on which every test puts an ingress of its own."""

    def __init__(self) -> None:
        self.ingress = Ingress()
        config = uvicorn.Config(self, port=0, log_level="critical", lifespan="off", loop="asyncio", ws="none")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.ingress.app(scope, receive, send)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/"


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    stage = Stage()
    stage.thread.start()
    while not stage.server.started:
        assert stage.thread.is_alive()
        time.sleep(0.01)
    yield stage
    stage.server.should_exit = stage.server.force_exit = True
    stage.thread.join(DEADLINE)


@pytest.fixture
def ingress(stage: Stage) -> Ingress:
    stage.ingress = Ingress()
    stage.ingress.url = stage.url
    return stage.ingress


# --- the page, in the words of its user ------------------------------------------------------------------------------


def pane(page: "Page", letter: str = "A") -> "Locator":
    return page.get_by_role("region", name=f"Pane {letter}")


def reply(page: "Page", letter: str = "A") -> "Locator":
    """What the model wrote, without the raw prompt that stands before it."""
    return page.get_by_role("region", name=f"Reply {letter}").locator(".text")


def number(page: "Page", name: str, letter: str = "A") -> str:
    return pane(page, letter).locator("dt", has_text=re.compile(f"^{name}$")).locator("+ dd").inner_text()


def milliseconds(text: str) -> float:
    value, unit = text.split()
    return float(value) * {"ms": 1, "s": 1000}[unit]


def state(page: "Page", text: str, letter: str = "A") -> None:
    expect(pane(page, letter).locator(".state")).to_have_text(text)


def row(page: "Page", name: str) -> "Locator":
    return page.get_by_role("list", name="Probability of each task").locator(f"li[data-task='{name}']")


def why(page: "Page") -> "Locator":
    return page.get_by_role("region", name="Routing").get_by_role("status")


# --- the reply -------------------------------------------------------------------------------------------------------


def test_a_reply_streams_in_and_its_speed_is_shown(ingress: Ingress, page_at: PageAt) -> None:
    hold = threading.Event()
    ingress.replies["auto"] = speaks("1", "9", " is it", hold=hold, pause=0.05, tokens=7)
    page = page_at(ingress.url)
    send(page)
    expect(reply(page)).to_have_text("19")
    state(page, "streaming")
    hold.set()
    state(page, "finished")
    expect(reply(page)).to_have_text("19 is it")
    expect(pane(page).get_by_role("heading")).to_have_text("arithmetic")
    expect(pane(page)).to_contain_text("asked for auto · routed 0.981 · 1.39M parameters, 50 % removed")
    expect(pane(page)).to_contain_text("request req-7f3a")
    assert number(page, "Tokens") == "7"  # by the server's count: the reply came in three pieces
    first, whole = milliseconds(number(page, "First token")), milliseconds(number(page, "Time"))
    assert 50 <= first <= whole - 50
    assert float(number(page, "Tokens/s")) == pytest.approx(7000 / whole, rel=0.05)
    ((path, body, _),) = ingress.requests()
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "auto",
        "messages": [{"role": "user", "content": "12 + 7 ="}],
        "max_tokens": 64,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_settings_are_sent_and_a_cut_reply_says_so(ingress: Ingress, page_at: PageAt) -> None:
    ingress.replies["sort"] = speaks("enost", finish="length", tokens=5)
    page = page_at(ingress.url)
    page.get_by_label("Model", exact=True).select_option("sort")
    page.get_by_label("Max tokens").fill("5")
    page.get_by_label("Temperature").fill("0.75")
    send(page, "sort stone:")
    state(page, "stopped at the limit of 5 tokens")
    ((_, body, _),) = ingress.requests()
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("sort", 5, 0.75)


def test_characters_and_events_may_be_cut_anywhere(ingress: Ingress, page_at: PageAt) -> None:
    text = "naïve 東京 🙂 end"
    whole = b": a comment\r\n\r\n" + b"".join(event(delta("auto", letter)).replace(b"\n", b"\r\n") for letter in text)
    whole += event("[DONE]")
    cuts = [0, 5, whole.index("ï".encode()) + 1, whole.index("東".encode()) + 2, whole.index("🙂".encode()) + 3]
    cuts += [whole.rindex(b"\r") + 1, whole.rindex(b"[DONE]") + 3, len(whole)]
    ingress.replies["auto"] = writes(*(whole[a:b] for a, b in zip(cuts, cuts[1:], strict=False)))
    page = page_at(ingress.url)
    send(page)
    state(page, "finished")
    assert reply(page).text_content() == text
    assert number(page, "Tokens") == f"≈\u2009{len(text)}"  # no usage came: pieces were counted


def test_models_without_a_chat_template_go_on_from_the_raw_prompt(ingress: Ingress, page_at: PageAt) -> None:
    ingress.cards = default_cards(chat=False)
    page = page_at(ingress.url)
    send(page)
    state(page, "finished")
    assert page.get_by_role("region", name="Reply A").text_content() == "12 + 7 =19"
    ((path, body, _),) = ingress.requests()
    assert (path, body["prompt"]) == ("/v1/completions", "12 + 7 =")
    assert [body for _, body, _ in ingress.requests("route")] == [{"prompt": "12 + 7 ="}]


def follow_up(page: "Page", prompt: str) -> None:
    page.get_by_label("Continue the conversation").check()
    send(page, prompt)


def test_a_system_message_and_earlier_turns_are_sent_as_messages(ingress: Ingress, page_at: PageAt) -> None:
    ingress.replies["auto"] = speaks("19")
    page = page_at(ingress.url)
    page.get_by_label("System message").fill("Be brief.")
    send(page)
    state(page, "finished")
    expect(pane(page).get_by_role("list", name="Conversation so far")).to_be_hidden()
    ingress.replies["auto"] = speaks("20")
    follow_up(page, "and 1 more?")
    state(page, "finished")
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "12 + 7 ="},
        {"role": "assistant", "content": "19"},
        {"role": "user", "content": "and 1 more?"},
    ]
    asked = [body["messages"] for _, body, _ in ingress.requests()]
    assert asked == [conversation[:2], conversation]
    assert [body for _, body, _ in ingress.requests("route")] == [{"messages": messages} for messages in asked]
    turns = pane(page).get_by_role("list", name="Conversation so far").get_by_role("listitem")
    expect(turns).to_have_text(["user 12 + 7 =", "assistant 19", "user and 1 more?"])
    expect(reply(page)).to_have_text("20")
    expect(pane(page).get_by_role("heading")).to_have_text("arithmetic")

    page.get_by_label("Continue the conversation").uncheck()
    page.get_by_label("System message").fill("")
    send(page, "another one")
    state(page, "finished")
    assert ingress.requests()[-1][1]["messages"] == [{"role": "user", "content": "another one"}]


def test_a_turn_that_failed_is_no_part_of_the_conversation(ingress: Ingress, page_at: PageAt) -> None:
    ingress.replies["auto"] = speaks("19")
    page = page_at(ingress.url)
    send(page)
    state(page, "finished")
    ingress.replies["auto"] = refuses(503, "busy")
    follow_up(page, "and 1 more?")
    state(page, "error")
    ingress.replies["auto"] = speaks("20")
    send(page, "and now?")
    state(page, "finished")
    contents = [message["content"] for message in ingress.requests()[-1][1]["messages"]]
    assert contents == ["12 + 7 =", "19", "and now?"]


def test_an_empty_reply_is_a_turn(ingress: Ingress, page_at: PageAt) -> None:
    ingress.replies["auto"] = speaks(tokens=1)
    page = page_at(ingress.url)
    send(page)
    state(page, "finished")
    follow_up(page, "nothing to say?")
    state(page, "finished")
    contents = [message["content"] for message in ingress.requests()[-1][1]["messages"]]
    assert contents == ["12 + 7 =", "", "nothing to say?"]


def test_each_pane_has_a_conversation_of_its_own(ingress: Ingress, page_at: PageAt) -> None:
    ingress.replies["auto"], ingress.replies["general"] = speaks("19"), speaks("20")
    page = page_at(ingress.url)
    page.get_by_label("Compare with").check()
    send(page)
    state(page, "finished")
    state(page, "finished", "B")
    follow_up(page, "sure?")
    state(page, "finished")
    state(page, "finished", "B")
    said = {body["model"]: body["messages"][1]["content"] for _, body, _ in ingress.requests()[2:]}
    assert said == {"auto": "19", "general": "20"}


def test_a_model_that_is_compared_later_knows_what_was_said(ingress: Ingress, page_at: PageAt) -> None:
    page = page_at(ingress.url)
    send(page)
    state(page, "finished")
    page.get_by_label("Compare with").check()
    follow_up(page, "sure?")
    state(page, "finished")
    state(page, "finished", "B")
    (one, other) = [body["messages"] for _, body, _ in ingress.requests()[1:]]
    assert one == other and [message["content"] for message in one] == ["12 + 7 =", "19", "sure?"]


def test_a_model_without_a_template_has_no_conversation(ingress: Ingress, page_at: PageAt) -> None:
    ingress.cards = default_cards(chat=False)
    page = page_at(ingress.url)
    expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
    expect(page.get_by_label("System message")).to_be_hidden()
    expect(page.get_by_label("Continue the conversation")).to_be_hidden()


def test_a_reply_with_html_is_shown_as_text(ingress: Ingress, page_at: PageAt) -> None:
    html = "<img src=x onerror='document.title=1'><b>bold</b><script>document.title=2</script>"
    ingress.cards = [*default_cards(), card(html, "expert", task=html, example=html)]
    ingress.route = lambda body: JSONResponse(decision() | {"probabilities": {html: 0.5}, "reason": html})
    ingress.replies["auto"] = speaks(html)
    ingress.replies["general"] = refuses(400, html)
    page = page_at(ingress.url)
    page.get_by_label("Compare with").check()
    page.get_by_role("button", name="<img").click()
    page.get_by_role("button", name="Send").click()
    expect(reply(page)).to_have_text(html)
    expect(pane(page, "B")).to_contain_text(html)
    expect(row(page, "arithmetic")).to_have_count(1)
    assert page.locator("img, b, body script:not(:last-child)").count() == 0
    assert page.title() == "seap_ray playground"


def test_an_empty_reply_is_no_blank(ingress: Ingress, page_at: PageAt) -> None:
    ingress.replies["auto"] = speaks(tokens=0)
    page = page_at(ingress.url)
    send(page)
    expect(pane(page)).to_contain_text("The model wrote nothing.")


def test_another_prompt_takes_the_place_of_the_one_that_runs(ingress: Ingress, page_at: PageAt) -> None:
    gone, hold = threading.Event(), threading.Event()
    ingress.replies["auto"] = speaks("old", "never", hold=threading.Event(), gone=gone)
    page = page_at(ingress.url)
    send(page)
    expect(reply(page)).to_have_text("old")
    ingress.replies["auto"] = speaks("new", "er", hold=hold)
    send(page, "again")
    assert gone.wait(DEADLINE)
    expect(reply(page)).to_have_text("new")
    state(page, "streaming")
    assert page.get_by_role("region", name="Reply A").get_attribute("aria-busy") == "true"
    assert page.get_by_role("button", name="Stop").get_attribute("aria-disabled") == "false"
    hold.set()
    state(page, "finished")
    expect(reply(page)).to_have_text("newer")


# --- routing ---------------------------------------------------------------------------------------------------------


def test_bars_show_the_probabilities_and_mark_the_expert(ingress: Ingress, page_at: PageAt) -> None:
    page = page_at(ingress.url, reduced_motion="reduce")
    expect(row(page, "sort").locator(".value")).to_have_text("–")
    send(page)
    expect(why(page)).to_have_text("Routed to arithmetic: its probability 0.981 reaches the threshold of 0.62.")
    for task, probability in decision()["probabilities"].items():
        expect(row(page, task).locator(".value")).to_have_text(f"{probability:.3f}")
        rail, fill, mark = (row(page, task).locator(f".{name}").bounding_box() for name in ("rail", "fill", "mark"))
        assert fill["width"] / rail["width"] == pytest.approx(probability, abs=0.01)
        assert (mark["x"] - rail["x"]) / rail["width"] == pytest.approx(0.62, abs=0.01)
    expect(page.get_by_role("region", name="Routing")).to_contain_text("threshold 0.62")
    marked = page.locator("[aria-current=true]")
    expect(marked).to_have_count(1)
    expect(marked).to_contain_text("arithmetic")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            decision("general", "unsure", 0.41),
            "Unsure: the likeliest task, logic, has a probability of 0.410 below the threshold of 0.62.",
        ),
        (decision("general", "unlike", 0.9), "The prompt is unlike all tasks. The general model answers."),
        (
            decision("general", "not_served", 0.9) | {"task": "sort"},
            "The prompt is taken for sort, which has no expert here.",
        ),
        (decision("general", "expert_down", 0.9) | {"task": "sort"}, "sort is being started again. general answers."),
        (decision("general", "anything", 0.9), "Reason: anything. general answers."),
        (
            decision("general", "no_router") | {"confidence": None, "threshold": None, "probabilities": {}},
            "Reason: no_router. general answers.",
        ),
    ],
    ids=["unsure", "unlike", "not served", "down", "unknown", "no router"],
)
def test_why_the_general_model_answers_is_said_in_words(
    said: dict[str, Any], words: str, ingress: Ingress, page_at: PageAt
) -> None:
    ingress.route = lambda body: JSONResponse(said)
    seap = {"x-seap-reason": said["reason"], "x-seap-confidence": str(said["confidence"] or "")}
    ingress.replies["auto"] = speaks("so", model="general", headers=seap)
    page = page_at(ingress.url)
    send(page)
    expect(why(page)).to_contain_text(words)
    expect(page.locator("[aria-current=true]")).to_have_attribute("data-task", "general")
    expect(pane(page).get_by_role("heading")).to_have_text("general")


def test_a_named_model_is_marked_beside_what_auto_would_take(ingress: Ingress, page_at: PageAt) -> None:
    page = page_at(ingress.url)
    page.get_by_label("Model", exact=True).select_option("sort")
    send(page)
    expect(why(page)).to_have_text("You chose sort. The router would choose arithmetic (0.981).")
    expect(page.locator("[aria-current=true]")).to_have_attribute("data-task", "sort")


def test_the_reply_knows_better_than_the_router_who_answered(ingress: Ingress, page_at: PageAt) -> None:
    ingress.replies["auto"] = speaks("so", model="general", headers={"x-seap-reason": "fallback"})
    page = page_at(ingress.url)
    send(page)
    expect(why(page)).to_have_text("Reason: fallback. general answers.")
    expect(page.locator("[aria-current=true]")).to_have_attribute("data-task", "general")


def test_without_the_router_the_reply_still_comes(ingress: Ingress, page_at: PageAt) -> None:
    ingress.route = refuses(503, "The router is not loaded")
    page = page_at(ingress.url)
    send(page)
    state(page, "finished")
    expect(why(page)).to_contain_text("Routed to arithmetic: its probability 0.981")
    expect(why(page)).to_contain_text("No probabilities: 503 Not available. The router is not loaded")


# --- side by side, stop ----------------------------------------------------------------------------------------------


def test_side_by_side_shows_two_models_replies_at_the_same_time(ingress: Ingress, page_at: PageAt) -> None:
    hold = threading.Event()
    ingress.replies = {"auto": speaks("nineteen", "!", hold=hold), "general": speaks("21", "?", hold=hold)}
    page = page_at(ingress.url, reduced_motion="reduce")  # so that it is not scrolling while it is measured
    expect(pane(page, "B")).to_be_hidden()
    page.get_by_label("Compare with").check()
    assert page.get_by_label("Second model").input_value() == "general"
    send(page)
    expect(reply(page, "A")).to_have_text("nineteen")  # neither has ended, both have begun
    expect(reply(page, "B")).to_have_text("21")
    hold.set()
    expect(reply(page, "A")).to_have_text("nineteen!")
    expect(reply(page, "B")).to_have_text("21?")
    expect(pane(page, "B").get_by_role("heading")).to_have_text("general")
    a, b = (pane(page, letter).bounding_box() for letter in "AB")
    assert a["y"] == b["y"] and a["x"] + a["width"] <= b["x"]
    page.set_viewport_size({"width": 600, "height": 800})
    a, b = (pane(page, letter).bounding_box() for letter in "AB")
    assert a["x"] == b["x"] and a["y"] + a["height"] <= b["y"]
    page.get_by_label("Compare with").uncheck()
    send(page)
    state(page, "finished")
    assert [body["model"] for _, body, _ in ingress.requests()].count("general") == 1


def test_another_expert_may_be_compared_with(ingress: Ingress, page_at: PageAt) -> None:
    ingress.replies["sort"] = speaks("from sort")
    page = page_at(ingress.url)
    page.get_by_label("Second model").select_option("sort")
    assert page.get_by_label("Compare with").is_checked()
    send(page)
    expect(reply(page, "B")).to_have_text("from sort")


def test_stop_leaves_what_arrived_and_hangs_up(ingress: Ingress, page_at: PageAt) -> None:
    gone = [threading.Event(), threading.Event()]
    ingress.replies["auto"] = speaks("one ", "two", "never", hold=threading.Event(), gone=gone[0])
    ingress.replies["general"] = speaks("drei ", "never", hold=threading.Event(), gone=gone[1])
    page = page_at(ingress.url)
    page.get_by_label("Compare with").check()
    stop = page.get_by_role("button", name="Stop")
    assert stop.get_attribute("aria-disabled") == "true"
    send(page)
    expect(reply(page, "A")).to_have_text("one two")
    expect(reply(page, "B")).to_have_text("drei ")
    stop.click()
    for letter in "AB":
        state(page, "stopped", letter)
    assert (reply(page, "A").text_content(), reply(page, "B").text_content()) == ("one two", "drei ")
    assert number(page, "Tokens") == "≈\u20092"
    assert stop.get_attribute("aria-disabled") == "true"
    assert all(each.wait(DEADLINE) for each in gone)


# --- errors ----------------------------------------------------------------------------------------------------------


BEGINNING = event(delta("auto", "so far"))


@pytest.mark.parametrize(
    ("answer", "title", "message"),
    [
        (refuses(404, "The model `x` does not exist."), "404 Not found", "The model `x` does not exist."),
        (refuses(429, "Queue is full.", retry_after="7"), "429 Too many requests", "Queue is full. Try again in 7 s."),
        (refuses(503, "sort is loading.", x_request_id="r1"), "503 Not available", "sort is loading. (request r1)"),
        (lambda body: Response("<h1>Bad</h1>", 502), "502 Bad gateway", "<h1>Bad</h1>"),
        (lambda body: Response(status_code=500), "500 Server error", "The server gave no reason."),
        (lambda body: JSONResponse({"detail": "too long"}, 422), "422 Bad request", "too long"),
    ],
    ids=["404", "429", "503", "not json", "empty", "another form"],
)
def test_each_refusal_is_readable(answer: Reply, title: str, message: str, ingress: Ingress, page_at: PageAt) -> None:
    ingress.replies["auto"] = answer
    page = page_at(ingress.url)
    send(page)
    state(page, "error")
    expect(pane(page).locator(".problem strong")).to_have_text(title)
    expect(pane(page).locator(".problem span")).to_have_text(message)


@pytest.mark.parametrize(
    ("answer", "title", "message"),
    [
        (
            writes(BEGINNING, event({"error": {"message": "EngineDeadError", "code": 500}})),
            "Error 500",
            "EngineDeadError",
        ),
        (writes(BEGINNING), "Connection lost", "The stream ended before the reply was complete."),
        (writes(BEGINNING, event("{half")), "Bad reply", "The stream held something that is not JSON: {half"),
    ],
    ids=["error event", "ends early", "not json"],
)
def test_an_error_in_the_stream_leaves_what_arrived(
    answer: Reply, title: str, message: str, ingress: Ingress, page_at: PageAt
) -> None:
    ingress.replies["auto"] = answer
    page = page_at(ingress.url)
    send(page)
    state(page, "error")
    expect(pane(page).locator(".problem strong")).to_have_text(title)
    expect(pane(page).locator(".problem span")).to_have_text(message)
    expect(reply(page)).to_have_text("so far")


def test_a_connection_that_breaks_leaves_what_arrived(ingress: Ingress, page_at: PageAt) -> None:
    breaks = threading.Event()
    ingress.replies["auto"] = writes(BEGINNING, breaks=breaks)
    page = page_at(ingress.url)
    send(page)
    expect(reply(page)).to_have_text("so far")
    breaks.set()
    expect(pane(page).locator(".problem")).to_have_text(
        "Connection lostThe connection broke before the reply was complete."
    )
    expect(reply(page)).to_have_text("so far")


def test_a_lost_network_is_told_and_the_next_prompt_works(ingress: Ingress, page_at: PageAt) -> None:
    page = page_at(ingress.url)
    expect(row(page, "sort")).to_be_visible()
    page.context.set_offline(True)
    send(page)
    expect(pane(page)).to_contain_text("No connection")
    page.context.set_offline(False)
    send(page)
    expect(reply(page)).to_have_text("19")
    expect(pane(page).locator(".problem")).to_be_hidden()


def test_models_that_cannot_be_listed_are_asked_for_again(ingress: Ingress, page_at: PageAt) -> None:
    ingress.models = refuses(503, "Experts are loading.")
    page = page_at(ingress.url)
    expect(page.get_by_text("Models: 503 Not available. Experts are loading.")).to_be_visible()
    send(page)
    expect(pane(page)).to_contain_text("Experts are loading.")
    ingress.models = None
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_text("6 experts and a general model, 50 % of the weights removed")).to_be_visible()
    expect(page.get_by_role("button", name="Try again")).to_be_hidden()


# --- who may ask -----------------------------------------------------------------------------------------------------


def test_the_key_is_asked_for_on_401_and_then_sent(ingress: Ingress, page_at: PageAt) -> None:
    page = page_at(ingress.url)
    field = page.get_by_label("API key", exact=True)
    expect(row(page, "sort")).to_be_visible()
    expect(field).to_be_hidden()
    ingress.authorization = "Bearer secret"
    send(page)
    expect(pane(page)).to_contain_text("401 Not authorised")
    expect(field).to_be_focused()
    assert field.get_attribute("type") == "password"
    field.fill("wrong")
    field.press("Enter")
    expect(page.get_by_text("The server refused this API key.")).to_be_visible()
    field.fill("secret")
    field.press("Enter")
    expect(reply(page)).to_have_text("19")  # the prompt that was refused has been sent again
    expect(field).to_be_hidden()
    assert ingress.requests()[-1][2]["authorization"] == "Bearer secret"
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    page.reload()
    expect(row(page, "sort")).to_be_visible()
    page.get_by_role("button", name="Forget the API key").click()
    assert page.evaluate("sessionStorage.length") == 0


def test_a_key_is_asked_for_at_once_where_nothing_answers_without(ingress: Ingress, page_at: PageAt) -> None:
    ingress.authorization = "Bearer secret"
    page = page_at(ingress.url)
    field = page.get_by_label("API key", exact=True)
    expect(field).to_be_focused()
    field.fill("secret")
    page.get_by_role("button", name="Use key").click()
    expect(row(page, "sort")).to_be_visible()
    assert ingress.requests() == []


def test_credentials_of_the_browser_are_enough(ingress: Ingress, page_at: PageAt) -> None:
    ingress.authorization = "Basic YW5uYTpwdw=="
    page = page_at(ingress.url, http_credentials={"username": "anna", "password": "pw"})
    send(page)
    expect(reply(page)).to_have_text("19")
    expect(page.get_by_label("API key", exact=True)).to_be_hidden()


@pytest.mark.parametrize("path", ["seap", "seap/"])
def test_a_route_prefix_stays_in_front(path: str, ingress: Ingress, page_at: PageAt) -> None:
    page = page_at(ingress.url + path)
    send(page)
    expect(reply(page)).to_have_text("19")
    expect(page.locator("body")).to_contain_text("Routed to")  # both were asked at once
    assert {each[0] for each in ingress.asked} == {"/seap/v1/route", "/seap/v1/chat/completions"}


def test_credentials_in_the_address_do_no_harm(ingress: Ingress, page_at: PageAt) -> None:
    page = page_at(ingress.url.replace("//", "//anna:pw@"))
    send(page)
    expect(reply(page)).to_have_text("19")


# --- everyone can use it ---------------------------------------------------------------------------------------------


def test_examples_fill_the_prompt(ingress: Ingress, page_at: PageAt) -> None:
    page = page_at(ingress.url)
    examples = page.get_by_role("group", name="Examples")
    expect(examples.get_by_role("button")).to_have_text(list(EXAMPLES.values()))
    examples.get_by_role("button", name="sort stone:").click()
    assert page.get_by_label("Prompt", exact=True).input_value() == "sort stone:"
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    ingress.cards = default_cards(examples={})
    page.reload()
    expect(row(page, "sort")).to_be_visible()
    expect(examples).to_be_hidden()


def test_it_works_by_keyboard_alone(ingress: Ingress, page_at: PageAt) -> None:
    gone = threading.Event()
    page = page_at(ingress.url)
    expect(row(page, "sort")).to_be_visible()
    visited = []
    for _ in range(20):
        page.keyboard.press("Tab")
        seen = page.evaluate(
            "(e => e === document.body ? null : [e.labels?.[0]?.innerText || e.ariaLabel || e.innerText,"
            " getComputedStyle(e).outlineStyle, parseFloat(getComputedStyle(e).outlineWidth)])(document.activeElement)"
        )
        if seen is None:
            break
        visited.append(seen)
    controls = ["Model", "Max tokens", "Temperature", "Compare with", "Second model", "Send", "Stop"]
    controls.append("Continue the conversation")
    assert [name for name, _, _ in visited] == ["Prompt", "System message", *EXAMPLES.values(), *controls]
    assert all(style == "solid" and width >= 2 for _, style, width in visited)

    page.keyboard.press("Tab")
    page.keyboard.type("12 + 7 =")
    page.keyboard.press("Control+Enter")
    expect(reply(page)).to_have_text("19")
    ingress.replies["auto"] = speaks("half", "never", hold=threading.Event(), gone=gone)
    page.keyboard.press("Meta+Enter")
    expect(reply(page)).to_have_text("half")
    page.keyboard.press("Escape")
    state(page, "stopped")
    assert gone.wait(DEADLINE)
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()


def test_what_changes_is_announced(ingress: Ingress, page_at: PageAt) -> None:
    hold = threading.Event()
    ingress.replies["auto"] = speaks("19", ".", hold=hold)
    page = page_at(ingress.url)
    send(page)
    region = page.get_by_role("region", name="Reply A")
    expect(region).to_have_attribute("aria-live", "polite")
    expect(region).to_have_attribute("aria-busy", "true")  # until it is whole
    hold.set()
    expect(region).to_have_attribute("aria-busy", "false")
    for part in (why(page), pane(page).locator(".state"), pane(page).locator(".problem")):
        expect(part).to_have_attribute("aria-live", "polite")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_controls_stand_out_from_what_is_behind_them(scheme: str, ingress: Ingress, page_at: PageAt) -> None:
    ingress.replies["general"] = refuses(503, "general is loading.")
    page = page_at(ingress.url, color_scheme=scheme, reduced_motion="reduce")
    page.get_by_label("Compare with").check()
    send(page)
    state(page, "error", "B")
    state(page, "finished", "A")
    page.evaluate("document.querySelectorAll('[hidden]').forEach(e => e.hidden = false)")
    texts, edges = page.evaluate(CONTRASTS)
    assert len(texts) > 40 and len(edges) > 8
    assert {name: ratio for name, ratio in texts if ratio < 4.5} == {}
    assert {name: ratio for name, ratio in edges if ratio < 3} == {}
    behind = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", behind)[0]) < 128) == (scheme == "dark")


CONTRASTS = """() => {
  const rgb = (css) => css.match(/[0-9.]+/g).map(Number);
  const light = (c) => rgb(c).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor, [, , , alpha = 1] = rgb(colour);
      if (alpha > 0) return colour;
    }
  };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const texts = [], edges = [];
  for (const e of document.querySelectorAll("body *:not(script, template, option)")) {
    const style = getComputedStyle(e), own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const edge = (colour) => edges.push([e.outerHTML.slice(0, 90), ratio(colour, behind(e.parentElement))]);
    if (own || e.matches("input, select, textarea")) {
      texts.push([e.outerHTML.slice(0, 90), ratio(style.color, behind(e))]);
    }
    if (e.matches("input:not([type=checkbox]), select, textarea")) edge(style.borderTopColor);
    if (e.matches(".mark")) edge(style.borderLeftColor);
    if (e.matches(".chosen .fill")) edge(style.backgroundColor);
  }
  return [texts, edges];
}"""


def test_at_360_pixels_nothing_is_wider_than_the_screen(ingress: Ingress, page_at: PageAt) -> None:
    long = "Donaudampfschifffahrtsgesellschaft" * 6
    router, *rest = default_cards(examples={task: long for task in TASKS})
    ingress.cards = [router, *rest, card(long, "expert", task=long, parameters=8_030_000_000, chat=True)]
    said = decision()
    ingress.route = lambda body: JSONResponse(said | {"probabilities": said["probabilities"] | {long: 1.0}})
    ingress.replies["auto"] = speaks(long, model=long, headers={"x-request-id": long, "x-seap-reason": long})
    ingress.replies["general"] = refuses(500, long)
    page = page_at(ingress.url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    fits = "document.documentElement.scrollWidth <= innerWidth && innerWidth === 360"
    expect(row(page, "sort")).to_be_visible()
    assert page.evaluate(fits)
    page.get_by_label("Compare with").check()
    send(page, long)
    state(page, "finished")
    state(page, "error", "B")
    expect(row(page, long).locator(".value")).to_have_text("1.000")
    assert page.evaluate(fits)
    page.evaluate("document.querySelectorAll('[hidden]').forEach(e => e.hidden = false)")
    assert page.evaluate(fits)
    small = "[...document.querySelectorAll('button, select, input')].filter(e => e.getBoundingClientRect().height < 24)"
    assert page.evaluate(f"{small}.map(e => e.id)") == ["compare", "go-on"]  # their labels are as much to be touched


def test_on_a_phone_the_reply_comes_into_view_by_itself(ingress: Ingress, page_at: PageAt) -> None:
    page = page_at(ingress.url, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    page.get_by_label("Prompt", exact=True).fill("12 + 7 =")
    expect(reply(page)).not_to_be_in_viewport()
    page.get_by_role("button", name="Send").tap()
    expect(reply(page)).to_have_text("19")
    expect(reply(page)).to_be_in_viewport(ratio=1)


def test_motion_is_for_those_who_want_it(ingress: Ingress, page_at: PageAt) -> None:
    ingress.replies["auto"] = speaks("a", "b", hold=threading.Event())
    moving = "document.getAnimations().length"
    for motion, moves in (("no-preference", True), ("reduce", False)):
        page = page_at(ingress.url, reduced_motion=motion)
        send(page)
        expect(reply(page)).to_have_text("a")
        assert (page.evaluate(moving) > 0) == moves


def test_the_policy_is_in_force_and_the_page_lives_with_it(ingress: Ingress, browser: "Browser") -> None:
    with pytest.raises(AssertionError, match="Content Security Policy"), open_page(ingress.url, browser) as page:
        send(page)
        expect(reply(page)).to_have_text("19")
        page.evaluate("new Image().src = '/x.png'")
        page.wait_for_timeout(100)
    assert not re.search(r"<\w+[^>]*\s(src|href)=[\"'](?!data:)|@import|url\(|innerHTML|\son\w+=", PAGE.read_text())
