"""The page in a real browser, over the installed command: what people do, and what they see."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clip_retrieval import build_index
from playwright.sync_api import Browser, Page, expect, sync_playwright

from .conftest import caption, picture, write_tar

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; apt-get install chromium"),
]
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
PICTURES = 130  # four pages of hits


@pytest.fixture(scope="module")
def index(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last picture is the first one again; the one before it has a caption of HTML."""
    root = tmp_path_factory.mktemp("page")
    samples = [
        (f"{n:09d}", {"png": picture(n), "txt": caption(n).encode()}) for n in range(PICTURES - 2)
    ]
    hostile, good = (
        json.dumps({"url": url, "similarity": 7}).encode()
        for url in ("javascript:document.title=3", "https://example.org/z.png")
    )
    samples += [("h", {"png": picture(500), "txt": HOSTILE.encode(), "json": hostile})]
    samples += [("z", {"png": picture(0), "txt": caption(0).encode(), "json": good})]
    write_tar(root / "shards/00000.tar", samples)
    build_index(model, root / "shards", root / "index", workers=0)
    return root / "index"


def command(*arguments: object) -> subprocess.Popen[str]:
    tool = Path(sys.executable).with_name("clip-retrieval")
    return subprocess.Popen(
        [tool, "serve", *map(str, arguments), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def address(index: Path) -> Iterator[str]:
    server = command(f"pictures={index}", f"other={index}", "--fold", "0.9999")
    assert server.stdout is not None
    ready = json.loads(server.stdout.readline())
    assert ready["indexes"] == {"pictures": PICTURES, "other": PICTURES}
    yield ready["address"]
    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=30)
    assert (server.returncode, out, err) == (0, "", "")


def test_ctrl_c_is_a_clean_end(index: Path) -> None:
    server = command(index)
    assert server.stdout is not None
    assert json.loads(server.stdout.readline())["indexes"] == {"index": PICTURES}
    server.send_signal(signal.SIGINT)
    assert server.communicate(timeout=30) == ("", "")
    assert server.returncode == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(request: Any, browser: Browser, address: str) -> Iterator[Page]:
    width, height = request.param
    context = browser.new_context(
        viewport={"width": width, "height": height}, has_touch=width < 500, is_mobile=width < 500
    )
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: r.url.startswith((address, "blob:")) or complaints.append(r.url))
    page.goto(address)
    expect(page.locator("#hits img.here").first).to_be_visible()
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing hangs over
    context.close()
    assert complaints == []


def search(page: Page, text: str) -> None:
    page.get_by_role("searchbox").fill(text)
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("nearest")


def choose(page: Page, data: bytes) -> None:
    file: Any = {"name": "mine.png", "mimeType": "image/png", "buffer": data}
    page.get_by_label("Search with a picture").set_input_files(file)


def captions(page: Page) -> list[str]:
    return page.locator("#hits .caption").all_inner_texts()


def similarities(page: Page) -> list[float]:
    return [float(text) for text in page.locator("#hits .similarity").all_inner_texts()]


def test_type_click_scroll_and_go_back(page: Page) -> None:
    assert page.locator("#hits li").count() == 40  # a start without a question
    assert page.locator("#hits .similarity").count() == 0

    search(page, "red cat")
    assert page.url.endswith("?q=red+cat")
    assert page.title() == "red cat · clip-retrieval"
    expect(page.locator("#hits li")).to_have_count(40)
    found = similarities(page)
    assert found == sorted(found, reverse=True)

    # the end comes into view until there is no more
    expect(page.get_by_role("status")).to_have_text(
        f"The nearest {PICTURES - 1} of {PICTURES} pictures, 1 duplicates folded"
    )
    for count in (80, 120, PICTURES - 1):
        page.locator("#end").scroll_into_view_if_needed()
        expect(page.locator("#hits li").nth(min(count, PICTURES - 1) - 1)).to_be_attached()
    expect(page.locator("#end")).to_have_text("That is all")
    assert len(set(captions(page))) == PICTURES - 1
    found = similarities(page)
    assert found == sorted(found, reverse=True)
    assert page.locator(".alike").all_inner_texts() == ["+1"]

    # a hit becomes the question
    chosen = captions(page)[100]
    page.locator("#hits a").nth(100).scroll_into_view_if_needed()
    place = page.evaluate("scrollY")
    page.locator("#hits a").nth(100).click()
    expect(page.get_by_role("heading")).to_have_text(chosen)
    assert "?id=" in page.url
    assert chosen not in captions(page)
    assert page.evaluate("scrollY") == 0
    shared = page.url

    # back to where one was
    page.go_back()
    expect(page.get_by_role("searchbox")).to_have_value("red cat")
    expect(page.locator("#hits li")).to_have_count(PICTURES - 1)
    assert page.evaluate("scrollY") == place > 1000
    page.go_forward()
    expect(page.get_by_role("heading")).to_have_text(chosen)

    page.goto(shared)  # as somebody who was sent the address
    expect(page.get_by_role("heading")).to_have_text(chosen)


