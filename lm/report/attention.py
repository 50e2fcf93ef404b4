"""What a model looks at in a text, as a page to click through and as pictures."""

from __future__ import annotations

import base64
import contextlib
import math
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lm.errors import UserError, check
from lm.report.inspection import Inspection, Shape
from lm.report.page import Html, Moving, Section, element, fold, join, number, page, table
from lm.report.pieces import labels
from lm.report.texts import shown
from lm.text.tokenizer import Tokenizer

LARGEST = 32_000_000
"""Weights a page may hold, a byte each before they are compressed."""

_STEPS = 255
_PARTS = 10_000  # what is told of the lens' probabilities


@dataclass(frozen=True, kw_only=True)
class About:
    """What stands around the arrays of an inspection."""

    run: str
    """The run's name."""
    step: int
    """Of the checkpoint."""
    tokenizer: Tokenizer
    """The run's."""
    in_bytes: bool
    """See `lm.report.pieces.spelled`."""
    causal: bool
    """Whether a token sees only those before it (and a prefix), and tells the next."""
    classes: tuple[str, ...] = ()
    """Names of the classes, if they are known."""


def quantised(weights: np.ndarray) -> np.ndarray:
    """Probabilities as uint8 steps of their square root, `(q / 255)**2`: within 0.004, small ones far closer."""
    return np.rint(_STEPS * np.sqrt(np.clip(weights, 0.0, 1.0))).astype(np.uint8)


def chosen_layers(shapes: dict[str, Shape], layers: Sequence[int]) -> dict[str, list[int]]:
    """The layers to show of each kind of attention: those asked for that it has, all if none is asked for.

    Args:
      shapes: layers, heads, queries and keys of each kind.
      layers: from 0.

    Raises:
      UserError: a layer that no kind has, or more weights than a page may hold.
    """
    most = max(shape[0] for shape in shapes.values())
    for layer in layers:
        check(0 <= layer < most, f"--layers has {layer}; the model's layers go from 0 to {most - 1}")
    chosen = {
        kind: [layer for layer in range(shape[0]) if not layers or layer in layers] for kind, shape in shapes.items()
    }
    weights = sum(len(chosen[kind]) * math.prod(shape[1:]) for kind, shape in shapes.items())
    check(
        weights <= LARGEST,
        f"a page of {number(weights)} attention weights is too large for a browser, {number(LARGEST)} are the most;"
        " show fewer layers with --layers, or give a shorter text",
    )
    return chosen


def check_head(shapes: dict[str, Shape], head: tuple[int, int]) -> None:
    """Raises `UserError` unless some kind of attention has this layer and head."""
    layers = max(shape[0] for shape in shapes.values())
    heads = max(shape[1] for shape in shapes.values())
    check(
        0 <= head[0] < layers and 0 <= head[1] < heads,
        f"--head is layer {head[0]}, head {head[1]}; layers go from 0 to {layers - 1} and heads from 0 to {heads - 1}",
    )


def attention_page(
    inspection: Inspection, about: About, layers: dict[str, list[int]], head: tuple[int, int] | None = None
) -> str:
    """The page: the text and its losses, maps of all heads, one head large, and the logit lens.

    Args:
      inspection: what to show.
      about: what stands around it.
      layers: from `chosen_layers`.
      head: layer and head that is shown large at first; None = the first there is.

    Returns:
      The file's content, the same for the same arguments.
    """
    names = _names(inspection, about)
    sections = [_text(inspection, about, names), _attention(inspection, about, layers)]
    if inspection.lens is not None:
        sections.append(_lens(inspection, about, names))
    kinds = [_kind(kind, inspection.attention[kind], layers[kind], about) for kind in _ORDER if layers.get(kind)]
    opened = next(
        (
            [at, kind["layers"].index(head[0]), head[1]]
            for at, kind in enumerate(kinds)
            if head and head[0] in kind["layers"]
        ),
        [0, 0, 0],
    )
    data: dict[str, Any] = {"names": names, "kinds": kinds, "opened": opened}
    if inspection.lens is not None:
        data["lens"] = _lens_data(inspection, about)
    return page(
        f"What {about.run} looks at",
        Html(f"step {number(about.step)}; layers, heads and places in the text are counted from 0"),
        _facts(inspection, about),
        sections,
        Moving(script=_own("attention.js"), style=_own("attention.css"), data=data),
    )


