"""The op tests on a GPU, inside `OnGPU`, where what a test creates lies on the device; and as on one without it."""

import sys

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

FACTORIES = {
    torch.arange, torch.empty, torch.eye, torch.from_numpy, torch.full, torch.linspace, torch.normal, torch.ones,
    torch.rand, torch.randint, torch.randn, torch.randperm, torch.scalar_tensor, torch.tensor, torch.zeros,
}  # fmt: skip
TO_NUMPY = {torch.Tensor.numpy, torch.Tensor.__array__}


class OnGPU(TorchFunctionMode):
    """Moves what tests create to `device`, and back before numpy reads it; code of the package is left alone.

    Random numbers come from the CPU's generators, so a test has the same inputs on every device.
    """

    def __init__(self, device: str = "cuda"):
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in TO_NUMPY:
            return function(args[0].cpu(), *args[1:], **kwargs)
        if function not in FACTORIES or "device" in kwargs or self._called_by_the_package():
            return function(*args, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        out = function(*args, **kwargs).to(self.device)
        return out.requires_grad_() if requires_grad else out

    @staticmethod
    def _called_by_the_package() -> bool:
        frame = sys._getframe(2)
        while frame is not None and frame.f_globals.get("__name__", "").startswith("torch"):
            frame = frame.f_back
        return frame is not None and frame.f_globals.get("__name__", "").startswith("rlhf")


def round_as_a_gpu_does() -> None:
    """Makes Triton's interpreter round fp32 to the nearest bf16. Its own way cuts digits off, which is a bias."""
    from triton import language
    from triton.runtime import interpreter

    plain = interpreter._convert_float

    def convert(values, source, target, mode):
        if (source, target) != (language.float32, language.bfloat16):
            return plain(values, source, target, mode)
        rounded = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = convert
