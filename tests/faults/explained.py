"""Why some faults cannot be seen: the faulty kernel does what the right one does."""

from __future__ import annotations

import re

from faults import Fault

SLOWER = "another path to the same bits, only slower"
MORE = "does work whose result nobody uses"
EXACT = "where both sides are equal, either way is right"
EDGE = "matters where the wanted candidate itself lies on a bin's edge: too rare for a test"
LOWER = "a lower threshold: more chunks are read, the same k are best"

# (path's end, what was done, the line that it was done in): two patterns. The reason.
EXPLAINED = (
    ("attention/sm80/forward.h", r"no ptx::copy_wait_all", r"", "zeros that nobody reads"),
    (
        "attention/sm80/scores.h",
        r"wrong lane",
        r"x, 2\)",
        "both lanes of a pair hold the same by then",
    ),
    ("beam/sm80/load.h", r"<= is <", r"bool whole", SLOWER),
    ("beam/sm80/load.h", r"<= is <|if \(false\)", r"whole && (skew|index)", SLOWER),
    ("beam/sm80/load.h", r"> is >=", r"index > 0", "reads up to 15 bytes before the row, unused"),
    ("beam/sm80/scan.h", r"< is <=|\+ 1", r"i \+ 1 < end", MORE),
    ("beam/sm80/scan.h", r"if \(false\)", r"!want_sum", MORE),
    ("beam/sm80/scan.h", r"if \(false\)", r"sum == 0\.f", "log(0) gives the same -inf"),
    ("beam/sm80/select.h", r"< is <=", r"bins\[i\] = 0", "the same thread soon writes there"),
    ("beam/sm80/select.h", r"< is <=", r"\(a < b\) ==", "equal ones: only zeros behind the last"),
    ("beam/sm80/select.h", r"> is >=", r"stride > 32", "a barrier where a warp's would do"),
    ("beam/sm80/select.h", r"is <=|is >=|- 1", r"range\.(low|high)", EDGE),
    ("beam/sm80/topk.cu", r"min|- 1", r"last = min|end = min|last / row", LOWER),
    ("beam/sm80/topk.cu", r"< is <=", r"c < row\.total_chunks", "one more key, on unused words"),
    ("beam/sm80/topk.cu", r"< is <=", r"total_chunks < k", EXACT),
    ("beam/sm80/topk.cu", r"<= is <|> is >=", r"capacity", "narrows once more than it must"),
    ("beam/sm80/topk.cu", r"< is <=", r"size \*= 2", "sorts more zeros"),
    ("beam/sm80/topk.cu", r"< is <=", r"i < size", "a zero behind the list, on unused words"),
    ("beam/sm80/topk.cu", r"if \(false\)", r"splits == 1", "the only block takes a ticket too"),
)


def reason(fault: Fault) -> str:
    for path, what, text, why in EXPLAINED:
        same = fault.path.endswith(path)
        if same and re.search(what, fault.what) and re.search(text, fault.text):
            return why
    return ""
