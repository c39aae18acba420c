"""What the assembler made of the CUDA kernels in a library: registers, stack, instructions.

    python -m tools.sass flashkern/libflashkern.so            a line for each kernel and GPU
    python -m tools.sass flashkern/libflashkern.so forward    those whose names hold the word

Needs cuobjdump and nvdisasm: CUDA's, or `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

_ARCH = re.compile(r"(?:arch =|code for) (sm_\w+)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);")
_BRANCH = re.compile(r"0x([0-9a-f]+)\s*$")

# What an instruction is for, by the first letters of its name; the first match counts.
KINDS = {
    "tensor": ("HMMA", "HGMMA"),
    "load shared": ("LDSM", "LDS"),
    "store shared": ("STS", "ATOMS"),
    "copy": ("LDGSTS", "UTMA", "LDGDEPBAR", "DEPBAR"),
    "global": ("LDG", "STG", "RED", "ATOM", "LD.", "ST."),
    "exp": ("MUFU",),
    "float": ("FFMA", "FMUL", "FADD", "FMNMX", "FSETP", "FSEL", "F2F", "HADD", "HFMA"),
    "control": ("BRA", "BSSY", "BSYNC", "BAR", "WARPSYNC", "NOP", "EXIT", "SYNC"),
}


def kind_of(instruction: str) -> str:
    """A key of ``KINDS``, or ``"integer"`` for addresses, masks, moves and all else."""
    for kind, names in KINDS.items():
        if instruction.startswith(names):
            return kind
    return "integer"


@dataclass
class Kernel:
    """One kernel for one GPU.

    Attributes:
        name: demangled, without parameters; arch: such as ``"sm_80"``.
        registers, stack, shared, local: a thread's registers and bytes of stack, a block's static
            shared memory, bytes of local memory.
        code: (address, instruction with its modifiers, address that it branches to or None).
    """

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    local: int = 0
    code: list[tuple[int, str, int | None]] = field(default_factory=list)

    @property
    def instructions(self) -> Counter[str]:
        """How often each instruction stands in the code."""
        return Counter(name for _, name, _ in self.code)

    def count(self, *names: str) -> int:
        """Instructions that begin with one of the names."""
        return sum(n for name, n in self.instructions.items() if name.startswith(names))

    def main_loop(self) -> Counter[str]:
        """The instructions of the smallest loop that has the most tensor-core instructions.

        A loop is what lies between a branch backwards and its target. Without tensor cores: the
        smallest with the most loads from global memory.
        """
        best, best_rank = Counter[str](), (-1, -1, 0)
        for end, _, start in self.code:
            if start is None or start > end:
                continue
            body = Counter(name for at, name, _ in self.code if start <= at <= end)
            kinds = by_kind(body)
            rank = (kinds["tensor"], kinds["global"] + kinds["copy"], -sum(body.values()))
            if rank > best_rank:
                best, best_rank = body, rank
        return best


def by_kind(instructions: Counter[str]) -> Counter[str]:
    """The same count, by kind of instruction."""
    kinds = Counter[str]()
    for name, n in instructions.items():
        kinds[kind_of(name)] += n
    return kinds


def tools_path() -> str:
    """PATH with CUDA's folder and pip's packages of cuobjdump and nvdisasm in it."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    found = [str(tool.parent) for tool in packages.glob("**/bin/*") if tool.name == "cuobjdump"]
    found += [str(tool.parent) for tool in packages.glob("**/bin/*") if tool.name == "nvdisasm"]
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", *found])


def missing_tool() -> str | None:
    """The name of the first of the two programs that is not here, or None."""
    tools = ("cuobjdump", "nvdisasm")
    return next((name for name in tools if shutil.which(name, path=tools_path()) is None), None)


def run(*command: str, text: str = "") -> str:
    environment = {**os.environ, "PATH": tools_path()}
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _short(name: str) -> str:
    """Without return type, namespaces and parameters."""
    name = name.replace("(anonymous namespace)::", "").replace("void ", "")
    name = re.sub(r"\((?:\w+::)*\w+\)(\d)", r"\1", name)  # an enumerator, as in (Form)1
    return re.sub(r"\w+::", "", name.split("(")[0])


def read_kernels(library: Path) -> list[Kernel]:
    """Every kernel in a library, an object or a cubin, for every GPU that it has code for.

    Raises:
        RuntimeError: cuobjdump or nvdisasm is missing or fails.
    """
    if (missing := missing_tool()) is not None:
        raise RuntimeError(f"sass: {missing} is not here; see the head of tools/sass.py")
    kernels: dict[tuple[str, str], Kernel] = {}
    arch, code = "", list[tuple[int, str, int | None]]()
    for line in run("cuobjdump", "-sass", str(library)).splitlines():
        if match := _ARCH.search(line):
            arch = match[1]
        elif line.strip().startswith("Function : "):
            name = line.split()[-1]
            code = kernels.setdefault((arch, name), Kernel(name, arch)).code
        elif match := _LINE.match(line):
            target = _BRANCH.search(match[3]) if match[2].startswith("BRA") else None
            code.append((int(match[1], 16), match[2], int(target[1], 16) if target else None))
    for line in run("cuobjdump", "-res-usage", str(library)).splitlines():
        if match := _ARCH.search(line):  # a cubin has no such line, and one arch
            arch = match[1]
        elif line.strip().startswith("Function "):
            name = line.split()[1].rstrip(":")
        elif match := _USAGE.search(line):
            k = kernels[arch, name]
            k.registers, k.stack, k.shared, k.local = map(int, match.groups())
    names = run("c++filt", text="\n".join(k.name for k in kernels.values())).splitlines()
    for kernel, name in zip(kernels.values(), names, strict=True):
        kernel.name = _short(name)
    return list(kernels.values())


def main() -> None:
    """Prints the main loop of each kernel by kind of instruction."""
    word = sys.argv[2] if len(sys.argv) > 2 else ""
    columns = [*KINDS, "integer"]
    print("arch    regs  " + "".join(f"{c:>14}" for c in columns) + "   kernel (its main loop)")
    for kernel in sorted(read_kernels(Path(sys.argv[1])), key=lambda k: (k.name, k.arch)):
        if word in kernel.name:
            kinds = by_kind(kernel.main_loop())
            counts = "".join(f"{kinds[c]:>14}" for c in columns)
            print(f"{kernel.arch:7} {kernel.registers:4}  {counts}   {kernel.name}")


if __name__ == "__main__":
    main()
