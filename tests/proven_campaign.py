"""Two sections of docs/proven.md: the soundness campaign and the calibration table, from fixtures/facts/campaign.json and
calibration.json, which scripts/campaign --write renews."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.real_cores.campaign import JUDGED
from tests.real_cores.campaign_languages import LANGUAGES
from tests.real_cores.campaign_tools import TOOLS

FACTS = Path(__file__).parents[1] / "fixtures" / "facts"
SURE = ("certain", "strong")
CONFIDENCES = ("certain", "strong", "plausible", "weak")

CAMPAIGN = """\
## Soundness campaign

{programs} programs of Debian packages, none of them made for these tests, were ended {ends} times in the middle of their work:
{killed} times by a signal, whose core the kernel wrote, {dumped} times gdb took a core of the living program. {inside} of these moments were
inside malloc. `scripts/campaign` runs it again; what was said is of commit {revision}.

A preloaded library wrote down every call of malloc (`fixtures/programs/witness.c`). In each core the blocks in use were compared with
what it knew, {blocks} blocks in all: every live block has to be found, and no other but the one call that each thread may have had under way.
All these programs are sound, so each damage that is said is wrong. A block that is called lost is wrong where the program
freed it afterwards, where the kernel was given its address (signal stacks, epoll), or where a word of the core leads to it, whatever
its place, also shifted or tagged. maxima and swipl have a malloc of their own: 0 blocks were compared. {wrong}

| program | package | in use | threads | in malloc | findings, and how often | wrong |
|---|---|---|---|---|---|---|
{table}
{left_out}"""
CALIBRATION = """
## How often each finding was wrong

Over {cores} real cores of `fixtures/programs`, of all targets, with the truth that each process wrote down (commit {revision}), and over
the campaign's ends. *Not judged*: nothing that was recorded tells whether it is true. A finding on damage is wrong when its code is not
that of the damage that was made, or the culprit that it names is another block; a figure when malloc_info said less.
`scripts/campaign --calibration` counts again.

| finding | confidence | on fixtures: given | wrong | not judged | in the campaign: given | wrong | not judged |
|---|---|---|---|---|---|---|---|
{table}

{sure}
"""


def sections() -> str:
    """The campaign, and the calibration table once it was counted."""
    campaign = _facts("campaign")
    text = _campaign(campaign)
    if (FACTS / "calibration.json").exists():
        text += _calibration(_facts("calibration"), campaign["ends"])
    return text


def _campaign(campaign: dict[str, Any]) -> str:
    ends = campaign["ends"]
    wrong_ends = [end for end in ends if end["wrong"]]
    left_out = "".join(f"\nLeft out, {name}: {why}." for name, why in sorted(campaign["left_out"].items()))
    return CAMPAIGN.format(
        programs=len({end["program"] for end in ends}),
        ends=len(ends),
        killed=sum(end["how"] == "killed" for end in ends),
        dumped=sum(end["how"] == "dumped" for end in ends),
        inside=sum(end["inside_malloc"] for end in ends),
        blocks=f"{sum(end['blocks'] for end in ends):,}",
        revision=campaign["revision"],
        wrong="Nothing wrong was said with certain or strong."
        if not wrong_ends
        else "Wrong were:\n\n" + "\n".join(f"- {end['program']}: {'; '.join(end['wrong'])}" for end in wrong_ends),
        table="\n".join(_program_rows(ends, campaign["versions"])),
        left_out=left_out and left_out + "\n",
    )


def _calibration(calibration: dict[str, Any], ends: list[dict[str, Any]]) -> str:
    return CALIBRATION.format(
        cores=calibration["cores"],
        revision=calibration["revision"],
        table="\n".join(_calibration_rows(calibration["rows"], ends)),
        sure=_sure(calibration),
    )


def _facts(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FACTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def _program_rows(ends: list[dict[str, Any]], versions: dict[str, str]) -> Iterator[str]:
    packages = {name: worker.package.split()[0] for name, worker in {**LANGUAGES, **TOOLS}.items()}
    for name in sorted({end["program"] for end in ends}, key=str.lower):
        own = [end for end in ends if end["program"] == name]
        said = Counter(f"{code} {confidence}" for end in own for code, confidence in end["findings"])
        findings = ", ".join(f"{word} {count}" for word, count in sorted(said.items())) or "-"
        blocks = ", ".join(f"{end['blocks']:,}" for end in own)
        yield (
            f"| {name} | {packages[name]} {versions.get(name, '')} | {blocks} | {max(end['threads'] for end in own)} "
            f"| {sum(end['inside_malloc'] for end in own)} of {len(own)} | {findings} | {sum(len(end['wrong']) for end in own)} |"
        )


def _calibration_rows(rows: list[list[Any]], ends: list[dict[str, Any]]) -> Iterator[str]:
    fixtures = {(code, confidence): counts for code, confidence, *counts in rows}
    given: Counter[tuple[str, str]] = Counter(tuple(kind) for end in ends for kind in end["findings"])
    wrong: Counter[tuple[str, str]] = Counter(tuple(kind) for end in ends for kind in end["wrong_findings"])
    for code, confidence in sorted(
        fixtures.keys() | given.keys(), key=lambda kind: (kind[0], CONFIDENCES.index(kind[1]))
    ):
        kind = (code, confidence)
        counts = " | ".join(str(count) for count in fixtures.get(kind, (0, 0, 0)))
        open_ones = 0 if code in JUDGED else given[kind] - wrong[kind]
        yield f"| {code} | {confidence} | {counts} | {given[kind]} | {wrong[kind]} | {open_ones} |"


def _sure(calibration: dict[str, Any]) -> str:
    wrong = calibration["wrong"]
    counts = ", ".join(f"wrong {word}: {sum(one['confidence'] == word for one in wrong)}" for word in SURE)
    named = "".join(f"\n- {one['core']}: {one['code']} {one['confidence']}: {one['why']}" for one in wrong)
    return f"On fixtures, {counts}." + ("\n" + named if named else "")
