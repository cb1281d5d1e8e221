"""Tests that run by backend are fit for a GPU: what they create and which messages they expect."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.on_gpu import FACTORIES, OnGPU

FILES = sorted(Path(__file__).parent.glob("test_*.py"))


def functions_of(path, by_backend):
    """The tests of a file that take `backend_name`, or those that do not."""
    tests = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [node for node in tests if ("backend_name" in {x.arg for x in node.args.args}) == by_backend]


class Seen(TorchFunctionMode):
    """The lines of a file that create a tensor."""

    def __init__(self, path):
        self.path, self.lines = str(path), set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        frame = sys._getframe(1)
        while frame is not None and function in FACTORIES:
            if frame.f_code.co_filename == self.path:
                self.lines.add(frame.f_lineno)
                break
            frame = frame.f_back
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("path", [path for path in FILES if functions_of(path, True)], ids=lambda path: path.stem)
def test_no_tensor_is_made_at_import(path):
    """It would lie on the CPU, and a test's own on the GPU. Parameters of tests that only run on a CPU may be."""
    with Seen(path) as seen:
        spec = importlib.util.spec_from_file_location(f"imported_{path.stem}", path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    elsewhere = [mark for test in functions_of(path, False) for mark in test.decorator_list]
    assert seen.lines <= {line for mark in elsewhere for line in range(mark.lineno, mark.end_lineno + 1)}


def test_messages_name_the_device_that_is_there():
    for path in FILES:
        for test in functions_of(path, True):
            assert not re.search(r"['\"][^'\"]*(on|expected) cpu\b", ast.unparse(test)), f"{path.name}: {test.name}"


def test_what_a_test_creates_lies_on_the_device():
    with OnGPU("meta"):
        x = torch.zeros(3, requires_grad=True)
        assert x.device.type == "meta" and x.is_leaf and x.requires_grad
        assert torch.ones(2, device="cpu").device.type == "cpu"
