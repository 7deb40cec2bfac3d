"""The verdict's table has every part of the report's verdict, whatever is known of what was in memory."""

from __future__ import annotations

import dataclasses

import pytest

from coreheap.evidence import Confidence
from coreheap.render.page import PageStyle
from coreheap.render.terminal import report_text
from coreheap.render.verdict_text import verdict_paragraph
from coreheap.report import VerdictItem
from tests.unit import report_samples

MIB = 1 << 20


def private(topic: str, byte_count: int, resident: int | None) -> VerdictItem:
    whole = None if resident is None else 60 * MIB
    return VerdictItem(
        topic, byte_count, 100 * MIB, "writable_private", Confidence.CERTAIN, (), resident, resident, whole, whole
    )


@pytest.mark.parametrize("resident", [None, 7 * MIB])
def test_every_part_has_its_row(resident: int | None) -> None:
    amounts = {"in_use": 41 * MIB, "thread_stacks": 29 * MIB, "retained_free": 17 * MIB, "unknown": 13 * MIB}
    shared = VerdictItem(
        "shared_memory", 23 * MIB, 23 * MIB, "writable_shared", Confidence.CERTAIN, (), resident, resident
    )
    verdict = (*(private(topic, count, resident) for topic, count in amounts.items()), shared)
    text = report_text(dataclasses.replace(report_samples.report(), verdict=verdict), PageStyle(width=120))
    table = text[text.index(" Of 100 MiB") : text.index("Where the memory went")]
    for count in (*amounts.values(), shared.bytes):
        assert f"{count // MIB}.0 MiB" in table
    # One figure for each part and one line for each whole: nothing twice.
    assert table.count("%") == len(verdict)


def test_shared_memory_is_said_beside_what_leads() -> None:
    shared = VerdictItem("shared_memory", 300 * MIB, 300 * MIB, "writable_shared", Confidence.CERTAIN)
    report = dataclasses.replace(report_samples.report(), verdict=(private("in_use", 41 * MIB, None), shared))
    text = verdict_paragraph(report)
    assert "300 MiB of shared memory" in text
    assert text.index("live chunks") < text.index("300 MiB of shared memory")
    alone = dataclasses.replace(report, verdict=(private("in_use", 41 * MIB, None),))
    assert "shared" not in verdict_paragraph(alone)
