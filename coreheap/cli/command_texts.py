"""What the help says of each command: a line, a paragraph, examples.

Data. Knows nothing of options. Nothing heavy is imported here, as in ``arguments``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CommandText:
    """A command's summary, its description, and examples: a line and what it does."""

    summary: str
    description: str
    examples: tuple[tuple[str, str], ...]


COMMANDS = {
    "analyze": CommandText(
        "the verdict and the whole report",
        "Says where the memory of the dumped process went, what malloc's heaps looked like, and what stands out.",
        (
            ("coreheap analyze core.1234", "the report for people"),
            ("coreheap analyze core.1234.zst --json -o report.json", "the whole report for programs"),
            ("coreheap analyze core.1234 --sysroot ./customer-root --fail-on error", "libraries from elsewhere"),
        ),
    ),
    "check": CommandText(
        "heap integrity and crash context",
        "Says whether malloc's heap is sound, what is damaged and by whom as far as the bytes tell, and how the process ended: "
        "signal, fault address and what lies there, glibc's own message, backtrace, a signature to group crashes by. Leaks are not "
        "looked for unless --leaks is given, so it is quick. The exit code is 0 whatever is found, unless --fail-on is given.",
        (
            ("coreheap check core.1234", "the page for people"),
            ("coreheap check core.1234 --json --fail-on error", "for a pipeline: exit code 1 when the heap is damaged"),
            ("coreheap check core.1234 --json | jq -r .crash.signature", "the same for crashes of one kind"),
            ("coreheap check core.1234 --leaks", "slower; names who holds the blocks that were written past"),
        ),
    ),
    "arenas": CommandText(
        "one row an arena: what it holds and what is in use",
        "Lists malloc's arenas, those that hold most memory first.",
        (
            ("coreheap arenas core.1234", "the largest arenas"),
            ("coreheap arenas core.1234 --csv -o arenas.csv", "all arenas, all columns"),
            ("coreheap arenas core.1234 --json | jq .system_mem", "JSON lines for scripts"),
        ),
    ),
    "heaps": CommandText(
        "one row a sub-heap, or a piece of the main arena",
        "Lists the stretches of memory that arenas consist of: sub-heaps of 64 MiB, and the main arena's own pieces.",
        (
            ("coreheap heaps core.1234", "the largest stretches"),
            ("coreheap heaps core.1234 --top 200", "more of them"),
            ("coreheap heaps core.1234 --json", "all, as JSON lines"),
        ),
    ),
    "chunks": CommandText(
        "every malloc chunk, filtered by state, arena and size",
        "Lists malloc's chunks: the largest as a table, or all of them as CSV or JSON lines.",
        (
            ("coreheap chunks core.1234 --state in_use --top 20", "the 20 largest chunks in use"),
            ("coreheap chunks core.1234 --csv -o chunks.csv", "every chunk"),
            ("coreheap chunks core.1234 --arena 3 --min-bytes 1MiB --json", "the large ones of arena 3"),
        ),
    ),
    "bins": CommandText(
        "one row a free list: tcache, fastbins, bins",
        "Lists the free lists that hold chunks, those with most bytes first.",
        (
            ("coreheap bins core.1234", "where the free memory is listed"),
            ("coreheap bins core.1234 --csv", "every list, empty ones too"),
        ),
    ),
    "threads": CommandText(
        "one row a thread: its arena and its tcache",
        "Lists the threads with the arena that each uses, what its tcache holds, and its stack: used, in memory, reserved.",
        (
            ("coreheap threads core.1234", "who uses which arena"),
            ("coreheap threads core.1234 --json | jq 'select(.arena == 3)'", "the threads of one arena"),
        ),
    ),
    "maps": CommandText(
        "the address space by kind, like pmap: mapped, committed, saved, in memory",
        "Says of every mapped byte what it is used for and by whom: malloc's arenas and what they have reserved, stacks, modules, "
        "files, the memory of a Java VM or another allocator. Mapped bytes are address space; committed ones the program may "
        "access; saved ones are in the core; those in memory count for RSS, or were swapped out.",
        (
            ("coreheap maps core.1234", "a row for each kind, the largest first"),
            ("coreheap maps core.1234 --sort resident_low_bytes --descending", "what surely was in memory, most first"),
            ("coreheap maps core.1234 --flat --kind thread_stack,main_stack", "every stack, with its thread"),
            ("coreheap maps core.1234 --flat --csv -o maps.csv", "every mapping, all columns"),
        ),
    ),
    "leaks": CommandText(
        "who is lost: groups of chunks that nothing leads to",
        "Follows every pointer in the core and lists the chunks that the program can no longer free, in groups.",
        (
            ("coreheap leaks core.1234", "the suspects, the surest and largest first"),
            (
                "coreheap leaks core.1234 --list --csv -o lost.csv",
                "every chunk that is lost, perhaps lost or weakly held",
            ),
            ("coreheap leaks core.1234 --list --verdict definitely_lost --json", "the leaders alone"),
        ),
    ),
    "explain": CommandText(
        "what an address is, who holds it, and what it leads to",
        "Says what lies at addresses: the chunk, its neighbours, who leads to it and what it leads to.",
        (
            ("coreheap explain core.1234 0x7f3a10000020", "one address"),
            ("coreheap explain core.1234 0x7f3a10000020 0x55d0e8a012a0 --json", "several, a JSON line each"),
            ("coreheap explain core.1234 0x7f3a10000020 --retained", "with what would go with it"),
        ),
    ),
    "owners": CommandText(
        "who holds an address, and who holds them",
        "Shows who leads to a chunk, and who leads to these, as a tree.",
        (
            ("coreheap owners core.1234 0x7f3a10000020", "three levels"),
            ("coreheap owners core.1234 0x7f3a10000020 --depth 6 --limit 3", "deeper and narrower"),
        ),
    ),
    "top": CommandText(
        "what keeps most memory alive: retained sizes, containers that grew",
        "Lists the chunks without which most memory would go, and holders of very many like chunks.",
        (
            ("coreheap top core.1234", "the largest"),
            ("coreheap top core.1234 --top 200 --csv", "more of them, for a spreadsheet"),
        ),
    ),
}
