from typing import Any

version: str
commit: str
isas: str
compiler: str
cuda: str

def __getattr__(name: str) -> Any: ...
