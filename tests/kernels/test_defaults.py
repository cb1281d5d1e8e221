"""torch.set_default_dtype and torch.set_default_device change nothing: every allocation says what it is and where."""

import ast
from pathlib import Path

import pytest
import torch

import rlhf_kernels
from tests.kernels.calls import GPU, ON_BACKENDS, ON_GPU, build, results, serving

PACKAGE = Path(rlhf_kernels.__file__).parent
CALLS = [(*call, torch.float32) for call in ON_BACKENDS]
CALLS += [(*call, torch.bfloat16) for call in ON_BACKENDS if call[1] not in ON_GPU or GPU]  # slow where interpreted
OTHERS = (torch.float64, torch.bfloat16, torch.float16)
# What PyTorch gives the default dtype or device where the call names none; new_* and *_like take their tensor's.
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones",
    "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


@pytest.fixture
def default_dtype():
    """torch.set_default_dtype, and float32 again afterwards."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for x, y in zip(found, expected):
        assert (x is None) == (y is None)
        if y is not None:
            assert (x.dtype, x.device, x.shape) == (y.dtype, y.device, y.shape)
            assert torch.equal(x.nan_to_num(0.125), y.nan_to_num(0.125))


@pytest.mark.parametrize(("name", "backend", "dtype"), CALLS)
def test_every_op_has_the_same_bits_under_every_default(name, backend, dtype, default_dtype):
    with serving(backend):
        call = build(dtype)[name]
        expected = results(call)
        for other in OTHERS:
            default_dtype(other)
            assert_same(results(call), expected)
        default_dtype(torch.float32)
        with torch.device("meta"):
            assert_same(results(call), expected)


def allocations(path):
    """(line, factory, what the call does not say of dtype and device) of every factory that a file calls."""
    tree = ast.parse(path.read_text())
    examples = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "example_inputs"]
    on_the_host = {id(n) for function in examples for n in ast.walk(function)}  # made there, then moved
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if ast.unparse(node.func.value) == "torch" and node.func.attr in FACTORIES:
            said = {keyword.arg for keyword in node.keywords}
            wanted = {"dtype"} if id(node) in on_the_host else {"dtype", "device"}
            yield node.lineno, node.func.attr, set() if None in said else wanted - said


def test_every_allocation_names_dtype_and_device():
    found = [(path, *call) for path in sorted(PACKAGE.rglob("*.py")) for call in allocations(path)]
    assert len(found) > 50
    silent = [f"{path.relative_to(PACKAGE)}:{line} {name}: {missing}" for path, line, name, missing in found if missing]
    assert not silent, "\n".join(silent)
