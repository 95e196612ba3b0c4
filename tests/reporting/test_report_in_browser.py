"""The report and the comparison in a real browser: nothing fails, figures are drawn and answer, a script stays text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from safeneuron.reporting.comparison import Compared, render_comparison
from safeneuron.reporting.details import Details, JudgedAnswer, StrongNeuron
from safeneuron.reporting.report import render_report
from tests.helpers.browser import Chromium, installed
from tests.helpers.sample_results import SCRIPT, SECRET, sample_provenance, sample_results, sample_state, typed
from tests.reporting.test_comparison import ASKED, verdicts

pytestmark = pytest.mark.skipif(
    installed() is None, reason="no Chromium or Chrome is installed (on Debian: apt-get install chromium)"
)
PLANTED = "</script><script>document.title = 'broken out'</script><img src=x onerror=\"document.title='broken out'\">"


def answers() -> list[JudgedAnswer]:
    """Three hundred answers, one in ten of them with markup in it."""
    found = []
    for number in range(300):
        state, kind = f"T{number % 2}", ("harmful", "benign")[number // 2 % 2]
        which = ("ORI", "none") if number % 3 else ("FULL", "static")
        verdict = ("refused", "complied", "incoherent")[number % 3]
        text = PLANTED if number % 10 == 0 else f"{SECRET} Number {number}."
        found.append(
            JudgedAnswer(
                state=state,
                set=which[0],
                knowledge=which[1],
                kind=kind,
                index=number // 4,
                prompt=f"{SCRIPT} request {number // 4}",
                response=text,
                verdict=verdict,
            )
        )
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same report, masked and with the text in it."""
    folder = tmp_path_factory.mktemp("pages")
    neurons = {"T0": [StrongNeuron(layer, 5, 100, layer / 10, 2.0, 1 + layer % 3) for layer in range(30)]}
    found = {}
    for name, show_text in (("masked", False), ("whole", True)):
        files = render_report(typed(sample_results()), [], sample_provenance(), show_text, Details(answers(), neurons))
        found[name] = folder / f"{name}.html"
        found[name].write_text(files["report.html"], encoding="utf-8")
    return found


def choose(browser: Chromium, name: str, value: str) -> None:
    """Choose what is written so, or everything, in a select of the response browser, as a reader would."""
    browser.run(
        f"""(() => {{ const select = document.querySelector('#browser [name={name}]');
        select.value = [...select.options].find(option => option.text === {json.dumps(value)}).value;
        select.dispatchEvent(new Event('change')); }})()"""
    )


def counted(browser: Chromium) -> str:
    return str(browser.run("document.querySelector('#browser .count').textContent"))


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False), (390, True)])
def test_the_page_opens_without_an_error_and_draws_its_figures(browser, pages, width, dark) -> None:
    browser.problems.clear()
    browser.requests.clear()
    browser.open(pages["masked"], width, dark)
    assert browser.problems == []
    assert browser.requests == [pages["masked"].as_uri()], "the page loads nothing"
    drawn = browser.run(
        "Object.fromEntries([...document.querySelectorAll('figure[data-chart]')].map(figure => [figure.dataset.chart, "
        "[figure.querySelectorAll('.panel svg').length, figure.querySelectorAll('.panel .mark').length]]))"
    )
    assert drawn == {
        "attack": [1, 13 + 3],  # the base model's static attacks are its adaptive ones too
        "curve": [2, 20],
        "layers": [2, 60],
        "neurons": [1, 30],
        "training": [3, 144],
    }
    assert browser.run("document.querySelectorAll('.panel rect.column').length") > 100
    heights = "[...document.querySelectorAll('.panel rect.column')].map(bar => bar.getBoundingClientRect().height)"
    assert browser.run(f"Math.max(...{heights})") > 50, "bars have the height of their value"
    assert browser.run("document.documentElement.scrollWidth") <= width, "nothing is wider than the window"
    light = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (light == "rgb(22, 24, 27)") == dark


def test_the_switch_changes_the_theme(browser, pages) -> None:
    browser.open(pages["masked"], dark=False)
    seen = []
    for _ in range(3):
        browser.run("document.getElementById('theme').click()")
        seen.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert seen == ["rgb(252, 251, 249)", "rgb(22, 24, 27)", "rgb(252, 251, 249)"]


