"""Why some faults cannot be seen: the faulty kernel does what the right one does."""

from __future__ import annotations

import re

from faults import Fault

SLOWER = "another path to the same bits, only slower"
MORE = "does work whose result nobody uses"
EXACT = "where both sides are equal, either way is right"
EDGE = "matters where the wanted candidate itself lies on a bin's edge: too rare for a test"
AGAIN = "asks the driver again"
CONSTANT = "a constant, which stays as it is"
MASKED = "rows past the last are masked"
UNREAD = "the address of what is not read"
MISSED = "decides for rows that no block meets, since they see no keys"
LOWER = "a lower threshold: more chunks are read, the same k are best"

# (path's end or folder, what was done, the line that it was done in): two patterns. The reason.
EXPLAINED = (
    ("attention/sm80/append.cu", r"- 1", r"kWarps - 1", MORE),
    ("attention/sm80/append.cu", r"if \(false\)", r"bits %", SLOWER),
    ("attention/sm80/append.cu", r"if \(false\)", r"rows == 0", "nobody calls it so"),
    ("attention/sm80/backward.h", r"", r"numbers_ \+|thread < rows", MASKED),
    ("attention/sm80/backward.h", r"", r"index \+ 1 < end", MORE),
    ("attention/sm80/backward.h", r"< is <=", r"threadIdx\.x < kRows", SLOWER),
    ("attention/sm80/backward.h", r"", r"begin >= s\.k_length", "then no row sees the block"),
    ("attention/sm80/backward.h", r"\+ 1", r"p_\.turns \+ 1\};  //", "the turn of no tile"),
    ("attention/sm80/backward.h", r"if \(false\)", r"\(whole\)", SLOWER),
    ("attention/sm80/backward_products.h", r"", r"k >= length", "multiplies zeros"),
    ("attention/sm80/backward_rows.h", r"if \(false\)", r"if \(aligned\)", SLOWER),
    ("attention/sm80/backward_shape.h", r"", r"queries > 0|if \(aligned\)", SLOWER),
    ("attention/sm80/backward_shape.h", r"", r"r < rows \? start", UNREAD),
    ("attention/sm80/backward_turns.h", r"", r"whole = rows >= kRows", SLOWER),
    ("attention/sm80/backward_turns.h", r"< is <=|\+ 1", r"mine \+ 1 < blocks", "nobody waits"),
    ("attention/sm80/backward_turns.h", r"if \(false\)", r"first\(\)", "waits for the 0 there"),
    ("attention/sm80/forward.cu", r"if \(false\)", r"plan\.blocks == 0", "nobody calls it so"),
    ("attention/sm80/forward.h", r"no ptx::copy_wait_all", r"", "zeros that nobody reads"),
    ("attention/sm80/forward.h", r"", r"__any_sync", "a lane's factors are its own"),
    ("attention/sm80/forward.h", r"< is <=", r"begin\(\) < end", MORE),
    ("attention/sm80/forward.h", r"", r"bool whole = first >=|kPlain \|\|", SLOWER),
    ("attention/sm80/forward.h", r"if \(false\)", r"plan\.splits == 1|row_end == 0", MORE),
    ("attention/sm80/gradient.h", r"", r"int (first|end)\(int query\)", MISSED),
    ("attention/sm80/products.h", r"", r"8 \* j >= dim", "multiplies zeros"),
    ("attention/sm80/results.h", r"if \(false\)", r"lane_id\(\) % 4", "four lanes write the same"),
    ("attention/sm80/results.h", r"- 1", r"share =", "shares of another size"),
    ("attention/sm80/results.h", r"", r"lane < count \?|column >= parts", MORE),
    ("attention/sm80/scores.h", r"> is >=", r"> 0x1p24f", EXACT),
    ("attention/sm80/tile.h", r"if \(false\)", r"if \(aligned\)", SLOWER),
    ("attention/sm80/tile.h", r"", r"= row < left", UNREAD),
    ("attention/sm80/work.h", r"< is <=", r"(first|32 \* i) < p_?\.batch", MORE),
    ("attention/sm80/work.h", r"- 1", r"w\.row_end - 1", MORE),
    ("attention/sm80/work.h", r"\? :", r"cut\.tiles - 1 - tile", "another order of blocks"),
    (
        "attention/sm80/scores.h",
        r"wrong lane",
        r"x, 2\)",
        "both lanes of a pair hold the same by then",
    ),
    ("beam/sm80/allowed.h", r"> is >=", r"count > 0", "no probe is below, and that ends it"),
    ("beam/sm80/allowed.h", r"min", r"min\(step - 1", "past a list's end all places are alike"),
    ("beam/sm80/allowed.h", r"31|\+ 1|- 1", r"step|passed", "starts at a token before the chunk"),
    ("beam/sm80/allowed.h", r"no __syncwarp", r"are set", "the emulator's votes order memory too"),
    ("beam/sm80/allowed.h", r"> is >=", r"size > 32 \* w", EXACT),
    ("beam/sm80/load.h", r"<= is <", r"bool whole", SLOWER),
    ("beam/sm80/rank.h", r">= is >", r"c >= range\.low\) shared", EDGE),
    ("beam/sm80/load.h", r"<= is <|if \(false\)", r"whole && (skew|index)", SLOWER),
    ("beam/sm80/load.h", r"> is >=", r"index > 0", "reads up to 15 bytes before the row, unused"),
    ("beam/sm80/scan.h", r"< is <=|\+ 1", r"i \+ 1 < end", MORE),
    ("beam/sm80/rank.h", r"no __syncwarp", r"handed", "the emulator's votes order memory too"),
    ("beam/sm80/rank.h", r"min|- 1", r"index_of\(range\.low\)|last [%/] row", LOWER),
    ("beam/sm80/rank.h", r"< is <=", r"row_chunks < ", EXACT),
    ("beam/sm80/rank.h", r"< is <=", r"i \+= 4 \* step|loaded\[j\] = |i \+= kThreads", MORE),
    ("beam/sm80/rank.h", r"", r"ptx::prefetch", "a hint: what it fetches is read in any case"),
    ("beam/sm80/scan.h", r"if \(false\)", r"!something", SLOWER),
    ("beam/sm80/scan.h", r"if \(false\)", r"sum == 0\.f", "log(0) gives the same -inf"),
    ("beam/sm80/select.h", r"< is <=", r"bins\[i\] = 0", "the same thread soon writes there"),
    ("beam/sm80/select.h", r"< is <=", r"\(a < b\) ==", "equal ones: only zeros behind the last"),
    ("beam/sm80/select.h", r"> is >=", r"stride > 32", "a barrier where a warp's would do"),
    ("beam/sm80/select.h", r"is <=|is >=|- 1", r"range\.(low|high)", EDGE),
    ("beam/sm80/topk.cu", r"if \(false\)", r"!want_sum", SLOWER),
    ("beam/sm80/topk.cu", r"> is >=", r"splits > 1", "draws a ticket that nobody asks for"),
    ("beam/sm80/topk.cu", r"if \(false\)", r"< least\) return", SLOWER),
    ("beam/sm80/topk.cu", r"<= is <|> is >=", r"capacity", "narrows once more than it must"),
    ("beam/sm80/topk.cu", r"< is <=", r"size \*= 2", "sorts more zeros"),
    ("beam/sm80/topk.cu", r"< is <=", r"i < size", "a zero behind the list, on unused words"),
    (
        "beam/sm80/tickets.h",
        r"< is <=|\+ 1024",
        r"own\.count < count",
        "other room to spare",
    ),
    ("beam/sm80/tickets.h", r"", r"kMostStreams|MemoryAllocation", "tests/emulator sees it"),
    ("beam/sm80/tickets.h", r"if \(false\)", r"own\.count < count", "tests/emulator sees it"),
    ("beam/sm80/tickets.h", r"if \(false\)", r"CaptureStatusNone", "a GPU alone captures graphs"),
    ("lora/sm80/common.h", r"< is <=", r"left < most", EXACT),
    ("lora/sm80/common.h", r"\? :", r"int turn =", "chunks lie in other banks"),
    ("lora/sm80/common.h", r"if \(false\)", r"if \(aligned\)", SLOWER),
    ("lora/sm80/decode.cu", r"< is <=", r"begin < p\.(in|rank)", MORE),
    ("lora/sm80/decode.cu", r"\? :", r"\(exists \?", "the address of what is not read"),
    ("lora/sm80/decode.cu", r"<= is <|if \(false\)", r"p\.rows <= (8|16|32)|p\.rank <= 16", SLOWER),
    ("lora/sm80/gradient.cu", r"", r"(begin|tiles|step) = ", "another cut of the same rows"),
    ("lora/sm80/gradient.cu", r"if \(false\)", r"call\.width == 0", "nobody calls it so"),
    (
        "lora/sm80/lora.cu",
        r"< is <=|\? :|if \(false\)",
        r"known\[device\]",
        AGAIN,
    ),
    ("lora/sm80/lora.cu", r"if \(false\)", r"capability != 0", AGAIN),
    ("lora/sm80/lora.cu", r"> is >=|\? :", r"rank > 0", "a rank of 0 adds nothing"),
    ("lora/sm80/lora.cu", r"\? :", r"ad\.ids == nullptr", "a GPU alone hides its memory"),
    ("lora/sm80/lora.cu", r"\? :", r"ad\.ids != nullptr", "unread without ids"),
    ("lora/sm80/narrow.h", r"> is >=|\? :", r"offset = count > 0", UNREAD),
    ("lora/sm80/narrow.h", r"", r"position >= task\.row_end", "zeros either way"),
    ("lora/sm80/narrow.h", r"", r"s \+ 1 < count", MORE),
    ("lora/sm80/narrow.h", r"- 1", r"kDepth - 1", "adds zeros"),
    ("lora/sm80/order.cu", r"< is <=", r"first < rows", "adds zeros"),
    ("lora/sm80/product.cu", r"< is <=", r"i < kTile \* pairs", "fill_right overwrites it"),
    ("lora/sm80/product.cu", r"> is >=", r"call\.rank - rank > 16", MORE),
    ("lora/sm80/product.cu", r"< is <=", r"rank < p\.call|rank \+ k < p.*k \+=", "adds zeros"),
    ("lora/sm80/product.cu", r"", r"position < call\.rows \?", "draws for rows that are not there"),
    ("lora/sm80/product.cu", r"", r"step < steps|kDepth - 1", "adds zeros"),
    ("lora/sm80/product.cu", r"\? :", r"kHalf \? 3", "more exact than it must be"),
    ("lora/sm80/product_float.cu", r"", r"min\(row \+ i", "draws for rows that are not there"),
    ("lora/sm80/product_float.cu", r"", r"kDepth < term|depth > 0", "adds zeros"),
    ("lora/sm80/product_tile.h", r"> is >=|\? :", r"from = count > 0", UNREAD),
    ("lora/sm80/lora.cu", r"if \(false\)", r"cudaMemsetAsync", "zeroing never fails here"),
    ("lora/sm80/lora.cu", r"if \(false\)", r"p\.rows == 0", "kernels without rows do nothing"),
    ("lora/sm80/product.cu", r"no ptx", r"copy_wait_all", "the last groups of copies are empty"),
    ("lora/sm80/product.cu", r"if \(false\)", r"out_aligned|step < whole", SLOWER),
    ("lora/sm80/product_float.cu", r"if \(false\)", r"order\.empty", MORE),
    ("attention/sm80/backward.h", r"if \(false\)", r"rows\.empty", MORE),
    ("attention/sm80/backward.h", r"", r"i < tile\.rows && lse", "zeros either way"),
    ("attention/sm80/backward_rows.h", r"> is >=", r"blocks > 0", "nobody calls it so"),
    ("attention/sm80/forward.h", r"if \(false\)", r"plan_\.aligned", SLOWER),
    ("attention/sm80/gradient.h", r"> is >=", r"x > 1 \?", EXACT),
    ("attention/sm80/results.h", r"min", r"min\(warp \* share", "an empty share either way"),
    ("attention/sm80/results.h", r"> is >=", r"row_beams > 1", "the same row, computed anew"),
    ("attention/sm80/results.h", r"< is <=", r"first < end; first", MORE),
    ("attention/sm80/tile.h", r"\+ 31", r"found\[", CONSTANT),
    ("lora/sm80/decode.cu", r"> is >=", r"begin > 0", MORE),
    ("lora/sm80/decode.cu", r"\+ 1", r"^float b\[", CONSTANT),
    ("lora/sm80/narrow.h", r"\? :", r"second = both", UNREAD),
    ("lora/sm80/narrow.h", r"no __syncthreads", r"whoever used", "a block runs one sum"),
    ("lora/sm80/narrow.h", r"if \(false\)", r"task\.paired", SLOWER),
    ("lora/sm80/product.cu", r"\? :", r"rank > 16 \? kDepth", "adds zeros"),
    ("lora/sm80/product.cu", r"if \(false\)", r"_paired|depth == 0", SLOWER),
    ("lora/sm80/product_float.cu", r"if \(false\)", r"if \(aligned\)", SLOWER),
    ("lora/sm80/product_tile.h", r"\? :", r"kBase \? kStages", CONSTANT),
    ("lora/sm80/shrink.cu", r"< is <=", r"before < order", "starts[count] is the end of all rows"),
    ("lora/sm80/shrink.cu", r"", r"begin >= segment\.end", MORE),
    ("lora/sm80/shrink.cu", r"\? :", r"int64_t several", MORE),
    ("lora/sm80/", r"\? :", r"pairs_lie_together", SLOWER),
    ("", r"<= is <|- 1", r"\bbelow\)|threshold\S* - 1", "one random word in 2^32 differs"),
    ("", r"one less|\? :", r"__launch_bounds__|copy_wait<k\w+ - \d>|at\[kAlong", CONSTANT),
    ("attention/sm80/backward.h", r"", r"kMostColumns", CONSTANT),
    ("", r"\+ 1 is", r"^float (part|h)\[", CONSTANT),
    ("", r"if \(false\)", r"call\.rows == 0 \|\|", "nobody calls it so"),
)


def reason(fault: Fault) -> str:
    for path, what, text, why in EXPLAINED:
        same = fault.path.endswith(path) or (path.endswith("/") and fault.path.startswith(path))
        if same and re.search(what, fault.what) and re.search(text, fault.text):
            return why
    return ""
