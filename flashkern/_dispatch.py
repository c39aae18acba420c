"""How a call reaches an operator: the shortest way that records what must be recorded."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

_any_requires_grad = torch._C._any_requires_grad
_below_autograd = torch._C._AutoDispatchBelowAutograd
_functorch_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled


_PLACE = re.compile(r"^\w+, \S+:\d+, ")  # of a check in the C++ sources, before its text


# What torch's dispatcher says of an operator without a kernel; no check of ours looks at devices.
_NO_KERNEL = re.compile(r"Could not run 'flashkern::(\w+)' with arguments from the '(\w+)' backend")


def reworded(error: RuntimeError) -> RuntimeError:
    """An adapter's error without the place in the sources that torch's checks put first.

    Where there is no kernel for the tensors, one line in place of the dispatcher's page.
    """
    text = _PLACE.sub("", str(error))
    if missing := _NO_KERNEL.match(text):
        op = missing[1].removesuffix("_backward").removesuffix("_forward")
        op = "attention_kvcache" if op in ("attention_beams", "attention_append_kv") else op
        return NotImplementedError(
            f"{op}: tensors must be of a kind that this build has a kernel for, got {missing[2]} "
            "(`python -m flashkern info` says what was built)"
        )
    return error if type(error) is not RuntimeError or text == str(error) else RuntimeError(text)


def _refuse_other_derivatives(name: str, arguments: tuple[Any, ...]) -> None:
    """Raises where a derivative is asked for that a kernel with one backward pass cannot give.

    torch's own layers would return a tangent of zero there, or speak of a missing setup_context.
    """
    stack = get_interpreter_stack() if _functorch_active() else None
    transforms = {level.key() for level in stack or ()}
    if TransformType.Grad in transforms:
        raise NotImplementedError(
            f"{name}: torch.func.grad, vjp and jacrev are not supported; use torch.autograd.grad"
        )
    tangents = TransformType.Jvp in transforms or any(
        isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None
        for a in (arguments if forward_ad._current_level >= 0 else ())
    )
    if tangents:
        raise NotImplementedError(f"{name}: forward-mode derivatives (jvp) are not supported")


def register_autograd(
    op: Any, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> Callable[..., Any]:
    """Registers an operator's gradient with torch; returns the function to call the operator by.

    torch runs a registered gradient in Python, on every call, between two passes through its
    dispatcher: more than a small kernel costs. The function returned leaves that to calls under
    torch.compile, torch.func or ``__torch_function__``. Any other call records the same node by
    itself, or none where no argument requires a gradient. It takes arguments by place, all of them.
    """
    torch.library.register_autograd(op.name(), backward, setup_context=setup_context)
    run = op._op  # what op's own __call__ calls

    def forward(ctx: Any, *arguments: Any) -> Any:
        with _below_autograd():
            result = run(*arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, result)
        return result

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    node: Any = type(op.name().replace("::", "_"), (torch.autograd.Function,), members)

    name = op._schema.name.split("::")[1].removesuffix("_forward")

    def call(*arguments: Any) -> Any:
        if _functorch_active() or forward_ad._current_level >= 0:
            _refuse_other_derivatives(name, arguments)
        if _is_compiling() or _functorch_active():
            return op(*arguments)
        try:
            if _is_grad_enabled() and _any_requires_grad(*arguments):
                return op(*arguments) if has_torch_function(arguments) else node.apply(*arguments)
            with _below_autograd():
                return run(*arguments)
        except RuntimeError as error:
            raise reworded(error) from None

    return call
