"""The paragraph at the top: what leads, what follows, and what must not be said."""

from __future__ import annotations

from dataclasses import replace

from coreheap.evidence import Confidence
from coreheap.render.verdict_text import verdict_paragraph
from coreheap.report import Report, VerdictItem
from tests.unit import report_samples

MIB = 1 << 20


def item(topic: str, mib: int, resident: tuple[int, int] | None = None, of: int = 100, **more: object) -> VerdictItem:
    low, high = (None, None) if resident is None else (resident[0] * MIB, resident[1] * MIB)
    whole = str(more.get("whole", "writable_private"))
    confidence = more.get("confidence", Confidence.CERTAIN)
    assert isinstance(confidence, Confidence)
    of_memory = None if resident is None else 90 * MIB
    return VerdictItem(topic, mib * MIB, of * MIB, whole, confidence, (), low, high, of_memory, of_memory)


def with_verdict(*items: VerdictItem) -> Report:
    return replace(report_samples.report(), verdict=items, leaks=None, free_memory=None, findings=())


def test_the_part_that_took_most_leads_and_live_chunks_follow() -> None:
    text = verdict_paragraph(with_verdict(item("retained_free", 70, (60, 60)), item("in_use", 30, (30, 30))))
    assert text.startswith("The program could write 100 MiB, of which 90.0 MiB were in memory or swapped out.")
    assert "70.0 MiB (60.0 MiB in memory), 70.0 % of it, are free inside malloc: not a leak" in text
    assert "Live chunks hold 30.0 MiB." in text


def test_what_is_not_known_is_not_said() -> None:
    text = verdict_paragraph(with_verdict(item("in_use", 100)))
    assert "how much of it was in memory is not known" in text
    assert "leak" not in text
    assert "malloc_trim" not in text
    assert verdict_paragraph(with_verdict()) == ""


def test_what_is_not_sure_is_not_said_as_sure() -> None:
    def lead(confidence: Confidence) -> str:
        text = verdict_paragraph(with_verdict(item("in_use", 100, (100, 100), confidence=confidence)))
        return text.split(". ")[1].split(",")[0].split()[0]

    assert lead(Confidence.CERTAIN) == lead(Confidence.STRONG) == "100"
    assert lead(Confidence.PLAUSIBLE) == "Probably"
    assert lead(Confidence.WEAK) == "Perhaps"


def test_a_leak_is_named_with_its_confidence() -> None:
    lost = item("lost", 20, of=40, whole="live_chunks", confidence=Confidence.STRONG)
    text = verdict_paragraph(with_verdict(item("in_use", 100, (100, 100)), lost))
    assert "20.0 MiB of live chunks are leaked (strong)." in text


def test_a_topic_that_is_new_is_named_plainly() -> None:
    assert "are page cache" in verdict_paragraph(with_verdict(item("page_cache", 100, (1, 2))))
