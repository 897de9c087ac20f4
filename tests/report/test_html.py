"""The page for the browser, read by a parser: nothing that a stranger wrote may become a tag, and nothing may be fetched."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from marlinctl.report import compression, html, training
from marlinctl.report.page import Block, Figure, Listing, Name, Page, Paragraph, Points, Section, Table
from tests.report import documents

VOID = {"meta", "img", "br", "link", "input"}


class Outline(HTMLParser):
    """Tags with their attributes, and the text of what is not style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@functools.cache
def ours() -> str:
    """The page of a compression, with everything that it may have."""
    return html.render(compression.page(documents.report(), documents.folder()))


def hostile_everywhere() -> Page:
    """The same bad text at every place that a page has."""
    bad = documents.HOSTILE[0] + documents.HOSTILE[1] + documents.HOSTILE[4] + documents.HOSTILE[7]
    blocks: list[Block] = [
        Table((bad,), [(bad,)], folded=bad),
        Table((), [(Name(bad), bad)]),
        Points([[Name(bad), bad]]),
        Listing(bad, folded=bad),
        Paragraph(bad),
    ]
    return Page(bad, bad, [Figure(bad, bad, bad)], [Section(bad, blocks)], bad)


STRANGERS: dict[str, Callable[[], Page]] = {
    "every place": hostile_everywhere,
    "names of linears": lambda: compression.page(documents.report(list(documents.HOSTILE)), documents.folder()),
    "name of the model": lambda: compression.page(
        documents.report([], source={"kind": "hub", "name": documents.HOSTILE[1], "revision": None}), documents.folder()
    ),
}


@pytest.mark.parametrize("place", STRANGERS)
def test_text_of_strangers_stays_text(place: str) -> None:
    """A tensor called <script> would run in the browser of whoever looks at the report."""
    outline = Outline(html.render(STRANGERS[place]()))
    names = {tag for tag, _ in outline.tags}
    assert not names & {"script", "img", "iframe", "object", "link", "a", "base", "form"}
    assert not [attributes for _, attributes in outline.tags if any(key.startswith("on") for key in attributes)]
    assert sum(tag == "style" for tag, _ in outline.tags) == 1 + sum(tag == "svg" for tag, _ in outline.tags)  # each SVG has matplotlib's
    assert outline.open == []
    assert "49" not in re.findall(r"model\.layers\.4\.(\S+)", outline.text)  # {{ 7 * 7 }} is not calculated
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", outline.text)
    if "model.layers" in outline.text:
        assert documents.HOSTILE[0] in outline.text or documents.HOSTILE[1] in outline.text


OURS: dict[str, Callable[[], str]] = {
    "compress": ours,
    "distill": lambda: html.render(training.page(documents.training(), documents.folder("dense"))),
    "blockwise": lambda: html.render(training.page(documents.training("blockwise"), documents.folder("dense"))),
}


