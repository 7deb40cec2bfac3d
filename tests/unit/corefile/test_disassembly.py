"""Addresses that machine code names: hand-assembled snippets of three machines, and noise.

The comment above each snippet says which instructions the bytes are. Real functions of fifteen libcs are
read in tests/unit/allocators/ways.
"""

from __future__ import annotations

import random

import pytest

from coreheap.corefile.disassembly import Reference, Use, references_in

ADDRESS, ACCESS = Use.ADDRESS, Use.ACCESS


def places(code: str, machine: str, start: int = 0x1000) -> list[tuple[int, Use]]:
    found = references_in(bytes.fromhex(code), start, machine)
    return [(reference.place, reference.use) for reference in found if not reference.is_thread_local]


def thread_locals(code: str, machine: str, start: int = 0x1000) -> list[tuple[int | None, int]]:
    found = references_in(bytes.fromhex(code), start, machine)
    return [(reference.slot, reference.place) for reference in found if reference.is_thread_local]


class TestX86:
    def test_relative_to_the_instruction(self) -> None:
        # lea 0x100(%rip),%rax ; mov 0x200(%rip),%rdx ; mov %rdx,0x8(%rax)
        code = "488d0500010000" + "488b1500020000" + "48895008"
        assert places(code, "x86_64") == [(0x1107, ADDRESS), (0x120E, ACCESS), (0x110F, ACCESS)]

    def test_a_register_that_was_written_is_forgotten(self) -> None:
        # lea 0x100(%rip),%rax ; xor %eax,%eax ; mov (%rax),%rcx
        assert places("488d0500010000" + "31c0" + "488b08", "x86_64") == [(0x1107, ADDRESS)]

    def test_a_call_loses_what_it_may_change(self) -> None:
        # lea 0x100(%rip),%rax ; lea 0x100(%rip),%rbx ; call . ; mov (%rax),%rcx ; mov (%rbx),%rcx
        code = "488d0500010000" + "488d1d00010000" + "e800000000" + "488b08" + "488b0b"
        assert places(code, "x86_64") == [(0x1107, ADDRESS), (0x110E, ADDRESS), (0x110E, ACCESS)]

    def test_a_thread_local_variable_by_its_slot(self) -> None:
        # mov 0x100(%rip),%rax ; mov %fs:(%rax),%rdx
        code = "488b0500010000" + "64488b10"
        assert thread_locals(code, "x86_64") == [(0x1107, 0)]

    def test_a_thread_local_variable_of_a_static_program(self) -> None:
        # mov %fs:0xffffffffffffffc8,%rax
        assert thread_locals("64488b0425c8ffffff", "x86_64") == [(None, -56)]

    def test_a_thread_local_variable_by_the_thread_pointer(self) -> None:
        # mov %fs:0x0,%rax ; add 0x100(%rip),%rax ; mov 0x8(%rax),%rdx
        code = "64488b042500000000" + "48030500010000" + "488b5008"
        assert thread_locals(code, "x86_64") == [(None, 0), (0x1110, 8)]


