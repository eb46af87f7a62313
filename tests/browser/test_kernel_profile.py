"""The figure of a kernel's lines in Chromium: the chosen measure is drawn, the chosen line is told."""

from collections.abc import Callable

from playwright.sync_api import expect

from optinfer.widgets.kernel_profile import KernelProfile


def line(number: int, code: str, instructions: int, sectors: list[int]) -> dict:
    classes = [["integer and logic", instructions]] if instructions else []
    return {
        "number": number,
        "code": code,
        "instructions": [instructions, None],
        "sectors": sectors,
        "wavefronts": [0, 0],
        "classes": classes,
    }


def test_measures_and_lines_are_chosen(show: Callable) -> None:
    lines = [line(7, "def kernel(x):", 0, [0, 0]), line(8, "    a = tl.load(x + 9 * i)  # " + "far " * 40, 12, [64, 8])]
    lines.append(line(9, "    tl.store(x, a)", 48, [8, 8]))
    widget = KernelProfile(title="kernel on sm_90", lines=lines)
    page = show(widget)
    said, counts = page.locator("[aria-live]"), page.locator("td.oi-count")
    expect(said).to_contain_text("60 instructions of warps")
    assert counts.all_inner_texts() == ["", "12", "48"]
    page.get_by_label("What is counted").select_option("sectors")
    expect(said).to_contain_text("72 sectors")
    assert counts.all_inner_texts() == ["", "64", "8"]
    widths = page.locator(".oi-bar").nth(1).locator("i").evaluate_all("nodes => nodes.map(n => n.style.width)")
    assert widths == ["12.5%", "87.5%"]  # what is needed, and what comes on top
    page.get_by_role("button", name="Line 8").focus()
    page.keyboard.press("Enter")
    expect(said).to_contain_text("12 integer and logic; 64 sectors, at best 8.")
    page.get_by_role("button", name="Line 7").click()
    expect(said).to_contain_text("leaves no instruction of its own")