@pytest.mark.parametrize("kind", OURS)
def test_a_page_needs_nothing_else(kind: str) -> None:
    """A report that is mailed to somebody would lose its pictures, or tell a server who reads it."""
    text = OURS[kind]()
    outline = Outline(text)
    for _, attributes in outline.tags:
        for key in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attributes.get(key) or "#").startswith("#"), attributes
    assert not re.search(r"@import|url\((?!#)", text)
    policy = next(a["content"] for tag, a in outline.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_ids_are_unique_and_every_reference_finds_one() -> None:
    """Two pictures with equal ids show each other's markers and clips."""
    text = ours()
    ids = [attributes["id"] for _, attributes in Outline(text).tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 100
    references = set(re.findall(r"(?:xlink:href=\"|url\()#([^\")]+)", text))
    assert references and references <= set(ids)


def test_everything_that_was_measured_is_on_the_page() -> None:
    """A section that silently stays away is worse than none at all."""
    text = Outline(ours()).text
    for wanted in (
        "org/Model-1B", "24 linears quantized", "1.0 MB", "3.00 times smaller", "4.27",  # 4 bits + 16 / 64, and 32 bytes of shape
        "diagonal Hessian", "3 inputs were zero", "nothing but zeros: <b>model.layers.2</b>",
        "winogrande (validation)", "0.5300 ± 0.0100", "-0.0200 ± 0.0040", "14.400 ± 0.700", "0.12340 ± 0.00200",
        "on a part of their documents",
        "model.layers.3.mlp.up_proj", "lm_head", "output head",
        "Roofline", "llama3-8b", "3.20", "Some GPU", "n128 m16", "2.0e-04",
        "apache-2.0", "cccc", "dede", "calibration 0", "torch 2.13.0+cpu", "ffff", "logits within 1.0e-07",
        "pip install marlinctl==0.1.0 torch==2.13.0 transformers==5.23.0", "marlinctl compress org/Model-1B out/model", "group_size: 128",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "n64 m16" not in text, "only the fastest of each family"


def test_what_looked_wrong_is_on_the_page_of_a_distillation() -> None:
    """A teacher with half of its shards would be told of on a terminal that nobody keeps."""
    text = Outline(html.render(training.page(documents.training(), documents.folder("dense")))).text
    assert "teacher: weights that are not read lie in the folder: old.safetensors" in text


def test_sections_without_figures_stay_out() -> None:
    """`quantize` measures no quality and no speed: headings over nothing help nobody."""
    bare = documents.report(fallbacks=[], dead_inputs=[], warnings=[], kept=[])
    for key in ("evaluation", "bench", "verified"):
        del bare[key]
    text = html.render(compression.page(bare, documents.folder()))
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == ["Layers", "Where it comes from", "Make it again"]


def test_what_could_not_be_measured_is_said() -> None:
    """A report without quality would look like one that forgot it."""
    reason = "not evaluated: both models need 9.0 GiB, 1.0 GiB are free"
    text = html.render(compression.page(documents.report(evaluation={"table": reason}), documents.folder()))
    assert reason in text


def test_the_bits_are_those_of_the_format() -> None:
    """Sparse-MARLIN holds three bits a weight, whatever the interchange form that was made first takes."""
    figures = compression.page(documents.report(), documents.folder("marlin_24")).figures
    assert next(figure.value for figure in figures if figure.label == "Bits per weight").startswith("3.2")


ODD = (0.0, -0.0, float("nan"), float("inf"), -1.0, 1e-300, 1e300, None)


@pytest.mark.parametrize(
    "odd",
    [pytest.param(odd, marks=pytest.mark.slow if odd in (-1.0, 1e-300) or str(odd) in ("-0.0", "inf") else ()) for odd in ODD],
    ids=str,
)
def test_no_figure_stops_the_page(odd: float | None) -> None:
    """The page is made after hours of work: a figure that nobody foresaw must not be their end."""
    names = ["model.layers.0.q", "model.layers.999999999999999999.q", "lm_head", "model.layers.3.experts.7.up_proj", ""]
    layers = [documents.layer(name, error=odd, seconds=abs(odd or 0.0) if odd == odd else 0.1, damping=1e-300) for name in names]
    layers[1]["error"] = 0.5
    estimate = documents.estimate(odd, odd)
    one = documents.evaluation()
    one["model"]["perplexity"] = one["baseline"]["perplexity"] = one["comparison"]["kl"] = one["comparison"]["perplexity"] = estimate
    one["model"]["tasks"]["winogrande"]["metrics"]["acc"] = estimate
    report = documents.report(layers=layers, evaluation={"document": one}, error={"mean": odd, "worst": "x"})
    text = html.render(compression.page(report, documents.folder()))
    assert ("not a number" in text) is (odd is None or odd != odd or odd == float("inf"))
    curve = [{"step": 1, "loss": odd}, {"step": 2, "loss": 1.0}]
    losses = {"before": {"loss": odd}, "after": {"loss": 1.0}}
    trained = documents.training(held_out=losses)
    trained["training"]["curve"] = curve
    assert html.render(training.page(trained, documents.folder("dense")))


def test_a_model_without_linears_to_show() -> None:
    """Everything skipped, or a single step: lists that are empty where they never were."""
    assert html.render(
        compression.page(documents.report([], evaluation={"document": documents.evaluation(names=[], text=None)}), documents.folder())
    )
    short = documents.training()
    short["training"]["curve"] = short["training"]["curve"][:1]
    assert html.render(training.page(short, documents.folder("dense")))


def test_a_row_with_one_scale_is_no_group() -> None:
    """`group size 576` for some linears and 1536 for others is not what --group-size -1 was."""
    names = ["model.layers.0.q", "model.layers.0.down"]
    layers = [documents.layer(names[0], group_size=128), documents.layer(names[1], shape=[64, 256], group_size=256)]
    page = compression.page(documents.report(names, layers=layers), documents.folder("marlin"))
    assert page.lead.endswith("one scale a row.") and "group size" not in html.render(page).split("The recipe")[0]