def test_a_search_given_up_while_its_answer_arrives(page: Page) -> None:
    page.evaluate(
        """() => {
            const read = Response.prototype.json;
            Response.prototype.json = async function () {
                await new Promise((go) => setTimeout(go, 300));
                return read.call(this);
            };
        }"""
    )
    page.get_by_role("searchbox").fill("red")
    page.keyboard.press("Enter")
    page.wait_for_timeout(150)
    search(page, "blue")
    page.wait_for_timeout(900)
    expect(page.get_by_role("button", name="Try again")).to_have_count(0)
    assert len(captions(page)) > 0


def test_folding_can_be_switched_off(page: Page) -> None:
    search(page, "stone")
    page.get_by_label("Fold duplicates").uncheck()
    status = f"The nearest {PICTURES} of {PICTURES} pictures"
    expect(page.get_by_role("status")).to_have_text(status)
    assert page.url.endswith("?q=stone&fold=0")
    page.go_back()
    expect(page.get_by_label("Fold duplicates")).to_be_checked()


@pytest.mark.parametrize("way", ["choose", "drop", "paste"])
def test_a_picture_of_ones_own(page: Page, way: str) -> None:
    if way == "choose":
        choose(page, picture(17))
    else:
        page.evaluate(
            """([bytes, way]) => {
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array(bytes)], "mine.png", {type: "image/png"}));
                const event = way === "paste"
                    ? new ClipboardEvent("paste", {clipboardData: data, bubbles: true})
                    : new DragEvent("drop", {dataTransfer: data, bubbles: true});
                document.body.dispatchEvent(event);
            }""",
            [list(picture(17)), way],
        )
    expect(page.get_by_role("heading")).to_have_text("mine.png")
    expect(page.locator("#hits .caption").first).to_have_text(caption(17))
    assert similarities(page)[0] == pytest.approx(1, abs=2e-3)
    page.reload()  # the picture is not kept, and that is said
    expect(page.get_by_role("alert")).to_contain_text("mine.png is not kept")


def test_a_large_picture_is_made_smaller_first(page: Page) -> None:
    """Ten megabytes of noise, more than the service takes."""
    page.evaluate(
        """async () => {
            const canvas = document.createElement("canvas");
            Object.assign(canvas, {width: 2200, height: 1800});
            const context = canvas.getContext("2d"), image = context.createImageData(2200, 1800);
            for (let n = 0; n < image.data.length; n++) image.data[n] = Math.random() * 256;
            context.putImageData(image, 0, 0);
            const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
            const data = new DataTransfer();
            data.items.add(new File([blob], "noise.png", {type: "image/png"}));
            document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
        }"""
    )
    expect(page.get_by_role("heading")).to_have_text("noise.png", timeout=20_000)
    expect(page.get_by_role("status")).to_contain_text("nearest", timeout=20_000)


def test_captions_are_text(page: Page) -> None:
    page.goto(page.url.split("?")[0] + f"?id={PICTURES - 1}")
    source = page.get_by_role("link", name="Source")
    expect(source).to_have_attribute("href", "https://example.org/z.png")
    page.goto(page.url.split("?")[0] + f"?id={PICTURES - 2}")
    expect(page.get_by_role("heading")).to_have_text(HOSTILE)
    assert page.locator("main img[src=x]").count() == 0
    assert source.count() == 0  # a javascript: address
    choose(page, picture(500))
    expect(page.locator("#hits .caption").first).to_have_text(HOSTILE)
    search(page, HOSTILE)
    assert page.title() == f"{HOSTILE} · clip-retrieval"


def test_the_keyboard_is_enough(page: Page) -> None:
    page.keyboard.press("/")
    page.keyboard.type("river")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("nearest")
    first = captions(page)[0]
    page.keyboard.press("/")
    for _ in range(10):  # picture, search, index, folding, first hit
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('#hits a')"):
            break
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading")).to_have_text(first)


def test_another_index_of_the_same_server(page: Page) -> None:
    search(page, "tree")
    page.get_by_label("Index").select_option("other")
    expect(page.get_by_role("status")).to_contain_text("nearest")
    assert page.url.endswith("?q=tree&index=other")
    page.goto(page.url.replace("other", "none"))
    expect(page.get_by_role("alert")).to_contain_text("There is no index none here")


def test_an_error_is_shown_and_can_be_tried_again(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.goto(address)
    busy = json.dumps({"error": "too many requests at once; try again soon"})
    page.route("**/knn-service", lambda route: route.fulfill(status=503, body=busy))
    page.get_by_role("searchbox").fill("cat")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("too many requests at once")
    page.unroute("**/knn-service")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("status")).to_contain_text("nearest")
    expect(page.get_by_role("alert")).to_be_hidden()
    page.route("**/metadata", lambda route: route.abort())
    page.locator("#end").scroll_into_view_if_needed()
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    page.close()
