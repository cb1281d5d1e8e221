"""Calls of csrc/cpu/preference.cpp; what the functions mean stands in reference/preference.py."""

from .._native import dense_fp32, fresh, run
from ..reference.preference import DIVERGENCES, TERMS


def preference_fwd(
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, anchor, term, beta, a, b, divergence,
    alpha,
):  # fmt: skip
    log_probs = [dense_fp32(x) for x in (chosen, rejected, ref_chosen, ref_rejected)]
    lengths = [None if x is None else x.contiguous() for x in (chosen_lengths, rejected_lengths)]
    C, R = chosen.shape[0], rejected.shape[0]
    outputs = (fresh(C + R if term == "kto" else C), fresh(C), fresh(R), fresh(C), fresh(R))
    run(
        "preference_fwd_f32", *log_probs, *lengths, C, R, TERMS.index(term), dense_fp32(anchor), beta, a, b,
        DIVERGENCES.index(divergence), alpha, *outputs,
    )  # fmt: skip
    return outputs


def preference_bwd(grad_loss, grad_chosen, grad_rejected):
    C, R = grad_chosen.shape[0], grad_rejected.shape[0]
    grad_loss, *saved = (x.contiguous() for x in (grad_loss, grad_chosen, grad_rejected))
    upstream = grad_loss.split((C, R)) if grad_loss.shape[0] == C + R else (grad_loss, grad_loss)
    out = fresh(C), fresh(R)
    run("preference_bwd_f32", *upstream, *saved, C, R, *out)
    return out