def test_a_bar_says_its_numbers_under_the_pointer_and_by_keys(browser, pages) -> None:
    browser.open(pages["masked"])
    place = browser.run(
        """(() => { const bar = [...document.querySelectorAll('[data-chart=attack] .mark')]
        .find(mark => mark.dataset.tip.startsWith('T1, FULL adaptive'));
        bar.scrollIntoView({block: 'center', behavior: 'instant'}); const box = bar.getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2]; })()"""
    )
    browser.run("new Promise(done => setTimeout(done, 100))")
    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    said = browser.run("document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent")
    assert "15 of 47" in said
    browser.run("document.querySelector('[data-chart=layers] svg').focus({preventScroll: true})")
    for _ in range(2):
        browser.ask("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", code="ArrowRight")
    assert browser.run("document.getElementById('tip').textContent").startswith("T0, layer 1: ")


def test_a_state_can_be_taken_out_of_a_figure(browser, pages) -> None:
    browser.open(pages["masked"])
    marks = "document.querySelectorAll('[data-chart=attack] .mark').length"
    browser.run("document.querySelectorAll('[data-chart=attack] .legend button')[1].click()")
    assert browser.run(marks) == 8
    browser.run("document.querySelectorAll('[data-chart=attack] .legend button')[1].click()")
    assert browser.run(marks) == 16


def test_the_filters_filter_together(browser, pages) -> None:
    browser.open(pages["masked"])
    everything = answers()
    assert counted(browser) == "1 to 12 of 300 answers"
    assert browser.run("document.querySelectorAll('#browser .answers > li').length") == 12
    choose(browser, "state", "T1")
    choose(browser, "attack", "FULL static")
    choose(browser, "kind", "harmful")
    choose(browser, "verdict", "refused")
    expected = [
        answer
        for answer in everything
        if (answer.state, answer.set, answer.kind, answer.verdict) == ("T1", "FULL", "harmful", "refused")
    ]
    assert counted(browser) == f"1 to 12 of {len(expected)} answers"
    browser.run("document.querySelector('#browser .on').click()")
    browser.run("document.querySelector('#browser .on').click()")
    assert counted(browser) == f"25 to {len(expected)} of {len(expected)} answers"
    last = browser.run("document.querySelector('#browser .answers > li:last-child .asked').textContent")
    assert last == expected[-1].prompt
    for name in ("state", "attack", "kind", "verdict"):
        choose(browser, name, "all")
    text = "document.querySelector('#browser [name=text]')"
    browser.run(f"{text}.value = 'REQUEST 31'; {text}.dispatchEvent(new Event('input'))")
    browser.run("new Promise(done => setTimeout(done, 400))")
    assert counted(browser) == "1 to 4 of 4 answers"
    browser.run(f"{text}.value = 'moonlight'; {text}.dispatchEvent(new Event('input'))")
    browser.run("new Promise(done => setTimeout(done, 400))")
    assert counted(browser) == "0 answers", "what is masked is not in the page at all"


def test_harmful_text_is_hidden_until_asked_for_and_a_script_in_it_stays_text(browser, pages) -> None:
    browser.problems.clear()
    browser.open(pages["whole"])
    choose(browser, "kind", "harmful")
    shown = "document.querySelector('#browser .answers').textContent"
    assert "moonlight" not in browser.run(shown)
    browser.run("document.querySelector('#browser .said button').click()")
    assert browser.run("document.querySelector('#browser .said').textContent") == PLANTED
    assert "moonlight" not in browser.run(shown), "the others are still hidden"
    browser.run("document.querySelector('#browser [name=reveal]').click()")
    assert "moonlight" in browser.run(shown)
    assert SCRIPT in browser.run(shown)
    assert browser.run("document.querySelectorAll('#browser script, #browser img').length") == 0
    assert browser.run("document.title").startswith("Safety neurons of")
    assert browser.problems == []


