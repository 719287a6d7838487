"""The page at ``/``, in a real browser against the real gateway with a tiny model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import foreword
from foreword.artifact.ensemble import write_ensemble
from foreword.records import Task
from serving_gateway import BASE, tiny_world
from serving_parts import soft_prompt

playwright = pytest.importorskip("playwright.sync_api", reason="playwright's Python package is not installed")

PAGE = Path(foreword.__file__).parent / "serving" / "gateway" / "page.html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
KEY = "a-key-of-the-page-test"
MANY = 1100
TEXT = "my parcel is late"
TASKS = {
    "complaints": Task("Tweet text : {Tweet text} Label :", " ", "Label", ("complaint", "no complaint"), ("t", "n")),
    "markup": Task("{text} Label :", " ", "l", ("<b>bold</b>", "<img src=x onerror=alert(1)>"), ("p", "t")),
    "pairs": Task("{first} , {second|cut} :", " ", "l", tuple("abcdefghijklmnop"), tuple("ijklmnopqrstuvwx")),
    "writer": Task("{text} Label :", " ", "l"),
}  # fmt: skip

needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine (apt-get install chromium)")


@dataclass(frozen=True)
class Server:
    """A running gateway, and what it serves."""

    url: str
    model: Path
    store: Path
    running: Callable[[], int]


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = make_store(tmp_path_factory.mktemp("store"))
    with tiny_world(model_folder, store, api_keys=(KEY,)) as world, world.server() as served:
        yield Server(f"{served.address}/", model_folder, store, lambda: len(served.gateway.running))


def make_store(store: Path) -> Path:
    """One of each kind, and an ensemble."""
    for seed, (name, task) in enumerate(TASKS.items()):
        soft_prompt(store / name, seed, task=task)
    soft_prompt(store / ".member", seed=9, task=TASKS["complaints"])
    write_ensemble(store / "several", [store / "complaints", store / ".member"])
    return store


@pytest.fixture
def many(server: Server) -> Iterator[None]:
    """More soft prompts than the page asks for at once."""
    folders = [server.store / f"tenant-{i:04}" for i in range(MANY)]
    for folder in folders:
        folder.mkdir()
        for file in (server.store / "complaints").iterdir():
            (folder / file.name).hardlink_to(file)
    yield
    for folder in folders:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield opened
        opened.close()


@dataclass
class Watched:
    """What a page did behind the scenes."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    expected: str = ""
    """Part of the browser's complaints that a test provokes."""


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def fresh(browser: Any, server: Server, watched: Watched) -> Iterator[Any]:
    """A page without a key; after the test: nothing went wrong in it, and nothing left the server."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, base_url=server.url)
    context.set_default_timeout(20_000)
    page = context.new_page()
    page.on("request", lambda request: watched.requests.append(request.url))
    page.on("pageerror", lambda error: watched.complaints.append(str(error)))
    page.on("dialog", lambda dialog: watched.complaints.append(f"a dialog: {dialog.message}"))
    page.on("console", lambda said: watched.complaints.append(said.text) if said.type in ("error", "warning") else None)
    yield page
    context.close()
    strange = [c for c in watched.complaints if not (watched.expected and watched.expected in c)]
    assert not strange
    assert all(url.startswith((server.url, "data:")) for url in watched.requests)


@pytest.fixture
def page(fresh: Any) -> Any:
    """A page that has its key."""
    fresh.context.add_init_script(f"sessionStorage.setItem('foreword.key', '{KEY}')")
    fresh.goto("/")
    fresh.get_by_text(re.compile(rf"{BASE} · \d+ soft prompts$")).wait_for()
    return fresh


def pick(page: Any, name: str, label: str = "Soft prompt") -> None:
    box = page.get_by_role("combobox", name=label)
    box.fill(name)
    page.get_by_role("option", name=name, exact=True).click()
    page.locator(f"summary:visible >> nth={label != 'Soft prompt':d}").wait_for()


def result(page: Any, name: str) -> Any:
    """The result card of a name."""
    return page.get_by_role("article").filter(has=page.get_by_role("heading", name=name, exact=True))


def shown(card: Any) -> dict[str, float]:
    """The probabilities that a card shows, in percent."""
    card.locator(".bars li").first.wait_for()
    rows = card.locator(".bars li")
    labels, numbers = rows.locator(".label").all_text_contents(), rows.locator(".p").all_text_contents()
    return {label: float(p.removesuffix("%")) for label, p in zip(labels, numbers, strict=True)}


def library(server: Server, name: str, row: Any) -> dict[str, float]:
    """The library's own probabilities, in percent."""
    (found,) = foreword.load(server.store / name, model=str(server.model)).predict([row])
    return {label: 100 * p for label, p in found.probabilities.items()}


