"""How the ops join autograd: a backward runs on its forward's backend; other derivatives than the first are errors.

Without this, gradients of gradients, forward mode and torch.func would take an op's result for a constant.
Eager calls go straight to the functions behind the operators, whose own way takes 20 to 60 us a call, in tiny batches
more than the kernels. What compiles, traces or watches calls, or rewrites tensors, gets the operator.
"""

import contextlib

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from ._choice import chosen, resumed

NAMESPACE = __package__.replace(".", "_")  # of the operators; a copy of the package under another name has its own


def custom_op(name: str, *, mutates_args: tuple[str, ...] = ()):
    """torch.library.custom_op, in the package's namespace."""
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=mutates_args)


def check_reverse_mode(names, tensors) -> None:
    """Raise if torch.func or forward-mode AD differentiates one of the tensors."""
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and _is_differentiated(tensor):
            raise NotImplementedError(
                f"{name} is differentiated by torch.func or in forward mode, for which the ops of rlhf_kernels have no "
                "derivative; use torch.autograd.grad or backward()"
            )


def _is_differentiated(tensor):
    """Whether the tensor has a tangent, or a level of torch.func's grad or jvp watches it; vmap may lie over either."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def needs_grad(tensor: Tensor | None) -> bool:
    """Whether autograd asks for the gradient of this tensor, under torch.func.vmap too."""
    if tensor is None or not torch.is_grad_enabled():
        return False
    if not torch.compiler.is_compiling():
        while functorch.is_functorch_wrapped_tensor(tensor):
            tensor = functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def without_autocast(device: torch.device):
    """A context without autocast; entering torch.autocast takes time, also where there is none."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class _Last(torch.autograd.Function):
    """The first tensor itself, as a function of all of them that has no derivative."""

    @staticmethod
    def forward(ctx, x, name, *sources):
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(_twice(ctx.name))


def _twice(name):
    return f"trying to differentiate twice {name}, which has first derivatives only"


def differentiated_last(name, gradients, sources):
    """The gradients that a backward made of the sources: differentiating them is an error.

    PyTorch's once_differentiable lets them pass for constants where torch.autograd.grad names its inputs, or where the
    upstream gradient is a constant.
    """
    sources = [x for x in sources if x is not None and x.requires_grad]
    return tuple(x if x is None else _Last.apply(x, name, *sources) for x in gradients)


_PLAIN = (Tensor, torch.nn.Parameter)


def _way(args) -> tuple[bool, bool]:
    """(whether nothing but autograd stands before an operator's function, whether autograd records the call).

    Else there is a compiler, tracer, mode or transform, or a tensor that PyTorch makes another one of first: of a
    subclass, without memory, or negated only when it is read.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False, False
    recorded = False
    for x in args:
        kind = type(x)
        if kind in _PLAIN:
            if x.is_meta or x.is_neg() or x._is_zerotensor():
                return False, False
            recorded = recorded or x.requires_grad
        elif issubclass(kind, Tensor):
            return False, False
    return True, recorded and torch.is_grad_enabled()


def direct(op):
    """An operator without derivative as it is to be called."""
    function, arguments = op._init_fn, op._opoverload._schema.arguments
    mutated = [i for i, x in enumerate(arguments) if x.alias_info is not None and x.alias_info.is_write]

    def call(*args):
        plain, recorded = _way(args)
        if recorded or not plain:
            return op(*args)
        results = function(*args)
        for i in mutated:
            torch.autograd.graph.increment_version(args[i])
        return results

    return call


def _function(op, setup, run):
    """The autograd function of an op: what the operator itself gives autograd, without the dispatcher.

    torch.autograd.Function would look through the arguments for torch.func's tensors, which `_way` has done.
    """

    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            results = op._init_fn(*args)
            setup(ctx, args, results)
        return results

    methods = {"forward": staticmethod(forward), "backward": staticmethod(run)}
    return type(op._opoverload._opname, (_SingleLevelFunction,), methods)


def register(op, backward, setup_context, *, keeps_inputs=False, **differentiable):
    """Give a custom op its derivative, and return the op as it is to be called, with all arguments.

    backward, setup_context: as for the op's `register_autograd`.
    keeps_inputs: setup_context always saves the inputs for the backward.
    differentiable: {name that the user knows: place of the argument}.
    """

    def setup(ctx, inputs, output):
        setup_context(ctx, inputs, output)
        ctx.backend, ctx.sources = chosen(), None

    def run(ctx, *grads):
        sources = None
        if torch.is_grad_enabled():
            sources = ctx.saved_tensors if keeps_inputs else ctx.sources
            if sources is None:  # the call was made by torch.compile or vmap
                raise RuntimeError(_twice(op._qualname))
        with resumed(ctx.backend):
            if sources is None:
                return backward(ctx, *grads)
            with torch.no_grad():
                gradients = backward(ctx, *grads)
        return differentiated_last(op._qualname, gradients, (*sources, *grads))

    function, places = _function(op, setup, run), tuple(differentiable.values())

    def call(*args):
        if torch.compiler.is_compiling():
            return op(*args)
        inputs = [args[place] for place in places]
        check_reverse_mode(differentiable, inputs)
        plain, recorded = _way(args)
        if plain and not recorded:
            return op._init_fn(*args)
        results = function.apply(*args) if plain else op(*args)
        first = results if isinstance(results, Tensor) else results[0]
        if first.requires_grad and not keeps_inputs:
            first.grad_fn.sources = [_source(x) for x in inputs]
        return results

    op.register_autograd(run, setup_context=setup)
    return call


def _source(x):
    """A tensor that depends on all that x depends on, and keeps no memory: without entries, or a leaf itself."""
    if x is None or not x.requires_grad:
        return None
    return x if x.is_leaf else x.narrow(0, 0, 0).clone()
