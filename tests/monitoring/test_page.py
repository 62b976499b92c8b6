# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The report's page is well-formed, self-contained and deterministic, and no text in it can become markup or a script."""

import base64
import hashlib
import importlib.util
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from modeling_moe.monitoring.report import card_pictures, write_report
from modeling_moe.monitoring.report.data import ModelChanges, RoutingReport, TracedText
from modeling_moe.monitoring.report.page.token_data import text_data, to_json, top_data
from modeling_moe.monitoring.report.page.visible import shorten, visible
from modeling_moe.utils.errors import UserError
from tests.monitoring.synthetic_report import HOSTILE, synthetic_report


pytest.importorskip("matplotlib")

from modeling_moe.monitoring.report.page import figures_experts, figures_history, figures_layers, words
from modeling_moe.monitoring.report.page.sections import sections
from modeling_moe.monitoring.report.page.style import style


VOID = {"meta", "link", "input", "br", "hr", "img"}
OTHER_SECTIONS = {"summary", "tokens", "texts", "figures"}
HOSTILE_NAMES = [*HOSTILE, "$x^{", "\\frac{a_b", "\ud800", "\u0301", "100%_#&~", "\u200b\u2066\ufeff", "日本 🙂 عربى"]


class Page(HTMLParser):
    """A page that was read: its elements, the text of its scripts, and its visible text."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif not self.open or self.open[-1] != "style":
            self.text += data

    def with_tag(self, wanted: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == wanted]

    def json(self, name: str):
        (text,) = [text for attributes, text in self.scripts if attributes.get("id") == name]
        return json.loads(text)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report = synthetic_report(layers=2, experts=4, domains=2, compare=True, history=True)
    return report, write_report(report, folder)


@pytest.fixture(scope="module")
def page(written) -> Page:
    return Page(written[1][0].read_text(encoding="utf-8"))


def hostile_report() -> RoutingReport:
    report = synthetic_report(
        layers=2, experts=4, domains=len(HOSTILE_NAMES), hostile=True, compare=True, history=True
    )
    texts = [replace(text, domain=name) for text, name in zip(report.models[0].texts, HOSTILE_NAMES, strict=True)]
    model = replace(
        report.models[0],
        name=" ".join(HOSTILE_NAMES),
        facts={name: name for name in HOSTILE_NAMES},
        domains=HOSTILE_NAMES,
        tokens=dict.fromkeys(HOSTILE_NAMES, 100),
        losses=None,
        texts=texts,
    )
    changes = replace(report.changes, note=" ".join(HOSTILE_NAMES))
    history = [
        entry | {"routing/layer_00/x": 1.0, "</script>": "<b>", "loss": "nan"} for entry in report.history or []
    ]
    return RoutingReport([model], changes, history)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> str:
    return write_report(hostile_report(), tmp_path_factory.mktemp("hostile"))[0].read_bytes().decode("utf-8")


def test_the_page_closes_every_element_and_has_unique_ids(page):
    assert page.open == []
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))


def test_references_within_the_page_have_a_target(page):
    names = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = [attributes["href"] for _, attributes in page.elements if (attributes.get("href") or "").startswith("#")]
    paints = re.findall(r"url\(#([^)]*)\)", str(page.elements))
    assert {link[1:] for link in links if link} <= names
    assert paints
    assert set(paints) <= names


def test_sections_have_a_title_one_sentence_and_an_entry_in_the_contents(page):
    sections = [attributes["id"] for attributes in page.with_tag("section")]
    assert sections == [
        *("summary", "changes", "load", "specialisation", "entropy", "co_activation", "paths", "position", "history"),
        *("tokens", "texts", "figures"),
    ]
    links = [attributes["href"] for attributes in page.with_tag("a")]
    assert set(links) == {f"#{name}" for name in sections}
    captions = [
        attributes
        for attributes in page.with_tag("p")
        if attributes.get("class") == "caption" and "hidden" not in attributes
    ]
    assert len(captions) == len(sections) - 1  # the summary is words


def test_the_page_loads_nothing(written, page):
    html = written[1][0].read_text(encoding="utf-8")
    assert not re.search(r"https?:|ftp:|@import|\bfetch\(|XMLHttpRequest|WebSocket", html)
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))


def test_only_the_script_that_the_policy_names_may_run(page):
    (script,) = [text for attributes, text in page.scripts if attributes.get("type") != "application/json"]
    (policy,) = [of["content"] for of in page.with_tag("meta") if of.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';")
    assert re.findall(r"script-src ([^;]*)", policy) == [f"'sha256-{digest}'"]
    assert "on" not in {name[:2] for _, attributes in page.elements for name in attributes}


def test_the_script_writes_no_markup(page):
    (script,) = [text for attributes, text in page.scripts if attributes.get("type") != "application/json"]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|setAttribute\(\"on", script
    )


def test_hostile_texts_become_no_element_and_no_script(hostile):
    page = Page(hostile)
    assert page.open == []
    assert sum(attributes.get("type") != "application/json" for attributes, _ in page.scripts) == 1
    assert not page.with_tag("img")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    for attributes, text in page.scripts:
        assert attributes.get("type") is None or json.loads(text) is not None


def test_hostile_texts_are_shown_character_by_character(hostile):
    page = Page(hostile)
    for name in HOSTILE_NAMES:
        assert visible(name) in page.text, name
    tokens = {token for text in (0, 1) for token in page.json(f"text-0-{text}")["tokens"]}
    assert {visible(token) for token in HOSTILE if len(token) < 40} <= tokens


def test_the_page_has_no_character_that_moves_or_hides_others(hostile):
    # first strong isolates are the page's own: they enclose names within sentences
    invisible = [mark for mark in set(hostile) if not mark.isprintable() and mark not in "\n\u2068\u2069\u00a0"]
    assert invisible == []


def test_a_long_token_is_cut_and_its_start_is_kept_for_the_tooltip():
    text = TracedText("d", ["x" * 10_000], np.zeros((1, 1, 1), np.int32), np.ones((1, 1, 1), np.float32), None)
    data = text_data(text)
    assert data["tokens"] == ["x" * 39 + "…"]
    assert data["long"] == {0: "x" * 300 + "… (10,000 characters)"}
    assert len(json.dumps(data)) < 1000


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a b"),
        ("\n\t\0\x1b\x7f", "↵⇥␀␛␡"),
        ("\x85\u200b\u202e\u2028\ud800\ue000", "⟨U+0085⟩⟨U+200B⟩⟨U+202E⟩⟨U+2028⟩⟨U+D800⟩⟨U+E000⟩"),
        ("\u0301x", "◌\u0301x"),
        ("日本🙂\u00a0é", "日本🙂\u00a0é"),
        ("", ""),
    ],
)
def test_every_character_is_visible(text, shown):
    assert visible(text) == shown


def test_a_text_is_shortened_to_the_limit():
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abcde…"
    assert len(shorten("\u202e" * 100, 20)) == 20


def test_json_for_a_script_has_no_markup():
    value = ["</script><!-- & \u2028 \ud800"]
    text = to_json(value)
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == value


@pytest.mark.parametrize("experts", [4, 255, 256, 1000])
def test_the_page_holds_each_tokens_experts_weights_and_margins(experts):
    random = np.random.default_rng(0)
    index = random.integers(0, experts, (3, 5, 2)).astype(np.int32)
    index[0, 0] = -1
    index[1, 1, 0] = experts - 1
    weight = (random.normal(size=(3, 5, 2)) * 3).astype(np.float32)
    margin = random.random((3, 5)).astype(np.float32)
    margin[2] = np.nan
    data = text_data(TracedText("d", list("abcde"), index, weight, margin))
    read = np.frombuffer(base64.b64decode(data["index"]), f"<u{data['bytes']}").reshape(data["shape"]).astype(int)
    read[read == (255 if data["bytes"] == 1 else 65535)] = -1
    np.testing.assert_array_equal(read, index)
    weights = np.frombuffer(base64.b64decode(data["weight"]), "<i2").reshape(data["shape"]) * data["weight_unit"]
    np.testing.assert_allclose(weights, weight, atol=1e-3)
    whole = np.frombuffer(base64.b64decode(data["margin"]), "<i2").reshape(3, 5)
    assert (whole[2] == -32768).all()
    np.testing.assert_allclose(whole[:2] * data["margin_unit"], margin[:2], atol=1e-4)


def test_a_token_is_listed_with_its_share_and_the_text_around_it(written):
    layer = written[0].models[0].layers[1]
    top = layer.top_tokens[2][0]
    assert top_data(layer)[2][0] == [visible(top.token), top.count, round(top.share, 3), "before it ", " after"]


def test_equal_reports_give_equal_bytes(tmp_path):
    first, second = (
        write_report(synthetic_report(layers=1, experts=2, history=True), tmp_path / name) for name in "ab"
    )
    assert [file.name for file in first] == [file.name for file in second]
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_each_section_with_a_picture_has_a_png_file(written):
    names = [file.name for file in written[1]]
    of_both = [
        f"{key}{part}.png"
        for key in ("load", "specialisation", "entropy", "co_activation", "paths", "position")
        for part in ("", "_2")
    ]
    assert names == ["report.html", "changes.png", *of_both, "history.png"]
    for file in written[1][1:]:
        width, height = png_size(file.read_bytes())
        assert 800 <= width <= 1300
        assert height >= 250


def test_a_heat_map_names_its_values(written, page):
    (values, *_), model = (
        [json.loads(text) for of, text in page.scripts if of.get("class") == "cells"][1:3],
        written[0].models[0],
    )
    load = model.layers[0].load.sum(axis=0)
    assert values[0]["values"][0] == pytest.approx(load / load.mean(), rel=1e-2)
    assert values[0]["rows"] == ["layer 0", "layer 1"]
    left, top, right, bottom = values[0]["box"]
    assert 0 < left < right < 1
    assert 0 < top < bottom < 1


def test_a_model_cards_pictures_are_small(tmp_path):
    files = card_pictures(synthetic_report(layers=16, experts=64, domains=3, top_k=8), tmp_path)
    assert [file.name for file in files] == ["routing_load.png", "routing_specialisation.png"]
    for file in files:
        assert 1150 <= png_size(file.read_bytes())[0] <= 1250
        assert file.stat().st_size < 150_000


def test_a_card_of_one_domain_has_one_picture_and_a_history_has_none(tmp_path):
    assert [file.name for file in card_pictures(synthetic_report(domains=1), tmp_path)] == ["routing_load.png"]
    with pytest.raises(ValueError, match="needs a report with a model"):
        card_pictures(RoutingReport(history=[]), tmp_path)


def test_a_report_of_64_experts_is_small(tmp_path):
    """One layer may cost a sixteenth of sixteen, of which a slow test in a browser measures the whole."""
    files = write_report(synthetic_report(layers=1, experts=64, domains=3, texts=3, top_k=8), tmp_path)
    assert sum(file.stat().st_size for file in files) < 15_000_000 / 16


def test_without_matplotlib_nothing_is_computed_or_written(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    for write in (write_report, card_pictures):
        with pytest.raises(UserError, match=r'pip install "modeling-moe\[plot\]"'):
            write(synthetic_report(), tmp_path / "report")
    assert not list(tmp_path.iterdir())


def unknown_entropies(report):
    layers = [
        replace(layer, token_entropy=None, marginal_entropy=None, gate_margin=None)
        for layer in report.models[0].layers
    ]
    texts = [replace(text, margin=None) for text in report.models[0].texts]
    return replace(report, models=[replace(report.models[0], layers=layers, texts=texts)])


def silent_layer(report):
    layers = report.models[0].layers
    silent = replace(
        layers[0],
        load=layers[0].load * 0,
        position=layers[0].position * 0,
        co_activation=layers[0].co_activation * 0,
        specialisation=np.full_like(layers[0].specialisation, -np.inf),
        significant=layers[0].significant & False,
    )
    paths = [np.zeros_like(report.models[0].paths[0])]
    return replace(report, models=[replace(report.models[0], layers=[silent, layers[1]], paths=paths, texts=[])])


def layers_of_different_widths(report):
    wide = synthetic_report(layers=2, experts=6).models[0]
    layers = [report.models[0].layers[0], wide.layers[1]]
    paths = [np.arange(24).reshape(4, 6)]
    return replace(report, models=[replace(report.models[0], layers=layers, paths=paths)])


def incomparable(report):
    other = synthetic_report(layers=1, experts=6, seed=1).models[0]
    return replace(report, models=[report.models[0], other], changes=ModelChanges([], "The models have other layers."))


# what is unusual -> a report, and the sections that have no picture
UNUSUAL = {
    "one layer, one choice": (synthetic_report(layers=1, experts=2, top_k=1), {"paths", "co_activation"}),
    "one domain": (synthetic_report(domains=1), {"specialisation"}),
    "no probabilities": (unknown_entropies(synthetic_report()), {"entropy"}),
    "a layer without tokens": (silent_layer(synthetic_report()), set()),
    "different widths": (layers_of_different_widths(synthetic_report()), set()),
    "incomparable": (incomparable(synthetic_report()), {"paths"}),
    "only a history": (replace(synthetic_report(history=True), models=[]), set()),
    "an empty history": (RoutingReport(history=[{"step": 1}, {"loss": None}]), {"history"}),
    "ten domains": (synthetic_report(layers=1, domains=10), {"paths"}),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("report", "without"), UNUSUAL.values(), ids=UNUSUAL.keys())
def test_an_unusual_report_is_drawn_without_a_warning(report, without, tmp_path):
    files = write_report(report, tmp_path)
    page = Page(files[0].read_text(encoding="utf-8"))
    assert page.open == []
    pictures = [of["id"] for of in page.with_tag("section") if of["id"] not in OTHER_SECTIONS]
    drawn = {file.stem.removesuffix("_2") for file in files[1:]}
    assert drawn == set(pictures) - without


def test_the_load_is_shown_over_the_mean():
    layer = replace(synthetic_report().models[0].layers[0], load=np.array([[1, 0, 2, 1], [3, 0, 2, 3]]))
    np.testing.assert_allclose(figures_layers.load_over_mean(layer), [4 / 3, 0, 4 / 3, 4 / 3])


def test_the_distance_of_a_position_is_the_share_that_would_have_to_move():
    layer = replace(synthetic_report().models[0].layers[0], position=np.array([[4, 0], [2, 2], [0, 4], [0, 0]]))
    np.testing.assert_allclose(figures_experts.position_shift(layer), [0.5, 0, 0.5, np.nan])
    ratios = figures_experts.position_ratios(layer)
    np.testing.assert_allclose(ratios[0], [1, 0, -np.inf, np.nan])


def test_the_history_keeps_each_layers_steps_and_leaves_out_what_is_no_number():
    entries = [
        {"step": 1, "loss": 2.0, "routing/layer_03/max_violation": 0.5, "routing/max_violation": 0.1},
        {"step": 2, "loss": math.nan, "routing/layer_03/max_violation": "x", "routing/layer_04/new": 1},
        {"loss": 3.0, "routing/layer_03/max_violation": 0.5},
    ]
    assert figures_history.logged(entries) == {"max_violation": {"3": {1.0: 0.5}}, "new": {"4": {2.0: 1.0}}}
    assert figures_history.losses(entries) == {1.0: 2.0}


def test_a_layer_with_two_experts_modules_and_the_router_losses_are_drawn():
    names = ["layer_10", "layer_02", "model.layers.10.mlp.vision.experts", "model.layers.2.mlp.text.experts"]
    entry = {f"routing/{layer}/max_violation": 1.0 for layer in names} | {
        "routing/balance_loss": 1.2,
        "routing/z_loss": 3.0,
    }
    entries = [entry | {"step": step} for step in (1, 2)]
    assert [*figures_history.logged(entries)["max_violation"]] == ["2", "10", *sorted(names[2:], reverse=True)]
    assert figures_history.router_losses(entries) == {"balance": {1.0: 1.2, 2.0: 1.2}, "z": {1.0: 3.0, 2.0: 3.0}}
    with style():
        drawing = figures_history.history(entries)
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in drawing.figure.axes]
    assert "Router losses, before their coefficients" in titles


def test_models_share_a_scale_only_if_they_have_equally_many_experts():
    few, many = (synthetic_report(experts=count).models[0] for count in (4, 32))
    with style():
        other = synthetic_report(experts=4, seed=1).models[0]
        equal = {part.key: part.groups for part in sections(RoutingReport([few, other]))}
        unequal = {part.key: part.groups for part in sections(RoutingReport([few, many]))}

    matrices = [drawings[1].cells[0].axes.images[0].get_clim()[1] for drawings in equal["paths"]]
    assert len(matrices) == 2
    assert matrices[0] == matrices[1]

    def ends(groups):
        return [drawings[0].cells[0].axes.images[0].get_clim()[1] for drawings in groups]

    assert len(set(ends(equal["co_activation"]))) == 1
    assert len(set(ends(unequal["co_activation"]))) == 2


def test_layers_of_different_numbers_of_experts_are_drawn(tmp_path):
    first, second = (synthetic_report(experts=count).models[0] for count in (2, 9))
    random = np.random.default_rng(0)
    model = replace(first, layers=[first.layers[0], second.layers[1]], paths=[random.integers(0, 9, (2, 9))])
    page = write_report(RoutingReport([model]), tmp_path)[0].read_text(encoding="utf-8")
    assert "of 2 to 9 experts" in Page(page).text


def test_a_long_history_is_averaged_to_what_a_screen_can_show():
    entries = [{"step": step, "routing/layer_00/max_violation": step % 2} for step in range(1, 10_001)]
    with style():
        (cells,) = figures_history.history(entries).cells
    assert cells.values.shape == (1, figures_history.MOST_COLUMNS)
    assert cells.columns[:2] == ["step 1\u201325", "step 26\u201350"]
    assert cells.values[0, 0] == pytest.approx(13 / 25)


def sentences(**changed) -> dict[str, str]:
    """Returns kind -> sentences about a model of two layers, of which the second is changed."""
    report = synthetic_report(layers=2, experts=8)
    plain = {"load": np.full((3, 8), 1000), "max_violation": 0.0, "token_entropy": 1.0}
    first = replace(report.models[0].layers[0], **plain)
    model = replace(report.models[0], layers=[first, replace(report.models[0].layers[1], **plain | changed)])
    found: dict[str, str] = {}
    for finding in words.findings(model):
        found[finding.kind] = found.get(finding.kind, "") + finding.text + " "
    return found


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"load": np.eye(1, 8, dtype=int) * 9000}, "Collapse in layer 1: layer 1 uses as few as 1 of 8 experts"),
        ({"load": np.array([[0, 0, *[1000] * 6]])}, "2 dead experts, which got no token, in layer 1"),
        ({"max_violation": 1.5}, "Imbalance in layer 1"),
        ({"dropped_share": 0.2}, "Capacity drops more than 10 % of the assignments in layer 1, 20 % in layer 1"),
        ({"token_entropy": math.log(8)}, "The router hardly chooses in layer 1"),
        ({"load": np.full((3, 8), 5)}, "Few tokens: an expert gets 15 on average"),
    ],
)
def test_the_summary_names_a_problem_and_the_layer(changed, said):
    assert said in sentences(**changed)["Problem"]
    assert said not in sentences().get("Problem", "")


def test_a_healthy_model_has_no_problem():
    found = sentences()
    assert set(found) == {"Fine", "Seen"}
    assert "No expert is dead" in found["Fine"]
    assert "the expert prefers or avoids the domain beyond chance" in found["Seen"]


def test_the_summary_begins_with_what_was_run():
    model = synthetic_report(layers=2, experts=8).models[0]
    worst = max(model.layers, key=lambda layer: layer.max_violation)
    assert words.what_was_run(model) == (
        "\u2068tiny-0\u2069 sent 30,000 tokens of 3 domains through 2 sparse layers of 8 experts, 2 for each token."
    )
    assert f"The least balanced layer is layer {worst.layer}, where expert" in words.worst_layer(model)
