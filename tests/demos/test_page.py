"""The page in headless Chromium: two adapters, three methods, skip, stop, a broken file, two users, a narrow window."""

import contextlib
import shutil

import numpy as np
import pytest
import tiny
from demo_files import random_adapter
from PIL import Image

import vislr
from vislr.core.files import read_picture

pytest.importorskip("gradio", reason="needs gradio: pip install 'vislr[demo]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: make browser")
SECONDS = 60


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two good files and a broken one for the embedded pipeline."""
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("adapters")
    pipe = vislr.zoo.pipeline("emoji-unet")
    random_adapter(
        pipe,
        folder / "style.safetensors",
        vislr.ConvLoraConfig(r=1, target_modules=["conv1", "to_q"]),
        1,
        strength=0.05,
    )
    random_adapter(
        pipe, folder / "subject.safetensors", LoraConfig(r=2, target_modules=["to_q", "to_v"]), 2, "kohya", strength=0.2
    )
    (folder / "broken.safetensors").write_bytes((folder / "style.safetensors").read_bytes()[:5000])
    return folder


@pytest.fixture(scope="module")
def served(adapters):
    """(studio, address)."""
    from vislr.demos.app import DemoConfig, start

    studio, page, address = start(DemoConfig(port=0, steps=3), wait=False)
    yield studio, address
    page.close()
    studio.close_all()


@contextlib.contextmanager
def opened(browser, address, **options):
    """A user with a window; afterwards nothing was asked from elsewhere, and the page had no error."""
    window = browser.new_context(**options)
    page = window.new_page()
    page.set_default_timeout(1000 * SECONDS)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#adapters .note:has-text('emoji-unet')")
    yield page
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []
    window.close()


def upload(page, *files):
    page.locator("#upload input[type=file], input[type=file]").first.set_input_files([str(file) for file in files])


def fill(page, label, value):
    page.get_by_label(label, exact=True).first.fill(str(value))


def states(page):
    return page.locator("#lines tr").evaluate_all("rows => rows.map(r => [r.dataset.method, r.dataset.state])")


def wait_until_it_fits(page):
    # Pictures that are still coming may be wider for a moment.
    page.wait_for_function("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_page(served, adapters, tmp_path):
    studio, address = served
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        with opened(browser, address, viewport={"width": 1300, "height": 900}) as page:
            # A broken file: one readable line, nothing loaded.
            upload(page, adapters / "broken.safetensors")
            page.wait_for_selector("#message .bad")
            said = page.inner_text("#message")
            assert "broken" in said
            assert "Traceback" not in said
            assert str(adapters) not in said
            assert not page.is_visible("#slot-0")
            # Two adapters, four methods, two seeds: a grid of eight.
            upload(page, adapters / "style.safetensors", adapters / "subject.safetensors")
            page.wait_for_selector("#slot-1", state="visible")
            assert page.inner_text("#message").strip() == ""
            assert "convlora" in page.inner_text("#adapters")
            page.fill("#prompt textarea", "noto style, a cat face")
            fill(page, "Pictures", 2)
            page.locator("#methods label:has-text('cmlora')").click()
            page.click("#generate")
            page.wait_for_selector("#grid img >> nth=7")
            page.wait_for_selector("#generate:not([disabled])")
            assert states(page) == [[name, "done"] for name in ("merge", "switch", "composite", "cmlora")]
            columns = {round(box["x"]) for box in (one.bounding_box() for one in page.locator("#grid img").all())}
            assert len(columns) == 4
            page.screenshot(path=tmp_path / "grid.png")
            # A picture out of the grid, with its plan in the file.
            page.locator("#grid .thumbnail-item").nth(1).click()
            page.wait_for_selector("#save-picture:not([disabled])")
            with page.expect_download() as download:
                page.click("#save-picture")
            made = read_picture(download.value.path())
            assert (made["method"], made["seeds"], made["plan"]["adapters"]) == ("switch", [0], ["style", "subject"])
            # Narrow: one column, and the grid shrinks with it.
            page.set_viewport_size({"width": 380, "height": 800})
            page.wait_for_function("document.querySelector('#generate').getBoundingClientRect().left < 40")
            wait_until_it_fits(page)
            page.screenshot(path=tmp_path / "narrow-grid.png", full_page=True)
            page.set_viewport_size({"width": 1300, "height": 900})
            # A long run: one method is skipped, then everything is stopped.
            fill(page, "Steps", 200)
            page.click("#generate")
            page.wait_for_selector("#lines tr[data-method=merge][data-state=running]")
            page.click("#skip")
            page.wait_for_selector("#lines tr[data-method=switch][data-state=running]")
            page.click("#stop")
            page.wait_for_selector("#generate:not([disabled])")
            assert states(page) == [[name, "skipped"] for name in ("merge", "switch", "composite", "cmlora")]
            # Somebody else sees nothing of this, in a narrow window that needs no sideways scrolling.
            with opened(browser, address, viewport={"width": 380, "height": 800}) as other:
                assert not other.is_visible("#slot-0")
                wait_until_it_fits(other)
                other.screenshot(path=tmp_path / "narrow.png", full_page=True)
                other.fill("#prompt textarea", "a zzyzx")
                other.click("#generate")
                other.wait_for_selector("#message .bad")
                assert "no adapter is on" in other.inner_text("#message")
                assert len(studio.visitors()) == 2
            # Conflicts and a merged file.
            page.get_by_role("tab", name="Conflicts").click()
            page.click("#conflict")
            page.get_by_text("style and subject").first.wait_for()
            page.get_by_role("tab", name="Save").click()
            page.click("#save-adapter")
            page.wait_for_selector("#saved:has-text('merged')")
        browser.close()
    for name in ("grid", "narrow", "narrow-grid"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).std() > 5


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_another_pipeline_by_its_folder(served, family, tmp_path):
    """A folder is typed, an adapter of that pipeline is uploaded, three methods make their pictures."""
    from peft import LoraConfig

    _, address = served
    pipe = getattr(tiny, f"tiny_{family}_pipeline")()
    lora = random_adapter(pipe, tmp_path / "style.safetensors", LoraConfig(r=2, target_modules=["to_q"]), 1)
    vislr.save(pipe, tmp_path / "pipeline")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        with opened(browser, address, viewport={"width": 1300, "height": 900}) as page:
            box = page.locator("#model input")
            box.fill(str(tmp_path / "pipeline"))
            box.press("Enter")
            page.wait_for_selector("#adapters .note:has-text('pipeline')")
            upload(page, lora)
            page.wait_for_selector("#slot-0", state="visible")
            page.fill("#prompt textarea", "noto style, a cat face")
            page.click("#generate")
            page.wait_for_selector("#grid img >> nth=2")
            page.wait_for_selector("#generate:not([disabled])")
            assert states(page) == [[name, "done"] for name in ("merge", "switch", "composite")]
        browser.close()
