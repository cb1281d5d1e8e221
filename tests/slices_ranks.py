"""One rank of tests/rlhf/models/test_slices.py: slices_ranks.py RANK FOLDER RENDEZVOUS_FILE.

FOLDER holds models by name. Whole and sliced loads give the same networks; and loading `large` takes the memory of its
slices, told by the anonymous pages of the process after every operation of torch (pages of files are not counted).
"""

import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf import models
from rlhf.models.slices import load_slices
from rlhf.ppo.sharding import Sharding, whole_state
from rlhf.same_run import weights_digest

WHOLE = {"mixtral", "both"}  # what transformers converts; tied weights that the files hold twice
LOADS = {
    torch.bfloat16: models.load_policy,
    torch.float32: lambda path, **options: models.reward_model_from_policy(path, 5, pad_token_id=0, **options),
}


class Peak(TorchDispatchMode):
    """The most bytes of anonymous memory that the process held after an operation, beyond those at the beginning."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def __enter__(self):
        self.before, self.most = anonymous_bytes(), 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if types and any(issubclass(kind, torch.distributed.tensor.DTensor) for kind in types):
            return NotImplemented
        made = function(*args, **(kwargs or {}))
        self.most = max(self.most, anonymous_bytes() - self.before)
        return made


def anonymous_bytes():
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def same(one, two):
    assert one.keys() == two.keys(), one.keys() ^ two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name


def check_equal(folder, cut, log):
    """Weights, buffers that files hold and others, config, generation config, mode: those of transformers' own load."""
    for dtype, load in LOADS.items():
        expected, random = load(folder, dtype=dtype), torch.get_rng_state()
        log.clear()
        found = load(folder, dtype=dtype, cut=cut)
        assert torch.equal(random, torch.get_rng_state())
        state = whole_state(found)
        if folder.name in WHOLE:
            assert state is None and "is loaded whole by each process" in log[0], log
            cut(found)
            state = whole_state(found)
        assert state is not None, folder
        same(expected.state_dict(), state)
        same(dict(expected.named_buffers()), dict(found.named_buffers()))
        assert weights_digest(expected) == weights_digest(found)
        assert expected.config.to_dict() == found.config.to_dict() and expected.training == found.training
        assert expected.config._attn_implementation == found.config._attn_implementation
        if expected.can_generate():
            assert expected.generation_config.to_dict() == found.generation_config.to_dict()
        assert len(list(expected.parameters())) == len(list(found.parameters()))  # what is tied counts once
        ids = torch.tensor([[3, 5, 4, 7]])
        with torch.no_grad():
            assert torch.equal(expected(input_ids=ids).logits, found(input_ids=ids).logits)
        check_saving(found, expected, folder)


def check_saving(model, expected, folder):
    """Whole files of at most 6 kB, or of one tensor; of the file of a save before nothing is left."""
    saved, tokenizer = folder.parent.parent / "saved" / folder.name, models.load_tokenizer(folder)
    for size in ("1GB", "6KB"):
        models.save_cut_model(model, tokenizer, saved, main=dist.get_rank() == 0, max_file_size=size)
    dist.barrier()
    files = sorted(saved.glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        tensors = load_file(file).values()
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= 6000
    again, info = type(expected).from_pretrained(saved, dtype=expected.dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    same(expected.state_dict(), again.state_dict())
    dist.barrier()


def check_memory(folder, cut, ranks):
    """Reading takes half of the weights and one of them; with the first forward a few blocks more, as FSDP2 gathers.

    In bf16, since weights that stay as they are in the files are pages of these, which nobody counts.
    """
    config, options = AutoConfig.from_pretrained(folder), {"dtype": torch.bfloat16}
    with Peak("reading") as reading:
        model = load_slices(AutoModelForCausalLM, folder, config, cut, **options)
    whole, held, block = (
        sum(size(weight) * weight.element_size() for weight in part.parameters())
        for size, part in ((len_all, model), (len_own, model), (len_all, model.model.layers[0]))
    )
    del model
    with Peak("loading") as loading:
        model = models.load_policy(folder, cut=cut, **options)
    with Peak("saving") as saving:
        tokenizer, saved = models.load_tokenizer(folder), folder.parent.parent / "saved" / folder.name
        models.save_cut_model(model, tokenizer, saved, main=dist.get_rank() == 0, max_file_size="10MB")
    with Peak("usual") as usual:
        models.load_policy(folder, **options)
    found = {
        "whole": whole,
        "held": held,
        "block": block,
        **{x.name: x.most for x in (reading, loading, usual, saving)},
    }
    print({name: f"{size / 2**20:.1f} MiB" for name, size in found.items()})
    assert abs(held - whole / ranks) < 0.01 * whole
    assert reading.most < whole / ranks + block
    assert saving.most < 3 * 10e6 < whole / ranks, saving.most  # a file's worth, twice while safetensors writes it
    assert loading.most < whole / ranks + 4 * block < 0.95 * whole < usual.most


def len_all(weight):
    return weight.numel()


def len_own(weight):
    return weight.to_local().numel()


if __name__ == "__main__":
    rank, folder, rendezvous = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    ranks, log = 2, []
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    logger, handler = logging.getLogger("rlhf"), logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    sharding = Sharding(init_device_mesh("cpu", (ranks,)))
    for path in sorted(folder.iterdir()):
        if path.name == "large":
            check_memory(path, sharding, ranks)
        else:
            check_equal(path, sharding, log)
    dist.destroy_process_group()
