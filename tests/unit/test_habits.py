"""Habits of the code that no linter knows (DESIGN and STYLE name them)."""

from __future__ import annotations

import ast
from pathlib import Path

import coreheap

PACKAGE = Path(coreheap.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

BROAD_EXCEPTS = {
    "analysis.py": 1,  # around each check: a defect must not cost the report
    "cli/application.py": 1,  # the last resort: no input may end in a traceback
}
VERSION_TABLE = "allocators/glibc/layouts.py"


def broad_excepts(source: str) -> int:
    """How many handlers take every exception and do not raise it again."""
    found = 0
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        is_broad = any(kind is None or (isinstance(kind, ast.Name) and kind.id in BROAD) for kind in kinds)
        found += is_broad and not isinstance(node.body[-1], ast.Raise)
    return found


BROAD = {"Exception", "BaseException"}


def test_one_broad_except_stands_around_each_check_and_one_at_the_end() -> None:
    counts = {
        path.relative_to(PACKAGE).as_posix(): count
        for path in SOURCES
        if (count := broad_excepts(path.read_text(encoding="utf-8")))
    }
    assert counts == BROAD_EXCEPTS


def test_the_count_sees_every_kind_of_broad_except() -> None:
    handlers = ("except:", "except Exception:", "except BaseException as e:", "except (ValueError, Exception):")
    for handler in handlers:
        assert broad_excepts(f"try:\n    pass\n{handler}\n    pass\n") == 1
    assert broad_excepts("try:\n    pass\nexcept BaseException:\n    x = 1\n    raise\n") == 0
    assert broad_excepts("try:\n    pass\nexcept ValueError:\n    pass\n") == 0


def version_comparisons(source: str) -> list[int]:
    """Lines where something with "version" in its name is compared for order."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare)
        and any(isinstance(operator, ast.Gt | ast.GtE | ast.Lt | ast.LtE) for operator in node.ops)
        and any("version" in ast.unparse(operand).lower() for operand in (node.left, *node.comparators))
    ]


def test_no_version_is_compared_outside_the_selection() -> None:
    """Data over branches: a new glibc is a row of ``layouts``, never a condition somewhere else."""
    found = {
        name: lines
        for path in SOURCES
        if (name := path.relative_to(PACKAGE).as_posix()) != VERSION_TABLE
        and (lines := version_comparisons(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_a_version_comparison_would_be_seen() -> None:
    for text in ("glibc_version >= (2, 26)", "self.version < 3", "(2, 26) <= libc.version", "1 < versions[0] < 3"):
        assert version_comparisons(text) == [1]
    assert version_comparisons("version == 3 or size > 4") == []


def test_only_the_command_line_prints_or_exits() -> None:
    for path in SOURCES:
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith("cli/") or name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"print", "sys.exit", "exit", "os._exit"}, f"{name}:{node.lineno} calls {called}"
