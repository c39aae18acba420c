"""What the GPU says of itself while it is measured: clocks, power, temperature, why it is slowed.

NVML by ctypes: the driver's own libnvidia-ml, no package. Where it is missing, or a driver does not
answer a question, the answer is None.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from statistics import median
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
_SM_CLOCK, _MEMORY_CLOCK, _GPU_TEMPERATURE = 1, 2, 0  # nvmlClockType_t, nvmlTemperatureSensors_t
# nvmlClocksEventReasons, by bit.
REASONS = {
    0: "idle",
    1: "application clocks",
    2: "software power cap",
    3: "hardware slowdown",
    4: "sync boost",
    5: "software thermal slowdown",
    6: "hardware thermal slowdown",
    7: "hardware power brake",
    8: "display clocks",
}


def reasons(bits: int) -> list[str]:
    """The names of the set bits; an unknown one by its number."""
    places = (i for i in range(64) if bits >> i & 1)
    return [REASONS.get(place, f"bit {place}") for place in places]


class Nvml:
    """One GPU's answers. `open` gives None where there is no driver or no such GPU."""

    def __init__(self, library: Any, handle: ctypes.c_void_p) -> None:
        self._library, self._handle = library, handle

    @staticmethod
    def open(index: int = 0, name: str = LIBRARY) -> Nvml | None:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            return None
        handle = ctypes.c_void_p()
        if library.nvmlInit_v2() != 0:
            return None
        if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
            return None
        return Nvml(library, handle)

    def _number(self, function: str, *arguments: Any, kind: Any = ctypes.c_uint) -> int | None:
        out = kind()
        call = getattr(self._library, function, None)
        if call is None or call(self._handle, *arguments, ctypes.byref(out)) != 0:
            return None
        return int(out.value)

    def _text(self, function: str, *first: Any) -> str | None:
        out = ctypes.create_string_buffer(96)
        if getattr(self._library, function)(*first, out, ctypes.c_uint(96)) != 0:
            return None
        return out.value.decode()

    def sm_mhz(self) -> int | None:
        return self._number("nvmlDeviceGetClockInfo", ctypes.c_int(_SM_CLOCK))

    def memory_mhz(self) -> int | None:
        return self._number("nvmlDeviceGetClockInfo", ctypes.c_int(_MEMORY_CLOCK))

    def milliwatt(self) -> int | None:
        return self._number("nvmlDeviceGetPowerUsage")

    def celsius(self) -> int | None:
        return self._number("nvmlDeviceGetTemperature", ctypes.c_int(_GPU_TEMPERATURE))

    def reason_bits(self) -> int | None:
        kind = ctypes.c_ulonglong
        new = self._number("nvmlDeviceGetCurrentClocksEventReasons", kind=kind)
        old = "nvmlDeviceGetCurrentClocksThrottleReasons"
        return self._number(old, kind=kind) if new is None else new

    def describe(self) -> dict[str, Any]:
        """Name, driver, limits and present state, as a result file keeps them."""
        power = self.milliwatt()
        limit = self._number("nvmlDeviceGetEnforcedPowerLimit")
        most = self._number("nvmlDeviceGetMaxClockInfo", ctypes.c_int(_SM_CLOCK))
        return {
            "name": self._text("nvmlDeviceGetName", self._handle),
            "driver": self._text("nvmlSystemGetDriverVersion"),
            "power_watt": None if power is None else power / 1000,
            "power_limit_watt": None if limit is None else limit / 1000,
            "sm_mhz": self.sm_mhz(),
            "sm_mhz_most": most,
            "memory_mhz": self.memory_mhz(),
            "celsius": self.celsius(),
        }


class Watch:
    """Asks every `seconds` while it is open; `summary` is what it saw: least, median, most."""

    def __init__(self, nvml: Nvml | None, seconds: float = 0.02) -> None:
        self._nvml, self._seconds = nvml, seconds
        self._seen: dict[str, list[int]] = {}
        self._bits = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        if self._nvml is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._nvml is not None:
            self._thread.join()

    def _run(self) -> None:
        assert self._nvml is not None
        questions: dict[str, Callable[[], int | None]] = {
            "sm_mhz": self._nvml.sm_mhz,
            "memory_mhz": self._nvml.memory_mhz,
            "milliwatt": self._nvml.milliwatt,
            "celsius": self._nvml.celsius,
        }
        while True:
            for name, ask in questions.items():
                answer = ask()
                if answer is not None:
                    self._seen.setdefault(name, []).append(answer)
            self._bits |= self._nvml.reason_bits() or 0
            if self._done.wait(self._seconds):
                return

    def summary(self) -> dict[str, Any] | None:
        """{"sm_mhz": [least, median, most], ..., "slowed_by": [...]}; None without NVML."""
        if self._nvml is None:
            return None
        spans = {name: [min(v), median(v), max(v)] for name, v in self._seen.items()}
        slowed = [reason for reason in reasons(self._bits) if reason != "idle"]
        return {**spans, "slowed_by": slowed, "readings": len(self._seen.get("sm_mhz", []))}