class TestI386:
    # call __x86.get_pc_thunk.bx ; add $0x2000,%ebx: ebx = 0x1005 + 0x2000
    GOT = "e800000000" + "81c300200000"

    def test_relative_to_the_got(self) -> None:
        # lea 0x40(%ebx),%eax ; mov 0x80(%ebx),%edx
        assert places(self.GOT + "8d4340" + "8b9380000000", "i386") == [(0x3045, ADDRESS), (0x3085, ACCESS)]

    def test_ebp_may_hold_the_got(self) -> None:
        # call thunk.bp ; add $0x2000,%ebp ; lea 0x40(%ebp),%eax
        assert places("e800000000" + "81c500200000" + "8d4540", "i386") == [(0x3045, ADDRESS)]

    def test_the_got_survives_a_stay_on_the_stack(self) -> None:
        # mov %ebx,0xc(%esp) ; push %eax ; xor %ebx,%ebx ; mov 0x10(%esp),%ecx ; lea 0x40(%ecx),%eax
        code = self.GOT + "895c240c" + "50" + "31db" + "8b4c2410" + "8d4140"
        assert places(code, "i386") == [(0x3045, ADDRESS)]

    def test_behind_a_return_goes_on_what_the_jump_knew(self) -> None:
        # test %eax,%eax ; je 1f ; pop %ebx ; ret ; nop ; 1: lea 0x40(%ebx),%eax
        code = self.GOT + "85c0" + "7403" + "5b" + "c3" + "90" + "8d4340"
        assert places(code, "i386") == [(0x3045, ADDRESS)]

    def test_a_thread_local_variable_by_its_slot(self) -> None:
        # mov -0x20(%ebx),%eax ; mov %gs:(%eax),%edx
        assert thread_locals(self.GOT + "8b43e0" + "658b10", "i386") == [(0x3005 - 0x20, 0)]

    def test_a_program_that_does_not_move(self) -> None:
        # mov $0x80e1234,%eax ; mov 0x80e5678,%ecx
        code = "b834120e08" + "8b0d78560e08"
        assert places(code, "i386") == [(0x80E1234, ADDRESS), (0x80E5678, ACCESS)]


class TestAarch64:
    def test_a_page_and_the_rest(self) -> None:
        # adrp x0, +0x2000 ; add x0, x0, #0x730 ; ldr x1, [x0, #8]
        code = "00000 0d0".replace(" ", "") + "00c01c91" + "010440f9"
        assert places(code, "aarch64") == [(0x3730, ADDRESS), (0x3738, ACCESS)]

    def test_an_anchor_and_its_neighbour(self) -> None:
        # adrp x0, +0x2000 ; add x0, x0, #0x730 ; add x1, x0, #0x10
        code = "000000d0" + "00c01c91" + "01400091"
        assert places(code, "aarch64") == [(0x3730, ADDRESS), (0x3740, ADDRESS)]

    def test_a_thread_local_variable_by_its_slot(self) -> None:
        # adrp x0, +0x2000 ; ldr x0, [x0, #0x730] ; mrs x1, tpidr_el0 ; add x0, x1, x0 ; ldr x2, [x0, #8]
        code = "000000d0" + "009843f9" + "41d03bd5" + "2000008b" + "020440f9"
        assert (0x3730, 8) in thread_locals(code, "aarch64")

    def test_a_load_with_an_index(self) -> None:
        # adrp x0, +0x2000 ; ldr x0, [x0, #0x730] ; mrs x1, tpidr_el0 ; ldr x2, [x1, x0]
        code = "000000d0" + "009843f9" + "41d03bd5" + "226860f8"
        assert thread_locals(code, "aarch64") == [(0x3730, 0)]

    def test_a_call_loses_what_it_may_change(self) -> None:
        # adrp x0, +0x2000 ; adrp x19, +0x2000 ; bl . ; ldr x1, [x0, #8] ; ldr x1, [x19, #8]
        code = "000000d0" + "130000d0" + "00000094" + "010440f9" + "610640f9"
        assert places(code, "aarch64") == [(0x3008, ACCESS)]


class TestNoise:
    @pytest.mark.parametrize("machine", ["x86_64", "i386", "aarch64"])
    @pytest.mark.parametrize("seed", range(20))
    def test_any_bytes_are_read_without_an_error(self, machine: str, seed: int) -> None:
        rng = random.Random(seed)
        code = rng.randbytes(600) if seed % 2 else bytes(rng.choice((0x8B, 0x8D, 0x05, 0x48, 0x90)) for _ in range(600))
        start = rng.choice((0, 0x1000, (1 << 64) - 256, (1 << 32) - 16))
        for reference in references_in(code, start, machine):
            assert isinstance(reference, Reference)
            assert abs(reference.place) < 1 << 64

    def test_an_unknown_machine_names_nothing(self) -> None:
        assert references_in(b"\x90" * 16, 0, "vax") == ()

    def test_no_code_names_nothing(self) -> None:
        assert references_in(b"", 0x1000, "x86_64") == ()
