"""The page of ``check``: what stands on it, in which order, and what must not be on it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.cells import cell_len

from coreheap.crash import FaultKind, PlaceNote
from coreheap.evidence import Confidence
from coreheap.render.page import PageStyle
from coreheap.render.terminal import report_text
from coreheap.render.terminal_check import check_text
from coreheap.report import Report, Severity
from tests.unit import report_samples

REPORTS = {
    "corrupt": report_samples.corrupt_report(),
    "sound": report_samples.sound_report(),
    "report": report_samples.report(),
    "heapless": report_samples.heapless_report(),
    "damaged": report_samples.damaged_report(),
    "wrong_free": report_samples.wrong_free_report(),
    "stale": report_samples.stale_report(),
}


def flat(text: str) -> str:
    """A page's text as if it had no lines."""
    return " ".join(text.split())


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", REPORTS)
def test_the_page_is_what_it_was(name: str, width: int, golden: Callable[[str, str], None]) -> None:
    golden(f"check_{name}_{width}.txt", check_text(REPORTS[name], PageStyle(width=width)))


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("width", [60, 80, 112, 120, 200])
@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_no_line_is_wider_than_the_page(report: Report, width: int, verbose: bool) -> None:
    text = check_text(report, PageStyle(width=width, verbose=verbose))
    assert max(cell_len(line) for line in text.splitlines()) <= width


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_nothing_on_the_page_is_obeyed(report: Report) -> None:
    text = check_text(report, PageStyle(verbose=True))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", text)
    styled = check_text(report, PageStyle(color=True, verbose=True))
    bare = re.sub(r"\x1b\[[0-9;]*m", "", styled)
    assert "".join(line.rstrip() + "\n" for line in bare.splitlines()) == text


def test_an_output_that_knows_only_ascii_gets_only_ascii() -> None:
    assert check_text(REPORTS["corrupt"], PageStyle(encoding="ascii", verbose=True)).isascii()


def test_the_answer_comes_first_then_the_crash_then_the_damage() -> None:
    text = check_text(REPORTS["corrupt"], PageStyle())
    sections = re.findall(r"^(Verdict|Crash|Damage|Findings|Where the heap|What was checked)", text, re.MULTILINE)
    assert sections == ["Verdict", "Crash", "Damage", "Findings", "Where the heap", "What was checked"]
    assert "The heap is damaged (certain): a block at 0x7f3a140008d0 was written past its end" in flat(text)


def test_frames_that_were_guessed_are_marked_and_the_rest_counted() -> None:
    lines = check_text(REPORTS["corrupt"], PageStyle()).splitlines()
    marked = [line for line in lines if re.match(r" +\? +\d+ +0x", line)]
    plain = [line for line in lines if re.match(r" +\d+ +0x", line)]
    assert (len(marked), len(plain)) == (13, 7)
    assert any("+10 more frames (-v)" in line for line in lines)
    assert (
        len(
            [
                line
                for line in check_text(REPORTS["corrupt"], PageStyle(verbose=True)).splitlines()
                if "0x7f3a5be" in line
            ]
        )
        == 30
    )


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("name", ["corrupt", "damaged"])
def test_words_that_the_process_wrote_are_on_no_page(name: str, verbose: bool) -> None:
    for shown in (check_text, report_text):
        text = shown(REPORTS[name], PageStyle(width=200, verbose=verbose))
        assert f"{report_samples.SECRET:x}" not in text
        assert "hunter" not in text


def test_a_bit_that_flipped_is_shown_since_the_word_is_mallocs_own() -> None:
    text = flat(check_text(REPORTS["corrupt"], PageStyle(width=120)))
    assert "the word at 0x7f3a60021008 should be 0x401003 instead of 0x401002 (bit 0 differs)" in text


def test_how_far_the_write_went_is_told_from_the_blocks_end() -> None:
    text = flat(check_text(REPORTS["corrupt"], PageStyle(width=120)))
    assert "its usable bytes end at 0x7f3a14000938; the write reached at least 11 B past that" in text
    assert "written 16 B into the block" in text


def test_long_lists_are_cut_and_counted() -> None:
    text = check_text(REPORTS["damaged"], PageStyle())
    assert "+12 more damages (-v)" in text
    assert "+14 more pieces of evidence (-v)" in text
    assert "+13 more kinds (-v)" in text
    assert "+89,975 more places" in text


def test_analyze_tells_of_damage_and_crash_in_a_few_lines() -> None:
    text = report_text(REPORTS["corrupt"], PageStyle())
    assert text.index("\nDamage") < text.index("\nCrash") < text.index("\nWhere the memory went")
    assert "+2 more damages (coreheap check)" in text
    assert "+20 more frames (coreheap check)" in text
    quiet = replace(REPORTS["sound"], crash=replace(report_samples.segfault(), fault=None))
    assert "\nCrash" not in report_text(quiet, PageStyle())
    assert "\nDamage" not in report_text(quiet, PageStyle())


@pytest.mark.parametrize(
    ("severity", "confidence", "leads"),
    [
        (Severity.ERROR, Confidence.CERTAIN, True),
        (Severity.ERROR, Confidence.STRONG, True),
        (Severity.ERROR, Confidence.PLAUSIBLE, False),
        (Severity.WARNING, Confidence.CERTAIN, False),
    ],
)
def test_the_verdict_of_analyze_begins_with_grave_damage_alone(
    severity: Severity, confidence: Confidence, leads: bool
) -> None:
    found = report_samples.corruption_finding(severity=severity, confidence=confidence)
    text = report_text(report_samples.corrupt_report(findings=(found,)), PageStyle(width=120))
    assert ("\n The heap is damaged: a block" in text) == leads


def test_malloc_is_named_as_the_witness_where_nothing_else_found_the_damage() -> None:
    crash = report_samples.crash()
    assert crash.abort_message is not None
    crash = replace(crash, abort_message=replace(crash.abort_message, text="malloc(): corrupted top size\n"))
    text = flat(check_text(replace(REPORTS["sound"], crash=crash), PageStyle()))
    assert (
        "The heap is damaged (strong): malloc found it and stopped the process: malloc(): corrupted top size"
    ) in text
    assert "also: where the damage is was not found here" in text


def test_damage_that_is_no_finding_of_weight_is_named_all_the_same() -> None:
    damage = report_samples.damages()[3]
    text = flat(check_text(replace(REPORTS["sound"], damages=(damage,)), PageStyle()))
    assert "The heap is damaged (strong): one bit is wrong in the header of an mmapped chunk." in text


def test_a_pointer_that_is_no_address_is_not_shown() -> None:
    place = PlaceNote(report_samples.SECRET, FaultKind.NON_CANONICAL, "no address on x86-64: rax")
    crash = replace(report_samples.segfault(), fault=place)
    text = check_text(replace(REPORTS["sound"], crash=crash), PageStyle(verbose=True))
    assert "fault at   a number that is not shown: no address on x86-64: rax" in text
    assert f"{report_samples.SECRET:x}" not in text


def test_a_fault_that_a_handler_saw_first_is_named() -> None:
    frames = (report_samples.frame(0, "abort"), report_samples.frame(1, "parse", is_interrupted=True))
    crash = replace(report_samples.segfault(), handled_signal=7, handled_signal_name="SIGBUS", frames=frames)
    text = flat(check_text(replace(REPORTS["sound"], crash=crash), PageStyle(width=120)))
    assert "SIGBUS: the process ended in its handler" in text
    assert "parse+0x11 (a signal came here)" in text