def test_the_page_asks_nobody_else_and_writes_no_markup() -> None:
    text = PAGE.read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)
    assert not re.search(
        r"\bon\w+=|style=\"|javascript:", text.split("<style>")[0] + text.split("</style>")[1].split("<script>")[0]
    )
    addresses = set(re.findall(r"https?://[^'\" >)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}


@needs_chromium
def test_thousands_are_listed_and_found_by_name(page: Any, many: None) -> None:
    page.reload()
    page.get_by_text(f"{BASE} · {MANY + len(TASKS) + 1:,} soft prompts", exact=True).wait_for()
    box = page.get_by_role("combobox", name="Soft prompt")
    box.click()
    options = page.get_by_role("option")
    assert options.first.text_content() == f"{BASE} (the plain model)"
    assert options.count() == 100
    page.get_by_role("listbox").evaluate("list => { list.scrollTop = list.scrollHeight; }")
    options.nth(150).wait_for(state="attached")
    box.fill("10 tenant 9")
    assert set(options.all_text_contents()) == {
        f"tenant-{i:04}" for i in range(MANY) if "10" in f"{i:04}" and "9" in f"{i:04}"
    }
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert box.input_value() == "tenant-0910"
    box.fill("no such name")
    page.get_by_text("No name has that in it.").wait_for()
    page.keyboard.press("Escape")
    assert box.input_value() == "tenant-0910"
    page.reload()
    playwright.expect(box).to_have_value("tenant-0910")


@needs_chromium
def test_probabilities_are_the_librarys(page: Any, server: Server) -> None:
    pick(page, "complaints")
    page.get_by_label("Text", exact=True).first.fill(TEXT)
    page.keyboard.press("Control+Enter")
    found = shown(result(page, "complaints"))
    assert found == pytest.approx(library(server, "complaints", TEXT), abs=0.06)
    assert sum(found.values()) == pytest.approx(100, abs=0.11)
    best = max(found, key=found.__getitem__)
    assert result(page, "complaints").locator(".winner").text_content() == best
    assert result(page, "complaints").locator(".best .label").text_content() == best
    assert page.get_by_role("status").filter(has_text=f"complaints: {best}, {found[best]}%").count() == 1


@needs_chromium
def test_a_template_of_two_columns_has_two_fields(page: Any, server: Server) -> None:
    pick(page, "pairs")
    row = {"first": "my parcel", "second": "the quick fox"}
    page.get_by_label("first").fill(row["first"])
    page.get_by_role("button", name="Run").click()
    page.get_by_text("Every field needs a text.").wait_for()
    page.get_by_label("second").fill(row["second"])
    page.get_by_role("button", name="Run").click()
    card = result(page, "pairs")
    found = shown(card)
    assert found == pytest.approx(library(server, "pairs", row), abs=0.06)
    assert sum(found.values()) == pytest.approx(100, abs=0.05 * len(found))
    assert card.locator(".bars li:visible").count() == 12
    card.get_by_role("button", name="Show all 16 classes").click()
    assert card.locator(".bars li:visible").count() == 16


@needs_chromium
def test_the_servers_words_are_text(page: Any) -> None:
    pick(page, "markup")
    page.get_by_label("Text", exact=True).first.fill("<i>x</i>")
    page.get_by_role("button", name="Run").click()
    assert set(shown(result(page, "markup"))) == set(TASKS["markup"].classes)
    assert page.locator("img, .card b, .card i").count() == page.locator(".bar > i").count()


@needs_chromium
def test_text_streams_and_is_what_the_api_writes(page: Any) -> None:
    pick(page, "writer")
    page.get_by_label("Text", exact=True).first.fill(TEXT)
    page.get_by_label("Most tokens").fill("100")
    page.get_by_role("button", name="Run").click()
    out = result(page, "writer").locator(".text")
    page.locator(".text.running:not(:empty)").wait_for()
    early = out.text_content()
    playwright.expect(out).not_to_have_class(re.compile("running"), timeout=30_000)
    answer = page.request.post(
        "/v1/completions", headers={"Authorization": f"Bearer {KEY}"},
        data={"model": "writer", "columns": {"text": TEXT}, "max_tokens": 100, "temperature": 0},
    ).json()  # fmt: skip
    text = answer["choices"][0]["text"].lstrip()
    assert out.text_content() == text
    assert text.startswith(early)
    assert len(early) < len(text)
    foot = result(page, "writer").locator(".foot").text_content()
    assert "tokens in (4 virtual" in foot
    assert f"{answer['usage']['completion_tokens']} out" in foot


@needs_chromium
def test_stop_ends_the_text_on_the_server_too(page: Any, server: Server) -> None:
    pick(page, "writer")
    page.get_by_label("Text", exact=True).first.fill(TEXT)
    page.get_by_label("Most tokens").fill("480")
    page.get_by_role("button", name="Run").click()
    page.locator(".text.running:not(:empty)").wait_for()
    assert server.running() == 1
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    for _ in range(100):
        if not server.running():
            break
        page.wait_for_timeout(50)
    assert server.running() == 0
    assert page.get_by_role("button", name="Stop").count() == 0
    assert page.evaluate("document.activeElement.id") == "run"
    page.get_by_label("Most tokens").fill("2")
    page.get_by_role("button", name="Run").click()
    page.get_by_text("Stopped at the most tokens").wait_for()


@needs_chromium
def test_two_are_compared_on_the_same_text(page: Any, server: Server) -> None:
    pick(page, "complaints")
    page.get_by_role("button", name="Compare").click()
    page.get_by_label("Text", exact=True).first.fill(TEXT)
    page.get_by_role("button", name="Run").click()
    mine, plain = shown(result(page, "complaints")), shown(result(page, f"{BASE}, the plain model"))
    assert list(mine) == list(plain) == list(TASKS["complaints"].classes)
    assert mine != plain
    pick(page, "several", "Compare with")
    page.get_by_role("button", name="Run").click()
    several = shown(result(page, "several"))
    other = library(server, ".member", TEXT)
    assert several == pytest.approx({c: (mine[c] + other[c]) / 2 for c in mine}, abs=0.12)
    assert result(page, "several").locator(".bar b").count() == 4
    page.get_by_text("Text", exact=True).last.click()
    page.get_by_label("Most tokens").fill("3")
    page.get_by_role("button", name="Run").click()
    result(page, "complaints").locator(".text").wait_for()
    assert shown(result(page, "several")) == several
    page.get_by_role("button", name="Remove").click()
    assert page.get_by_role("article").count() == 1


@needs_chromium
def test_the_plain_model_writes_after_the_same_template(page: Any) -> None:
    pick(page, "writer")
    page.get_by_role("button", name="Compare").click()
    page.get_by_label("Text", exact=True).first.fill(TEXT)
    page.get_by_label("Most tokens").fill("5")
    with page.expect_request(lambda r: r.method == "POST" and r.post_data_json["model"] == BASE) as asked:
        page.get_by_role("button", name="Run").click()
    assert asked.value.post_data_json["prompt"] == f"{TEXT} Label :"
    result(page, f"{BASE}, the plain model").get_by_text("5 out").wait_for()


@needs_chromium
def test_what_is_typed_and_run_before_the_cards_are_there_is_kept_and_waits(page: Any, watched: Watched) -> None:
    held: list[Any] = []
    page.route(re.compile(f"/v1/models/(writer|{BASE})$"), lambda route: held.append(route))
    pick(page, "writer")
    page.get_by_role("button", name="Compare").click()
    playwright.expect(page.get_by_role("combobox", name="Compare with")).to_be_focused()
    field_ = page.get_by_label("Text", exact=True).first
    field_.click()
    page.keyboard.type(TEXT[:5])
    page.get_by_role("button", name="Run").click()
    field_.focus()
    page.keyboard.type(TEXT[5:])
    assert not [url for url in watched.requests if url.endswith("/v1/completions")]
    with page.expect_request(lambda r: r.method == "POST" and r.post_data_json["model"] == BASE) as asked:
        for route in held:
            route.continue_()
    playwright.expect(field_).to_be_focused()
    playwright.expect(field_).to_have_value(TEXT)
    assert asked.value.post_data_json["prompt"] == f"{TEXT} Label :"


@needs_chromium
def test_stop_ends_a_run_that_waits_for_a_card(page: Any, watched: Watched) -> None:
    held: list[Any] = []
    page.route("**/v1/models/writer", lambda route: held.append(route))
    pick(page, "writer")
    page.get_by_label("Text", exact=True).first.fill(TEXT)
    page.get_by_role("button", name="Run").click()
    page.get_by_role("button", name="Stop").click()
    playwright.expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    held[0].continue_()
    page.get_by_label("Most tokens").wait_for()
    assert not [url for url in watched.requests if url.endswith(("/v1/completions", "/v1/classify"))]


@needs_chromium
def test_errors_say_what_to_do(page: Any, watched: Watched) -> None:
    watched.expected = "Failed to load resource"
    pick(page, "writer")
    page.get_by_label("Text", exact=True).first.fill(TEXT)
    page.get_by_label("Most tokens").fill("511")
    page.get_by_role("button", name="Run").click()
    alert = result(page, "writer").get_by_role("alert")
    playwright.expect(alert).to_contain_text("the model's context has 512 tokens")
    page.get_by_label("Most tokens").fill("2")
    page.context.set_offline(True)
    alert.get_by_role("button", name="Try again").click()
    playwright.expect(alert).to_contain_text("The server cannot be reached.")
    page.context.set_offline(False)
    alert.get_by_role("button", name="Try again").click()
    result(page, "writer").get_by_text("2 out").wait_for()
    assert alert.count() == 0


@needs_chromium
def test_a_key_is_asked_for_and_kept_in_this_tab_only(fresh: Any, watched: Watched) -> None:
    watched.expected = "401"
    fresh.goto("/")
    field_ = fresh.get_by_label("API key")
    field_.fill("wrong")
    fresh.keyboard.press("Enter")
    fresh.get_by_text("The server did not accept that key.").wait_for()
    field_.fill(KEY)
    fresh.get_by_role("button", name="Use this key").click()
    fresh.get_by_role("combobox", name="Soft prompt").wait_for()
    assert not field_.is_visible()
    assert fresh.evaluate("[localStorage.length, document.cookie, Object.values(sessionStorage)]") == [0, "", [KEY]]
    assert KEY not in fresh.url
    fresh.get_by_role("button", name="Forget the key").click()
    field_.wait_for()


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 390, "height": 844})
    pick(page, "pairs")
    page.get_by_role("button", name="Compare").click()
    page.get_by_label("first").fill("x" * 300)
    page.get_by_label("second").fill("y")
    page.get_by_role("button", name="Run").click()
    shown(result(page, "pairs"))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate(CONTRAST) >= 4.5


CONTRAST = """() => {
  const light = (colour) => {
    const linear = (c) => (c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    const [r, g, b] = colour.match(/[\\d.]+/g).map((c) => linear(c / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = (part) => {
    for (; part; part = part.parentElement) {
      const colour = getComputedStyle(part).backgroundColor;
      if (!colour.endsWith(", 0)")) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let least = 21;
  while (words.nextNode()) {
    const part = words.currentNode.parentElement;
    if (!words.currentNode.data.trim() || !part.checkVisibility() || part.closest("script")) continue;
    const [x, y] = [light(getComputedStyle(part).color), light(behind(part))].sort((p, q) => q - p);
    least = Math.min(least, (x + .05) / (y + .05));
  }
  return least;
}"""
"""The least contrast of any text on the page with what lies behind it."""
