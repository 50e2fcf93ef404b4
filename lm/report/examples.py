"""The sections of a preparation's report that show text: what was skipped, cleaned, and found twice.

They take parts of report.json (see `lm.data.prepare`) and are None where there is nothing to show.
"""

from __future__ import annotations

from typing import Any

from lm.data.preparation import EXCERPT_CHARACTERS
from lm.report.page import Html, Section, bars, beside, element, fold, join, number, percent, table
from lm.report.texts import Unit, differences, excerpt, shown
from lm.text.clean import RULES

# How much of a text the examples of `lm.text.report` hold.
_CHANGE_CUT = 80


def unreadable(skipped: dict[str, Any]) -> Section | None:
    """What could not be used, by source and reason."""
    folds = [
        fold(
            reason,
            f"{role}: {number(count)}",
            element("ul", *(element("li", shown(example)) for example in found["examples"].get(reason, []))),
            opened=True,
        )
        for role, found in skipped.items()
        for reason, count in found["counts"].items()
        if count
    ]
    if not folds:
        return None
    return Section(
        name="unreadable",
        title="What could not be read",
        intro="Documents and files that were skipped, with the first few of each kind. Many of one kind mean that "
        "the source is not in the form that the settings say.",
        body=join(folds),
    )


def cleaning(clean: dict[str, Any]) -> Section | None:
    """What each rule changed and dropped."""
    rules = clean["rules"]
    if not rules:
        return None
    overview = table(
        [
            ("rule", "name"),
            ("changed", "number"),
            ("", "number"),
            ("dropped", "number"),
            ("", "number"),
            ("documents seen", "number"),
            ("characters in", "number"),
            ("characters out", "number"),
        ],
        [
            [
                name,
                number(rule["changed"]),
                percent(rule["changed"], rule["seen"]) if rule["changed"] else "",
                number(rule["dropped"]),
                percent(rule["dropped"], rule["seen"]) if rule["dropped"] else "",
                number(rule["seen"]),
                number(rule["characters_in"]),
                number(rule["characters_out"]),
            ]
            for name, rule in rules.items()
        ],
    )
    count = {name: number(clean[name]) for name in ("documents", "kept", "changed", "characters_in", "characters_out")}
    sums = (
        f"{count['documents']} documents came, {count['kept']} were kept, {count['changed']} of these changed; "
        f"{count['characters_in']} characters became {count['characters_out']}."
    )
    touched = {name: rule["changed"] + rule["dropped"] for name, rule in rules.items()}
    most = max(touched.values())
    folds = [_rule(name, rules[name], opened=times == most) for name, times in touched.items() if times]
    intro = (
        "What each rule did, in the order in which they ran. Read the examples of whatever dropped much: a rule that "
        "drops good text costs more than the bad text it finds."
    )
    return Section(name="cleaning", title="Cleaning", intro=intro, body=join([element("p", sums), overview, *folds]))


def _rule(name: str, rule: dict[str, Any], *, opened: bool) -> Html:
    counts = [f"{number(rule[what])} {what}" for what in ("changed", "dropped") if rule[what]]
    parts: list[Html] = []
    if name in RULES:
        parts.append(element("p", RULES[name].summary, class_="aside"))
    masked = name in RULES and RULES[name].private
    if masked and rule["changes"]:
        hidden = "What came in is shown with x for letters and 0 for digits, so that it stays masked."
        parts.append(element("p", hidden, class_="aside"))
    for change in rule["changes"]:
        unit: Unit = "mask" if masked else "character"
        before, after = differences(change["before"], change["after"], by=unit, cut=_CHANGE_CUT)
        parts.append(beside(("before", before), ("after", after)))
    if rule["reasons"]:
        ranked = sorted(rule["reasons"].items(), key=lambda item: (-item[1], item[0]))
        parts.append(bars(("dropped because", "text"), [(shown(why), count) for why, count in ranked], rule["dropped"]))
    for drop in rule["drops"]:
        parts.append(
            element(
                "figure",
                element("figcaption", "dropped: ", shown(drop["why"])),
                excerpt(drop["text"], cut=_CHANGE_CUT),
            )
        )
    return fold(name, ", ".join(counts), *parts, opened=opened)


def duplicates(found: dict[str, Any]) -> Section | None:
    """What was found twice, by kind and across splits."""
    removed = {what: count for what, count in found["removed"].items() if count}
    if not removed and not found["lines_removed"] and not found["examples"]:
        return None
    parts: list[Html] = []
    if removed:
        parts.append(
            table(
                [("documents removed", "name"), ("count", "number")], [[what, number(n)] for what, n in removed.items()]
            )
        )
    if found["lines_removed"]:
        lines = number(found["lines_removed"])
        parts.append(element("p", f"{lines} lines that stood in an earlier document were removed."))
    if found["across_splits"]:
        across = table(
            [("across splits", "text"), ("documents", "number")],
            [[what, number(count)] for what, count in found["across_splits"].items()],
        )
        parts += [across, element("p", "Of such a pair the document in the split that is measured on stays.")]
    kinds: dict[str, list[Html]] = {}
    for pair in found["examples"]:
        kinds.setdefault(pair["kind"], []).append(_pair(pair))
    for i, (kind, pairs) in enumerate(kinds.items()):
        parts.append(fold(f"{kind} duplicates", f"{len(pairs)} shown", *pairs, opened=i == 0))
    return Section(
        name="duplicates",
        title="Duplicates",
        intro="Documents that say what another one says, the difference marked. Pairs that differ in what matters "
        "mean that dedup.threshold is too low.",
        body=join(parts),
    )


def _pair(pair: dict[str, str]) -> Html:
    removed = join([f"removed from {pair['removed_split']}: ", shown(pair["removed_key"])])
    kept = join([f"kept in {pair['kept_split']}: ", shown(pair["kept_key"])])
    before, after = pair["removed_text"], pair["kept_text"]
    if before == after:
        caption = element("figcaption", join([removed, ", ", kept, ": the same, as far as shown"]))
        return element("figure", caption, excerpt(before, cut=EXCERPT_CHARACTERS))
    left, right = differences(before, after, by="word", cut=EXCERPT_CHARACTERS)
    return beside((removed, left), (kept, right))