def write_page(content: str, path: Path) -> int:
    """Writes a page that is whole or not there; returns its size in bytes. Raises `UserError` if the disk refuses."""
    raw = content.encode("utf-8")
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        temporary.write_bytes(raw)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; name another file with --output") from error
    return len(raw)


def draw(
    inspection: Inspection,
    about: About,
    folder: Path,
    layers: dict[str, list[int]],
    head: tuple[int, int] | None = None,
) -> list[Path]:
    """Draws PNG files: `self.png` and so on with all heads, and `self-LAYER-HEAD.png` with one.

    Args:
      inspection: what to show.
      about: what stands around it.
      folder: where; it is made if only it is missing.
      layers: from `chosen_layers`.
      head: layer and head to draw by itself.

    Returns:
      The files.

    Raises:
      UserError: the folder can't be written.
    """
    names, paths = _names(inspection, about), []
    try:
        folder.mkdir(exist_ok=True)
        for kind in (kind for kind in _ORDER if layers.get(kind)):
            weights = inspection.attention[kind]
            paths.append(folder / f"{kind}.png")
            _draw_grid(weights, layers[kind], _title(kind, about), paths[-1])
            if head is not None and head[0] < len(weights):
                paths.append(folder / f"{kind}-{head[0]}-{head[1]}.png")
                title = f"{_title(kind, about)}: layer {head[0]}, head {head[1]}"
                queries, keys = (names[side] for side in _SIDES[kind])
                _draw_head(weights[head], queries, keys, title, paths[-1])
    except OSError as error:
        raise UserError(f"cannot write pictures into {folder}: {error.strerror}; name another with --png") from error
    return paths


# Kinds of attention in the order of a page, and whose tokens are their queries and keys.
_ORDER = ("self", "cross", "encoder")
_SIDES = {"self": ("tokens", "tokens"), "cross": ("tokens", "source"), "encoder": ("source", "source")}


def _title(kind: str, about: About) -> str:
    if kind == "self":
        return "Each token to itself and those before it" if about.causal else "Each token to all of the text"
    return "Target to source" if kind == "cross" else "Source to itself"


def _names(inspection: Inspection, about: About) -> dict[str, list[str]]:
    """What the tokens are called: `tokens`, with an encoder `source`, and `told`, what each place has to tell."""
    reading = inspection.reading
    rows = {"tokens": reading.tokens}
    if reading.source is not None:
        rows["source"] = reading.source
    found = {name: labels(about.tokenizer, row.tolist(), in_bytes=about.in_bytes) for name, row in rows.items()}
    found["told"] = found["tokens"]
    if about.causal:  # the last place tells a token that is in no row
        last = [int(reading.batch["targets"][0, -1])]
        # Named together, as a character's last byte may be that token.
        line = labels(about.tokenizer, [*reading.tokens.tolist(), *last], in_bytes=about.in_bytes)
        found["told"] = line[1:]
    return found


