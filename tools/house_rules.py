"""The house limits that no linter knows: files under 400 lines, functions under 60, 100 columns."""

import ast
import re
import subprocess
import sys
from pathlib import Path

MAX_FILE, MAX_FUNCTION, MAX_COLUMNS = 400, 60, 100
CPP_FUNCTION = re.compile(r"^[A-Za-z_].*[)\w] (?:noexcept |const )*\{$")


def python_functions(text: str) -> list[tuple[int, str, int]]:
    """(line, name, length of the body without its docstring) of every function."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            if ast.get_docstring(node) is not None and len(node.body) > 1:
                first = node.body[1]
            found.append((node.lineno, node.name, node.end_lineno - first.lineno + 1))
    return found


def cpp_functions(text: str) -> list[tuple[int, str, int]]:
    """(line, first line, length) of every block that opens at column 0 as a function does."""
    found, start = [], None
    for number, line in enumerate(text.splitlines(), 1):
        skip = line.startswith(("namespace", "struct", "class", "enum", "extern", "union"))
        if start is None and CPP_FUNCTION.match(line) and not skip:
            start = (number, line)
        elif start is not None and line.startswith("}"):
            found.append((start[0], start[1][:60], number - start[0] + 1))
            start = None
    return found


def problems(path: Path) -> list[str]:
    text = path.read_text()
    lines = text.splitlines()
    found = []
    if len(lines) >= MAX_FILE:
        found.append(f"{path}: {len(lines)} lines, must be under {MAX_FILE}")
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_COLUMNS:
            found.append(f"{path}:{number}: {len(line)} columns, at most {MAX_COLUMNS}")
    functions = python_functions(text) if path.suffix == ".py" else cpp_functions(text)
    for number, name, length in functions:
        if length >= MAX_FUNCTION:
            found.append(f"{path}:{number}: {name}: {length} lines, must be under {MAX_FUNCTION}")
    return found


def main() -> int:
    patterns = ["*.py", "*.cpp", "*.h", "*.cu", "*.cuh"]
    listing = subprocess.run(["git", "ls-files", *patterns], capture_output=True, check=True)
    files = [Path(name) for name in listing.stdout.decode().split()]
    found = [line for path in files if path.exists() for line in problems(path)]
    print("\n".join(found) or f"house rules: {len(files)} files, all within the limits")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
