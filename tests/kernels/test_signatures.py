"""What native functions are given: the prototypes are those of csrc, and nothing else gets its address taken."""

import re
from pathlib import Path

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import _native, _signatures, dispatch
from tests.kernels.calls import GPU, build, results, serving

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FUNCTION = re.compile(r"^void (\w+)\(([^)]*)\)\s*\{", re.MULTILINE)
TYPES = {"float": "f32", "double": "f64", "int64_t": "i64", "int": "i32", "uint8_t": "bool"}
HOST = torch.device("cpu")


def declared(folder, suffix):
    """{function: [(C++ type, name)]} of what the sources register, without the last one: threads, or a stream."""
    found = {}
    for path in sorted((CSRC / folder).glob(f"*.{suffix}")):
        text = path.read_text()
        for name, arguments in FUNCTION.findall(text):
            if f"RK_REGISTER({name});" in text and not name.endswith("_each"):
                parts = [part.removeprefix("const ").replace("*", "* ").rpartition(" ") for part in split(arguments)]
                found[name] = [(kind.replace(" ", ""), argument) for kind, _, argument in parts][:-1]
    return found


def split(arguments):
    return [" ".join(part.split()) for part in arguments.split(",")]


@pytest.mark.parametrize(
    ("prototypes", "folder", "suffix"), [(_signatures.CPU, "cpu", "cpp"), (_signatures.CUDA, "cuda", "cu")]
)
def test_prototypes_are_those_of_the_sources(prototypes, folder, suffix):
    ours, theirs = _signatures.signatures(prototypes), declared(folder, suffix)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, arguments in theirs.items():
        assert ours[name].names == [argument for _, argument in arguments], name
        arrays = ours[name].arrays
        for kind, argument in arguments:
            assert kind.endswith("*") == (argument in arrays), (name, argument)
            if kind == "void*":  # of a dtype chosen by another argument, or scratch
                dtype = arrays[argument].dtype
                assert dtype in ours[name].names or (argument, dtype) == ("partial", "f64"), (name, argument)
            elif kind.endswith("*"):
                assert arrays[argument].dtype == TYPES[kind[:-1]], (name, argument)


@pytest.fixture(scope="module")
def recorded():
    """{function: arguments} of a call of every native function that serves CPU tensors here."""
    found, check = {}, _signatures.Signature.check

    def record(signature, args, device):
        found[signature] = args
        check(signature, args, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_signatures.Signature, "check", record)
        for backend, reason in (("cpu", _native.missing()), ("cuda", "a GPU" if GPU else _native.missing_cuda())):
            for call in build().values():
                if reason is None and backend in dict(dispatch.TABLE[call.op]):
                    with serving(backend):
                        results(call)
    return found


def wrong(x):
    """Tensors that a kernel would misread where x is expected, beside what is wrong with them."""
    other = torch.float64 if x.dtype != torch.float64 else torch.float32
    yield "dtype", x.to(other)
    yield "more entries", torch.cat((x.reshape(-1), x.new_zeros(1)))
    yield "device", x.to("meta")
    if x.numel():
        yield "fewer entries", x.reshape(-1)[1:]
    if x.numel() > 1:
        yield "layout", torch.stack((x.reshape(-1), x.reshape(-1)), -1)[:, 0]


@pytest.mark.skipif(_native.missing() is not None, reason=f"no native CPU backend: {_native.missing()}")
def test_every_argument_is_checked_before_its_address_is_taken(recorded):
    expected = set(_signatures.signatures(_signatures.CPU).values())
    if not GPU and _native.missing_cuda() is None:
        expected |= set(_signatures.signatures(_signatures.CUDA).values())
    assert recorded.keys() == expected
    tried = 0
    for signature, args in recorded.items():
        signature.check(args, HOST)
        for index, name in enumerate(signature.names):
            if name not in signature.arrays:
                continue
            x = args[index]
            cases = [] if x is None else list(wrong(x))
            if name in signature.required:
                cases.append(("absent", None))
            for what, bad in cases:
                given = (*args[:index], bad, *args[index + 1 :])
                print(f"{signature.name}: {name}: {what}")  # shown where it is not refused
                with pytest.raises(RuntimeError, match=f"internal error: {signature.name} takes "):
                    signature.check(given, HOST)
                tried += 1
    assert tried > 500


@pytest.mark.skipif(_native.missing() is not None, reason=f"no native CPU backend: {_native.missing()}")
def test_a_refusal_names_the_argument_and_what_is_wrong_with_it():
    x, stats = torch.zeros(2, 3), torch.zeros(3, dtype=torch.float64)
    good = ("whiten_fwd_f32", x, 3, None, 0, 2, 3, stats, True, torch.ones(2, 3))
    _native.run(*good)
    assert not good[-1].any()
    wanted = "internal error: whiten_fwd_f32 takes out as torch.float32 on cpu with 6 entries, dense, "
    got = "got torch.bfloat16 on cpu with shape [2, 3], strides [3, 1]; please report it"
    with pytest.raises(RuntimeError, match=re.escape(wanted + got)):
        _native.run(*good[:-1], torch.ones(2, 3, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"takes x as .*, in rows as x_stride says, got"):
        _native.run("whiten_fwd_f32", x, 4, *good[3:])
    with pytest.raises(TypeError, match="whiten_fwd_f32 takes 9 arguments, got 3"):
        _native.run(*good[:4])


def test_empty_rows_fit_whatever_their_strides():
    logits = torch.zeros(0, 4)[:, ::2]
    found = [rk.logprobs_from_logits(logits, torch.zeros(0, dtype=torch.int64)), rk.entropy_from_logits(logits)]
    assert [list(x.shape) for x in found] == [[0], [0]]