def _own(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _scored(inspection: Inspection) -> np.ndarray:
    """The losses that there are, [n]."""
    return np.zeros(0) if inspection.nats is None else inspection.nats[~np.isnan(inspection.nats)]


def _facts(inspection: Inspection, about: About) -> list[tuple[str, str]]:
    reading, scored = inspection.reading, _scored(inspection)
    facts = [("tokens", number(len(reading.tokens)))]
    if reading.source is not None:
        facts = [("source tokens", number(len(reading.source))), ("target tokens", number(len(reading.tokens)))]
    for kind in _ORDER:
        if kind in inspection.attention:
            shape = inspection.attention[kind].shape
            name = "layers × heads" if len(inspection.attention) == 1 else f"layers × heads, {kind}"
            facts.append((name, f"{shape[0]} × {shape[1]}"))
    if len(scored):
        mean = float(scored.mean())
        facts.append(("nats per token" if about.causal else "nats per hidden token", f"{mean:.3f}"))
        facts.append(("perplexity" if about.causal else "pseudo-perplexity", f"{math.exp(min(mean, 700.0)):,.2f}"))
    return facts


def _text(inspection: Inspection, about: About, names: dict[str, list[str]]) -> Section:
    reading, parts = inspection.reading, []
    if reading.source is not None:
        parts += [
            element("h3", "Source"),
            _tokens(names["source"], [None] * len(names["source"]), 1.0),
            element("h3", "Target"),
        ]
    most = math.log(about.tokenizer.vocab_size)
    line, nats = list(names["tokens"]), [math.nan] * len(names["tokens"])
    if inspection.nats is not None:
        nats = inspection.nats.tolist()
        if about.causal:  # the loss at a place is that of the token after it
            line, nats = [names["tokens"][0], *names["told"]], [math.nan, *nats]
            if math.isnan(nats[-1]):
                line.pop(), nats.pop()
    parts.append(_tokens(line, [None if math.isnan(value) else value for value in nats], most))
    if len(_scored(inspection)):
        key = [element("span", "0", class_="from"), element("span", class_="ramp"), f"{most:.1f} nats, a pure guess"]
        parts.append(element("p", *key, class_="key aside"))
    if inspection.classes is not None:
        names_of = about.classes if len(about.classes) == len(inspection.classes) else ()
        rows = [
            [shown(names_of[i]) if names_of else f"class {i}", f"{share:.1%}"]
            for i, share in enumerate(inspection.classes.tolist())
        ]
        parts.append(table([("class", "text"), ("probability", "number")], rows))
    return Section(name="text", title="Text and loss", intro=_about_loss(inspection, about), body=join(parts))


def _about_loss(inspection: Inspection, about: About) -> str:
    written = (
        "The target is what the model itself writes, always taking the likeliest token. "
        if inspection.reading.written
        else ""
    )
    if inspection.lens is None:
        return "The text in its tokens. The model was not trained to tell tokens, so none has a loss."
    if inspection.nats is None:
        return (
            "The text in its tokens. A model that sees both sides has a loss only for tokens that are hidden from it: "
            "hiding each in turn would take too long for this text or the tokenizer has nothing to hide them with."
        )
    if about.causal:
        return (
            f"{written}The stronger the colour, the less the model expected a token after all before it. Numbers on "
            "hovering, in nats (-log probability)."
        )
    return (
        "The stronger the colour, the less the model can tell a token from all others when that one is hidden; their "
        "sum is the pseudo-log-likelihood (arXiv:1910.14659). Numbers on hovering, in nats (-log probability)."
    )


def _tokens(names: Sequence[str], nats: Sequence[float | None], most: float) -> Html:
    """Tokens one after another, coloured by their loss."""
    spans = []
    for place, (name, value) in enumerate(zip(names, nats)):
        if value is None:
            spans.append(element("span", name, class_="token", title=f"{place}: not scored"))
            continue
        about = f"{place}: {value:.3f} nats, probability {_share(math.exp(-value))}"
        heat = min(value / most, 1.0)
        spans.append(
            element(
                "span",
                name,
                class_="token loss strong" if heat > 0.6 else "token loss",
                style=f"--shade:{heat:.3f}",
                title=about,
                tabindex="0",
            )
        )
    return element("div", *spans, class_="tokens", dir="auto")


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 0.001 else f"{value:.1e}"


def _attention(inspection: Inspection, about: About, layers: dict[str, list[int]]) -> Section:
    parts: list[Html] = []
    kinds = [kind for kind in _ORDER if layers.get(kind)]
    for at, kind in enumerate(kinds):
        heads = inspection.attention[kind].shape[1]
        rows = [
            element(
                "tr",
                element("th", f"layer {layer}", scope="row"),
                *(
                    element(
                        "td",
                        element(
                            "button",
                            element("canvas", aria_hidden="true"),
                            type="button",
                            class_="head",
                            data_kind=str(at),
                            data_layer=str(row),
                            data_head=str(head),
                            aria_label=f"layer {layer}, head {head}",
                            aria_pressed="false",
                        ),
                    )
                    for head in range(heads)
                ),
            )
            for row, layer in enumerate(layers[kind])
        ]
        head_row = element("tr", element("td"), *(element("th", str(head), scope="col") for head in range(heads)))
        grid = element("table", element("thead", head_row), element("tbody", *rows), class_="heads")
        scroll = element("div", grid, class_="scroll maps")
        parts.append(scroll if len(kinds) == 1 else fold(_title(kind, about), "", scroll, opened=True))
    large = element("canvas", id="map", role="img", aria_label="the weights of the chosen head")
    queries = element("div", id="queries", class_="tokens", dir="auto")
    keys = element("div", id="keys", class_="tokens", dir="auto")
    viewer = element(
        "div",
        element("h3", "", id="which"),
        element("p", "", id="readout", aria_live="polite"),
        element(
            "div",
            element("figure", large),
            element(
                "div",
                element("figure", element("figcaption", "from (queries)"), queries),
                element("figure", element("figcaption", "to (keys)"), keys),
            ),
            class_="view",
        ),
        id="viewer",
    )
    without = "The maps are drawn by a script, and scripts are switched off here."
    parts.append(element("noscript", element("p", without)))
    parts.append(viewer)
    return Section(
        name="attention",
        title="Attention",
        intro="A map for each layer (down) and head (across): a row for each token that looks, a column for each that "
        "is looked at; every row sums to 1. Click a map to see it large. Hover over a token to see where it looks, "
        "click it to hold it, Escape lets go; arrow keys move. Colour goes with the square root of a weight, so that "
        "small ones show; weights are kept to within 0.004, small ones closer.",
        body=join(parts),
    )


def _kind(kind: str, weights: np.ndarray, layers: list[int], about: About) -> dict[str, Any]:
    queries, keys = _SIDES[kind]
    raw = quantised(weights[layers]).tobytes()
    return {
        "title": _title(kind, about),
        "queries": queries,
        "keys": keys,
        "layers": layers,
        "heads": weights.shape[1],
        "weights": base64.b64encode(zlib.compress(raw)).decode("ascii"),
    }


def _lens(inspection: Inspection, about: About, names: dict[str, list[str]]) -> Section:
    assert inspection.lens is not None
    depth, T = inspection.lens.ids.shape[:2]
    head = element(
        "tr", element("th", "read:", scope="col"), *(element("th", name, scope="col") for name in names["tokens"])
    )
    rows = []
    for layer in reversed(range(depth)):
        heading = element("th", _depth(layer), scope="row")
        cells = [element("td", tabindex="-1", data_layer=str(layer), data_place=str(place)) for place in range(T)]
        rows.append(element("tr", heading, *cells))
    told = element("tr", element("th", "to tell:", scope="row"), *(element("td", "") for _ in range(T)), id="told")
    grid = element(
        "table", element("thead", head), element("tbody", *rows), element("tfoot", told), id="lens-grid", class_="lens"
    )
    columns = ("after", "1", "2", "3", "4", "5", "what is to be told")
    detail = element(
        "table",
        element("caption", "", id="lens-caption"),
        element("thead", element("tr", *(element("th", name, scope="col") for name in columns))),
        element("tbody", id="lens-detail"),
    )
    return Section(
        name="lens",
        title="Logit lens",
        intro="What the model would write if it stopped after a layer: the final norm and the output head on the "
        "residual stream there (nostalgebraist, 2020: interpreting GPT, the logit lens). The likeliest token of each "
        "place, coloured by its probability and underlined where it is right; hover or move with the arrow keys for "
        "five of every layer.",
        body=join([element("div", grid, class_="scroll"), element("div", detail, class_="scroll", aria_live="polite")]),
    )


def _depth(layer: int) -> str:
    """What comes before the lens: the embedding, or a layer."""
    return f"layer {layer - 1}" if layer else "embedding"


def _lens_data(inspection: Inspection, about: About) -> dict[str, Any]:
    lens = inspection.lens
    assert lens is not None
    ids, at = np.unique(lens.ids, return_inverse=True)
    came = np.where(np.isnan(lens.came), -1, np.rint(lens.came * _PARTS))
    told = inspection.reading.batch["targets"][0] if about.causal else inspection.reading.tokens
    return {
        # Each by itself, as they don't follow each other.
        "pieces": [labels(about.tokenizer, [i], in_bytes=about.in_bytes)[0] for i in ids.tolist()],
        "depths": [_depth(layer) for layer in range(len(lens.ids))],
        "top": at.reshape(lens.ids.shape).tolist(),
        "parts": np.rint(lens.probabilities * _PARTS).astype(int).tolist(),
        "came": came.astype(int).tolist(),
        "right": (lens.ids[:, :, 0] == told).astype(int).tolist(),
    }


def _draw_grid(weights: np.ndarray, layers: list[int], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    heads = weights.shape[1]
    side = 1.0 if heads * len(layers) > 64 else 1.4
    ratio = min(max(weights.shape[2] / weights.shape[3], 0.4), 2.5)
    figure = Figure(figsize=(side * heads + 0.8, side * ratio * len(layers) + 0.7), layout="constrained")
    axes = figure.subplots(len(layers), heads, squeeze=False)
    for row, layer in enumerate(layers):
        for head in range(heads):
            axis = axes[row, head]
            axis.imshow(np.sqrt(weights[layer, head]), cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(f"head {head}", fontsize=8)
        axes[row, 0].set_ylabel(f"layer {layer}", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _draw_head(weights: np.ndarray, queries: list[str], keys: list[str], title: str, path: Path) -> None:
    import warnings

    from matplotlib.figure import Figure

    fonts = _fonts([*queries, *keys])
    T, S = weights.shape
    figure = Figure(figsize=(min(2.5 + 0.22 * S, 40), min(2.0 + 0.22 * T, 40)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(np.sqrt(weights), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(S), keys, rotation=90)
    axis.set_yticks(range(T), queries)
    size = 8.0 if max(T, S) <= 160 else 4.0
    for label in [*axis.get_xticklabels(), *axis.get_yticklabels()]:
        label.set(fontsize=size, fontfamily=fonts, parse_math=False)  # a dollar sign is a token, no formula
    axis.set(xlabel="to (keys)", ylabel="from (queries)")
    axis.set_title(title, fontsize=10)
    bar = figure.colorbar(image, fraction=0.04)
    ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
    bar.set_ticks([math.sqrt(tick) for tick in ticks], labels=[f"{tick:.0%}" for tick in ticks])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # no font here has it: an empty box
        figure.savefig(path, dpi=120)


def _fonts(names: Sequence[str]) -> list[str]:
    """Names of fonts that together have the characters of `names`, as far as this machine has them."""
    from matplotlib import font_manager

    fonts = ["DejaVu Sans"]  # comes with matplotlib; Latin, Greek, Cyrillic, Arabic, Hebrew and signs
    if max(map(ord, "".join(names)), default=0) < 0x2E80:
        return fonts
    known = set(font_manager.get_font_names())
    found = [name for name in _EASTERN if name in known]
    if not found:  # matplotlib remembers the fonts there once were
        paths = sorted(path for path in font_manager.findSystemFonts() if _EASTERN_FILE.search(Path(path).name))
        for path in paths[:1]:
            font_manager.fontManager.addfont(path)
            found.append(font_manager.fontManager.ttflist[-1].name)
    return fonts + found[:1]


# Fonts with Chinese characters, by name and by file.
_EASTERN = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Arial Unicode MS",
)
_EASTERN_FILE = re.compile("^(NotoSansCJK-Regular|NotoSansSC|SourceHanSans|wqy|msyh|simhei|PingFang|Hiragino Sans GB)")