def test_the_page_can_be_read_without_its_script(browser, pages) -> None:
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.ask("Page.navigate", url=pages["masked"].as_uri())
        for _ in range(100):
            if browser.run("document.readyState === 'complete' && document.querySelectorAll('figure svg').length"):
                break
        assert browser.run("document.querySelectorAll('figure .static svg').length") == 4
    finally:
        browser.ask("Emulation.setScriptExecutionDisabled", value=False)


# -- several runs side by side ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs of two states each, more than there are colours; the name of the last one is markup."""
    runs = []
    for number, name in enumerate(("seed-0", "seed-1", "seed-2", f"a{PLANTED}b")):
        states = sample_state("T0", 40), sample_state("T1", 8 + 4 * number)
        results = typed({**sample_results(*states), "seed": number})
        settings = "same" if number < 3 else "other"
        runs.append(Compared(name, results, settings, {ASKED: verdicts(16 - 5 * number)}))
    page = tmp_path_factory.mktemp("comparison") / "comparison.html"
    page.write_text(render_comparison(runs)["comparison.html"], encoding="utf-8")
    return page


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False), (390, True)])
def test_a_comparison_opens_without_an_error_and_draws_its_figures(browser, comparison, width, dark) -> None:
    browser.problems.clear()
    browser.requests.clear()
    browser.open(comparison, width, dark)
    assert browser.problems == []
    assert browser.requests == [comparison.as_uri()], "the page loads nothing"
    drawn = browser.run(
        "Object.fromEntries([...document.querySelectorAll('figure[data-chart]')].map(figure => [figure.dataset.chart, "
        "figure.querySelectorAll('.panel .mark').length]))"
    )
    assert drawn == {"attack": 4 * (8 + 8), "curve": 2 * 4 * 2 * 5, "scatter": 4 * 2}
    assert browser.run("document.documentElement.scrollWidth") <= width, "nothing is wider than the window"
    assert (browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)") == dark


def test_a_comparison_has_its_tables_and_a_name_that_is_a_script_stays_text(browser, comparison) -> None:
    browser.problems.clear()
    browser.open(comparison)
    tables = browser.run(
        "Object.fromEntries([...document.querySelectorAll('section')].filter(part => part.querySelector('table')).map("
        "part => [part.querySelector('h2').id, part.querySelectorAll('tbody tr').length]))"
    )
    assert tables == {"success": 8, "seeds": 1, "differences": 3, "refusal": 8, "neurons": 8}
    assert "adaptive" in browser.run("document.querySelector('#differences ~ .scroll tbody').textContent")
    assert browser.run("document.querySelector('.facts div:last-child dt').textContent") == f"a{PLANTED}b"
    assert PLANTED in browser.run("document.querySelector('[data-chart=scatter] .legend').textContent")
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert "side by side" in browser.run("document.title")
    assert browser.problems == []


def test_words_stand_left_numbers_right_and_on_a_phone_the_names_leave_room_for_them(browser, comparison) -> None:
    browser.open(comparison)
    aligned = browser.run(
        "[...document.querySelectorAll('#differences ~ .scroll tbody tr:first-child td')].map("
        "cell => getComputedStyle(cell).textAlign)"
    )
    assert aligned == ["left"] * 2 + ["right"] * 8
    wide = "document.querySelector('#differences ~ .scroll').scrollWidth <= document.querySelector('main').clientWidth"
    assert browser.run(wide), "the p-values are in view"
    browser.open(comparison, 390)
    name = "document.querySelector('.grid tbody tr:last-child th').getBoundingClientRect().width"
    assert browser.run(name) < 195


def test_where_the_colours_begin_again_points_are_hollow(browser, comparison) -> None:
    browser.open(comparison)
    looks = browser.run(
        "[...document.querySelectorAll('[data-chart=scatter] .dot-mark')].map(dot => "
        "[getComputedStyle(dot).fill, getComputedStyle(dot).stroke].join(' '))"
    )
    assert len(set(looks)) == len(looks) == 8
    swatches = browser.run(
        "[...document.querySelectorAll('[data-chart=scatter] .legend .swatch')].map(one => one.className)"
    )
    assert swatches == ["swatch"] * 7 + ["swatch hollow", "swatch interval"]
